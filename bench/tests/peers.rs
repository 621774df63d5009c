//! Every proxy, started as for a measurement, forwards what the client checks byte by byte, and leaves nothing behind.
//! Needs the peers' packages, which `cargo xtask install` installs as root.

#![expect(clippy::unwrap_used, reason = "a test that panics has failed, as it should")]

use std::fs;
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use drowse_bench::cases::Backend;
use drowse_bench::client;
use drowse_bench::client::bulk::{BulkLoad, Direction};
use drowse_bench::client::closed::RequestLoad;
use drowse_bench::costs::{Counters, Work};
use drowse_bench::cpus::Layout;
use drowse_bench::owners::{check_handed_off, wait_until_handed_off};
use drowse_bench::peers::{Direct, Haproxy, Nginx, Peer, Socat, SocketProxyd, Wanted};
use drowse_bench::process::{self, Running};
use drowse_bench::report::Report;
use drowse_bench::wire::Pattern;

const BENCH: &str = env!("CARGO_BIN_EXE_drowse-bench");
const BULK_BYTES: u64 = 8 * 1024 * 1024 + 5;

fn backend() -> Backend {
    let mut command = process::command(BENCH);
    command.args(["backend", "--listen=127.0.0.1:0"]).stdout(Stdio::piped());
    Backend::listening(Running::start("backend", command).unwrap(), Duration::ZERO).unwrap()
}

/// Puts every kind of load on `peer`, then ends it and looks for what it left.
fn forwards(peer: &dyn Peer) {
    assert_ne!(
        peer.version().unwrap(),
        "not installed",
        "{} is missing: run `cargo xtask install` as root",
        peer.name()
    );
    let (backend, pattern, layout) = (backend(), Pattern::default(), Layout::of_this_machine().unwrap());
    let wanted =
        Wanted { backend: backend.address, listen: [127, 0, 0, 1].into(), flows: 40, layout: &layout };
    let mut started = peer.start(&wanted).unwrap();
    let address = started.address;
    let outcome = client::warm_up(address, &pattern);
    started.explain(outcome).unwrap();

    let counters = || Counters::now(started.process.as_ref(), peer.has_process_for_each_flow()).unwrap();
    let before = counters();
    for direction in [Direction::Up, Direction::Down, Direction::Both] {
        BulkLoad { direction, bytes: BULK_BYTES }.run(address, &pattern).unwrap();
    }
    let (warm_up_time, measured_time) = (Duration::ZERO, Duration::from_millis(100));
    let load = RequestLoad { connections: 40, request_len: 64, warm_up_time, measured_time };
    let rate = load.run(address, &pattern).unwrap();
    assert!(rate.requests >= rate.latency.unwrap().len());
    let costs = counters().costs_since(&before, Work::Requests(rate.requests));
    let cost = |name| costs.iter().find(|(cost, _)| *cost == name).map(|(_, value)| *value);
    assert!(cost("machine_cpu_s_per_100k").unwrap() > 0.0, "{costs:?}");
    assert!(cost("proxy_cpu_s_per_100k").is_some_and(|cpu_s| cpu_s > 0.0), "{costs:?}");
    // Each of the transfers made the proxy wait at least once.
    let switches = cost("proxy_switches_per_1k");
    assert_eq!(switches.is_none(), peer.has_process_for_each_flow(), "{costs:?}");
    assert!(switches.is_none_or(|switches| switches > 0.0), "{costs:?}");

    let open = TcpStream::connect(address).unwrap();
    let processes = started.process.as_ref().unwrap().processes().unwrap();
    assert!(started.process.as_ref().unwrap().memory().unwrap().pss_bytes > 0);
    drop(started);
    for pid in processes {
        assert!(
            fs::metadata(format!("/proc/{pid}")).is_err(),
            "{}: process {pid} is still there",
            peer.name()
        );
    }
    drop(open);
    assert!(TcpStream::connect(address).is_err(), "{} still listens", peer.name());
}

fn socket_proxyd() -> SocketProxyd {
    let programs = ["/usr/lib/systemd/systemd-socket-proxyd", "/lib/systemd/systemd-socket-proxyd"];
    let program = programs.iter().map(PathBuf::from).find(|program| program.exists()).unwrap();
    SocketProxyd { program }
}

#[test]
fn systemd_socket_proxyd_forwards() {
    forwards(&socket_proxyd());
}

#[test]
fn a_forwarded_connection_is_not_taken_for_one_that_was_handed_off() {
    let (backend, pattern, layout) = (backend(), Pattern::default(), Layout::of_this_machine().unwrap());
    let wanted =
        Wanted { backend: backend.address, listen: [127, 0, 0, 1].into(), flows: 4, layout: &layout };
    let direct = Direct.start(&wanted).unwrap();
    wait_until_handed_off(direct.address, backend.pid(), &pattern).unwrap();
    check_handed_off(direct.address, backend.pid(), &pattern).unwrap();
    let proxyd = socket_proxyd().start(&wanted).unwrap();
    client::warm_up(proxyd.address, &pattern).unwrap();
    assert!(check_handed_off(proxyd.address, backend.pid(), &pattern).is_err());
    let refusal = wait_until_handed_off(proxyd.address, backend.pid(), &pattern).unwrap_err();
    assert!(format!("{refusal:#}").contains("hands none to the backend"), "{refusal:#}");
}

#[test]
fn haproxy_forwards() {
    forwards(&Haproxy);
}

#[test]
fn nginx_forwards() {
    forwards(&Nginx);
}

#[test]
fn socat_forwards() {
    forwards(&Socat);
}

#[test]
fn a_remote_client_reaches_every_peer_through_a_network_of_its_own() {
    let directory = tempfile::tempdir().unwrap();
    let mut command = Command::new(BENCH);
    command.args(["--quick", "--no-drowse", "--only=remote", "--out"]).arg(directory.path());
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    let report = fs::read_to_string(directory.path().join("latest.json")).unwrap();
    let report: Report = serde_json::from_str(&report).unwrap();
    assert_eq!(report.peers.len(), 5);
    assert!(report.measurements.len() >= 2 * report.peers.len(), "{said}");
    for measurement in &report.measurements {
        let (case, peer) = (&measurement.case, &measurement.peer);
        assert!(case.starts_with("remote/"), "{case}");
        assert_eq!(measurement.unavailable, None, "{case}: {peer}: {said}");
        assert_eq!(measurement.rounds.len(), 1, "{case}: {peer}");
        let costs = measurement.details.keys().any(|name| name.starts_with("machine_cpu_s_per_"));
        assert!(costs, "{case}: {peer}: {:?}", measurement.details);
    }
}
