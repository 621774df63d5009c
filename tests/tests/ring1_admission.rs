//! Ring 1: who may wake the backend, and how much one source may have, with the real program and clients of several
//! source addresses.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use drowse::report::snapshot::{Refused, Snapshot, StateName};
use drowse_tests::deadline::{eventually, pause};
use drowse_tests::drowse_binary;
use drowse_tests::process::{Drowse, RUNTIME_DIR, SOON, backend, echo, own_address, public};
use socket2::{Domain, Socket, Type};

const ECHO: &str = env!("CARGO_BIN_EXE_echo-backend");
/// Who may wake the backend.
const FRIEND: &str = "127.0.0.1";
/// Who may not.
const SCANNER: &str = "127.0.0.9";

/// `drowse run` named `echo` in front of an echo backend.
fn run(options: &[&str], backend_options: &[&str]) -> Result<Drowse> {
    let (public, backend) = (public(), backend());
    let addresses = ["--name", "echo", "--listen", &public, "--backend", &backend, "--log-level", "debug"];
    Drowse::run(&[&addresses, options, &["--", ECHO, &backend], backend_options].concat())
}

/// A connection from the address `source`.
fn connect_from(source: &str) -> Result<TcpStream> {
    connect_from_to(source, &public())
}

fn connect_from_to(source: &str, address: &str) -> Result<TcpStream> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    socket.bind(&SocketAddr::new(source.parse()?, 0).into())?;
    socket.connect(&address.parse::<SocketAddr>()?.into()).with_context(|| format!("from {source}"))?;
    let stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(SOON))?;
    stream.set_write_timeout(Some(SOON))?;
    Ok(stream)
}

fn ensure_reset(stream: &mut TcpStream) -> Result<()> {
    let end = stream.read(&mut [0]);
    ensure!(end.as_ref().is_err_and(|error| error.kind() == ErrorKind::ConnectionReset), "no reset: {end:?}");
    Ok(())
}

/// Whether `stream` is open and silent for a while.
fn ensure_waits(stream: &mut TcpStream) -> Result<()> {
    stream.set_read_timeout(Some(Duration::from_millis(200)))?;
    let early = stream.read(&mut [0]);
    ensure!(early.as_ref().is_err_and(|error| error.kind() == ErrorKind::WouldBlock), "{early:?}");
    Ok(stream.set_read_timeout(Some(SOON))?)
}

fn told(drowse: &Drowse, words: &[&str]) -> Result<String> {
    let mut status = Command::new(drowse_binary()?);
    let output =
        status.args(["status", "echo"]).args(words).env(RUNTIME_DIR, drowse.runtime_dir()).output()?;
    ensure!(output.status.success(), "{output:?}");
    Ok(String::from_utf8(output.stdout)?)
}

fn snapshot(drowse: &Drowse) -> Result<Snapshot> {
    Ok(serde_json::from_str(&told(drowse, &["--json"])?)?)
}

fn wait_for(drowse: &Drowse, state: StateName) -> Result<Snapshot> {
    eventually(state.word(), SOON, || Ok(Some(snapshot(drowse)?).filter(|found| found.state == state)))
}

fn starts(drowse: &mut Drowse) -> usize {
    drowse.all_output().iter().filter(|line| line.contains("StartBackend")).count()
}

#[test]
fn a_scanner_does_not_wake_and_a_friend_does() -> Result<()> {
    let mut drowse = run(&["--allow", "10.0.0.0/8,127.0.0.1"], &[])?;
    for _ in 0..20 {
        ensure_reset(&mut connect_from(SCANNER)?)?;
    }
    let asleep = snapshot(&drowse)?;
    ensure!(asleep.state == StateName::Asleep && asleep.held == 0, "{asleep:?}");
    ensure!(asleep.refused == Refused { may_not_wake: 20, too_many_of_source: 0 }, "{asleep:?}");
    ensure!(starts(&mut drowse) == 0, "a scanner started it");

    let mut friend = connect_from(FRIEND)?;
    echo(&mut friend, b"good morning")?;
    // While it is awake everybody is served.
    let mut scanner = connect_from(SCANNER)?;
    echo(&mut scanner, b"so you are awake")?;
    let awake = snapshot(&drowse)?;
    ensure!(awake.flows.proxied.open == 2 && awake.held == 0, "{awake:?}");
    ensure!(awake.refused.may_not_wake == 20, "{awake:?}");
    let whole = told(&drowse, &[])?.split_whitespace().collect::<Vec<_>>().join(" ");
    ensure!(whole.contains("refused since the start of drowse: 20 may not wake it"), "{whole}");
    let lines =
        drowse.all_output().into_iter().filter(|line| line.contains("refused") && line.contains("INFO"));
    let lines: Vec<String> = lines.collect();
    ensure!(lines.len() == 1 && lines[0].contains(SCANNER), "one line for twenty scans: {lines:?}");
    Ok(())
}

/// A scanner whose connection is reset before it is accepted has no address any more but that of accept(2).
#[test]
fn a_scanner_that_is_gone_already_does_not_wake() -> Result<()> {
    let mut drowse = run(&["--allow", FRIEND], &[])?;
    for _ in 0..50 {
        let stream = connect_from(SCANNER)?;
        socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
    }
    eventually("fifty refused", SOON, || Ok((snapshot(&drowse)?.refused.may_not_wake == 50).then_some(())))?;
    ensure!(starts(&mut drowse) == 0, "a scanner started it");
    Ok(())
}

#[test]
fn a_scanner_is_not_held_while_it_wakes_or_stops_and_does_not_wake_it_again() -> Result<()> {
    let (public, backend) = (public(), backend());
    let script = format!("trap 'sleep 1; exit 0' TERM; {ECHO} --delay-ms 500 {backend} & wait");
    let options = ["--name", "echo", "--listen", &public, "--backend", &backend, "--log-level", "debug"];
    let rules = ["--allow", FRIEND, "--idle-time", "100ms", "--", "/bin/sh", "-c", &script];
    let mut drowse = Drowse::run(&[&options[..], &rules].concat())?;
    let mut friend = connect_from(FRIEND)?;
    wait_for(&drowse, StateName::Waking)?;
    ensure_reset(&mut connect_from(SCANNER)?)?;
    echo(&mut friend, b"served")?;
    drop(friend);
    wait_for(&drowse, StateName::Stopping)?;
    ensure_reset(&mut connect_from(SCANNER)?)?;
    let asleep = wait_for(&drowse, StateName::Asleep)?;
    ensure!(asleep.refused.may_not_wake == 2 && asleep.activations_total == 1, "{asleep:?}");
    ensure!(starts(&mut drowse) == 1, "it was woken again");
    Ok(())
}

#[test]
fn a_scanner_does_not_start_what_failed() -> Result<()> {
    let mut drowse = run(&["--allow", FRIEND], &["--exit", "3"])?;
    ensure_reset(&mut connect_from(FRIEND)?)?;
    wait_for(&drowse, StateName::Failed)?;
    for _ in 0..5 {
        ensure_reset(&mut connect_from(SCANNER)?)?;
        pause(Duration::from_millis(100));
    }
    ensure!(starts(&mut drowse) == 1, "a scanner started it again after the pause");
    Ok(())
}

#[test]
fn a_client_of_a_unix_socket_always_may() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let path = directory.path().join("public");
    let path = path.to_str().context("a path")?;
    let _drowse = run(&["--allow", "10.0.0.0/8", "--max-per-source", "1", "--listen", path], &[])?;
    ensure_reset(&mut connect_from(FRIEND)?)?;
    for _ in 0..2 {
        let mut client = UnixStream::connect(path)?;
        client.set_read_timeout(Some(SOON))?;
        client.write_all(b"local")?;
        client.shutdown(Shutdown::Write)?;
        let mut reply = String::new();
        client.read_to_string(&mut reply)?;
        ensure!(reply == "local", "{reply}");
    }
    Ok(())
}

/// IPv4 clients of a listener for both families match IPv4 networks.
#[test]
fn a_mapped_client_is_an_ipv4_client() -> Result<()> {
    // Below the ports that clients get, and another one for each test process.
    let port = 10_000 + std::process::id() % 20_000;
    let (public, backend) = (format!(":{port}"), backend());
    let arguments = ["--listen", &public, "--backend", &backend, "--allow", FRIEND, "--", ECHO, &backend];
    let _drowse = Drowse::run(&arguments)?;
    let address = format!("{}:{port}", own_address());
    ensure_reset(&mut connect_from_to(SCANNER, &address)?)?;
    echo(&mut connect_from_to(FRIEND, &address)?, b"mapped")
}

#[test]
fn a_source_has_so_many_connections_and_gets_its_seats_back() -> Result<()> {
    for plane in ["splice", "copy"] {
        let drowse = run(&["--max-per-source", "3", "--plane", plane], &["--delay-ms", "200"])?;
        // Held clients have seats, too.
        let mut clients: Vec<TcpStream> = (0..3).map(|_| connect_from(FRIEND)).collect::<Result<_>>()?;
        ensure_reset(&mut connect_from(FRIEND)?)?;
        let mut other = connect_from(SCANNER)?;
        for (number, client) in clients.iter_mut().enumerate() {
            echo(client, &[u8::try_from(number)?])?;
        }
        echo(&mut other, b"another source")?;
        ensure_reset(&mut connect_from(FRIEND)?)?;
        let seen = snapshot(&drowse)?;
        ensure!(seen.refused == Refused { may_not_wake: 0, too_many_of_source: 2 }, "{seen:?}");

        // A FIN, a reset and a half-close give a seat back alike.
        socket2::SockRef::from(&clients[0]).set_linger(Some(Duration::ZERO))?;
        clients[2].shutdown(Shutdown::Write)?;
        let end = clients[2].read(&mut [0])?;
        ensure!(end == 0, "a byte from nowhere");
        drop(clients);
        eventually("no flow but the other", SOON, || {
            Ok((snapshot(&drowse)?.flows.proxied.open == 1).then_some(()))
        })?;
        let mut again: Vec<TcpStream> = (0..3).map(|_| connect_from(FRIEND)).collect::<Result<_>>()?;
        for client in &mut again {
            echo(client, b"again")?;
        }
        ensure_reset(&mut connect_from(FRIEND)?)?;
    }
    Ok(())
}

/// A start that fails gives the seats of those who waited back, and so does a client that leaves.
#[test]
fn a_held_client_that_goes_gives_its_seat_back() -> Result<()> {
    let drowse = run(&["--max-per-source", "1"], &["--exit", "3", "--delay-ms", "100"])?;
    for _ in 0..3 {
        ensure_reset(&mut connect_from(FRIEND)?)?;
    }
    let left = connect_from(FRIEND)?;
    eventually("it is held", SOON, || Ok((snapshot(&drowse)?.held == 1).then_some(())))?;
    socket2::SockRef::from(&left).set_linger(Some(Duration::ZERO))?;
    drop(left);
    eventually("it is forgotten", SOON, || Ok((snapshot(&drowse)?.held == 0).then_some(())))?;
    ensure_reset(&mut connect_from(FRIEND)?)?;
    let seen = snapshot(&drowse)?;
    ensure!(seen.refused.too_many_of_source == 0 && seen.failures_total >= 4, "{seen:?}");
    Ok(())
}

#[test]
fn beyond_held_max_clients_wait_in_the_backlog_and_are_served() -> Result<()> {
    let drowse = run(&["--held-max", "2"], &["--delay-ms", "700"])?;
    let mut clients: Vec<TcpStream> = (0..6).map(|_| connect_from(FRIEND)).collect::<Result<_>>()?;
    let waking = wait_for(&drowse, StateName::Waking)?;
    ensure!(waking.held <= 2, "{waking:?}");
    ensure_waits(&mut clients[5])?;
    eventually("two are held", SOON, || Ok((snapshot(&drowse)?.held == 2).then_some(())))?;
    for (number, client) in clients.iter_mut().enumerate() {
        echo(client, &[u8::try_from(number)?])?;
    }
    let awake = snapshot(&drowse)?;
    ensure!(awake.flows.proxied.open == 6 && awake.refused == Refused::default(), "{awake:?}");
    Ok(())
}
