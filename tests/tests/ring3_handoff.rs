//! Hand-off with the shipped units under a real systemd: kills, restarts, and units that must not be handed to.

use std::net::{Ipv4Addr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use drowse_tests::deadline::{eventually, pause};
use drowse_tests::service::{BACKEND_PORT, Installation, PUBLIC_PORT, SOON, with_deadline, with_drowse};
use drowse_tests::whoami::Client;
use serde_json::Value;

const ECHO: &str = env!("CARGO_BIN_EXE_echo-backend");
const WHOAMI: &str = "--behaviour whoami";
const HANDOFF: &str = "DROWSE_PLANE=handoff";

fn connect(installation: &Installation) -> Result<Client> {
    let client = Client::greeted(installation.connect()?)?;
    with_deadline(&client.stream)?;
    Ok(client)
}

/// A client that was handed off, with a byte each way.
fn handed_off(installation: &Installation) -> Result<Client> {
    let mut client = eventually("a client to be handed off", SOON, || {
        let client = connect(installation)?;
        Ok(client.is_handed_off()?.then_some(client))
    })?;
    client.echo(b"x")?;
    Ok(client)
}

/// The number of open flows that were handed off, as `bpftool` shows it.
fn flows_open(installation: &Installation) -> Result<u64> {
    let words = ["bpftool", "-j", "map", "dump", "pinned", "/sys/fs/bpf/drowse/echo/SERVICE"];
    let said = installation.systemd.call(words)?;
    let service: Value = serde_json::from_str(&said).with_context(|| format!("understand {said:?}"))?;
    let open = service.pointer("/0/formatted/value/flows_open").and_then(Value::as_u64);
    open.with_context(|| format!("find flows_open in {said}"))
}

fn wait_until_open(installation: &Installation, wanted: u64) -> Result<()> {
    let mut last = 0;
    eventually(&format!("{wanted} open flows"), SOON, || {
        last = flows_open(installation)?;
        Ok((last == wanted).then_some(()))
    })
    .with_context(|| format!("counted: {last}"))
}

#[test]
fn the_backend_is_the_owner_of_what_it_was_handed() -> Result<()> {
    with_drowse(ECHO, |installation| {
        let systemd = &installation.systemd;
        installation.echo(WHOAMI, HANDOFF)?;
        let proxied = connect(installation)?;
        ensure!(!proxied.is_handed_off()?, "the one that woke it was held");
        let flow = handed_off(installation)?;
        let owner = |client: &Client| -> Result<String> {
            let filter =
                format!("sport = :{PUBLIC_PORT} and dport = :{}", client.stream.local_addr()?.port());
            systemd.call(["ss", "-Htnp", "state", "established", &filter])
        };
        ensure!(owner(&proxied)?.contains("\"drowse\""), "{}", owner(&proxied)?);
        ensure!(owner(&flow)?.contains("\"echo-backend\""), "{}", owner(&flow)?);
        wait_until_open(installation, 1)
    })
}

#[test]
fn a_killed_drowse_leaves_the_flow_alone_and_the_next_one_counts_it() -> Result<()> {
    with_drowse(ECHO, |installation| {
        let systemd = &installation.systemd;
        installation.echo(WHOAMI, &format!("{HANDOFF}\nDROWSE_IDLE_TIME=1s"))?;
        let mut flow = handed_off(installation)?;
        let backend = systemd.property("echo.service", "InvocationID")?;
        wait_until_open(installation, 1)?;
        for round in 1..=2_u8 {
            systemd.systemctl(["kill", "--signal=KILL", "drowse@echo.service"])?;
            flow.echo(&[round]).context("the flow after its drowse was killed")?;
            connect(installation).context("the next client")?.end()?;
            systemd.wait_until_property("drowse@echo.service", "NRestarts", &round.to_string(), SOON)?;
            systemd.wait_until_property("drowse@echo.service", "ActiveState", "active", SOON)?;
            wait_until_open(installation, 1).context("the flow is counted again")?;
        }
        // Longer than the idle time: an open flow is use.
        pause(Duration::from_secs(3));
        flow.echo(b"still awake")?;
        ensure!(systemd.property("echo.service", "InvocationID")? == backend, "there was a second start");
        ensure!(systemd.property("echo.service", "ActiveState")? == "active");
        flow.end()?;
        installation.wait_asleep("echo").context("the new drowse puts the backend to sleep")?;
        connect(installation)?.end()
    })
}

/// Nobody comes after the kill but systemd's restart: the flow alone must keep the backend awake.
#[test]
fn a_killed_drowse_comes_back_without_a_client_and_keeps_the_backend_awake() -> Result<()> {
    with_drowse(ECHO, |installation| {
        let systemd = &installation.systemd;
        installation.echo(WHOAMI, &format!("{HANDOFF}\nDROWSE_IDLE_TIME=1s"))?;
        let mut flow = handed_off(installation)?;
        systemd.systemctl(["kill", "--signal=KILL", "drowse@echo.service"])?;
        systemd.wait_until_property("drowse@echo.service", "NRestarts", "1", SOON)?;
        systemd.wait_until_property("drowse@echo.service", "ActiveState", "active", SOON)?;
        pause(Duration::from_secs(3));
        flow.echo(b"still awake")?;
        wait_until_open(installation, 1)?;
        flow.end()?;
        installation.wait_asleep("echo")
    })
}

/// Asks on new connections until `done`. Gives back how many were handed off.
fn ask_until(done: &AtomicBool, asked: &AtomicU32) -> Result<u32> {
    let mut taken = 0;
    while !done.load(Relaxed) {
        let number = asked.fetch_add(1, Relaxed);
        let ask = || -> Result<bool> {
            let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, PUBLIC_PORT)).context("connect")?;
            let mut client = Client::greeted(stream)?;
            client.echo(b"how are you\n")?;
            let handed_off = client.is_handed_off()?;
            client.end()?;
            Ok(handed_off)
        };
        taken += u32::from(ask().with_context(|| format!("request {number}"))?);
    }
    Ok(taken)
}

/// A flow that is open from before the first restart to behind the last one.
#[test]
fn restarts_under_load_lose_no_connection_and_end_no_flow() -> Result<()> {
    with_drowse(ECHO, |installation| {
        let systemd = &installation.systemd;
        installation.echo(WHOAMI, HANDOFF)?;
        let mut flow = handed_off(installation)?;
        let backend = systemd.property("echo.service", "InvocationID")?;
        let (done, asked) = (AtomicBool::new(false), AtomicU32::new(0));
        let mut restarts = || -> Result<()> {
            for round in 0..5_u8 {
                pause(Duration::from_millis(500));
                systemd.systemctl(["restart", "drowse@echo.service"])?;
                flow.echo(&[round]).context("the flow that was open before")?;
            }
            pause(Duration::from_millis(500));
            Ok(())
        };
        let taken = systemd.in_netns(|| {
            std::thread::scope(|scope| {
                let clients: Vec<_> = (0..4).map(|_| scope.spawn(|| ask_until(&done, &asked))).collect();
                let restarted = restarts();
                done.store(true, Relaxed);
                let taken: Vec<u32> = clients
                    .into_iter()
                    .map(|client| client.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
                    .collect::<Result<_>>()?;
                restarted?;
                Ok::<u32, anyhow::Error>(taken.iter().sum())
            })
        })??;
        let asked = asked.load(Relaxed);
        println!("{asked} requests, {taken} handed off");
        ensure!(asked > 500 && taken > asked / 4, "{asked} requests, {taken} handed off: too few to tell");
        ensure!(systemd.property("echo.service", "InvocationID")? == backend, "the backend was left alone");
        wait_until_open(installation, 1)?;
        flow.end()?;
        wait_until_open(installation, 0)
    })
}

#[test]
fn hand_off_begins_again_after_each_sleep() -> Result<()> {
    with_drowse(ECHO, |installation| {
        installation.echo(WHOAMI, &format!("{HANDOFF}\nDROWSE_IDLE_TIME=300ms"))?;
        for round in 0..5 {
            let first = connect(installation).with_context(|| format!("round {round}"))?;
            ensure!(!first.is_handed_off()?, "round {round}: it was held");
            let later = handed_off(installation).with_context(|| format!("round {round}"))?;
            first.end()?;
            later.end()?;
            installation.wait_asleep("echo").with_context(|| format!("round {round}"))?;
        }
        ensure!(installation.systemd.property("drowse@echo.service", "NRestarts")? == "0");
        Ok(())
    })
}

#[test]
fn a_killed_backend_wakes_again_and_is_handed_to_again() -> Result<()> {
    with_drowse(ECHO, |installation| {
        installation.echo(WHOAMI, HANDOFF)?;
        for round in 0..3 {
            let flow = handed_off(installation).with_context(|| format!("round {round}"))?;
            installation.systemd.systemctl(["kill", "--signal=KILL", "echo.service"])?;
            let mut end = [0];
            let end = std::io::Read::read(&mut &flow.stream, &mut end);
            ensure!(!matches!(end, Ok(1)), "a byte from nowhere");
            // The kernel closes a dead process's listener and connections in any order; then all are closed.
            installation.systemd.wait_until_property("echo.service", "Result", "signal", SOON)?;
            connect(installation).with_context(|| format!("after crash {round}"))?.end()?;
        }
        handed_off(installation)?.end()
    })
}

/// Nobody is handed off, the journal says why with `word`, and everybody is served.
fn ensure_not_taken(installation: &Installation, word: &str) -> Result<()> {
    let mut client = connect(installation)?;
    eventually(&format!("{word} in the journal"), SOON, || {
        let lines = installation.systemd.lines_of("drowse@echo.service")?;
        let tells = |line: &String| line.contains("not handed off") && line.contains(word);
        Ok(lines.iter().any(tells).then_some(()))
    })?;
    for number in 0..20 {
        let client = connect(installation)?;
        ensure!(!client.is_handed_off()?, "client {number} was handed off");
        client.end()?;
    }
    client.echo(b"it works")?;
    client.end()
}

/// These settings filter by the peer's address or the interface. A unit that suddenly saw the client itself would
/// not be what its author meant.
fn not_to_a_unit_with(settings: &str, word: &str) -> Result<()> {
    with_drowse(ECHO, |installation| {
        installation.echo(WHOAMI, HANDOFF)?;
        installation.echo_unit(WHOAMI, settings)?;
        ensure_not_taken(installation, word)
    })
}

#[test]
fn not_to_a_unit_with_an_address_filter() -> Result<()> {
    not_to_a_unit_with("IPAddressDeny=any\nIPAddressAllow=localhost", "IPAddressDeny")
}

/// What no list has is granted.
#[test]
fn an_allow_list_alone_is_no_obstacle() -> Result<()> {
    with_drowse(ECHO, |installation| {
        installation.echo(WHOAMI, HANDOFF)?;
        installation.echo_unit(WHOAMI, "IPAddressAllow=localhost")?;
        handed_off(installation)?.end()
    })
}

#[test]
fn not_to_a_unit_that_is_bound_to_interfaces() -> Result<()> {
    not_to_a_unit_with("RestrictNetworkInterfaces=lo", "RestrictNetworkInterfaces")
}

/// The filter of a slice applies to all units in it.
#[test]
fn not_to_a_unit_in_a_slice_with_an_address_filter() -> Result<()> {
    with_drowse(ECHO, |installation| {
        let slice = "[Slice]\nIPAddressDeny=192.0.2.0/24\n";
        installation.systemd.write("/etc/systemd/system/strict.slice", slice)?;
        installation.echo(WHOAMI, HANDOFF)?;
        installation.echo_unit(WHOAMI, "Slice=strict.slice")?;
        ensure_not_taken(installation, "IPAddressDeny")
    })
}

/// The filter of the socket unit is for the sockets of that unit: clients would escape it.
#[test]
fn not_past_the_address_filter_of_the_public_socket() -> Result<()> {
    with_drowse(ECHO, |installation| {
        let drop_in = "[Socket]\nIPAddressDeny=192.0.2.0/24\n";
        installation.systemd.write("/etc/systemd/system/drowse@echo.socket.d/strict.conf", drop_in)?;
        installation.echo(WHOAMI, HANDOFF)?;
        ensure_not_taken(installation, "IPAddressDeny= of drowse@echo.socket")
    })
}

/// While such a backend is down, systemd listens in its place.
#[test]
fn not_to_a_backend_that_shares_its_listener_with_systemd() -> Result<()> {
    with_drowse(ECHO, |installation| {
        let socket = format!("[Socket]\nListenStream=127.0.0.1:{BACKEND_PORT}\n");
        installation.systemd.write("/etc/systemd/system/echo.socket", &socket)?;
        installation.echo(WHOAMI, HANDOFF)?;
        let start = "ExecStart=/usr/bin/echo-backend --inherit --behaviour whoami";
        installation
            .unit("echo", &format!("[Service]\n{start}\nStandardInput=socket\nStandardOutput=journal\n"))?;
        installation.systemd.systemctl(["start", "echo.socket"])?;
        ensure_not_taken(installation, "echo.socket")
    })
}
