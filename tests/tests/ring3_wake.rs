//! The shipped units under a real systemd: wake, serve, sleep again.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use drowse::clock;
use drowse_tests::deadline::eventually;
use drowse_tests::service::{Installation, SOON, connect_unix, http_get, with_deadline, with_drowse};

const ECHO: &str = env!("CARGO_BIN_EXE_echo-backend");

/// The answer of the dice, checked.
fn ensure_dice(body: &str) -> Result<()> {
    let number = body.trim().strip_prefix("{\"dice\": ").and_then(|rest| rest.strip_suffix('}'));
    let number: u8 = number.with_context(|| format!("no dice in {body:?}"))?.parse()?;
    ensure!((1..=6).contains(&number), "a strange dice: {number}");
    Ok(())
}

fn dice_over_tcp(installation: &Installation) -> Result<String> {
    let stream = installation.systemd.in_netns(|| TcpStream::connect((Ipv4Addr::LOCALHOST, 8080)))??;
    with_deadline(&stream)?;
    http_get(stream)
}

#[test]
fn dice_wakes_on_the_first_connection_and_sleeps_again() -> Result<()> {
    with_drowse(ECHO, |installation| {
        installation.example("dice", "DROWSE_IDLE_TIME=1s")?;
        let systemd = &installation.systemd;
        ensure!(systemd.property("drowse@dice.service", "ActiveState")? == "inactive", "nobody came yet");
        for _ in 0..2 {
            ensure!(systemd.property("dice.service", "ActiveState")? == "inactive");
            ensure_dice(&dice_over_tcp(installation)?)?;
            ensure!(systemd.property("dice.service", "ActiveState")? == "active");
            installation.wait_asleep("dice")?;
            ensure!(systemd.property("dice.service", "Result")? == "success");
        }
        ensure!(systemd.property("drowse@dice.service", "NRestarts")? == "0");
        Ok(())
    })
}

#[test]
fn dice_behind_unix_sockets_that_only_its_own_user_may_use() -> Result<()> {
    with_drowse(ECHO, |installation| {
        installation.example("dice-unix", "DROWSE_IDLE_TIME=1s")?;
        let public = installation.systemd.path("/run/dice.sock");
        for _ in 0..2 {
            ensure_dice(&http_get(connect_unix(&public)?)?)?;
            installation.wait_asleep("dice")?;
        }
        Ok(())
    })
}

/// systemd-socket-proxyd closes both directions at the client's FIN: the reply never comes.
#[test]
fn a_half_closed_request_gets_its_whole_reply() -> Result<()> {
    with_drowse(ECHO, |installation| {
        installation.echo("--behaviour reply-after-fin", "")?;
        let request: Vec<u8> = (0..1_000_000_u32).flat_map(u32::to_le_bytes).collect();
        for _ in 0..2 {
            let mut stream = installation.connect()?;
            stream.write_all(&request).context("send")?;
            stream.shutdown(Shutdown::Write).context("half-close")?;
            let mut reply = Vec::new();
            stream.read_to_end(&mut reply).context("receive")?;
            ensure!(reply == request, "{} of {} bytes came back", reply.len(), request.len());
        }
        Ok(())
    })
}

#[test]
fn a_backend_that_speaks_first_is_heard() -> Result<()> {
    with_drowse(ECHO, |installation| {
        installation.echo("--behaviour banner", "")?;
        let mut welcome = [0; 8];
        installation.connect()?.read_exact(&mut welcome).context("wait for the banner")?;
        ensure!(&welcome == b"welcome\n");
        Ok(())
    })
}

/// `Type=simple` is "started" before it listens: the clients wait, with what they sent, and keep their order.
#[test]
fn a_backend_that_lies_about_readiness_is_waited_for() -> Result<()> {
    with_drowse(ECHO, |installation| {
        installation.echo("", "")?;
        let unit = "[Service]\nExecStart=/usr/bin/echo-backend 127.0.0.1:8081 --delay-ms 700\n";
        installation.unit("echo", unit)?;
        let began = clock::now();
        let mut clients = Vec::new();
        for number in 0..20 {
            let mut stream = installation.connect()?;
            writeln!(stream, "client {number}").context("send")?;
            stream.shutdown(Shutdown::Write).context("half-close")?;
            clients.push((number, stream));
        }
        for (number, mut stream) in clients {
            let mut reply = String::new();
            stream.read_to_string(&mut reply).context("receive")?;
            ensure!(reply == format!("client {number}\n"), "client {number} got {reply:?}");
        }
        let waited = clock::now().saturating_sub(began);
        ensure!(waited >= Duration::from_millis(700), "answered before the backend listened: {waited:?}");
        Ok(())
    })
}

#[test]
fn the_status_says_what_happens_and_the_watchdog_is_fed() -> Result<()> {
    with_drowse(ECHO, |installation| {
        let systemd = &installation.systemd;
        let drop_in = "/etc/systemd/system/drowse@echo.service.d/watchdog.conf";
        systemd.write(drop_in, "[Service]\nWatchdogSec=500ms\n")?;
        installation.echo("--delay-ms 1000", "DROWSE_IDLE_TIME=2s")?;
        let status = |wanted: &'static str| {
            systemd.wait_until("drowse@echo.service", "StatusText", SOON, |text| text.starts_with(wanted))
        };
        let mut stream = installation.connect()?;
        status("waking echo.service")?;
        stream.write_all(b"x").context("send")?;
        stream.read_exact(&mut [0]).context("receive")?;
        status("awake: 1 flow")?;
        drop(stream);
        status("asleep")?;
        let fed = systemd.property("drowse@echo.service", "WatchdogTimestampMonotonic")?;
        systemd.wait_until("drowse@echo.service", "WatchdogTimestampMonotonic", SOON, |now| now != fed)?;
        ensure!(systemd.property("drowse@echo.service", "NRestarts")? == "0");
        Ok(())
    })
}

#[test]
fn drowse_itself_exits_when_idle_and_is_woken_by_the_socket() -> Result<()> {
    with_drowse(ECHO, |installation| {
        let systemd = &installation.systemd;
        installation.echo("", "DROWSE_IDLE_TIME=100ms\nDROWSE_EXIT_IDLE_TIME=200ms")?;
        for _ in 0..3 {
            installation.ask()?;
            systemd.wait_until_property("drowse@echo.service", "ActiveState", "inactive", SOON)?;
            ensure!(systemd.property("drowse@echo.service", "Result")? == "success");
            ensure!(systemd.property("echo.service", "ActiveState")? == "inactive");
            ensure!(systemd.property("drowse@echo.socket", "ActiveState")? == "active");
        }
        Ok(())
    })
}

#[test]
fn a_reload_is_done_and_keeps_the_flows() -> Result<()> {
    with_drowse(ECHO, |installation| {
        installation.echo("", "")?;
        let mut stream = installation.connect()?;
        for round in 0..3_u8 {
            stream.write_all(&[round]).context("send")?;
            let mut reply = [0];
            stream.read_exact(&mut reply).context("receive")?;
            ensure!(reply == [round]);
            installation.systemd.systemctl(["reload", "drowse@echo.service"])?;
            installation.systemd.wait_until_property("drowse@echo.service", "ActiveState", "active", SOON)?;
        }
        eventually("three lines on the reloads in the journal", SOON, || {
            let said = installation.systemd.lines_of("drowse@echo.service")?;
            let reloads = said.iter().filter(|line| line.contains("SIGHUP")).count();
            Ok((reloads == 3).then_some(()))
        })?;
        Ok(())
    })
}
