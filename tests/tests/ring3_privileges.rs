//! What drowse may do as a service, and what others may do with it.

use std::fs;
use std::io::{Read as _, Write as _};

use anyhow::{Context, Result, ensure};
use drowse_tests::deadline::eventually;
use drowse_tests::service::{Installation, SOON, ask, with_drowse};

const ECHO: &str = env!("CARGO_BIN_EXE_echo-backend");
const MANAGER: [&str; 3] =
    ["org.freedesktop.systemd1", "/org/freedesktop/systemd1", "org.freedesktop.systemd1.Manager"];

/// Asks systemd, as `user`, to do something to a unit. Returns its refusal.
fn manage(installation: &Installation, user: &str, call: [&str; 3]) -> Result<Option<String>> {
    let [method, unit, mode] = call;
    let (signature, arguments) = if mode.is_empty() { ("s", vec![unit]) } else { ("ss", vec![unit, mode]) };
    let words = ["setpriv", "--reuid", user, "--clear-groups", "busctl", "call"]
        .into_iter()
        .chain(MANAGER)
        .chain([method, signature])
        .chain(arguments);
    let output = installation.systemd.run(words)?;
    let complaint = String::from_utf8_lossy(&output.stderr).into_owned();
    Ok((!output.status.success()).then_some(complaint))
}

fn is_refusal(complaint: Option<&String>) -> bool {
    complaint.is_some_and(|text| text.contains("Access denied") || text.contains("authentication required"))
}

fn wait_for_handoff(installation: &Installation) -> Result<()> {
    let status = || installation.systemd.call(["drowse", "status", "echo"]);
    eventually("the hand-off", SOON, || Ok(status()?.contains("hand-off is on").then_some(())))
        .with_context(|| status().unwrap_or_default())
}

/// Hand-off, stop and the next start need no capability once the programs are loaded.
#[test]
fn a_service_is_a_user_without_capabilities() -> Result<()> {
    with_drowse(ECHO, |installation| {
        let systemd = &installation.systemd;
        installation.echo("", "DROWSE_IDLE_TIME=1s\n")?;
        for _ in 0..2 {
            installation.ask()?;
            wait_for_handoff(installation)?;
            let handed_off = installation.connect()?;
            let pid = systemd.property("drowse@echo.service", "MainPID")?;
            let owner = systemd.call(["ps", "-o", "user=", "-p", &pid])?;
            ensure!(owner.trim() == "drowse", "runs as {owner}");
            let tasks = systemd.path(&format!("/proc/{pid}/task"));
            let mut threads = 0;
            for task in fs::read_dir(&tasks).context("look at the threads")? {
                let Ok(status) = fs::read_to_string(task?.path().join("status")) else { continue };
                threads += 1;
                for line in ["CapInh:\t0", "CapPrm:\t0", "CapEff:\t0", "CapAmb:\t0"] {
                    ensure!(
                        status.contains(&format!("\n{line:0<24}\n")),
                        "{line} is not all of it: {status}"
                    );
                }
                ensure!(
                    status.contains("\nNoNewPrivs:\t1\n") && status.contains("\nSeccomp:\t2\n"),
                    "{status}"
                );
            }
            ensure!(threads > 2, "only {threads} threads");
            ask(handed_off)?;
            installation.wait_asleep("echo")?;
        }
        Ok(())
    })
}

/// The maps of sockets are written by descriptors that the service has, for each flow.
#[test]
fn a_service_without_capabilities_has_the_kernel_move_flows() -> Result<()> {
    with_drowse(ECHO, |installation| {
        installation.echo("", "DROWSE_PLANE=sockmap\n")?;
        installation.ask()?;
        let status = || installation.systemd.call(["drowse", "status", "echo"]);
        let wait_for = |what: &str| {
            eventually(what, SOON, || Ok(status()?.contains(what).then_some(())))
                .with_context(|| status().unwrap_or_default())
        };
        wait_for("plane        sockmap; hand-off is off")?;
        wait_for("proxied: 0 open")?;
        let mut open = installation.connect()?;
        eventually("a flow that the kernel moves", SOON, || {
            open.write_all(b"how are you\n")?;
            open.read_exact(&mut [0; 12])?;
            Ok(status()?.contains("of these moved by the kernel: 1 open").then_some(()))
        })
    })
}

#[test]
fn only_units_with_a_configuration_may_be_started_and_stopped() -> Result<()> {
    with_drowse(ECHO, |installation| {
        let systemd = &installation.systemd;
        installation.echo("", "")?;
        installation.unit("other", "[Service]\nExecStart=sleep infinity\n")?;
        let by = |user, method, unit| manage(installation, user, [method, unit, "replace"]);
        for (method, state) in [("StartUnit", "active"), ("StopUnit", "inactive")] {
            ensure!(by("drowse", method, "echo.service")?.is_none(), "{method}");
            systemd.wait_until_property("echo.service", "ActiveState", state, SOON)?;
        }
        let complaint = manage(installation, "drowse", ["ResetFailedUnit", "echo.service", ""])?;
        ensure!(!is_refusal(complaint.as_ref()), "{complaint:?}");
        for (user, method, unit) in [
            ("drowse", "StartUnit", "other.service"),
            ("drowse", "StartUnit", "rescue.target"),
            ("drowse", "StartUnit", "drowse@other.socket"),
            ("drowse", "RestartUnit", "echo.service"),
            ("drowse", "ReloadUnit", "echo.service"),
            ("nobody", "StartUnit", "echo.service"),
            ("nobody", "StopUnit", "drowse@echo.service"),
            ("nobody", "StartUnit", "other.service"),
        ] {
            let complaint = by(user, method, unit)?;
            ensure!(is_refusal(complaint.as_ref()), "{user} {method} {unit}: {complaint:?}");
        }
        ensure!(systemd.property("other.service", "ActiveState")? == "inactive");
        ensure!(systemd.property("echo.service", "ActiveState")? == "inactive");
        Ok(())
    })
}

/// A refused start says what is missing, and the client hears of it.
#[test]
fn a_service_without_the_rule_says_what_to_do() -> Result<()> {
    with_drowse(ECHO, |installation| {
        let systemd = &installation.systemd;
        fs::remove_file(systemd.path("/usr/share/polkit-1/rules.d/50-drowse.rules"))?;
        installation.echo("", "")?;
        ensure!(installation.ask().is_err(), "somebody started the backend");
        let lines = systemd.lines_of("drowse@echo.service")?.join("\n");
        ensure!(lines.contains("not allowed to start echo.service") && lines.contains("polkit"), "{lines}");
        Ok(())
    })
}

#[test]
fn another_user_sees_neither_status_nor_counters() -> Result<()> {
    with_drowse(ECHO, |installation| {
        let systemd = &installation.systemd;
        installation.echo("", "")?;
        let held = installation.connect()?;
        let status = ["drowse", "status", "echo"];
        let dump = ["bpftool", "map", "dump", "pinned", "/sys/fs/bpf/drowse/echo/SERVICE"];
        ask(held)?;
        wait_for_handoff(installation)?;
        systemd.call(status)?;
        systemd.call(dump)?;
        let as_nobody = ["setpriv", "--reuid", "nobody", "--clear-groups"];
        for words in [&dump[..], &["ls", "/sys/fs/bpf/drowse"], &["cat", "/run/drowse/echo.sock"]] {
            let output = systemd.run(as_nobody.iter().chain(words))?;
            ensure!(!output.status.success() && output.stdout.is_empty(), "{words:?}: {output:?}");
        }
        // systemd tells everybody whether it runs.
        let told = systemd.call(as_nobody.iter().chain(&status))?;
        ensure!(told.contains("not permitted to ask drowse") && !told.contains("bytes"), "{told}");
        Ok(())
    })
}
