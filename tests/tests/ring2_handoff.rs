//! Ring 2: connections that are handed off to the backend's own listener. Needs root and the eBPF object.
//!
//! Each test has its own network namespace and BPF file system, and the real program in them. Which way a client went
//! is told by the backend, which sees the client's own address or one of drowse's.

use std::collections::BTreeSet;
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::Command;
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use drowse_tests::deadline::{eventually, pause};
use drowse_tests::drowse_binary;
use drowse_tests::isolated::{FAR, NEAR, Remote, in_netns, isolated, new_netns};
use drowse_tests::pinned::{Counted, counted, held_by, steering_links, wait_until_gone, wait_until_open};
use drowse_tests::process::{Drowse, RUNTIME_DIR, SOON, connect_to};
use drowse_tests::whoami::{Backend, Client, ask, handed_off};
use rustix::process::{Pid, Resource, Rlimit, Signal, getrlimit, kill_process, setrlimit};
use socket2::{Domain, Protocol, SockRef, Socket, Type};

const ECHO: &str = env!("CARGO_BIN_EXE_echo-backend");
const NAME: &str = "test.service";
const PUBLIC: &str = "127.0.0.1:8080";
const BACKEND: &str = "127.0.0.1:8081";

/// What `drowse run` gets in front of a backend that looks after itself.
fn arguments<'a>(public: &[&'a str], backend: &'a str, options: &[&'a str]) -> Vec<&'a str> {
    let mut words = vec!["--backend", backend, "--plane", "handoff", "--name", NAME, "--log-level", "debug"];
    words.extend(public.iter().flat_map(|address| ["--listen", address]));
    words.extend(options);
    words
}

/// drowse in front of a backend of the test's own.
fn in_front_of(backend: &str, options: &[&str]) -> Result<Drowse> {
    Drowse::run(&arguments(&[PUBLIC], backend, options))
}

/// drowse with a backend that it starts and stops.
fn with_command(options: &[&str]) -> Result<Drowse> {
    let command = ["--", ECHO, "--behaviour", "whoami", BACKEND];
    Drowse::run(&[arguments(&[PUBLIC], BACKEND, options), command.to_vec()].concat())
}

fn ensure_handed_off(address: &str, clients: usize) -> Result<()> {
    for number in 0..clients {
        ensure!(ask(address)?, "client {number} of {address} was proxied");
    }
    Ok(())
}

fn ensure_proxied(address: &str, clients: usize) -> Result<()> {
    for number in 0..clients {
        ensure!(!ask(address)?, "client {number} of {address} was handed off");
    }
    Ok(())
}

/// Waits for the line that says why nobody is handed off, in which `word` occurs, and sees that nobody is.
fn ensure_not_taken(drowse: &mut Drowse, word: &str) -> Result<()> {
    drowse.wait_for_line_with(&["not handed off", word])?;
    ensure!(steering_links()?.is_empty(), "a steering program is attached all the same");
    Ok(())
}

/// What `drowse status` shows, which gives up after a second.
fn shown(drowse: &Drowse) -> Result<serde_json::Value> {
    let mut status = Command::new(drowse_binary()?);
    let output = status.args(["status", NAME, "--json"]).env(RUNTIME_DIR, drowse.runtime_dir()).output()?;
    ensure!(output.status.success(), "status: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).context("read what status shows")
}

/// A backend whose connections come to the test itself.
fn connections_to_the_test() -> Result<(Backend, Receiver<TcpStream>)> {
    let (give, take) = channel();
    let backend = Backend::on(TcpListener::bind(BACKEND)?, move |stream| drop(give.send(stream)))?;
    Ok((backend, take))
}

/// Both ends of a connection that is handed off: the client's and the backend's.
fn both_ends(accepted: &Receiver<TcpStream>) -> Result<(TcpStream, TcpStream)> {
    eventually("a connection that is handed off", SOON, || {
        let client = connect_to(PUBLIC)?;
        let backend = accepted.recv_timeout(SOON).context("wait for the backend's end")?;
        backend.set_read_timeout(Some(SOON))?;
        let of_client = (client.local_addr()?, client.peer_addr()?);
        Ok(((backend.peer_addr()?, backend.local_addr()?) == of_client).then_some((client, backend)))
    })
}

fn reset(stream: TcpStream) -> Result<()> {
    SockRef::from(&stream).set_linger(Some(Duration::ZERO)).context("ask for a reset")?;
    drop(stream);
    Ok(())
}

fn ensure_reset(mut stream: &TcpStream) -> Result<()> {
    let end = stream.read(&mut [0]);
    ensure!(end.as_ref().is_err_and(|error| error.kind() == ErrorKind::ConnectionReset), "no reset: {end:?}");
    Ok(())
}

/// SIGKILL for the one child of drowse.
fn kill_the_backend(drowse: &Drowse) -> Result<()> {
    let children = std::fs::read_to_string(format!("/proc/{0}/task/{0}/children", drowse.id()))?;
    let child: i32 = children.trim().parse().context("one child")?;
    kill_process(Pid::from_raw(child).context("a pid")?, Signal::KILL).context("kill the backend")
}

fn listen_in_a_group() -> Result<TcpListener> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    socket.bind(&BACKEND.parse::<SocketAddr>()?.into())?;
    socket.listen(128)?;
    Ok(socket.into())
}

fn whoami_in_a_group() -> Result<Backend> {
    Backend::on(listen_in_a_group()?, |stream| drop(drowse_tests::whoami::serve(stream)))
}

#[test]
fn the_client_that_wakes_is_proxied_and_later_ones_are_handed_off() -> Result<()> {
    isolated(|| {
        let mut drowse = with_command(&[])?;
        ensure!(steering_links()?.is_empty(), "steering while asleep");
        let mut first = Client::connect(PUBLIC)?;
        ensure!(!first.is_handed_off()?, "it was held, so drowse has it");
        let mut later = handed_off(PUBLIC)?;
        ensure!(steering_links()?.len() == 1, "one program steers");
        ensure_handed_off(PUBLIC, 50)?;
        first.echo(b"still proxied")?;
        later.echo(b"not proxied")?;
        first.end()?;
        later.end()?;
        let counted = wait_until_open(NAME, 0)?;
        ensure!(counted.flows_total >= 51, "{counted:?}");
        drowse.signal(Signal::TERM)?;
        ensure!(drowse.wait_for_exit()?.success());
        ensure!(steering_links()?.is_empty(), "steering without drowse");
        Ok(())
    })
}

#[test]
fn an_open_flow_is_looked_at_once_for_each_who_looks() -> Result<()> {
    isolated(|| {
        let drowse = with_command(&[])?;
        Client::connect(PUBLIC)?.end()?;
        let _open = handed_off(PUBLIC)?;
        let inspect = || -> Result<serde_json::Value> {
            pause(Duration::from_millis(1100));
            Ok(shown(&drowse)?.pointer("/flows/handed_off/open").context("find the flows")?.clone())
        };
        for _ in 0..2 {
            ensure!(inspect()? == 1, "a flow is open");
        }
        Ok(())
    })
}

#[test]
fn many_held_clients_are_served_before_anybody_is_handed_off() -> Result<()> {
    isolated(|| {
        let command = ["--", ECHO, "--behaviour", "whoami", "--delay-ms", "300", BACKEND];
        let _drowse = Drowse::run(&[arguments(&[PUBLIC], BACKEND, &[]), command.to_vec()].concat())?;
        let held: Vec<TcpStream> = (0..64).map(|_| connect_to(PUBLIC)).collect::<Result<_>>()?;
        for (number, stream) in held.into_iter().enumerate() {
            let mut client = Client::greeted(stream).with_context(|| format!("held client {number}"))?;
            ensure!(!client.is_handed_off()?, "client {number} was held");
            client.echo(format!("client {number}").as_bytes())?;
            client.end()?;
        }
        handed_off(PUBLIC)?.end()
    })
}

#[test]
fn an_ipv6_backend_gets_ipv6_clients() -> Result<()> {
    isolated(|| {
        let _backend = Backend::at("[::1]:8081")?;
        let _drowse = Drowse::run(&arguments(&["[::1]:8080"], "[::1]:8081", &[]))?;
        handed_off("[::1]:8080")?.end()?;
        ensure_handed_off("[::1]:8080", 20)
    })
}

#[test]
fn a_backend_with_a_listener_of_each_family_gets_clients_of_each() -> Result<()> {
    isolated(|| {
        let backends = [Backend::at(BACKEND)?, Backend::at("[::1]:8081")?];
        let _drowse = Drowse::run(&arguments(&[PUBLIC, "[::1]:8080"], ":8081", &[]))?;
        for public in [PUBLIC, "[::1]:8080"] {
            handed_off(public)?.end()?;
            ensure_handed_off(public, 20)?;
        }
        let served = backends.each_ref().map(Backend::served);
        ensure!(served.iter().all(|served| *served >= 21), "{served:?}");
        Ok(())
    })
}

#[test]
fn a_backend_that_listens_on_both_families_at_once_gets_clients_of_each() -> Result<()> {
    isolated(|| {
        let _backend = Backend::at("[::]:8081")?;
        let _drowse = Drowse::run(&arguments(&[":8080"], ":8081", &[]))?;
        for public in [PUBLIC, "[::1]:8080"] {
            handed_off(public)?.end()?;
            ensure_handed_off(public, 20)?;
        }
        Ok(())
    })
}

/// IPv6 packets cannot go to an IPv4 socket: that family keeps its proxy. The listener is one for both, so the IPv4
/// client has a mapped address there.
#[test]
fn ipv6_clients_of_an_ipv4_backend_are_proxied_while_ipv4_ones_are_handed_off() -> Result<()> {
    isolated(|| {
        let _backend = Backend::at(BACKEND)?;
        let _drowse = Drowse::run(&arguments(&[":8080"], BACKEND, &[]))?;
        for _ in 0..3 {
            handed_off(PUBLIC)?.end()?;
            ensure_proxied("[::1]:8080", 10)?;
            ensure_handed_off(PUBLIC, 10)?;
        }
        Ok(())
    })
}

#[test]
fn every_public_port_is_covered() -> Result<()> {
    isolated(|| {
        let _backend = Backend::at(BACKEND)?;
        // One has the backend's port on another address.
        let public = [PUBLIC, "127.0.0.1:9090", "127.0.0.7:80", "127.0.0.7:8081", "0.0.0.0:7070"];
        let _drowse = Drowse::run(&arguments(&public, BACKEND, &[]))?;
        let reached = [&public[..4], &["127.0.0.1:7070", "127.3.2.1:7070"]].concat();
        for address in reached {
            handed_off(address)?.end()?;
            ensure_handed_off(address, 10)?;
        }
        Ok(())
    })
}

#[test]
fn the_same_port_of_an_address_that_is_not_ours_is_left_alone() -> Result<()> {
    isolated(|| {
        let _backend = Backend::at(BACKEND)?;
        let neighbour = Backend::at("127.0.0.2:8080")?;
        let _drowse = in_front_of(BACKEND, &[])?;
        handed_off(PUBLIC)?.end()?;
        ask("127.0.0.2:8080")?;
        ensure!(neighbour.served() == 1, "the neighbour's client was taken away");
        let nobody = TcpStream::connect("127.0.0.3:8080");
        ensure!(
            nobody.as_ref().is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused),
            "{nobody:?}"
        );
        // The backend's own port is not public: what comes there is nobody's flow.
        let before = wait_until_open(NAME, 0)?;
        ask(BACKEND)?;
        ensure!(counted(NAME)? == before, "a client of the backend's own port is counted");
        Ok(())
    })
}

#[test]
fn the_backend_sees_a_remote_client_itself() -> Result<()> {
    isolated(|| {
        let remote = Remote::connected()?;
        let public = format!("{NEAR}:8080");
        for listen in [&*public, "0.0.0.0:8080"] {
            let _backend = Backend::at(BACKEND)?;
            let _drowse = Drowse::run(&arguments(&[listen], BACKEND, &[]))?;
            let mut client = remote.inside(|| handed_off(&public))??;
            ensure!(client.seen.starts_with(FAR), "seen: {}", client.seen);
            client.echo(b"from far away")?;
            wait_until_open(NAME, 1)?;
            client.end()?;
            wait_until_open(NAME, 0)?;
        }
        Ok(())
    })
}

#[test]
fn a_group_of_listeners_on_one_port_shares_the_clients() -> Result<()> {
    isolated(|| {
        let group: Vec<Backend> = (0..4).map(|_| whoami_in_a_group()).collect::<Result<_>>()?;
        let _drowse = in_front_of(BACKEND, &[])?;
        handed_off(PUBLIC)?.end()?;
        ensure_handed_off(PUBLIC, 300)?;
        let served: Vec<usize> = group.iter().map(Backend::served).collect();
        ensure!(served.iter().all(|served| *served >= 20), "not spread: {served:?}");
        Ok(())
    })
}

/// More members than slots, and one that came later: whoever accepts, it is counted.
#[test]
fn every_flow_of_a_group_is_counted() -> Result<()> {
    isolated(|| {
        let mut group: Vec<Backend> = (0..8).map(|_| whoami_in_a_group()).collect::<Result<_>>()?;
        let _drowse = in_front_of(BACKEND, &[])?;
        handed_off(PUBLIC)?.end()?;
        wait_until_open(NAME, 0)?;
        let mut clients = Vec::new();
        for number in 0..200 {
            if number == 100 {
                group.push(whoami_in_a_group()?);
            }
            let client = Client::connect(PUBLIC)?;
            ensure!(client.is_handed_off()?, "client {number} was not handed off");
            clients.push(client);
        }
        wait_until_open(NAME, 200)?;
        drop(clients);
        wait_until_open(NAME, 0)?;
        Ok(())
    })
}

#[test]
fn a_worker_that_leaves_its_group_takes_no_client_with_it() -> Result<()> {
    isolated(|| {
        let mut group: Vec<Backend> = (0..4).map(|_| whoami_in_a_group()).collect::<Result<_>>()?;
        let _drowse = in_front_of(BACKEND, &[])?;
        for round in 0..10 {
            handed_off(PUBLIC)?.end()?;
            group.remove(round % 4);
            for client in 0..20 {
                ask(PUBLIC).with_context(|| format!("round {round}, client {client}"))?;
            }
            group.push(whoami_in_a_group()?);
            let newest = group.last().context("a group")?;
            eventually("a client of the new worker", SOON, || {
                ask(PUBLIC)?;
                Ok((newest.served() > 0).then_some(()))
            })?;
        }
        Ok(())
    })
}

#[test]
fn steering_follows_a_listener_that_is_closed_and_opened_again() -> Result<()> {
    isolated(|| {
        let mut backend = Backend::at(BACKEND)?;
        let _drowse = in_front_of(BACKEND, &[])?;
        for round in 0..10 {
            handed_off(PUBLIC)?.end()?;
            drop(backend);
            // Nobody listens: it is drowse that takes and holds it.
            let held = connect_to(PUBLIC).with_context(|| format!("round {round}"))?;
            backend = Backend::at(BACKEND)?;
            let mut client = Client::greeted(held).with_context(|| format!("round {round}"))?;
            client.echo(b"held through a reload")?;
            client.end()?;
        }
        handed_off(PUBLIC)?.end()?;
        ensure_handed_off(PUBLIC, 20)
    })
}

#[test]
fn steering_follows_a_new_listener_that_replaces_the_old_one() -> Result<()> {
    isolated(|| {
        let mut old = whoami_in_a_group()?;
        let _drowse = in_front_of(BACKEND, &[])?;
        handed_off(PUBLIC)?.end()?;
        for round in 0..10 {
            let new = whoami_in_a_group()?;
            for client in 0..10 {
                ask(PUBLIC).with_context(|| format!("round {round}, client {client} beside"))?;
            }
            drop(old);
            let before = new.served();
            for client in 0..10 {
                ask(PUBLIC).with_context(|| format!("round {round}, client {client} after"))?;
            }
            handed_off(PUBLIC)?.end()?;
            ensure_handed_off(PUBLIC, 10)?;
            ensure!(new.served() >= before + 21, "somebody else served them");
            old = new;
        }
        Ok(())
    })
}

#[test]
fn after_a_crash_of_the_backend_the_next_client_is_held_and_wakes_it() -> Result<()> {
    isolated(|| {
        let mut drowse = with_command(&[])?;
        for round in 0..3 {
            let client = handed_off(PUBLIC)?;
            wait_until_open(NAME, 1)?;
            kill_the_backend(&drowse)?;
            let end = (&client.stream).read(&mut [0]);
            let reset = |error: &std::io::Error| error.kind() == ErrorKind::ConnectionReset;
            ensure!(
                matches!(end, Ok(0)) || end.as_ref().is_err_and(reset),
                "it goes on without a backend: {end:?}"
            );
            // The kernel closes a dead process's listener and connections in any order; now all are closed.
            drowse.wait_for_line("was ended by signal 9")?;
            ensure!(!ask(PUBLIC).with_context(|| format!("round {round}"))?, "held, so proxied");
            wait_until_open(NAME, 0)?;
            drowse.wait_for_line("is awake after")?;
        }
        handed_off(PUBLIC)?.end()
    })
}

#[test]
fn bytes_arrive_whole_in_both_directions_and_are_counted() -> Result<()> {
    const LENGTH: usize = 20_000_000;
    isolated(|| {
        let (_backend, accepted) = connections_to_the_test()?;
        let _drowse = in_front_of(BACKEND, &[])?;
        let (mut client, mut backend) = both_ends(&accepted)?;
        let before = wait_until_open(NAME, 1)?;
        let there: Vec<u8> = (0..251).cycle().take(LENGTH).collect();
        let back: Vec<u8> = (0..241).cycle().take(LENGTH / 2).collect();
        let received = thread::scope(|scope| {
            scope.spawn(|| (&client).write_all(&there).and_then(|()| client.shutdown(Shutdown::Write)));
            scope.spawn(|| (&backend).write_all(&back).and_then(|()| backend.shutdown(Shutdown::Write)));
            let at_client = scope.spawn(|| read_to_end(&client));
            let at_backend = read_to_end(&backend)?;
            Ok::<_, anyhow::Error>((at_backend, at_client.join().unwrap_or_else(|_| bail!("panicked"))?))
        })?;
        ensure!(received == (there, back), "other bytes arrived than were sent");
        ensure!(client.read(&mut [0])? == 0 && backend.read(&mut [0])? == 0);
        drop((client, backend));
        let after = wait_until_open(NAME, 0)?;
        // The connections that were proxied are not in these, the FINs are.
        let moved = (
            after.bytes_to_backend - before.bytes_to_backend,
            after.bytes_to_client - before.bytes_to_client,
        );
        let length = LENGTH as u64;
        ensure!((length..=length + 1).contains(&moved.0), "{moved:?}");
        ensure!((length / 2..=length / 2 + 1).contains(&moved.1), "{moved:?}");
        Ok(())
    })
}

fn read_to_end(mut stream: &TcpStream) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).context("receive")?;
    Ok(bytes)
}

#[test]
fn a_half_close_by_either_side_leaves_the_other_direction_open() -> Result<()> {
    isolated(|| {
        let (_backend, accepted) = connections_to_the_test()?;
        let _drowse = in_front_of(BACKEND, &[])?;
        for client_first in [true, false] {
            let (client, backend) = both_ends(&accepted)?;
            let (first, second) = if client_first { (&client, &backend) } else { (&backend, &client) };
            (&*first).write_all(b"all I have to say")?;
            first.shutdown(Shutdown::Write)?;
            ensure!(read_to_end(second)? == b"all I have to say");
            wait_until_open(NAME, 1).context("half a flow is a flow")?;
            (&*second).write_all(b"and the answer")?;
            second.shutdown(Shutdown::Write)?;
            ensure!(read_to_end(first)? == b"and the answer");
            wait_until_open(NAME, 0)?;
        }
        Ok(())
    })
}

#[test]
fn a_reset_by_either_side_reaches_the_other_and_ends_the_flow() -> Result<()> {
    isolated(|| {
        let (_backend, accepted) = connections_to_the_test()?;
        let _drowse = in_front_of(BACKEND, &[])?;
        for by_client in [true, false, true, false] {
            let (client, backend) = both_ends(&accepted)?;
            wait_until_open(NAME, 1)?;
            let (dying, other) = if by_client { (client, backend) } else { (backend, client) };
            reset(dying)?;
            ensure_reset(&other)?;
            wait_until_open(NAME, 0)?;
        }
        Ok(())
    })
}

#[test]
fn a_silent_client_keeps_the_backend_awake_under_connections() -> Result<()> {
    isolated(|| {
        let mut drowse = with_command(&["--idle-time", "200ms"])?;
        let mut client = handed_off(PUBLIC)?;
        pause(Duration::from_secs(1));
        client.echo(b"still there")?;
        let said = drowse.all_output();
        ensure!(!said.iter().any(|line| line.contains("stopping")), "{}", said.join("\n"));
        client.end()?;
        drowse.wait_for_line("is asleep")?;
        ensure!(connect_to(BACKEND).is_err(), "asleep is shown while the backend still listens");
        ensure!(steering_links()?.is_empty(), "steering while asleep");
        ask(PUBLIC).map(drop)
    })
}

#[test]
fn bytes_keep_the_backend_awake_under_traffic_and_silence_ends_it() -> Result<()> {
    isolated(|| {
        let mut drowse = with_command(&["--idle-time", "400ms", "--idle-policy", "traffic"])?;
        let mut client = handed_off(PUBLIC)?;
        for round in 0..40_u8 {
            client.echo(&[round]).with_context(|| format!("round {round}"))?;
            pause(Duration::from_millis(50));
        }
        let said = drowse.all_output();
        ensure!(!said.iter().any(|line| line.contains("stopping")), "{}", said.join("\n"));
        drowse.wait_for_line("is asleep")?;
        let end = client.stream.read(&mut [0]);
        let reset = |error: &std::io::Error| error.kind() == ErrorKind::ConnectionReset;
        ensure!(
            matches!(end, Ok(0)) || end.as_ref().is_err_and(reset),
            "it goes on without a backend: {end:?}"
        );
        ask(PUBLIC).map(drop)
    })
}

#[test]
fn ten_thousand_short_connections_leave_nothing_behind() -> Result<()> {
    const THREADS: usize = 4;
    isolated(|| {
        let _backend = Backend::at(BACKEND)?;
        let _drowse = in_front_of(BACKEND, &[])?;
        handed_off(PUBLIC)?.end()?;
        let before = wait_until_open(NAME, 0)?;
        let taken = thread::scope(|scope| {
            let some = || (0..10_000 / THREADS).map(|_| Ok(u64::from(ask(PUBLIC)?))).sum::<Result<u64>>();
            let clients: Vec<_> = (0..THREADS).map(|_| scope.spawn(some)).collect();
            clients
                .into_iter()
                .map(|one| one.join().unwrap_or_else(|_| bail!("panicked")))
                .sum::<Result<u64>>()
        })?;
        ensure!(taken == 10_000, "{taken} of 10,000 were handed off");
        let after = wait_until_open(NAME, 0)?;
        ensure!(after.flows_total - before.flows_total == taken, "{before:?}, {after:?}");
        Ok(())
    })
}

#[test]
fn two_thousand_flows_at_once_are_counted_exactly() -> Result<()> {
    isolated(|| {
        let maximum = getrlimit(Resource::Nofile).maximum;
        setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum })
            .context("raise the limit on open files")?;
        let _backend = Backend::at(BACKEND)?;
        let _drowse = in_front_of(BACKEND, &[])?;
        let mut flows = vec![handed_off(PUBLIC)?];
        while flows.len() < 2000 {
            let client = Client::connect(PUBLIC)?;
            ensure!(client.is_handed_off()?, "client {} was proxied", flows.len());
            flows.push(client);
        }
        wait_until_open(NAME, 2000)?;
        for flow in &mut flows {
            flow.echo(b"all at once")?;
        }
        for _ in 0..1000 {
            flows.pop().context("a flow")?.end()?;
        }
        wait_until_open(NAME, 1000)?;
        flows.drain(..).try_for_each(|flow| reset(flow.stream))?;
        wait_until_open(NAME, 0)?;
        Ok(())
    })
}

#[test]
fn a_killed_drowse_leaves_flows_alone_and_no_program_behind() -> Result<()> {
    const FLOWS: u64 = 100;
    isolated(|| {
        let _backend = Backend::at(BACKEND)?;
        let mut drowse = in_front_of(BACKEND, &[])?;
        let some = || (0..FLOWS).map(|_| handed_off(PUBLIC)).collect::<Result<Vec<Client>>>();
        let (mut stay, go) = (some()?, some()?);
        wait_until_open(NAME, 2 * FLOWS)?;
        let held = held_by(drowse.id())?;
        ensure!(steering_links()?.len() == 1);
        drowse.signal(Signal::KILL)?;
        drowse.wait_for_exit()?;
        wait_until_gone(&held)?;
        ensure!(steering_links()?.is_empty(), "steering without drowse");
        stay.iter_mut().try_for_each(|flow| flow.echo(b"without drowse"))?;
        // Nobody is told that these close.
        go.into_iter().try_for_each(Client::end)?;

        let mut drowse = in_front_of(BACKEND, &[])?;
        handed_off(PUBLIC)?.end()?;
        wait_until_open(NAME, FLOWS).context("the flows of the drowse before")?;
        stay.iter_mut().try_for_each(|flow| flow.echo(b"counted again"))?;
        stay.into_iter().try_for_each(Client::end)?;
        let after = wait_until_open(NAME, 0)?;
        ensure!(after.flows_total > 2 * FLOWS, "{after:?}");
        drowse.signal(Signal::TERM)?;
        ensure!(drowse.wait_for_exit()?.success());
        Ok(())
    })
}

#[test]
fn drowse_may_be_killed_again_and_again() -> Result<()> {
    isolated(|| {
        let _backend = Backend::at(BACKEND)?;
        let mut flows = Vec::new();
        for round in 1..=10_u8 {
            let mut drowse = in_front_of(BACKEND, &[])?;
            flows.push(handed_off(PUBLIC).with_context(|| format!("round {round}"))?);
            wait_until_open(NAME, u64::from(round))?;
            let held = held_by(drowse.id())?;
            drowse.signal(Signal::KILL)?;
            drowse.wait_for_exit()?;
            wait_until_gone(&held)?;
            flows.iter_mut().try_for_each(|flow| flow.echo(&[round]))?;
        }
        Ok(())
    })
}

#[test]
fn an_orderly_exit_leaves_flows_to_a_backend_that_stays() -> Result<()> {
    isolated(|| {
        let _backend = Backend::at(BACKEND)?;
        let mut drowse = in_front_of(BACKEND, &["--drain-time", "1min"])?;
        let mut flow = handed_off(PUBLIC)?;
        wait_until_open(NAME, 1)?;
        drowse.signal(Signal::TERM)?;
        ensure!(drowse.wait_for_exit()?.success());
        flow.echo(b"without drowse")?;
        let _drowse = in_front_of(BACKEND, &[])?;
        handed_off(PUBLIC)?.end()?;
        wait_until_open(NAME, 1).context("the flow of the drowse before")?;
        flow.echo(b"with another one")?;
        flow.end()?;
        wait_until_open(NAME, 0)?;
        Ok(())
    })
}

/// A COMMAND ends with drowse, so its flows are let end first.
#[test]
fn an_orderly_exit_waits_for_the_flows_of_a_command() -> Result<()> {
    isolated(|| {
        let mut drowse = with_command(&["--drain-time", "1min"])?;
        let mut flow = handed_off(PUBLIC)?;
        wait_until_open(NAME, 1)?;
        drowse.signal(Signal::TERM)?;
        drowse.wait_for_line("letting open connections end")?;
        for round in 0..5_u8 {
            pause(Duration::from_millis(100));
            flow.echo(&[round]).with_context(|| format!("round {round}"))?;
        }
        flow.end()?;
        ensure!(drowse.wait_for_exit()?.success());
        Ok(())
    })
}

#[test]
fn handed_off_clients_keep_drowse_itself_from_leaving() -> Result<()> {
    isolated(|| {
        let _backend = Backend::at(BACKEND)?;
        let mut drowse = in_front_of(BACKEND, &["--exit-idle-time", "500ms"])?;
        let mut flow = handed_off(PUBLIC)?;
        pause(Duration::from_secs(1));
        flow.echo(b"still open")?;
        ensure!(!drowse.has_exited()?, "it left an open flow alone");
        flow.end()?;
        for round in 0..15 {
            pause(Duration::from_millis(100));
            ensure!(ask(PUBLIC).with_context(|| format!("round {round}"))?, "round {round} was proxied");
        }
        ensure!(drowse.wait_for_exit()?.success());
        Ok(())
    })
}

/// Drowse says why, and proxies.
fn not_taken(options: &[&str], word: &str) -> Result<()> {
    isolated(|| {
        let mut drowse = with_command(options)?;
        ensure_proxied(PUBLIC, 5)?;
        ensure_not_taken(&mut drowse, word)?;
        ensure_proxied(PUBLIC, 5)
    })
}

#[test]
fn not_with_a_proxy_protocol_header() -> Result<()> {
    isolated(|| {
        let mut drowse = with_command(&["--proxy-protocol", "v1"])?;
        ensure_not_taken_with_header()?;
        ensure_not_taken(&mut drowse, "--proxy-protocol")?;
        (0..10).try_for_each(|_| ensure_not_taken_with_header())
    })
}

/// The backend echoes what it gets first, which is the header.
fn ensure_not_taken_with_header() -> Result<()> {
    let mut client = Client::connect(PUBLIC)?;
    ensure!(!client.is_handed_off()?, "handed off");
    let mut header = [0; 10];
    client.stream.read_exact(&mut header).context("read the header")?;
    ensure!(&header == b"PROXY TCP4", "{}", header.escape_ascii());
    Ok(())
}

#[test]
fn not_with_a_limit_on_connections() -> Result<()> {
    not_taken(&["--connections-max", "10"], "--connections-max")
}

#[test]
fn not_with_a_limit_for_each_source() -> Result<()> {
    not_taken(&["--max-per-source", "100"], "--max-per-source")
}

/// Who may wake the backend is decided while it sleeps; while it is awake everybody goes straight to it.
#[test]
fn a_stranger_wakes_nobody_and_is_handed_off_while_it_is_awake() -> Result<()> {
    isolated(|| {
        let drowse = with_command(&["--allow", "127.0.0.1", "--held-max", "10"])?;
        let stranger = || -> Result<TcpStream> {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
            socket.bind(&SocketAddr::from(([127, 0, 0, 9], 0)).into())?;
            socket.connect(&PUBLIC.parse::<SocketAddr>()?.into())?;
            socket.set_read_timeout(Some(SOON))?;
            Ok(socket.into())
        };
        ensure_reset(&stranger()?)?;
        ensure!(shown(&drowse)?["state"] == "asleep", "a stranger woke it");
        handed_off(PUBLIC)?.end()?;
        let mut client = Client::greeted(stranger()?)?;
        ensure!(client.is_handed_off()?, "the stranger was proxied");
        client.echo(b"served")?;
        ensure!(shown(&drowse)?["refused"]["may_not_wake"] == 1, "the count");
        client.end()
    })
}

#[test]
fn not_without_ebpf() -> Result<()> {
    not_taken(&["--ebpf", "off"], "--ebpf")
}

/// What was asked for needs no reason, but must be so.
#[test]
fn not_when_another_plane_was_asked_for() -> Result<()> {
    for plane in ["splice", "copy"] {
        isolated(|| {
            let _backend = Backend::at(BACKEND)?;
            let words = ["--listen", PUBLIC, "--backend", BACKEND, "--name", NAME, "--plane", plane];
            let mut drowse = Drowse::run(&words)?;
            drowse.wait_for_line(&format!("plane {plane}"))?;
            ensure_proxied(PUBLIC, 20)?;
            ensure!(steering_links()?.is_empty());
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn auto_is_hand_off_where_it_is_possible() -> Result<()> {
    isolated(|| {
        let _backend = Backend::at(BACKEND)?;
        let _drowse = Drowse::run(&["--listen", PUBLIC, "--backend", BACKEND, "--name", NAME])?;
        handed_off(PUBLIC)?.end()?;
        ensure_handed_off(PUBLIC, 20)
    })
}

#[test]
fn not_to_a_backend_on_a_unix_socket() -> Result<()> {
    isolated(|| {
        let directory = tempfile::tempdir()?;
        let path = directory.path().join("backend");
        let listener = UnixListener::bind(&path)?;
        thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                thread::spawn(move || echo_on(stream));
            }
        });
        let mut drowse = in_front_of(path.to_str().context("a path")?, &[])?;
        drowse_tests::process::echo(&mut connect_to(PUBLIC)?, b"over a unix socket")?;
        ensure_not_taken(&mut drowse, "unix")
    })
}

fn echo_on(mut stream: UnixStream) -> std::io::Result<()> {
    std::io::copy(&mut stream.try_clone()?, &mut stream)?;
    stream.shutdown(Shutdown::Write)
}

#[test]
fn not_from_a_unix_listener() -> Result<()> {
    isolated(|| {
        let directory = tempfile::tempdir()?;
        let path = directory.path().join("public");
        let _backend = Backend::at(BACKEND)?;
        let unix = path.to_str().context("a path")?;
        let mut drowse = Drowse::run(&arguments(&[unix], BACKEND, &[]))?;
        greeted_on(unix)?;
        ensure_not_taken(&mut drowse, "unix")
    })
}

/// Each listener is judged by itself.
#[test]
fn a_unix_listener_beside_a_tcp_one_is_proxied() -> Result<()> {
    isolated(|| {
        let directory = tempfile::tempdir()?;
        let path = directory.path().join("public");
        let unix = path.to_str().context("a path")?;
        let _backend = Backend::at(BACKEND)?;
        let mut drowse = Drowse::run(&arguments(&[PUBLIC, unix], BACKEND, &[]))?;
        handed_off(PUBLIC)?.end()?;
        drowse.wait_for_line_with(&[unix, "it is a unix socket"])?;
        greeted_on(unix)?;
        ensure_handed_off(PUBLIC, 10)
    })
}

/// A client that drowse must have, because the backend has no unix socket.
fn greeted_on(path: &str) -> Result<()> {
    let mut client = UnixStream::connect(path).context("connect to the unix socket")?;
    client.set_read_timeout(Some(SOON))?;
    client.write_all(b"x")?;
    client.shutdown(Shutdown::Write)?;
    let mut answer = String::new();
    client.read_to_string(&mut answer).context("read the answer")?;
    ensure!(answer.ends_with("\nx"), "{answer:?}");
    Ok(())
}

#[test]
fn not_to_a_backend_of_another_machine() -> Result<()> {
    isolated(|| {
        let remote = Remote::connected()?;
        let address = format!("{FAR}:8081");
        let _backend = remote.inside(|| Backend::at(&address))??;
        let mut drowse = in_front_of(&address, &[])?;
        ensure_proxied(PUBLIC, 5)?;
        ensure_not_taken(&mut drowse, "another machine")?;
        ensure_proxied(PUBLIC, 5)
    })
}

/// The public listener comes from systemd, whose namespace may be another than drowse's and the backend's.
#[test]
fn not_from_a_listener_in_another_network_namespace() -> Result<()> {
    isolated(|| {
        let elsewhere = new_netns()?;
        let listener = in_netns(&elsewhere, || TcpListener::bind(PUBLIC))??;
        rustix::io::fcntl_setfd(&listener, rustix::io::FdFlags::empty()).context("let drowse inherit it")?;
        let _backend = Backend::at(BACKEND)?;
        let inherited = std::os::fd::AsRawFd::as_raw_fd(&listener);
        let script = format!("exec 3<&{inherited}; LISTEN_FDS=1 LISTEN_PID=$$ exec \"$@\"");
        let mut command = Command::new("bash");
        command.args(["-c", &script, "bash"]).arg(drowse_binary()?).arg("run");
        command.args(arguments(&[], BACKEND, &[]));
        let mut drowse = Drowse::spawn(&mut command)?;
        drowse.wait_for_notification("READY=1")?;
        in_netns(&elsewhere, || ensure_proxied(PUBLIC, 5))??;
        ensure_not_taken(&mut drowse, "network namespace")?;
        in_netns(&elsewhere, || ensure_proxied(PUBLIC, 5))??;
        let there = in_netns(&elsewhere, steering_links)??;
        ensure!(there.is_empty(), "a steering program is attached to the other namespace");
        Ok(())
    })
}

/// The kernel takes no MPTCP socket into a map. Go's listeners are of this kind.
#[test]
fn not_to_a_backend_with_mptcp() -> Result<()> {
    isolated(|| {
        let socket =
            Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::MPTCP)).context("make an MPTCP socket")?;
        socket.set_reuse_address(true)?;
        socket.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 8081)).into())?;
        socket.listen(128)?;
        let _backend = Backend::on(socket.into(), |stream| drop(drowse_tests::whoami::serve(stream)))?;
        let mut drowse = in_front_of(BACKEND, &[])?;
        ensure_proxied(PUBLIC, 5)?;
        ensure_not_taken(&mut drowse, "MPTCP")?;
        ensure_proxied(PUBLIC, 20)
    })
}

/// Two services side by side: each has its own clients and counters.
#[test]
fn two_services_of_one_namespace_do_not_disturb_each_other() -> Result<()> {
    isolated(|| {
        let [one, two] = [Backend::at(BACKEND)?, Backend::at("127.0.0.1:9091")?];
        let _one = in_front_of(BACKEND, &[])?;
        let words = ["--listen", "127.0.0.1:9090", "--backend", "127.0.0.1:9091", "--name", "other"];
        let _two = Drowse::run(&[&words[..], &["--plane", "handoff"]].concat())?;
        let mut flow_of_one = handed_off(PUBLIC)?;
        let mut flow_of_two = handed_off("127.0.0.1:9090")?;
        let served = [one.served(), two.served()];
        ensure_handed_off(PUBLIC, 20)?;
        ensure!([one.served(), two.served()] == [served[0] + 20, served[1]]);
        ensure_handed_off("127.0.0.1:9090", 20)?;
        ensure!([one.served(), two.served()] == [served[0] + 20, served[1] + 20]);
        let open = |name: &str| -> Result<Counted> { wait_until_open(name, 1) };
        open(NAME)?;
        open("other")?;
        flow_of_one.echo(b"one")?;
        flow_of_two.echo(b"two")?;
        let distinct: BTreeSet<u64> = steering_links()?.into_iter().collect();
        ensure!(distinct.len() == 2, "{distinct:?}");
        Ok(())
    })
}
