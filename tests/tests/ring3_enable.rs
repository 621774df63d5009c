//! `drowse enable` and `drowse disable` under a real systemd: from a service that runs to one that sleeps, and back.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Output;

use anyhow::{Context, Result, ensure};
use drowse_tests::deadline::eventually;
use drowse_tests::service::{Installation, SOON, connect_unix, http_get, with_drowse};
use drowse_tests::workspace;

const ECHO: &str = env!("CARGO_BIN_EXE_echo-backend");
const ADDRESSES: [&str; 4] = ["--listen", "127.0.0.1:8080", "--backend", "127.0.0.1:8081"];

/// `web.service`, which is started at boot.
fn web(installation: &Installation, arguments: &str) -> Result<()> {
    let unit = format!(
        "[Service]\nType=notify\nExecStart=/usr/bin/echo-backend 127.0.0.1:8081 --notify {arguments}\n\
         [Install]\nWantedBy=multi-user.target\nAlias=site.service\n"
    );
    installation.unit("web", &unit)?;
    installation.systemd.systemctl(["enable", "web.service"]).map(drop)
}

/// Every file, directory and link below the directories where enable writes, with mode and content.
fn tree(installation: &Installation, directories: &[&str]) -> Result<BTreeMap<String, String>> {
    fn add(path: &Path, tree: &mut BTreeMap<String, String>) -> Result<()> {
        let found = fs::symlink_metadata(path)?;
        let what = if found.is_symlink() {
            format!("-> {}", fs::read_link(path)?.display())
        } else if found.is_dir() {
            for entry in fs::read_dir(path)? {
                add(&entry?.path(), tree)?;
            }
            "directory".to_owned()
        } else {
            fs::read_to_string(path)?
        };
        tree.insert(path.display().to_string(), format!("{:o} {what}", found.permissions().mode()));
        Ok(())
    }
    let mut all = BTreeMap::new();
    for directory in directories {
        let path = installation.systemd.path(directory);
        if path.exists() {
            add(&path, &mut all)?;
        }
    }
    Ok(all)
}

const SYSTEM: [&str; 3] = ["/etc/systemd", "/etc/drowse", "/run/systemd/system"];

fn drowse(installation: &Installation, command: &str, words: &[&str]) -> Result<Output> {
    let line = ["drowse", command, "web"].into_iter().chain(words.iter().copied());
    installation.systemd.run(line)
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// It succeeds; what it says.
fn well(installation: &Installation, command: &str, words: &[&str]) -> Result<String> {
    let output = drowse(installation, command, words)?;
    ensure!(output.status.success(), "{}", text(&output));
    Ok(text(&output))
}

/// It says all of `parts` and fails, and changes nothing.
fn refused(installation: &Installation, command: &str, words: &[&str], parts: &[&str]) -> Result<()> {
    let before = tree(installation, &SYSTEM)?;
    let output = drowse(installation, command, words)?;
    ensure!(output.status.code() == Some(1), "{}", text(&output));
    for part in parts {
        ensure!(text(&output).contains(part), "no '{part}' in:\n{}", text(&output));
    }
    ensure!(tree(installation, &SYSTEM)? == before, "something changed");
    Ok(())
}

fn property(installation: &Installation, unit: &str, property: &str) -> Result<String> {
    installation.systemd.property(unit, property)
}

fn state(installation: &Installation, unit: &str) -> Result<String> {
    property(installation, unit, "ActiveState")
}

#[test]
fn a_service_that_runs_goes_to_sleep_and_back() -> Result<()> {
    with_drowse(ECHO, |installation| {
        web(installation, "")?;
        let systemd = &installation.systemd;
        systemd.systemctl(["start", "web.service"])?;
        let before = tree(installation, &SYSTEM)?;
        let words =
            [&ADDRESSES[..], &["--idle-time", "1s", "--busy-command", "test \"$0\" = '%i' # \\"]].concat();

        let shown = well(installation, "enable", &[&words[..], &["--dry-run"]].concat())?;
        ensure!(
            shown.contains("+++ /etc/drowse/web.conf") && shown.contains("+ListenStream=127.0.0.1:8080"),
            "{shown}"
        );
        ensure!(tree(installation, &SYSTEM)? == before, "a dry run changed something");
        ensure!(state(installation, "drowse@web.socket")? == "inactive");

        let began = drowse::clock::now();
        let said = well(installation, "enable", &words)?;
        println!("enabled in {:?}", drowse::clock::now().saturating_sub(began));
        ensure!(said.contains("web.service runs and is started at boot"), "{said}");
        ensure!(property(installation, "web.service", "UnitFileState")? == "disabled");
        ensure!(property(installation, "drowse@web.socket", "UnitFileState")? == "enabled");
        ensure!(state(installation, "web.service")? == "active", "it was stopped");
        // systemd's own reading of what was written.
        let pid = property(installation, "drowse@web.service", "MainPID")?;
        let environment = fs::read_to_string(systemd.path(&format!("/proc/{pid}/environ")))?;
        ensure!(environment.contains("\0DROWSE_BUSY_COMMAND=test \"$0\" = '%i' # \\\0"), "{environment:?}");
        ensure!(fs::metadata(systemd.path("/etc/drowse/web.conf"))?.permissions().mode() & 0o777 == 0o644);

        installation.wait_asleep("web").context("it sleeps without a first client")?;
        installation.ask()?;
        installation.wait_asleep("web")?;
        let status = systemd.call(["drowse", "status"])?;
        ensure!(status.contains("web") && status.contains("asleep"), "{status}");

        let again = well(installation, "enable", &words)?;
        ensure!(again.starts_with("web.service") && again.contains("nothing to change"), "{again}");
        let undone = well(installation, "disable", &["--dry-run"])?;
        ensure!(undone.contains("--- /etc/drowse/web.conf") && undone.contains("+++ /dev/null"), "{undone}");
        let undone = well(installation, "disable", &[])?;
        ensure!(undone.contains("multi-user.target.wants/web.service"), "{undone}");
        let after = tree(installation, &SYSTEM)?;
        ensure!(after == before, "before: {before:#?}\nafter: {after:#?}");
        ensure!(state(installation, "web.service")? == "active", "what was started at boot runs again");
        ensure!(property(installation, "web.service", "UnitFileState")? == "enabled");
        ensure!(state(installation, "drowse@web.socket")? == "inactive");
        ensure!(well(installation, "disable", &[])?.contains("nothing to change"));
        Ok(())
    })
}

#[test]
fn every_problem_is_told_at_once_and_nothing_changes() -> Result<()> {
    with_drowse(ECHO, |installation| {
        let systemd = &installation.systemd;
        refused(installation, "enable", &ADDRESSES, &["there is no web.service", "list-unit-files"])?;
        web(installation, "")?;
        for (name, port) in [("taker", 8080), ("stranger", 8081)] {
            let unit = format!(
                "[Service]\nType=notify\nExecStart=/usr/bin/echo-backend 127.0.0.1:{port} --notify\n"
            );
            installation.unit(name, &unit)?;
            systemd.systemctl(["start", &format!("{name}.service")])?;
        }
        systemd.systemctl(["mask", "--runtime", "drowse@web.service"])?;
        let more = ["--listen", "192.0.2.1:80", "--listen", "localhost:81", "--connections-max", "1000000"];
        refused(
            installation,
            "enable",
            &[&ADDRESSES[..], &more].concat(),
            &[
                "--listen 127.0.0.1:8080 is taken by echo-backend (process ",
                ", taker.service)",
                ", stranger.service) listens at its address 127.0.0.1:8081: drowse would not start it",
                "--listen 192.0.2.1:80: this machine has no such address",
                "--listen localhost:81: systemd looks no name up",
                "drowse@web.service is masked",
                "--connections-max=1000000 needs",
            ],
        )?;
        systemd.systemctl(["unmask", "--runtime", "drowse@web.service"])?;
        systemd.systemctl(["stop", "taker.service", "stranger.service"])?;
        systemd.systemctl(["mask", "hidden.service"])?;
        let output = systemd.run(["drowse", "enable", "hidden"].into_iter().chain(ADDRESSES))?;
        ensure!(output.status.code() == Some(1), "{output:?}");
        ensure!(
            text(&output).contains("hidden.service is masked and cannot be started: systemctl unmask"),
            "{output:?}"
        );

        systemd.systemctl(["start", "web.service"])?;
        let same = ["--listen", ":8081", "--backend", "127.0.0.1:8081"];
        refused(
            installation,
            "enable",
            &same,
            &["web.service itself listens at :8081", "takes in the backend's own"],
        )?;
        installation.socket("web", "127.0.0.1:8080")?;
        refused(
            installation,
            "enable",
            &ADDRESSES,
            &["listen.conf has addresses for drowse@web.socket already"],
        )?;
        installation.configure("web", "DROWSE_BACKEND=127.0.0.1:1\n")?;
        refused(
            installation,
            "enable",
            &ADDRESSES,
            &["/etc/drowse/web.conf was not written by drowse enable"],
        )?;
        refused(installation, "disable", &[], &["/etc/drowse/web.conf was written by hand"])?;
        fs::remove_file(systemd.path("/usr/lib/systemd/system/drowse@.socket"))?;
        systemd.systemctl(["daemon-reload"])?;
        refused(
            installation,
            "enable",
            &ADDRESSES,
            &["drowse's own units are not installed (drowse@web.socket not"],
        )
    })
}

#[test]
fn a_try_shows_the_wake_or_the_reason() -> Result<()> {
    with_drowse(ECHO, |installation| {
        let systemd = &installation.systemd;
        web(installation, "--delay-ms 300")?;
        let tried = [&ADDRESSES[..], &["--try"]].concat();
        let said = well(installation, "enable", &tried)?;
        ensure!(said.contains("web.service woke and took the connection; it was ready after 0."), "{said}");
        let said = well(installation, "enable", &tried)?;
        ensure!(
            said.contains("nothing to change") && said.contains("runs already and took the connection"),
            "{said}"
        );
        systemd.systemctl(["stop", "web.service"])?;

        web(installation, "--exit 3")?;
        let output = drowse(installation, "enable", &tried)?;
        ensure!(output.status.code() == Some(1), "{output:?}");
        ensure!(text(&output).contains("main process exited with status 3"), "{}", text(&output));
        ensure!(text(&output).contains("What was set up stays"), "{}", text(&output));
        ensure!(state(installation, "drowse@web.socket")? == "active", "it does not stay");

        let said = well(installation, "disable", &[])?;
        ensure!(
            said.contains("nothing of drowse is left, but web.service does not run: cannot start"),
            "{said}"
        );
        ensure!(said.contains("journalctl -u web.service"), "{said}");
        ensure!(!systemd.path("/etc/drowse/web.conf").exists(), "it is not undone: {said}");
        ensure!(state(installation, "drowse@web.socket")? == "inactive");
        ensure!(property(installation, "web.service", "UnitFileState")? == "enabled");
        Ok(())
    })
}

/// Options that change are shown as such, and only what they concern is restarted.
#[test]
fn another_option_restarts_what_needs_it() -> Result<()> {
    with_drowse(ECHO, |installation| {
        let systemd = &installation.systemd;
        web(installation, "")?;
        systemd.systemctl(["start", "web.service"])?;
        well(installation, "enable", &ADDRESSES)?;
        let (backend, first) = (property(installation, "web.service", "MainPID")?, pid(installation)?);
        let longer = [&ADDRESSES[..], &["--idle-time", "1h"]].concat();
        let shown = well(installation, "enable", &[&longer[..], &["--dry-run"]].concat())?;
        ensure!(
            shown.contains("\n+DROWSE_IDLE_TIME=1h\n") && shown.contains("restart drowse@web.service"),
            "{shown}"
        );
        ensure!(
            !shown.contains("\n-#") && !shown.contains("\n-D"),
            "the record of what was enabled is lost: {shown}"
        );
        well(installation, "enable", &longer)?;
        let second = pid(installation)?;
        ensure!(second != first, "drowse was not restarted");

        let moved = ["--listen", "127.0.0.1:8090", "--backend", "127.0.0.1:8081", "--idle-time", "1h"];
        let said = well(installation, "enable", &moved)?;
        ensure!(said.contains("restart drowse@web.socket"), "{said}");
        ensure!(
            state(installation, "drowse@web.service")? == "active",
            "it is done before drowse is up again"
        );
        ensure!(pid(installation)? != second);
        ensure!(property(installation, "drowse@web.socket", "Listen")?.starts_with("127.0.0.1:8090"));
        ensure!(
            property(installation, "web.service", "MainPID")? == backend,
            "the service was restarted, too"
        );
        well(installation, "disable", &[])?;
        ensure!(
            property(installation, "web.service", "MainPID")? == backend,
            "the service was restarted at the end"
        );
        ensure!(property(installation, "web.service", "UnitFileState")? == "enabled");
        Ok(())
    })
}

fn pid(installation: &Installation) -> Result<String> {
    let pid = property(installation, "drowse@web.service", "MainPID")?;
    ensure!(pid != "0", "drowse does not run");
    Ok(pid)
}

/// systemd takes the files but cannot start the socket: its user does not exist.
#[test]
fn a_failure_leaves_everything_as_it_was() -> Result<()> {
    with_drowse(ECHO, |installation| {
        let systemd = &installation.systemd;
        web(installation, "")?;
        systemd.systemctl(["start", "web.service"])?;
        let wrong = "[Socket]\nSocketUser=nobody-has-this-name\n";
        systemd.write("/etc/systemd/system/drowse@web.socket.d/user.conf", wrong)?;
        systemd.systemctl(["daemon-reload"])?;
        let path = ["--listen", "/run/web.sock", "--backend", "127.0.0.1:8081"];
        refused(
            installation,
            "enable",
            &path,
            &["drowse@web.socket", "everything is as it was before", "journalctl"],
        )?;
        ensure!(property(installation, "web.service", "UnitFileState")? == "enabled");
        ensure!(state(installation, "web.service")? == "active");
        Ok(())
    })
}

/// drowse, which is restarted with its socket, does not come up again with another address.
#[test]
fn a_failure_of_what_is_restarted_leaves_everything_as_it_was() -> Result<()> {
    with_drowse(ECHO, |installation| {
        let systemd = &installation.systemd;
        web(installation, "")?;
        systemd.systemctl(["start", "web.service"])?;
        well(installation, "enable", &ADDRESSES)?;
        let place = "/etc/systemd/system/drowse@web.socket.d/drowse.conf";
        let picky = format!("[Service]\nExecStartPre=/bin/sh -c '! grep -q :8090 {place}'\n");
        systemd.write("/etc/systemd/system/drowse@web.service.d/picky.conf", &picky)?;
        systemd.systemctl(["daemon-reload"])?;

        let moved = ["--listen", "127.0.0.1:8090", "--backend", "127.0.0.1:8081"];
        let parts = ["start drowse@web.service", "everything is as it was before", "journalctl"];
        refused(installation, "enable", &moved, &parts)?;
        ensure!(property(installation, "drowse@web.socket", "Listen")?.starts_with("127.0.0.1:8080"));
        ensure!(state(installation, "drowse@web.service")? == "active", "drowse does not run again");
        Ok(())
    })
}

/// A unit file elsewhere, known by a link, and links in /run: disabling it must not make it unknown.
#[test]
fn a_linked_unit_and_one_enabled_until_the_next_boot_come_back() -> Result<()> {
    with_drowse(ECHO, |installation| {
        let systemd = &installation.systemd;
        let unit = "[Service]\nType=notify\nExecStart=/usr/bin/echo-backend 127.0.0.1:8081 --notify\n\
                    [Install]\nWantedBy=multi-user.target\n";
        systemd.write("/opt/web.service", unit)?;
        systemd.systemctl(["enable", "/opt/web.service"])?;
        let before = tree(installation, &SYSTEM)?;
        well(installation, "enable", &ADDRESSES)?;
        ensure!(property(installation, "web.service", "UnitFileState")? != "enabled");
        installation.ask()?;
        well(installation, "disable", &[])?;
        ensure!(tree(installation, &SYSTEM)? == before);
        systemd.systemctl(["disable", "--now", "web.service"])?;

        let extra = "[Service]\nExecStart=/usr/bin/sleep infinity\n[Install]\nWantedBy=multi-user.target\n";
        installation.unit("extra", extra)?;
        installation.unit("web", &format!("{unit}Also=extra.service\n"))?;
        systemd.systemctl(["enable", "web.service"])?;
        let before = tree(installation, &SYSTEM)?;
        well(installation, "enable", &ADDRESSES)?;
        ensure!(
            property(installation, "extra.service", "UnitFileState")? == "enabled",
            "it has nothing to do with it"
        );
        well(installation, "disable", &[])?;
        ensure!(tree(installation, &SYSTEM)? == before);
        systemd.systemctl(["disable", "--now", "web.service"])?;

        installation.unit("web", unit)?;
        systemd.systemctl(["enable", "--runtime", "web.service"])?;
        let before = tree(installation, &SYSTEM)?;
        well(installation, "enable", &ADDRESSES)?;
        ensure!(property(installation, "web.service", "UnitFileState")? == "disabled");
        well(installation, "disable", &[])?;
        let after = tree(installation, &SYSTEM)?;
        ensure!(after == before, "before: {before:#?}\nafter: {after:#?}");
        Ok(())
    })
}

/// The shipped example on a unix socket, set up by one command.
#[test]
fn a_backend_on_a_closed_unix_socket_is_reached() -> Result<()> {
    with_drowse(ECHO, |installation| {
        let systemd = &installation.systemd;
        let examples = workspace().join("units/examples");
        systemd.install(examples.join("dice/dice.py"), "/usr/local/bin/dice.py")?;
        systemd.install(examples.join("dice-unix/dice.service"), "/etc/systemd/system/dice.service")?;
        systemd.systemctl(["daemon-reload"])?;
        let paths = ["--listen", "/run/dice.sock", "--backend", "/run/dice-private/backend.sock", "--try"];
        let output = systemd.run(["drowse", "enable", "dice"].into_iter().chain(paths))?;
        ensure!(output.status.success() && text(&output).contains("dice.service woke"), "{}", text(&output));
        let answer = http_get(connect_unix(&systemd.path("/run/dice.sock"))?)?;
        ensure!(answer.starts_with("{\"dice\": "), "{answer}");
        // Its socket and its directory are there, and then they are not.
        for state in ["active", "inactive"] {
            let again =
                systemd.run(["drowse", "enable", "dice"].into_iter().chain(paths.into_iter().take(4)))?;
            ensure!(text(&again).contains("nothing to change"), "{state}: {}", text(&again));
            systemd.systemctl(["stop", "dice.service"])?;
            ensure!(!systemd.path("/run/dice-private").exists());
        }
        Ok(())
    })
}

/// A user with a systemd of their own, which has drowse's units.
fn add_user(installation: &Installation) -> Result<()> {
    let systemd = &installation.systemd;
    for unit in ["drowse@.socket", "drowse@.service"] {
        let from = workspace().join("units/user").join(unit);
        systemd.install(from, &format!("/usr/lib/systemd/user/{unit}"))?;
    }
    systemd.call([
        "useradd",
        "--uid=4711",
        "--user-group",
        "--key=GID_MIN=4711",
        "--create-home",
        "--shell=/bin/sh",
        "sleeper",
    ])?;
    systemd.systemctl(["start", "user@4711.service"]).map(drop)
}

fn as_user(installation: &Installation, words: &[&str]) -> Result<Output> {
    let user = ["setpriv", "--reuid=4711", "--regid=4711", "--clear-groups", "env", "HOME=/home/sleeper"];
    installation.systemd.run(user.iter().chain(&["XDG_RUNTIME_DIR=/run/user/4711"]).chain(words))
}

#[test]
fn a_users_own_service_is_set_up_without_root() -> Result<()> {
    with_drowse(ECHO, |installation| {
        add_user(installation)?;
        let as_user = |words: &[&str]| as_user(installation, words);
        let well = |words: &[&str]| {
            let output = as_user(words)?;
            println!("$ {}\n{}", words.join(" "), text(&output));
            ensure!(output.status.success(), "{words:?}: {}", text(&output));
            anyhow::Ok(text(&output))
        };
        let unit = "[Service]\nType=notify\nExecStart=/usr/bin/echo-backend 127.0.0.1:8081 --notify\n\
                    [Install]\nWantedBy=default.target\n";
        let file = "/home/sleeper/.config/systemd/user/web.service";
        well(&["mkdir", "-p", "/home/sleeper/.config/systemd/user"])?;
        well(&["sh", "-c", &format!("printf '{}' >{file}", unit.replace('\n', "\\n"))])?;
        well(&["systemctl", "--user", "daemon-reload"])?;
        well(&["systemctl", "--user", "enable", "--now", "web.service"])?;
        let home = ["/home/sleeper"];
        let before = tree(installation, &home)?;

        let not_root = as_user(&[&["drowse", "enable", "web"][..], &ADDRESSES].concat())?;
        ensure!(
            text(&not_root).contains("only root may set up a service of the system"),
            "{}",
            text(&not_root)
        );
        let words =
            [&["drowse", "enable", "web", "--user", "--idle-time", "1s", "--try"][..], &ADDRESSES].concat();
        let said = well(&words)?;
        ensure!(said.contains("took the connection"), "{said}");
        eventually("the sleep of a user's service", SOON, || {
            let state = as_user(&["systemctl", "--user", "is-active", "web.service"])?;
            Ok((text(&state).trim() == "inactive").then_some(()))
        })?;
        installation.ask()?;
        ensure!(well(&words)?.contains("nothing to change"));
        well(&["systemctl", "--user", "stop", "drowse@web.service"])?;
        let status = well(&["drowse", "status", "web"])?;
        ensure!(
            status.contains("all this is from systemd") && status.contains("127.0.0.1:8081, web"),
            "{status}"
        );
        let said = well(&["drowse", "disable", "web", "--user"])?;
        ensure!(said.contains("default.target.wants/web.service"), "{said}");
        let after = tree(installation, &home)?;
        ensure!(after == before, "before: {before:#?}\nafter: {after:#?}");
        well(&["systemctl", "--user", "is-active", "web.service"]).map(drop)
    })
}

#[test]
fn a_unit_that_is_enabled_for_all_users_stays() -> Result<()> {
    with_drowse(ECHO, |installation| {
        let systemd = &installation.systemd;
        let unit = "[Service]\nExecStart=/bin/false\n[Install]\nWantedBy=default.target\n";
        systemd.write("/etc/systemd/user/all.service", unit)?;
        systemd.systemctl(["--global", "enable", "all.service"])?;
        add_user(installation)?;
        let words = [
            "drowse",
            "enable",
            "all",
            "--user",
            "--listen",
            "127.0.0.1:8090",
            "--backend",
            "127.0.0.1:8091",
        ];
        let tried = as_user(installation, &[&words[..], &["--try"]].concat())?;
        for part in ["all.service is enabled for all users", "undo it with drowse disable --user all"] {
            ensure!(text(&tried).contains(part), "no '{part}' in: {}", text(&tried));
        }
        ensure!(!text(&tried).contains("no more start"), "{}", text(&tried));
        let again = as_user(installation, &words)?;
        ensure!(again.status.success() && text(&again).contains("nothing to change"), "{}", text(&again));
        Ok(())
    })
}
