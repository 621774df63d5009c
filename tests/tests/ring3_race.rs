//! What the hand-written recipe loses: clients that come while the backend stops, or while drowse restarts.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use drowse::clock;
use drowse_tests::deadline::pause;
use drowse_tests::random;
use drowse_tests::service::{PUBLIC_PORT, ask, with_deadline, with_drowse};

const ECHO: &str = env!("CARGO_BIN_EXE_echo-backend");

/// The stop begins 50 ms after the last flow and takes some 20 ms: the next client comes at a random time from well
/// before to well after it.
#[test]
fn two_hundred_clients_at_any_instant_of_the_stop_are_served() -> Result<()> {
    with_drowse(ECHO, |installation| {
        installation.echo("", "DROWSE_IDLE_TIME=50ms")?;
        let mut seed = 0x9e37_79b9_7f4a_7c15;
        for round in 0..200 {
            let began = clock::now();
            installation.ask().with_context(|| format!("round {round}"))?;
            let waited = clock::now().saturating_sub(began);
            ensure!(waited < Duration::from_secs(5), "round {round} waited for {waited:?}");
            pause(Duration::from_micros(30_000 + random::next(&mut seed) % 150_000));
        }
        let journal = installation.systemd.journal("echo.service")?;
        let stops = journal.lines().filter(|line| line.starts_with("Stopped echo.service")).count();
        println!("{stops} stops");
        ensure!(stops >= 10, "the race was run in {stops} rounds only");
        ensure!(installation.systemd.property("drowse@echo.service", "NRestarts")? == "0");
        Ok(())
    })
}

/// A client whose request takes longer than a restart: it lives through the drain.
fn ask_slowly(mut stream: TcpStream) -> Result<()> {
    stream.write_all(b"one ").context("send the first half")?;
    let mut reply = [0; 8];
    stream.read_exact(&mut reply[..4]).context("receive the first half")?;
    pause(Duration::from_millis(300));
    stream.write_all(b"two ").context("send the second half")?;
    stream.shutdown(Shutdown::Write).context("half-close")?;
    stream.read_exact(&mut reply[4..]).context("receive the second half")?;
    ensure!(&reply == b"one two " && stream.read(&mut reply)? == 0, "another reply: {reply:?}");
    Ok(())
}

/// Asks again and again until `done`. Gives back how often.
fn ask_until(done: &AtomicBool, asked: &AtomicU32, ask: fn(TcpStream) -> Result<()>) -> Result<()> {
    while !done.load(Relaxed) {
        let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, PUBLIC_PORT)).context("connect")?;
        with_deadline(&stream)?;
        ask(stream).with_context(|| format!("request {}", asked.load(Relaxed)))?;
        asked.fetch_add(1, Relaxed);
    }
    Ok(())
}

#[test]
fn a_restart_under_load_loses_no_connection() -> Result<()> {
    with_drowse(ECHO, |installation| {
        let systemd = &installation.systemd;
        installation.echo("", "")?;
        installation.ask()?;
        let backend = systemd.property("echo.service", "InvocationID")?;
        let (done, quick, slow) = (AtomicBool::new(false), AtomicU32::new(0), AtomicU32::new(0));
        let restarts = || -> Result<()> {
            for _ in 0..3 {
                pause(Duration::from_millis(500));
                systemd.systemctl(["restart", "drowse@echo.service"])?;
            }
            pause(Duration::from_millis(500));
            Ok(())
        };
        systemd.in_netns(|| {
            std::thread::scope(|scope| {
                let clients: Vec<_> = (0..5)
                    .map(|number| {
                        let (asked, ask): (_, fn(TcpStream) -> Result<()>) =
                            if number == 0 { (&slow, ask_slowly) } else { (&quick, ask) };
                        let done = &done;
                        scope.spawn(move || ask_until(done, asked, ask))
                    })
                    .collect();
                let restarted = restarts();
                done.store(true, Relaxed);
                for client in clients {
                    client.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
                }
                restarted
            })
        })??;
        println!("{} quick and {} slow requests", quick.load(Relaxed), slow.load(Relaxed));
        ensure!(quick.load(Relaxed) > 100 && slow.load(Relaxed) > 3, "too little load to tell");
        ensure!(systemd.property("echo.service", "InvocationID")? == backend, "the backend was left alone");
        ensure!(systemd.property("drowse@echo.socket", "ActiveState")? == "active");
        Ok(())
    })
}

/// Nothing but stopping the socket closes the public port.
#[test]
fn a_stopped_drowse_comes_back_with_the_next_connection() -> Result<()> {
    with_drowse(ECHO, |installation| {
        let systemd = &installation.systemd;
        installation.echo("", "")?;
        installation.ask()?;
        let backend = systemd.property("echo.service", "InvocationID")?;
        systemd.systemctl(["stop", "drowse@echo.service"])?;
        ensure!(systemd.property("drowse@echo.service", "Result")? == "success");
        ensure!(systemd.property("echo.service", "ActiveState")? == "active", "the backend was left alone");
        installation.ask()?;
        systemd.systemctl(["restart", "drowse@echo.socket"])?;
        installation.ask()?;
        ensure!(systemd.property("echo.service", "InvocationID")? == backend, "the backend was left alone");
        Ok(())
    })
}
