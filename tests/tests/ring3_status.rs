//! `drowse status` under a real systemd: services whose drowse does not run, and what is known of them all the same.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use drowse::clock;
use drowse_tests::deadline::eventually;
use drowse_tests::service::{Installation, SOON, with_drowse};
use serde_json::Value;

const ECHO: &str = env!("CARGO_BIN_EXE_echo-backend");

fn status(installation: &Installation) -> Result<Value> {
    let text = installation.systemd.call(["drowse", "status", "echo", "--json"])?;
    serde_json::from_str(&text).context("read the status")
}

/// Waits until the status is as `wanted` says.
fn wait_for(installation: &Installation, what: &str, wanted: impl Fn(&Value) -> bool) -> Result<Value> {
    let mut last = Value::Null;
    eventually(what, SOON, || {
        last = status(installation)?;
        Ok(wanted(&last).then(|| last.clone()))
    })
    .with_context(|| format!("the status is {last:#}"))
}

#[test]
fn a_service_without_its_drowse_is_told_from_systemd() -> Result<()> {
    with_drowse(ECHO, |installation| {
        let systemd = &installation.systemd;
        installation.echo("", "DROWSE_IDLE_TIME=1h")?;
        let asleep = status(installation)?;
        ensure!(
            asleep["state"] == "asleep" && asleep["source"] == "systemd" && asleep["pid"] == 0,
            "{asleep:#}"
        );
        ensure!(asleep["backend"] == "127.0.0.1:8081" && asleep["unit"] == "echo.service", "{asleep:#}");
        ensure!(asleep["today"].is_null() && asleep["last_activation"].is_null(), "made up: {asleep:#}");
        let line = asleep["line"].as_str().context("a line")?;
        ensure!(line == "asleep: systemd holds the socket; the next connection wakes echo.service", "{line}");

        systemd.systemctl(["start", "echo.service"])?;
        let awake = status(installation)?;
        ensure!(
            awake["state"] == "awake" && awake["line"].as_str().unwrap_or("").contains("without drowse"),
            "{awake:#}"
        );
        systemd.systemctl(["stop", "echo.service"])?;

        installation.ask()?;
        let answered = status(installation)?;
        ensure!(answered["state"] == "awake" && answered["source"] == "drowse", "{answered:#}");
        systemd.systemctl(["stop", "drowse@echo.service", "echo.service"])?;

        installation.unit("echo", "[Service]\nExecStart=/bin/false\n")?;
        let _fails = systemd.run(["systemctl", "start", "echo.service"])?;
        let failed = wait_for(installation, "failed", |status| status["state"] == "failed")?;
        ensure!(failed["line"].as_str().unwrap_or("").contains("(result exit-code)"), "{failed:#}");

        // drowse itself cannot start: systemd tries again and again.
        installation.configure("echo", "DROWSE_BACKEND=nonsense\n")?;
        let _waits = installation.connect()?;
        let failed = wait_for(installation, "a drowse that fails", |status| {
            status["line"].as_str().unwrap_or("").contains("drowse itself does not start")
        })?;
        ensure!(failed["state"] == "failed", "{failed:#}");
        systemd.systemctl(["stop", "drowse@echo.socket", "drowse@echo.service"])?;
        let gone = systemd.run(["drowse", "status", "echo"])?;
        let advice = String::from_utf8_lossy(&gone.stderr);
        ensure!(gone.status.code() == Some(1) && advice.contains("drowse enable"), "{gone:?}");

        // The socket cannot listen: somebody else does.
        installation.unit(
            "taker",
            "[Service]\nType=notify\nExecStart=/usr/bin/echo-backend 127.0.0.1:8080 --notify\n",
        )?;
        systemd.systemctl(["start", "taker.service"])?;
        let _fails = systemd.run(["systemctl", "start", "drowse@echo.socket"])?;
        let changed = systemd.property("drowse@echo.socket", "StateChangeTimestampMonotonic")?;
        let since = |now: Duration| now.saturating_sub(Duration::from_micros(changed.parse().unwrap_or(0)));
        let least = since(clock::now());
        let failed = status(installation)?;
        let told = Duration::from_secs_f64(failed["since_s"].as_f64().context("a time")?);
        let not_of_the_backend = least..=since(clock::now());
        ensure!(not_of_the_backend.contains(&told), "{told:?} is not in {not_of_the_backend:?}");
        ensure!(failed["state"] == "failed", "{failed:#}");
        ensure!(
            failed["line"].as_str().unwrap_or("").contains("drowse@echo.socket failed (result resources)"),
            "{failed:#}"
        );
        Ok(())
    })
}

/// A backend that is not in memory is looked at all the same, among many as alone.
#[test]
fn a_backend_that_cannot_be_started_is_told_among_others() -> Result<()> {
    with_drowse(ECHO, |installation| {
        let systemd = &installation.systemd;
        for name in ["good", "masked", "missing", "odd", "aliased"] {
            let unit = if name == "odd" { "no unit at all".to_owned() } else { format!("{name}.service") };
            installation.socket(name, &format!("@{name}"))?;
            installation
                .configure(name, &format!("DROWSE_BACKEND=127.0.0.1:9000\nDROWSE_UNIT=\"{unit}\"\n"))?;
        }
        installation.unit("good", "[Service]\nExecStart=/usr/bin/sleep infinity\n")?;
        let directory = "/etc/systemd/system";
        systemd.call(["ln", "-s", "/dev/null", &format!("{directory}/masked.service")])?;
        systemd.call(["ln", "-s", "good.service", &format!("{directory}/aliased.service")])?;
        systemd.systemctl(["daemon-reload"])?;
        let sockets =
            ["good", "masked", "missing", "odd", "aliased"].map(|name| format!("drowse@{name}.socket"));
        systemd.systemctl(["start".to_owned()].into_iter().chain(sockets))?;
        let all: Vec<Value> = serde_json::from_str(&systemd.call(["drowse", "status", "--json"])?)?;
        ensure!(all.len() == 5, "{all:#?}");
        for (name, state, words) in [
            ("aliased", "asleep", "the next connection wakes aliased.service"),
            ("good", "asleep", "the next connection wakes good.service"),
            ("masked", "failed", "masked.service cannot be started (masked)"),
            ("missing", "failed", "missing.service cannot be started (not-found)"),
        ] {
            let listed = all.iter().find(|one| one["name"] == name).context("listed")?;
            ensure!(listed["state"] == state, "{listed:#}");
            ensure!(listed["line"].as_str().unwrap_or("").contains(words), "{listed:#}");
            ensure!(listed["since_s"].is_null() == (state == "failed"), "made up: {listed:#}");
            let alone: Value = serde_json::from_str(&systemd.call(["drowse", "status", name, "--json"])?)?;
            ensure!(alone["line"] == listed["line"] && alone["state"] == state, "{alone:#} {listed:#}");
        }
        let text = systemd.call(["drowse", "status"])?;
        let masked = text.lines().find(|line| line.starts_with("masked ")).context("a line")?;
        ensure!(masked.split_whitespace().take(3).eq(["masked", "failed", "-"]), "{text}");
        Ok(())
    })
}

/// What the backend used, what its sleep saves, how long it took to wake, how often: also when drowse has ended.
#[test]
fn memory_and_wake_ups_outlive_their_drowse() -> Result<()> {
    with_drowse(ECHO, |installation| {
        let systemd = &installation.systemd;
        // Here is no memory controller, so the sizes of the backend's processes are asked for. The sandbox hides those.
        systemd.write(
            "/etc/systemd/system/drowse@echo.service.d/proc.conf",
            "[Service]\nProtectProc=default\n",
        )?;
        installation.echo("", "DROWSE_IDLE_TIME=500ms\nDROWSE_EXIT_IDLE_TIME=2s")?;
        installation.ask()?;
        let held = installation.connect()?;
        // systemd is asked for the cgroup beside the first client, who waits for nothing.
        let awake = wait_for(installation, "awake, with its memory", |status| {
            status["state"] == "awake" && !status["memory_bytes"].is_null()
        })?;
        let used = awake["memory_bytes"].as_u64().context("the memory in use")?;
        ensure!((100 << 10..1 << 30).contains(&used), "{used} bytes");
        ensure!(awake["memory_saved_bytes"].is_null(), "{awake:#}");
        println!("{}", systemd.call(["drowse", "status"])?);
        drop(held);
        let asleep = wait_for(installation, "asleep", |status| status["state"] == "asleep")?;
        let saved = asleep["memory_saved_bytes"].as_u64().context("the memory saved")?;
        ensure!((100 << 10..1 << 30).contains(&saved) && asleep["memory_bytes"].is_null(), "{asleep:#}");
        ensure!(asleep["today"]["activations"] == 1, "{asleep:#}");
        println!("{}", systemd.call(["drowse", "status"])?);

        systemd.wait_until_property("drowse@echo.service", "ActiveState", "inactive", SOON)?;
        let alone = status(installation)?;
        ensure!(alone["source"] == "systemd" && alone["memory_saved_bytes"] == saved, "{alone:#}");
        ensure!(alone["last_activation"]["took_s"] == asleep["last_activation"]["took_s"], "{alone:#}");
        ensure!(alone["today"] == asleep["today"], "{alone:#}");
        ensure!(alone["since_s"].as_f64().context("a time")? >= 1.9, "{alone:#}");
        println!("{}{}", systemd.call(["drowse", "status"])?, systemd.call(["drowse", "status", "echo"])?);

        installation.ask()?;
        let second = status(installation)?;
        ensure!(second["source"] == "drowse" && second["activations_total"] == 1, "{second:#}");
        ensure!(second["today"]["activations"] == 2, "{second:#}");
        Ok(())
    })
}

/// Another user sees what systemd tells everybody.
#[test]
fn another_user_sees_the_states_and_why_not_more() -> Result<()> {
    with_drowse(ECHO, |installation| {
        let systemd = &installation.systemd;
        installation.echo("", "DROWSE_IDLE_TIME=1h")?;
        installation.ask()?;
        let nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "drowse", "status"];
        let text = systemd.call(nobody)?;
        ensure!(text.contains("echo") && text.contains("awake"), "{text}");
        ensure!(text.contains("not permitted to ask drowse: only root"), "{text}");
        ensure!(text.contains("systemd says that echo.service is active"), "{text}");
        systemd.systemctl(["stop", "drowse@echo.service", "echo.service"])?;
        let text = systemd.call(nobody)?;
        ensure!(text.contains("asleep") && text.contains("systemd holds the socket"), "{text}");
        Ok(())
    })
}

#[test]
fn without_a_bus_those_that_run_are_told() -> Result<()> {
    with_drowse(ECHO, |installation| {
        let systemd = &installation.systemd;
        installation.echo("", "DROWSE_IDLE_TIME=1h")?;
        installation.ask()?;
        systemd.systemctl(["stop", "dbus.socket", "dbus.service"])?;
        let output = systemd.run(["drowse", "status"])?;
        let (text, note) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        ensure!(output.status.success() && text.contains("echo  awake"), "{output:?}");
        ensure!(note.contains("only what runs is shown") && note.contains("cannot reach systemd"), "{note}");
        let one = systemd.call(["drowse", "status", "echo"])?;
        ensure!(one.starts_with("echo: awake"), "{one}");
        Ok(())
    })
}

/// A benchmark more than a test: fifty services with a running drowse beside fifty without.
#[test]
fn a_hundred_services_are_told_in_one_go() -> Result<()> {
    with_drowse(ECHO, |installation| {
        let systemd = &installation.systemd;
        let names: Vec<String> = (0..100_u16).map(|number| format!("s{number:02}")).collect();
        for (number, name) in (0_u16..).zip(&names) {
            let unit = "[Service]\nExecStart=/usr/bin/sleep infinity\n";
            systemd.write(&format!("/etc/systemd/system/{name}.service"), unit)?;
            installation.socket(name, &format!("@{name}"))?;
            installation.configure(
                name,
                &format!("DROWSE_BACKEND=127.0.0.1:{}\nDROWSE_WORKERS=1\nDROWSE_EBPF=off\n", 9000 + number),
            )?;
        }
        let unit = |kind: &'static str| move |name: &String| format!("drowse@{name}.{kind}");
        let start = |units: &mut dyn Iterator<Item = String>| {
            systemd.systemctl(["start".to_owned()].into_iter().chain(units))
        };
        systemd.systemctl(["daemon-reload"])?;
        start(&mut names.iter().map(unit("socket")))?;
        start(&mut names.iter().take(50).map(unit("service")))?;
        let text = systemd.call(["drowse", "status"])?;
        ensure!(text.lines().filter(|line| line.contains(" asleep ")).count() == 100, "{text}");
        ensure!(
            text.lines().filter(|line| line.contains("systemd holds the socket")).count() == 50,
            "{text}"
        );
        ensure!(text.lines().skip(1).is_sorted(), "{text}");
        let time = |what: &str| -> Result<Duration> {
            let script = format!(
                "begin=$(date +%s%N); for i in 1 2 3 4 5 6 7 8 9 10; do {what} >/dev/null; done; echo $((($(date +%s%N) - begin) / 10))"
            );
            Ok(Duration::from_nanos(systemd.call(["sh", "-c", &script])?.trim().parse()?))
        };
        println!(
            "50 running and 50 dormant: {:?} each, drowse --version: {:?}",
            time("drowse status")?,
            time("drowse --version")?
        );
        let sleepers = names.iter().skip(50).map(unit("socket"));
        systemd.systemctl(["stop".to_owned()].into_iter().chain(sleepers))?;
        println!("50 running: {:?} each", time("drowse status")?);
        let running = names.iter().take(50).flat_map(|name| [unit("socket")(name), unit("service")(name)]);
        systemd.systemctl(["stop".to_owned()].into_iter().chain(running))?;
        start(&mut names.iter().skip(50).map(unit("socket")))?;
        println!("50 dormant: {:?} each", time("drowse status")?);
        Ok(())
    })
}
