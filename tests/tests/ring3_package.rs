//! The Debian package on a booted system: `dpkg` itself, with its maintainer scripts.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed};

use anyhow::{Context, Result, ensure};
use drowse_tests::deadline::eventually;
use drowse_tests::package::{self, PACKAGE, TARBALL, made, with_package};
use drowse_tests::service::{Installation, SOON, http_get, with_deadline};
use drowse_tests::systemd::Systemd;
use drowse_tests::whoami;

const ECHO: &str = env!("CARGO_BIN_EXE_echo-backend");
/// Where [`Installation::echo`] is public.
const PUBLIC: &str = "127.0.0.1:8080";
const WHOAMI: &str = "--behaviour whoami";
const EXAMPLES: &str = "/usr/share/doc/drowse/examples";
const RUNTIME_DIR: &str = "XDG_RUNTIME_DIR=/run/user/0";

/// Runs dpkg, which must succeed, and no `systemctl` of the maintainer scripts may fail.
fn dpkg(systemd: &Systemd, action: &str, what: &str) -> Result<()> {
    let output = systemd.run(["dpkg", action, what])?;
    let said =
        [output.stdout, output.stderr].map(|said| String::from_utf8_lossy(&said).into_owned()).concat();
    ensure!(output.status.success() && !said.contains("failed") && !said.contains("warning"), "{said}");
    Ok(())
}

/// The layer of `/usr` that has what the system changed of the host's.
const CHANGED_USR: &str = "/.usr/upper/";

/// Every file and directory of the system, but of `/usr` only what was changed. Without what dpkg, systemd, the journal
/// and the accounts' backups are about, and what systemd 252 leaves when a unit is stopped while its `PrivateDevices=` is
/// made.
fn files(systemd: &Systemd) -> Result<BTreeSet<String>> {
    const FIND: &str = r"find / /.usr/upper /run /tmp /sys/fs/bpf -xdev \( -path /.usr -o -path /var/lib/dpkg \
        -o -path /var/log -o -path /run/systemd -o -path /run/log -o -path '/etc/*-' -o -path /etc/.pwd.lock \
        -o -path '/tmp/namespace-dev-*' \) -prune \
        -o -printf '%y %m %p %l\n'";
    Ok(systemd.call(["sh", "-c", FIND])?.lines().map(str::to_owned).collect())
}

/// What is there, or is not, and was otherwise `before`.
fn differences(systemd: &Systemd, before: &BTreeSet<String>) -> Result<Vec<String>> {
    let below = package::tree().join("usr");
    // Whatever happens in a directory, the layer above gets the directory, too, and keeps it.
    let is_layers_own = |line: &str| {
        let changed =
            line.strip_prefix("d ").and_then(|line| line.split(' ').nth(1)?.strip_prefix(CHANGED_USR));
        changed.is_some_and(|directory| below.join(directory).is_dir())
    };
    let after = files(systemd)?;
    let differences = after.symmetric_difference(before).filter(|line| !is_layers_own(line));
    Ok(differences.cloned().collect())
}

fn ensure_nothing_failed(systemd: &Systemd) -> Result<()> {
    let failed = systemd.systemctl(["list-units", "--failed", "--plain", "--no-legend"])?;
    ensure!(failed.trim().is_empty(), "{failed}");
    Ok(())
}

/// Puts the dice behind drowse with the files that the package brings, as its documentation says.
fn set_up_dice(systemd: &Systemd) -> Result<()> {
    for (from, to) in [
        ("dice.py", "/usr/local/bin/dice.py"),
        ("dice.service", "/etc/systemd/system/dice.service"),
        ("listen.conf", "/etc/systemd/system/drowse@dice.socket.d/listen.conf"),
        ("dice.conf", "/etc/drowse/dice.conf"),
    ] {
        let mode = if from == "dice.py" { "755" } else { "644" };
        systemd.call(["install", "-D", "-m", mode, &format!("{EXAMPLES}/dice/{from}"), to])?;
    }
    systemd.systemctl(["daemon-reload"])?;
    systemd.systemctl(["enable", "--now", "drowse@dice.socket"]).map(drop)
}

fn roll(installation: &Installation) -> Result<()> {
    let stream = installation.connect()?;
    with_deadline(&stream)?;
    ensure!(http_get(stream)?.starts_with("{\"dice\": "));
    Ok(())
}

#[test]
fn an_installed_package_wakes_a_service() -> Result<()> {
    with_package(ECHO, |installation| {
        let systemd = &installation.systemd;
        dpkg(systemd, "--install", PACKAGE)?;
        ensure!(systemd.call(["dpkg", "--verify", "drowse"])?.is_empty(), "a file differs from its checksum");
        let loaded = systemd.systemctl(["list-units", "--all", "--plain", "--no-legend", "drowse@*"])?;
        ensure!(loaded.is_empty(), "nothing runs before somebody asks for it: {loaded}");
        let version = systemd.call(["drowse", "--version"])?;
        ensure!(version.trim() == concat!("drowse ", env!("CARGO_PKG_VERSION")), "{version}");
        let check = systemd.call(["drowse", "check"])?;
        ensure!(check.contains("built in"), "no eBPF object: {check}");

        set_up_dice(systemd)?;
        ensure!(systemd.property("dice.service", "ActiveState")? == "inactive");
        roll(installation)?;
        ensure!(systemd.property("dice.service", "ActiveState")? == "active");
        let status = systemd.call(["drowse", "status", "dice"])?;
        ensure!(status.starts_with("dice: awake"), "{status}");
        ensure_nothing_failed(systemd)
    })
}

/// The commands are those of the tarball's own INSTALL.
#[test]
fn an_unpacked_tarball_wakes_a_service_and_goes_without_a_trace() -> Result<()> {
    with_package(ECHO, |installation| {
        let systemd = &installation.systemd;
        let before = files(systemd)?;
        systemd.call(["mkdir", "/root/unpacked"])?;
        systemd.call(["tar", "-C", "/root/unpacked", "--strip-components=1", "-xf", TARBALL])?;
        let text = fs::read_to_string(systemd.path("/root/unpacked/INSTALL")).context("read INSTALL")?;
        let (install, remove) = text.split_once("To remove").context("find how to remove it")?;
        let follow = |text: &str| -> Result<()> {
            let commands: Vec<_> = text.lines().filter_map(|line| line.strip_prefix("    ")).collect();
            ensure!(commands.len() > 3, "{text}");
            systemd.call(["sh", "-euc", &format!("cd /root/unpacked\n{}", commands.join("\n"))]).map(drop)
        };
        follow(install)?;
        set_up_dice(systemd)?;
        roll(installation)?;
        let drowse = running(systemd, "drowse@dice.service")?;
        follow(install).context("again, as for an upgrade")?;
        ensure!(running(systemd, "drowse@dice.service")?.0 != drowse.0, "the old drowse still runs");
        roll(installation)?;

        follow(remove)?;
        ensure_nothing_failed(systemd)?;
        systemd.systemctl(["stop", "dice.service"])?;
        let own = "/root/unpacked /usr/local/bin/dice.py /etc/systemd/system/dice.service \
                   /etc/systemd/system/drowse@dice.socket.d /etc/drowse";
        systemd.call(["rm", "-r"].into_iter().chain(own.split_whitespace()))?;
        let mut left = differences(systemd, &before)?;
        // The commands of INSTALL remove files.
        left.retain(|line| !line.starts_with("d "));
        ensure!(left.is_empty(), "not as before: {left:#?}");
        Ok(())
    })
}

/// The pages and the completions are made of the same definition as `--help`: each option is in all of them.
#[test]
fn manual_and_completions_know_every_option() -> Result<()> {
    with_package(ECHO, |installation| {
        let systemd = &installation.systemd;
        dpkg(systemd, "--install", PACKAGE)?;
        // Debian's macros for pages read it. The boot gives the system little of `/etc`.
        systemd.write("/etc/groff/man.local", "")?;
        let completions = [
            "/usr/share/bash-completion/completions/drowse",
            "/usr/share/zsh/vendor-completions/_drowse",
            "/usr/share/fish/vendor_completions.d/drowse.fish",
        ]
        .map(|file| fs::read_to_string(systemd.path(file)).with_context(|| format!("read {file}")));
        let [bash, zsh, fish] = completions;
        let (bash, zsh, fish) = (bash?, zsh?, fish?);

        let help = systemd.call(["drowse", "--help"])?;
        let commands = help.lines().skip_while(|line| *line != "Commands:").skip(1);
        let commands: Vec<_> = commands
            .take_while(|line| !line.is_empty())
            .filter_map(|line| line.strip_prefix("  ")?.split(' ').next().filter(|name| !name.is_empty()))
            .collect();
        ensure!(commands.contains(&"run") && commands.contains(&"status"), "{commands:?}");
        for command in commands.into_iter().filter(|command| *command != "help") {
            let page = format!("/usr/share/man/man1/drowse-{command}.1.gz");
            let output = systemd.run(["man", "--warnings", "--local-file", &page])?;
            let complaint = String::from_utf8_lossy(&output.stderr);
            ensure!(output.status.success() && complaint.is_empty(), "{page}: {complaint}");
            // Hyphenated and justified for people: compare words without those.
            let page = String::from_utf8_lossy(&output.stdout).replace("\u{2010}\n", "");
            let help = systemd.call(["drowse", command, "--help"])?;
            let words = help.lines().filter(|line| line.trim_start().starts_with('-'));
            let words = words.flat_map(|line| line.split([' ', ',', '=']));
            let options: BTreeSet<_> = words.filter(|word| word.starts_with("--")).collect();
            ensure!(options.contains("--help"), "{help}");
            for option in options {
                ensure!(page.contains(option), "{option} of {command} is not in its page: {page}");
                ensure!(
                    bash.contains(option) && zsh.contains(option),
                    "{option} of {command} is not completed"
                );
                let fish_has =
                    option.strip_prefix("--").is_some_and(|name| fish.contains(&format!(" -l {name}")));
                ensure!(fish_has, "{option} of {command} is not completed by fish");
            }
        }
        let complete = ". /usr/share/bash-completion/completions/drowse; COMP_WORDS=(drowse run --plane ''); \
                        COMP_CWORD=3; _drowse drowse '' --plane; echo \"${COMPREPLY[@]}\"";
        let completed = systemd.call(["bash", "-c", complete])?;
        ensure!(completed.contains("handoff") && completed.contains("copy"), "{completed}");
        Ok(())
    })
}

/// Another version of the package with the same files, at the same place inside.
fn newer_package(systemd: &Systemd) -> Result<()> {
    let directory = tempfile::tempdir().context("make a directory")?;
    let (tree, newer) = (directory.path().join("tree"), directory.path().join("newer.deb"));
    let dpkg_deb = |arguments: &[&Path]| -> Result<()> {
        let output = Command::new("dpkg-deb").args(arguments).output().context("start dpkg-deb")?;
        ensure!(output.status.success(), "{output:?}");
        Ok(())
    };
    dpkg_deb(&[Path::new("--raw-extract"), &made("deb")?, &tree])?;
    let control = tree.join("DEBIAN/control");
    let text = fs::read_to_string(&control)?;
    let version = concat!("Version: ", env!("CARGO_PKG_VERSION"), "\n");
    ensure!(text.contains(version), "{text}");
    fs::write(&control, text.replace(version, "Version: 999\n"))?;
    dpkg_deb(
        &["--root-owner-group", "-Znone", "--build"]
            .map(Path::new)
            .into_iter()
            .chain([&*tree, &*newer])
            .collect::<Vec<_>>(),
    )?;
    systemd.install(newer, PACKAGE)
}

/// Which process drowse is, and the executable that it runs.
fn running(systemd: &Systemd, unit: &str) -> Result<(String, String)> {
    let pid = systemd.property(unit, "MainPID")?;
    let program = systemd.call(["readlink", &format!("/proc/{pid}/exe")])?;
    Ok((pid, program.trim().to_owned()))
}

#[test]
fn an_upgrade_loses_no_client() -> Result<()> {
    with_package(ECHO, |installation| {
        let systemd = &installation.systemd;
        dpkg(systemd, "--install", PACKAGE)?;
        newer_package(systemd)?;
        // One that is awake, with a flow that was handed off; one that sleeps; one that nobody ever came to.
        installation.echo(WHOAMI, "DROWSE_PLANE=handoff")?;
        for (name, port) in [("sleeps", 8082), ("never", 8084)] {
            let unit = format!(
                "[Service]\nType=notify\nExecStart=/usr/bin/echo-backend 127.0.0.1:{} --notify {WHOAMI}\n",
                port + 1
            );
            installation.unit(name, &unit)?;
            installation.socket(name, &format!("127.0.0.1:{port}"))?;
            installation.configure(
                name,
                &format!("DROWSE_BACKEND=127.0.0.1:{}\nDROWSE_IDLE_TIME=100ms\n", port + 1),
            )?;
            installation.listen(name)?;
        }
        let mut flow = systemd.in_netns(|| whoami::handed_off(PUBLIC))??;
        systemd.in_netns(|| whoami::ask("127.0.0.1:8082"))??;
        installation.wait_asleep("sleeps")?;
        let sockets = ["drowse@echo.socket", "drowse@sleeps.socket", "drowse@never.socket"];
        let invocations = |units: &[&str]| -> Result<Vec<String>> {
            units.iter().map(|unit| systemd.property(unit, "InvocationID")).collect()
        };
        let before = invocations(&sockets)?;
        let backend = systemd.property("echo.service", "MainPID")?;
        let old: Vec<_> = ["drowse@echo.service", "drowse@sleeps.service"]
            .iter()
            .map(|unit| running(systemd, unit))
            .collect::<Result<_>>()?;

        let (done, asked) = (AtomicBool::new(false), AtomicU32::new(0));
        std::thread::scope(|scope| -> Result<()> {
            let clients = scope.spawn(|| {
                systemd.in_netns(|| -> Result<()> {
                    while !done.load(Relaxed) {
                        let number = asked.fetch_add(1, Relaxed);
                        whoami::ask(PUBLIC).with_context(|| format!("client {number}"))?;
                    }
                    Ok(())
                })?
            });
            let upgraded = dpkg(systemd, "--install", PACKAGE);
            done.store(true, Relaxed);
            let served = clients.join().map_err(|_| anyhow::anyhow!("a client panicked"))?;
            upgraded.and(served)
        })?;
        println!("{} clients came during the upgrade", asked.load(Relaxed));
        ensure!(asked.load(Relaxed) > 10, "hardly any client came during the upgrade");

        flow.echo(b"still there").context("the flow that was handed off before")?;
        flow.end()?;
        ensure!(systemd.call(["dpkg-query", "-W", "-f", "${Version}", "drowse"])? == "999");
        ensure!(invocations(&sockets)? == before, "a socket was started again");
        ensure!(systemd.property("echo.service", "MainPID")? == backend, "the backend was restarted");
        for ((old_pid, _), unit) in old.iter().zip(["drowse@echo.service", "drowse@sleeps.service"]) {
            let (pid, program) = running(systemd, unit)?;
            ensure!(&pid != old_pid && program == "/usr/bin/drowse", "{unit}: {pid} runs {program}");
        }
        ensure!(systemd.property("sleeps.service", "ActiveState")? == "inactive", "the upgrade woke it");
        ensure!(
            systemd.property("drowse@never.service", "ActiveState")? == "inactive",
            "the upgrade started it"
        );
        for address in [PUBLIC, "127.0.0.1:8082", "127.0.0.1:8084"] {
            systemd
                .in_netns(|| whoami::ask(address))?
                .with_context(|| format!("a client of {address} afterwards"))?;
        }
        ensure_nothing_failed(systemd)
    })
}

/// A service of root's own manager on port 8090, woken once.
fn set_up_users_echo(systemd: &Systemd) -> Result<()> {
    let home = "/root/.config";
    let unit =
        format!("[Service]\nType=notify\nExecStart=/usr/bin/echo-backend 127.0.0.1:8091 --notify {WHOAMI}\n");
    systemd.write(&format!("{home}/systemd/user/mine.service"), &unit)?;
    let listen = "[Socket]\nListenStream=127.0.0.1:8090\n";
    systemd.write(&format!("{home}/systemd/user/drowse@mine.socket.d/listen.conf"), listen)?;
    systemd.write(&format!("{home}/drowse/mine.conf"), "DROWSE_BACKEND=127.0.0.1:8091\n")?;
    systemd.systemctl(["start", "user@0.service"])?;
    systemd.call(["env", RUNTIME_DIR, "systemctl", "--user", "start", "drowse@mine.socket"])?;
    systemd.in_netns(|| whoami::ask("127.0.0.1:8090"))?.map(drop)
}

#[test]
fn a_removal_leaves_backends_alone_and_a_purge_leaves_nothing() -> Result<()> {
    with_package(ECHO, |installation| {
        let systemd = &installation.systemd;
        let before = files(systemd)?;
        dpkg(systemd, "--install", PACKAGE)?;
        installation.echo(WHOAMI, "DROWSE_PLANE=handoff\nDROWSE_DRAIN_TIME=100ms")?;
        systemd.systemctl(["enable", "drowse@echo.socket"])?;
        // It fails at every start: nobody may be kept from removing the package by that.
        installation.socket("broken", "127.0.0.1:8092")?;
        installation.configure("broken", "DROWSE_BACKEND=nonsense\n")?;
        installation.listen("broken")?;
        let mut flow = systemd.in_netns(|| whoami::handed_off(PUBLIC))??;
        systemd.in_netns(|| std::net::TcpStream::connect("127.0.0.1:8092"))??;
        eventually("a drowse that cannot start", SOON, || {
            Ok((systemd.property("drowse@broken.service", "NRestarts")? != "0").then_some(()))
        })?;
        set_up_users_echo(systemd)?;
        ensure!(systemd.path("/sys/fs/bpf/drowse/echo").exists() && systemd.path("/run/drowse").exists());

        dpkg(systemd, "--remove", "drowse")?;
        for gone in [
            "/usr/bin/drowse",
            "/usr/lib/systemd/system/drowse@.service",
            "/run/drowse",
            "/sys/fs/bpf/drowse",
        ] {
            ensure!(!systemd.path(gone).exists(), "{gone} is still there");
        }
        let link = systemd.path("/etc/systemd/system/sockets.target.wants/drowse@echo.socket");
        ensure!(fs::symlink_metadata(&link).is_err(), "an enabled socket points nowhere");
        ensure!(systemd.path("/etc/drowse/echo.conf").exists(), "the configuration stays until the purge");
        let loaded = systemd.systemctl(["list-units", "--plain", "--no-legend", "drowse@*"])?;
        ensure!(loaded.is_empty(), "{loaded}");
        ensure_nothing_failed(systemd)?;
        ensure!(systemd.property("echo.service", "ActiveState")? == "active", "the backend was stopped");
        flow.echo(b"still there").context("the flow that was handed off")?;
        flow.end()?;
        for public in [PUBLIC, "127.0.0.1:8090"] {
            let refused = systemd.in_netns(|| std::net::TcpStream::connect(public))?;
            ensure!(refused.is_err(), "somebody still listens at {public}");
        }
        let mine = systemd.call(["env", RUNTIME_DIR, "systemctl", "--user", "is-active", "mine.service"])?;
        ensure!(mine.trim() == "active", "the user's backend was stopped");

        dpkg(systemd, "--purge", "drowse")?;
        // What the test itself brought.
        systemd.systemctl(["stop", "echo.service", "user@0.service"])?;
        systemd.call(["rm", "-r", "/etc/systemd/system/echo.service", "/root/.config"])?;
        systemd.systemctl(["daemon-reload"])?;
        ensure_nothing_failed(systemd)?;
        let left = differences(systemd, &before)?;
        ensure!(left.is_empty(), "not as before: {left:#?}");
        Ok(())
    })
}

/// `drowse enable` took away what starts the backend at boot, and nobody else knows: a removal gives it back, with a
/// systemd that runs and in a chroot without one.
#[test]
fn a_removal_lets_backends_start_at_boot_again() -> Result<()> {
    with_package(ECHO, |installation| {
        let systemd = &installation.systemd;
        installation.unit(
            "web",
            "[Service]\nType=notify\nExecStart=/usr/bin/echo-backend 127.0.0.1:8081 --notify\n\
             [Install]\nWantedBy=multi-user.target\nAlias=site.service\n",
        )?;
        systemd.systemctl(["enable", "web.service"])?;
        let links = ["site.service", "multi-user.target.wants/web.service"]
            .map(|link| systemd.path(&format!("/etc/systemd/system/{link}")));
        let targets = || links.each_ref().map(|link| fs::read_link(link).ok());
        let before = targets();
        ensure!(before.iter().all(Option::is_some), "{before:?}");
        // Its first line is not enable's: nobody may be surprised by what is in it.
        let foreign = "# mine\n# To be restored: /etc/systemd/system/foreign.service -> /dev/null\n";
        for remove in [
            &["dpkg", "--remove", "drowse"][..],
            &["unshare", "--mount", "sh", "-c", "mount -t tmpfs none /run && dpkg --remove drowse"],
        ] {
            dpkg(systemd, "--install", PACKAGE)?;
            systemd.call([
                "drowse",
                "enable",
                "web",
                "--listen",
                "127.0.0.1:8080",
                "--backend",
                "127.0.0.1:8081",
            ])?;
            installation.configure("foreign", foreign)?;
            ensure!(targets() == [None, None], "{:?}", targets());
            let output = systemd.run(remove.iter().copied())?;
            ensure!(output.status.success(), "{output:?}");
            ensure!(targets() == before, "{:?}, and {output:?}", targets());
            ensure!(fs::symlink_metadata(systemd.path("/etc/systemd/system/foreign.service")).is_err());
            systemd.systemctl(["daemon-reload"])?;
            ensure!(systemd.systemctl(["is-enabled", "web.service"])?.trim() == "enabled");
            systemd.systemctl(["stop", "drowse@*", "web.service"])?;
        }
        dpkg(systemd, "--purge", "drowse")?;
        ensure!(targets() == before, "{:?}", targets());
        Ok(())
    })
}
