//! The shipped units as such: how tight the sandbox is, and the user manager's variant.

use std::fs;
use std::net::{Ipv4Addr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use drowse_tests::deadline::eventually;
use drowse_tests::service::{SOON, ask, http_get, numbered, with_deadline, with_drowse};
use drowse_tests::workspace;
use serde_json::Value;

const ECHO: &str = env!("CARGO_BIN_EXE_echo-backend");

/// `systemd-analyze security` gives 0.0 (nothing exposed) to 10.0, and compares with ten times the figure.
#[test]
fn the_sandbox_stays_tight() -> Result<()> {
    with_drowse(ECHO, |installation| {
        installation.echo("", "")?;
        let analyze = ["systemd-analyze", "--no-pager", "security", "--threshold=15", "drowse@echo.service"];
        let output = installation.systemd.run(analyze)?;
        let report = String::from_utf8_lossy(&output.stdout);
        let figure = report.lines().last().unwrap_or_default();
        println!("{figure}");
        ensure!(output.status.success() && figure.contains("Overall exposure level"), "{report}");
        Ok(())
    })
}

/// The listen hook is there only while the backend starts, and so are the pins of its maps.
#[test]
fn ebpf_works_inside_the_sandbox() -> Result<()> {
    with_drowse(ECHO, |installation| {
        installation.echo("--delay-ms 4000", "DROWSE_LOG_LEVEL=debug")?;
        let held = installation.connect()?;
        let pins = installation.systemd.path("/sys/fs/bpf/drowse/echo");
        eventually(
            "pinned maps (was the object built? cargo xtask build-ebpf)",
            Duration::from_secs(2),
            || {
                let entries = fs::read_dir(&pins).map(Iterator::count);
                Ok((entries.unwrap_or(0) > 0).then_some(()))
            },
        )?;
        ask(held)?;
        let lines = installation.systemd.lines_of("drowse@echo.service")?;
        ensure!(
            lines.iter().any(|line| line.contains("the listen hook is attached")),
            "{}",
            numbered(&lines)
        );
        Ok(())
    })
}

/// A misspelt or unknown setting is ignored by systemd with a line in the journal.
#[test]
fn systemd_understands_every_line() -> Result<()> {
    with_drowse(ECHO, |installation| {
        installation.example("dice-unix", "")?;
        let systemd = &installation.systemd;
        let files = ["dice.service", "drowse@dice.service", "drowse@dice.socket"];
        let output = systemd.run(["systemd-analyze", "verify", "--man=no"].into_iter().chain(files))?;
        let complaint = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success() && complaint.trim().is_empty(), "{complaint}");
        Ok(())
    })
}

/// The directory of status sockets belongs to all instances: the stop of one leaves the others' in their place.
#[test]
fn status_sockets_of_other_instances_survive_a_stop() -> Result<()> {
    with_drowse(ECHO, |installation| {
        let systemd = &installation.systemd;
        installation.echo("", "")?;
        installation.unit("other", "[Service]\nExecStart=/usr/bin/echo-backend 127.0.0.1:8083\n")?;
        installation.socket("other", "127.0.0.1:8082")?;
        installation.configure("other", "DROWSE_BACKEND=127.0.0.1:8083\n")?;
        installation.listen("other")?;
        systemd.systemctl(["start", "drowse@echo.service", "drowse@other.service"])?;
        let status = |name: &str| systemd.run(["drowse", "status", name]);
        for name in ["echo", "other"] {
            let output = status(name)?;
            let text = String::from_utf8_lossy(&output.stdout);
            ensure!(output.status.success() && text.starts_with(&format!("{name}: asleep")), "{output:?}");
        }
        systemd.systemctl(["stop", "drowse@other.service"])?;
        let all: Value = serde_json::from_str(&systemd.call(["drowse", "status", "--json"])?)?;
        ensure!(all[0]["name"] == "echo" && all[0]["source"] == "drowse", "{all}");
        ensure!(all[1]["name"] == "other" && all[1]["source"] == "systemd", "{all}");
        let output = status("other.service")?;
        let text = String::from_utf8_lossy(&output.stdout);
        ensure!(
            output.status.success() && text.starts_with("other: asleep: systemd holds the socket"),
            "{output:?}"
        );
        let output = systemd.run(["drowse", "check"])?;
        ensure!(output.status.success(), "{output:?}");
        Ok(())
    })
}

/// What the README compares with must itself work.
#[test]
fn the_old_recipe_works_as_well_as_it_can() -> Result<()> {
    with_drowse(ECHO, |installation| {
        let systemd = &installation.systemd;
        let recipe = workspace().join("units/examples/old-recipe");
        for unit in [
            "dice.service",
            "dice-proxy.service",
            "dice-proxy.socket",
            "dice-idle.service",
            "dice-idle.timer",
        ] {
            systemd.install(recipe.join(unit), &format!("/etc/systemd/system/{unit}"))?;
        }
        systemd.install(recipe.join("dice-idle.sh"), "/usr/local/bin/dice-idle.sh")?;
        systemd.install(workspace().join("units/examples/dice/dice.py"), "/usr/local/bin/dice.py")?;
        systemd.systemctl(["daemon-reload"])?;
        systemd.systemctl(["start", "dice-proxy.socket", "dice-idle.timer"])?;
        for _ in 0..2 {
            let stream = systemd.in_netns(|| TcpStream::connect((Ipv4Addr::LOCALHOST, 8080)))??;
            with_deadline(&stream)?;
            ensure!(http_get(stream)?.starts_with("{\"dice\": "));
            eventually("the stop by the checker", SOON, || {
                systemd.systemctl(["start", "dice-idle.service"])?;
                Ok((systemd.property("dice.service", "ActiveState")? == "inactive").then_some(()))
            })?;
        }
        Ok(())
    })
}

#[test]
fn a_users_own_service_wakes_and_sleeps() -> Result<()> {
    with_drowse(ECHO, |installation| {
        let systemd = &installation.systemd;
        for unit in ["drowse@.socket", "drowse@.service"] {
            systemd.install(
                workspace().join("units/user").join(unit),
                &format!("/usr/lib/systemd/user/{unit}"),
            )?;
        }
        let home = "/root/.config";
        let unit = "[Service]\nType=notify\nExecStart=/usr/bin/echo-backend 127.0.0.1:8081 --notify\n";
        systemd.write(&format!("{home}/systemd/user/echo.service"), unit)?;
        let listen = "[Socket]\nListenStream=127.0.0.1:8080\n";
        systemd.write(&format!("{home}/systemd/user/drowse@echo.socket.d/listen.conf"), listen)?;
        let conf = "DROWSE_BACKEND=127.0.0.1:8081\nDROWSE_IDLE_TIME=1s\n";
        systemd.write(&format!("{home}/drowse/echo.conf"), conf)?;
        systemd.systemctl(["start", "user@0.service"])?;

        // systemctl finds the user's manager through this directory, as in a login session.
        let user = ["env", "XDG_RUNTIME_DIR=/run/user/0", "systemctl", "--user"];
        let systemctl = |words: &[&'static str]| systemd.call(user.into_iter().chain(words.iter().copied()));
        systemctl(&["start", "drowse@echo.socket"])?;
        for _ in 0..2 {
            let stream = systemd.in_netns(|| TcpStream::connect((Ipv4Addr::LOCALHOST, 8080)))??;
            with_deadline(&stream)?;
            ask(stream)?;
            ensure!(systemctl(&["is-active", "echo.service"])?.trim() == "active");
            let status =
                systemd.call(["env", "XDG_RUNTIME_DIR=/run/user/0", "drowse", "status", "echo", "--json"])?;
            ensure!(status.contains("\"unit\": \"echo.service\""), "{status}");
            ensure!(systemd.path("/run/user/0/drowse/echo.sock").exists(), "in another place");
            let said = systemd.journal("user@0.service")?;
            ensure!(!said.contains("capabilities are kept"), "{said}");
            eventually("the sleep of a user's service", SOON, || {
                let state = systemctl(&["show", "--value", "--property=ActiveState", "echo.service"])?;
                Ok((state.trim() == "inactive").then_some(()))
            })
            .context("the user's drowse puts the backend to sleep")?;
        }
        Ok(())
    })
}
