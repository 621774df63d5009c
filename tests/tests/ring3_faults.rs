//! What goes wrong under a real systemd: killed processes, starts that fail, units that are not there.

use std::collections::BTreeSet;
use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use drowse::clock;
use drowse_tests::deadline::eventually;
use drowse_tests::service::{Installation, SOON, ask, numbered, with_drowse};

const ECHO: &str = env!("CARGO_BIN_EXE_echo-backend");

/// An open flow that has carried a byte each way.
fn open_flow(installation: &Installation) -> Result<TcpStream> {
    let mut stream = installation.connect()?;
    stream.write_all(b"x").context("send")?;
    stream.read_exact(&mut [0]).context("receive")?;
    Ok(stream)
}

/// Waits for the end of a connection on which nothing more may come: `true` for a reset, `false` for a clean end.
fn was_reset(mut stream: &TcpStream) -> Result<bool> {
    match stream.read(&mut [0]) {
        Ok(0) => Ok(false),
        Ok(_) => bail!("a byte came from nowhere"),
        Err(error) if error.kind() == ErrorKind::ConnectionReset => Ok(true),
        Err(error) => Err(error).context("wait for the end of the connection"),
    }
}

/// The lines of `drowse@echo.service` in which `word` occurs.
fn lines_with(installation: &Installation, word: &str) -> Result<Vec<String>> {
    let mut lines = installation.systemd.lines_of("drowse@echo.service")?;
    lines.retain(|line| line.contains(word));
    Ok(lines)
}

#[test]
fn a_killed_drowse_comes_back_and_takes_the_running_backend_up() -> Result<()> {
    with_drowse(ECHO, |installation| {
        let systemd = &installation.systemd;
        installation.echo("", "DROWSE_IDLE_TIME=1s")?;
        let flow = open_flow(installation)?;
        let backend = systemd.property("echo.service", "InvocationID")?;
        systemd.systemctl(["kill", "--signal=KILL", "drowse@echo.service"])?;
        was_reset(&flow).context("the flow ends with its proxy")?;
        installation.ask()?;
        ensure!(systemd.property("echo.service", "InvocationID")? == backend, "there was a second start");
        installation.wait_asleep("echo").context("the new drowse puts the backend to sleep")?;
        installation.ask()
    })
}

/// The new drowse has no client to tell it about, but a backend that runs and that nobody uses.
#[test]
fn a_killed_drowse_comes_back_without_a_client_and_lets_the_backend_sleep() -> Result<()> {
    with_drowse(ECHO, |installation| {
        installation.echo("", "DROWSE_IDLE_TIME=1s")?;
        installation.ask()?;
        installation.systemd.systemctl(["kill", "--signal=KILL", "drowse@echo.service"])?;
        installation.systemd.wait_until_property("drowse@echo.service", "NRestarts", "1", SOON)?;
        installation.wait_asleep("echo")
    })
}

#[test]
fn a_killed_backend_ends_its_flows_and_wakes_again() -> Result<()> {
    with_drowse(ECHO, |installation| {
        let systemd = &installation.systemd;
        installation.echo("", "")?;
        let flow = open_flow(installation)?;
        let killed = systemd.property("echo.service", "InvocationID")?;
        systemd.systemctl(["kill", "--signal=KILL", "echo.service"])?;
        was_reset(&flow).context("the flow ends with its backend")?;
        // Before that its listener may still be there: the kernel resets who it took in and nobody accepted.
        systemd.wait_until_property("echo.service", "ActiveState", "failed", SOON)?;
        installation.ask()?;
        ensure!(systemd.property("echo.service", "InvocationID")? != killed, "it was started anew");

        // A backend that dies with unread bytes: the kernel sends a reset, and the client must see one.
        installation.echo_unit("--behaviour ignore", "")?;
        systemd.systemctl(["restart", "echo.service"])?;
        let mut flow = installation.connect()?;
        flow.write_all(b"never read").context("send")?;
        eventually("bytes that the backend does not read", SOON, || {
            // The backend's own end has the public port where the connection was handed off to it.
            let sockets = systemd.call(["ss", "-Htnp", "state", "established"])?;
            let is_unread = |line: &str| line.contains("echo-backend") && !line.starts_with("0 ");
            Ok(sockets.lines().any(is_unread).then_some(()))
        })?;
        systemd.systemctl(["kill", "--signal=KILL", "echo.service"])?;
        ensure!(was_reset(&flow)?, "a reset was turned into a clean end");
        Ok(())
    })
}

/// Two clients are held through a start that fails: both are reset, one line says why, and the next one is served
/// once the unit is repaired, without anybody's help.
fn start_failure(kind: &str, arguments: &str, word: &str) -> Result<()> {
    with_drowse(ECHO, |installation| {
        installation.echo("", "DROWSE_START_TIMEOUT=2s")?;
        let unit =
            format!("[Service]\nType={kind}\nExecStart=/usr/bin/echo-backend 127.0.0.1:8081 {arguments}\n");
        installation.unit("echo", &unit)?;
        let began = clock::now();
        let held = [installation.connect()?, installation.connect()?];
        for mut client in &held {
            client.write_all(b"hello").context("send")?;
        }
        for client in &held {
            ensure!(was_reset(client)?, "a held client must see a reset, not a clean end");
        }
        let waited = clock::now().saturating_sub(began);
        ensure!(waited < Duration::from_secs(4), "the clients waited for {waited:?}");
        let lines = lines_with(installation, word)?;
        let [line] = lines.as_slice() else { bail!("not one line with {word}:\n{}", numbered(&lines)) };
        ensure!(line.contains("echo.service"), "the unit is not named: {line}");

        installation.echo_unit("", "")?;
        installation.ask().context("the next connection, after the back-off")
    })
}

#[test]
fn a_start_job_that_fails_resets_the_held_clients() -> Result<()> {
    start_failure("notify", "--delay-ms 500 --exit 3", "exit-code")
}

#[test]
fn a_backend_that_exits_before_it_listens_resets_the_held_clients() -> Result<()> {
    start_failure("simple", "--delay-ms 500 --exit 3", "exit-code")
}

#[test]
fn a_backend_that_never_listens_resets_the_held_clients() -> Result<()> {
    start_failure("simple", "--delay-ms 60000", "start-timeout")
}

/// The third start is refused for an hour, unless somebody resets the counter.
#[test]
fn a_backend_at_its_start_limit_recovers() -> Result<()> {
    with_drowse(ECHO, |installation| {
        installation.echo("", "DROWSE_IDLE_TIME=50ms")?;
        installation.echo_unit("", "[Unit]\nStartLimitIntervalSec=1h\nStartLimitBurst=2")?;
        let mut refused = 0;
        for round in 0..6 {
            let stream = installation.connect()?;
            if let Err(error) = ask(stream) {
                refused += 1;
                installation.ask().with_context(|| format!("round {round}, after {error:#}"))?;
            }
            installation.wait_asleep("echo")?;
        }
        let lines = lines_with(installation, "start-limit-hit")?;
        ensure!(refused <= 3, "more than every third start was refused: {refused}");
        ensure!(lines.len() >= refused, "{refused} refused:\n{}", numbered(&lines));
        Ok(())
    })
}

/// drowse cannot start: it says so in one line each time, and the client that waits in the backlog is served as soon
/// as the unit is there.
fn impossible_unit(word: &str, prepare: impl FnOnce(&Installation) -> Result<()>) -> Result<()> {
    with_drowse(ECHO, |installation| {
        let systemd = &installation.systemd;
        installation.socket("echo", "127.0.0.1:8080")?;
        installation.configure("echo", "DROWSE_BACKEND=127.0.0.1:8081\n")?;
        prepare(installation)?;
        installation.listen("echo")?;
        let started = systemd.run(["systemctl", "start", "drowse@echo.service"])?;
        ensure!(!started.status.success(), "drowse must not be ready in front of a unit that cannot start");
        ensure!(systemd.property("drowse@echo.service", "ExecMainStatus")? == "1");
        let lines = systemd.lines_of("drowse@echo.service")?;
        // systemd has started it again meanwhile, perhaps, and it has said the same again.
        let distinct: Vec<&String> = lines.iter().collect::<BTreeSet<_>>().into_iter().collect();
        let [line] = distinct.as_slice() else { bail!("not one line:\n{}", numbered(&lines)) };
        ensure!(line.contains("echo.service") && line.contains(word), "unclear: {line}");

        let held = installation.connect()?;
        systemd.run(["systemctl", "unmask", "echo.service"])?;
        installation.echo_unit("", "")?;
        ask(held).context("the client that waited in the backlog")
    })
}

#[test]
fn a_unit_that_is_not_there_is_named_and_waited_for() -> Result<()> {
    impossible_unit("not-found", |_| Ok(()))
}

#[test]
fn a_masked_unit_is_named_and_waited_for() -> Result<()> {
    impossible_unit("masked", |installation| {
        installation.systemd.systemctl(["mask", "echo.service"]).map(drop)
    })
}
