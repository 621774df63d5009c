//! Ring 1: the real program before a systemd that fails on demand, and before none at all.
//!
//! The test itself is the backend: it listens at the backend's address while the fake unit is "active".

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use drowse_tests::drowse_binary;
use drowse_tests::fake_systemd::{Answer, FakeSystemd, FakeUnit, PrivateBus};
use drowse_tests::process::{Drowse, backend, connect, public};

const DICE: &str = "dice.service";

fn command(bus_address: &str) -> Result<Command> {
    let mut command = Command::new(drowse_binary()?);
    command.args([
        "run",
        "--listen",
        &public(),
        "--backend",
        &backend(),
        "--unit",
        DICE,
        "--idle-time",
        "100ms",
    ]);
    command.env("DBUS_SYSTEM_BUS_ADDRESS", bus_address);
    Ok(command)
}

struct Fixture {
    drowse: Drowse,
    systemd: FakeSystemd,
    bus: PrivateBus,
}

async fn fixture(unit: FakeUnit) -> Result<Fixture> {
    let bus = PrivateBus::start()?;
    let systemd = FakeSystemd::start(&bus, DICE, unit).await?;
    let mut drowse = Drowse::spawn(&mut command(&bus.address())?)?;
    drowse.wait_for_notification("READY=1")?;
    Ok(Fixture { drowse, systemd, bus })
}

fn is_reset(client: &mut TcpStream) -> Result<()> {
    let end = client.read(&mut [0]);
    ensure!(end.as_ref().is_err_and(|error| error.kind() == ErrorKind::ConnectionReset), "no reset: {end:?}");
    Ok(())
}

/// The test, as the backend, answers one byte.
fn answer(listener: &TcpListener, client: &mut TcpStream) -> Result<()> {
    client.write_all(b"?")?;
    let mut at_backend = listener.accept()?.0;
    at_backend.read_exact(&mut [0])?;
    at_backend.write_all(b"!")?;
    client.read_exact(&mut [0]).context("read the answer")
}

/// Starts drowse where it cannot begin; returns what it says.
fn refused(bus_address: &str) -> Result<String> {
    let mut drowse = Drowse::spawn(&mut command(bus_address)?)?;
    let status = drowse.wait_for_exit()?;
    let said = drowse.all_output();
    ensure!(status.code() == Some(1), "{status}: {said:?}");
    let errors: Vec<_> = said.iter().filter(|line| line.contains("ERROR")).cloned().collect();
    ensure!(errors.len() == 1, "not one line: {said:?}");
    Ok(errors.concat())
}

#[test]
fn without_a_bus_one_line_says_what_to_do() -> Result<()> {
    let said = refused("unix:path=/nonexistent/bus")?;
    ensure!(said.contains("cannot reach systemd over the system bus"), "{said}");
    Ok(())
}

#[tokio::test]
async fn a_unit_that_cannot_be_started_is_named_at_once() -> Result<()> {
    for (load_state, advice) in [("not-found", "does not exist"), ("masked", "systemctl unmask dice.service")]
    {
        let bus = PrivateBus::start()?;
        let unit = FakeUnit { load_state, ..FakeUnit::default() };
        let _systemd = FakeSystemd::start(&bus, DICE, unit).await?;
        let said = refused(&bus.address())?;
        ensure!(said.contains(advice) && said.contains(DICE), "{said}");
    }
    Ok(())
}

#[tokio::test]
async fn a_start_that_is_not_allowed_says_so_and_is_tried_again() -> Result<()> {
    let denied = Answer::Error("org.freedesktop.DBus.Error.InteractiveAuthorizationRequired", "no");
    let unit = FakeUnit { starts: VecDeque::from([denied]), ..FakeUnit::default() };
    let mut fixture = fixture(unit).await?;
    is_reset(&mut connect()?)?;
    let line = fixture.drowse.wait_for_line("not allowed to start dice.service")?;
    ensure!(line.contains("polkit"), "{line}");
    let mut client = connect()?;
    fixture.systemd.wait_for_calls("StartUnit", 2).await?;
    answer(&TcpListener::bind(backend())?, &mut client)
}

#[tokio::test]
async fn each_failed_job_has_systemds_own_word_in_one_line() -> Result<()> {
    let starts: VecDeque<_> = ["failed", "timeout", "dependency", "canceled"]
        .map(|result| Answer::Ends { result, then: if result == "failed" { "failed" } else { "inactive" } })
        .into();
    let results = ["exit-code", "timeout", "dependency", "canceled"];
    let unit = FakeUnit { starts, result: "exit-code", main_code: 1, main_status: 3, ..FakeUnit::default() };
    let mut fixture = fixture(unit).await?;
    for (number, result) in (1..).zip(results) {
        let mut client = connect()?;
        is_reset(&mut client)?;
        fixture.drowse.wait_for_line(&format!("(result {result})"))?;
        fixture.systemd.wait_for_calls("StartUnit", number).await?;
    }
    let errors = fixture.drowse.all_output().iter().filter(|line| line.contains("ERROR")).count();
    ensure!(errors == results.len(), "{errors} lines for {} failures", results.len());
    Ok(())
}

#[tokio::test]
async fn the_start_limit_is_reset_before_the_next_try() -> Result<()> {
    let hit = Answer::Ends { result: "failed", then: "failed" };
    let unit = FakeUnit { starts: VecDeque::from([hit]), result: "start-limit-hit", ..FakeUnit::default() };
    let mut fixture = fixture(unit).await?;
    is_reset(&mut connect()?)?;
    fixture.drowse.wait_for_line("start-limit-hit")?;
    let mut client = connect()?;
    fixture.systemd.wait_for_calls("StartUnit", 2).await?;
    let calls = fixture.systemd.calls();
    let reset = calls.iter().position(|call| call.starts_with("ResetFailedUnit"));
    let second = calls.iter().rposition(|call| call.starts_with("StartUnit"));
    ensure!(reset.is_some() && reset < second, "{calls:?}");
    answer(&TcpListener::bind(backend())?, &mut client)
}

#[tokio::test]
async fn a_dead_bus_is_told_and_the_next_client_after_its_return_is_served() -> Result<()> {
    let mut fixture = fixture(FakeUnit::default()).await?;
    fixture.bus.kill();
    fixture.drowse.wait_for_line("lost the connection to systemd")?;
    is_reset(&mut connect()?)?;
    fixture.drowse.wait_for_line("cannot reach systemd over the system bus")?;
    fixture.bus.revive()?;
    fixture.systemd.come_back().await?;
    let mut client = connect()?;
    fixture.systemd.wait_for_calls("StartUnit", 1).await?;
    answer(&TcpListener::bind(backend())?, &mut client)
}

#[tokio::test]
async fn who_comes_while_somebody_else_stops_the_unit_is_served_by_the_next_start() -> Result<()> {
    let mut fixture = fixture(FakeUnit { active: "active", ..FakeUnit::default() }).await?;
    fixture.systemd.set_active(DICE, "deactivating");
    fixture.drowse.wait_for_notification("somebody stops dice.service")?;
    let mut client = connect()?;
    fixture.drowse.wait_for_notification("1 client waits")?;
    fixture.systemd.set_active(DICE, "inactive");
    fixture.systemd.wait_for_calls("StartUnit", 1).await?;
    answer(&TcpListener::bind(backend())?, &mut client)
}
