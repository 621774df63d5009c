//! Both ends of the benchmark, with nothing between them and with a relay that damages what passes.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test that panics has failed, as it should"
)]

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use drowse_bench::cases::Backend;
use drowse_bench::client::{self, Direction, RequestLoad};
use drowse_bench::process::{self, Running};
use drowse_bench::report::Report;
use drowse_bench::wire::Pattern;

const BENCH: &str = env!("CARGO_BIN_EXE_drowse-bench");
const BULK_BYTES: u64 = 3 * 1024 * 1024 + 5;
const DIRECTIONS: [Direction; 3] = [Direction::Up, Direction::Down, Direction::Both];

fn backend() -> Backend {
    let mut command = process::command(BENCH);
    command.args(["backend", "--listen=127.0.0.1:0"]).stdout(Stdio::piped());
    Backend::listening(Running::start("backend", command).unwrap(), Duration::ZERO).unwrap()
}

/// What a relay does to the byte at `DAMAGED_AT` of each direction.
#[derive(Debug, Clone, Copy)]
enum Damage {
    Flip,
    Drop,
    Double,
    End,
}

const DAMAGED_AT: usize = 1_000_000;

/// Relays one connection to `backend`, with `damage` in the given direction.
fn relay(backend: SocketAddr, damage: Damage, upwards: bool) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        let (client, _) = listener.accept().unwrap();
        let behind = TcpStream::connect(backend).unwrap();
        let (from, to) = (client.try_clone().unwrap(), behind.try_clone().unwrap());
        let up = thread::spawn(move || pump(from, to, upwards.then_some(damage)));
        pump(behind, client, (!upwards).then_some(damage));
        up.join().unwrap();
    });
    address
}

fn pump(mut from: TcpStream, mut to: TcpStream, damage: Option<Damage>) {
    let mut buffer = [0; 10_000];
    let mut position = 0;
    while let Ok(len @ 1..) = from.read(&mut buffer) {
        let mut bytes = buffer[..len].to_vec();
        if let Some(damage) = damage.filter(|_| (position..position + len).contains(&DAMAGED_AT)) {
            let at = DAMAGED_AT - position;
            match damage {
                Damage::Flip => bytes[at] ^= 1,
                Damage::Drop => drop(bytes.remove(at)),
                Damage::Double => bytes.insert(at, bytes[at]),
                Damage::End => bytes.truncate(at),
            }
            if let Damage::End = damage {
                let _ = to.write_all(&bytes);
                break;
            }
        }
        position += len;
        if to.write_all(&bytes).is_err() {
            break;
        }
    }
    // The other side may be gone already.
    let _ = to.shutdown(Shutdown::Write);
}

#[test]
fn every_load_passes_over_a_direct_connection() {
    let backend = backend();
    let pattern = Pattern::default();
    client::warm_up(backend.address, &pattern).unwrap();
    for direction in DIRECTIONS {
        assert!(
            client::bulk(backend.address, &pattern, direction, BULK_BYTES).unwrap() > 0.0,
            "{direction:?}"
        );
    }
    for request_len in [1, 64, 16 * 1024] {
        let load = RequestLoad {
            connections: 5,
            request_len,
            warm_up_time: Duration::ZERO,
            measured_time: Duration::from_millis(50),
        };
        let rate = load.run(backend.address, &pattern).unwrap();
        assert!(rate.per_second > 0.0 && rate.latency.max() > 0, "{request_len}");
    }
    let (stamp, _flow) = client::stamp(backend.address).unwrap();
    assert_eq!(stamp.listened_at_ns, backend.listened_at_ns);
    assert_eq!(client::open_flows(backend.address, &pattern, 50).unwrap().len(), 50);
}

#[test]
fn a_damaged_byte_fails_the_transfer_in_either_direction() {
    let backend = backend();
    let pattern = Pattern::default();
    for damage in [Damage::Flip, Damage::Drop, Damage::Double, Damage::End] {
        for (upwards, direction) in [
            (true, Direction::Up),
            (false, Direction::Down),
            (true, Direction::Both),
            (false, Direction::Both),
        ] {
            let address = relay(backend.address, damage, upwards);
            let outcome = client::bulk(address, &pattern, direction, BULK_BYTES);
            assert!(outcome.is_err(), "{damage:?}, upwards: {upwards}, {direction:?}");
        }
    }
}

#[test]
fn a_peer_that_hangs_up_fails_every_load() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || listener.incoming().take(5).for_each(drop));
    let pattern = Pattern::default();
    assert!(client::warm_up(address, &pattern).is_err());
    assert!(client::stamp(address).is_err());
    assert!(client::open_flows(address, &pattern, 1).is_err());
    assert!(client::bulk(address, &pattern, Direction::Down, BULK_BYTES).is_err());
    let load = RequestLoad {
        connections: 1,
        request_len: 64,
        warm_up_time: Duration::ZERO,
        measured_time: Duration::from_millis(50),
    };
    assert!(load.run(address, &pattern).is_err());
}

#[test]
fn a_quick_run_writes_a_report_that_can_be_read_again() {
    let directory = tempfile::tempdir().unwrap();
    let mut command = Command::new(BENCH);
    command
        .args(["--quick", "--no-drowse", "--peers=direct", "--only=request,bulk/up", "--out"])
        .arg(directory.path());
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let table = std::fs::read_to_string(directory.path().join("latest.md")).unwrap();
    assert_eq!(String::from_utf8(output.stdout).unwrap(), table);
    let report: Report =
        serde_json::from_str(&std::fs::read_to_string(directory.path().join("latest.json")).unwrap())
            .unwrap();
    let cases: Vec<&str> = report.measurements.iter().map(|measurement| measurement.case.as_str()).collect();
    assert_eq!(cases, ["request/64B/1", "request/64B/32", "bulk/up"]);
    assert!(report.measurements.iter().all(|measurement| measurement.rounds.len() == 1));
}

#[test]
fn a_wrong_argument_is_told_in_one_line() {
    for (arguments, words) in [
        (vec!["--no-drowse", "--peers=direct", "--only=nothing"], "no case begins with nothing"),
        (vec!["--no-drowse", "--rounds=0"], "--rounds takes 1"),
        (vec!["--drowse=/does/not/exist"], "find drowse at /does/not/exist"),
    ] {
        let output = Command::new(BENCH).args(&arguments).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{arguments:?}");
        assert!(said.lines().count() == 1 && said.contains(words), "{said}");
    }
}
