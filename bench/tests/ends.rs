//! Both ends of the benchmark, with nothing between them and with a relay that damages what passes.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test that panics has failed, as it should"
)]

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use drowse_bench::cases::Backend;
use drowse_bench::client;
use drowse_bench::client::bulk::{BulkLoad, Direction};
use drowse_bench::client::closed::RequestLoad;
use drowse_bench::client::fresh::FreshLoad;
use drowse_bench::client::load::{Load, LoadResult};
use drowse_bench::client::paced::PacedLoad;
use drowse_bench::client::slow::SlowReader;
use drowse_bench::process::{self, Running};
use drowse_bench::report::Report;
use drowse_bench::wire::Pattern;
use hdrhistogram::Histogram;

const BENCH: &str = env!("CARGO_BIN_EXE_drowse-bench");
const BULK_BYTES: u64 = 3 * 1024 * 1024 + 5;
const DIRECTIONS: [Direction; 3] = [Direction::Up, Direction::Down, Direction::Both];
const STALL: Duration = Duration::from_millis(300);

fn bulk(direction: Direction) -> Load {
    Load::Bulk(BulkLoad { direction, bytes: BULK_BYTES })
}

fn requests(connections: usize, request_len: u64, measured_time: Duration) -> Load {
    Load::Request(RequestLoad { connections, request_len, warm_up_time: Duration::ZERO, measured_time })
}

/// One connection, a request every millisecond.
fn paced(request_len: u64, measured_time: Duration) -> Load {
    let (connections, requests_per_second) = (1, 1_000);
    let warm_up_time = Duration::ZERO;
    Load::Paced(PacedLoad { connections, request_len, requests_per_second, warm_up_time, measured_time })
}

fn fresh(at_once: usize, measured_time: Duration) -> Load {
    Load::Fresh(FreshLoad { at_once, request_len: 64, warm_up_time: Duration::ZERO, measured_time })
}

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
    /// Everything behind it comes late.
    Stall,
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
                Damage::Stall => {
                    let (_nobody, word) = mpsc::channel::<()>();
                    assert!(word.recv_timeout(STALL).is_err());
                }
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
        let result = bulk(direction).run(backend.address, &pattern).unwrap();
        let ways = if direction == Direction::Both { 2 } else { 1 };
        assert!(result.per_second > 0.0 && result.bytes == ways * BULK_BYTES, "{direction:?}");
    }
    let time = Duration::from_millis(50);
    let loads = [requests(5, 1, time), requests(300, 64, time), requests(3, 1 << 20, time)];
    for load in loads.into_iter().chain([paced(64, time), fresh(4, time)]) {
        let result = load.run(backend.address, &pattern).unwrap();
        let latency = result.latency.unwrap();
        assert!(result.per_second > 0.0 && latency.max() > 0 && latency.len() <= result.requests, "{load:?}");
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
            let outcome = bulk(direction).run(address, &pattern);
            assert!(outcome.is_err(), "{damage:?}, upwards: {upwards}, {direction:?}");
        }
        for upwards in [true, false] {
            for load in [requests(1, 10_000, STALL * 20), paced(10_000, STALL * 20)] {
                let failure = load.run(relay(backend.address, damage, upwards), &pattern).unwrap_err();
                let waited = format!("{failure:#}").contains("no answer for");
                assert!(!waited, "{damage:?}, upwards: {upwards}, {load:?}: {failure:#}");
            }
        }
    }
}

#[test]
fn a_stall_shows_in_every_request_that_was_due_meanwhile() {
    let backend = backend();
    let pattern = Pattern::default();
    let run = |load: &Load| load.run(relay(backend.address, Damage::Stall, false), &pattern).unwrap();
    let late = |latency: Option<Histogram<u64>>| {
        let latency = latency.unwrap();
        let half = u64::try_from(STALL.as_nanos()).unwrap() / 2;
        let waited_half = latency
            .iter_recorded()
            .filter(|bucket| bucket.value_iterated_to() >= half)
            .map(|b| b.count_at_value());
        (waited_half.sum::<u64>(), latency.len())
    };
    // One answer in 300 milliseconds at a request each: half of those due waited for at least half of it.
    let open_loop = run(&paced(10_000, STALL * 2));
    let (since_due, all) = late(open_loop.latency);
    assert!(since_due >= 150, "{since_due} late requests");
    assert_eq!(all, 600, "the schedule was not kept");
    // A client that was late itself has sent some of them after the first half of the stall.
    let (since_sent, all) = late(open_loop.latency_since_sent);
    assert!((10..=since_due).contains(&since_sent), "{since_sent} late requests");
    assert_eq!(all, 600, "the schedule was not kept");
    let (closed_loop, _) = late(run(&requests(1, 10_000, STALL * 2)).latency);
    assert!(closed_loop < 100, "{closed_loop} late requests");
}

#[test]
fn a_rate_that_cannot_be_kept_is_a_result() {
    let backend = backend();
    let load = PacedLoad {
        connections: 3,
        request_len: 1,
        requests_per_second: 5_000_000,
        warm_up_time: Duration::ZERO,
        measured_time: Duration::from_millis(10),
    };
    let result = load.run(backend.address, &Pattern::default()).unwrap();
    assert_eq!((result.requests, result.latency.unwrap().len()), (50_000, 50_000));
    assert!(result.per_second < 4_900_000.0, "{}", result.per_second);
}

/// Answers one request of each of `count` connections with what `answer` makes of it.
fn fake(count: usize, answer: fn(Vec<u8>) -> Vec<u8>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for stream in listener.incoming().take(count) {
            let mut stream = stream.unwrap();
            let mut message = [0; 16 + 64];
            stream.read_exact(&mut message).unwrap();
            stream.write_all(&answer(message[16..].to_vec())).unwrap();
            // The client may be gone already.
            let _ = stream.shutdown(Shutdown::Write).and_then(|()| stream.read(&mut [0]));
        }
    });
    address
}

#[test]
fn a_new_connection_is_checked_from_its_first_byte_to_its_end() {
    let time = Duration::from_secs(20);
    let pattern = Pattern::default();
    let said = |answer| format!("{:#}", fresh(1, time).run(fake(5, answer), &pattern).unwrap_err());
    let flipped = |mut bytes: Vec<u8>| {
        bytes[63] ^= 1;
        bytes
    };
    assert_eq!(said(flipped), "the answer is not what was sent");
    assert!(said(|bytes| bytes[..63].to_vec()).starts_with("receive an answer"));
    assert_eq!(said(|bytes| [bytes.as_slice(), b"x"].concat()), "more came back than was sent");
    // Nobody answers any more after five right answers.
    assert!(!said(|bytes| bytes).is_empty());
}

#[test]
fn a_slow_reader_holds_up_nobody_and_gets_every_byte() {
    let backend = backend();
    let pattern = Pattern::default();
    let bytes = 48 << 20;
    let slow = SlowReader::stall(backend.address, bytes).unwrap();
    let fast = requests(4, 4096, Duration::from_millis(50)).run(backend.address, &pattern).unwrap();
    assert!(fast.per_second > 0.0);
    slow.finish(&pattern).unwrap();
    for damage in [Damage::Flip, Damage::Drop, Damage::Double, Damage::End] {
        let slow = SlowReader::stall(relay(backend.address, damage, false), BULK_BYTES).unwrap();
        assert!(slow.finish(&pattern).is_err(), "{damage:?}");
    }
}

#[test]
fn a_client_in_a_process_of_its_own_brings_the_same_result() {
    let backend = backend();
    for load in [paced(64, Duration::from_millis(50)), bulk(Direction::Both)] {
        let here = load.run(backend.address, &Pattern::default()).unwrap();
        let there = load.run_in_child(process::command(BENCH), backend.address).unwrap();
        let counted = |result: &LoadResult| result.latency.as_ref().map(Histogram::len);
        assert_eq!((there.requests, there.bytes), (here.requests, here.bytes));
        assert_eq!(counted(&there), counted(&here));
        assert!(there.per_second > 0.0);
    }
    let address = backend.address;
    drop(backend);
    let failure = bulk(Direction::Up).run_in_child(process::command(BENCH), address).unwrap_err();
    assert!(format!("{failure:#}").contains("client said: drowse-bench: connect"), "{failure:#}");
}

#[test]
fn a_peer_that_hangs_up_fails_every_load() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || listener.incoming().take(7).for_each(drop));
    let pattern = Pattern::default();
    assert!(client::warm_up(address, &pattern).is_err());
    assert!(client::stamp(address).is_err());
    assert!(client::open_flows(address, &pattern, 1).is_err());
    assert!(SlowReader::stall(address, BULK_BYTES).and_then(|slow| slow.finish(&pattern)).is_err());
    let time = Duration::from_millis(50);
    for load in [bulk(Direction::Down), requests(1, 64, time), paced(64, time), fresh(1, time)] {
        assert!(load.run(address, &pattern).is_err(), "{load:?}");
    }
}

#[test]
fn a_quick_run_writes_a_report_that_can_be_read_again() {
    let directory = tempfile::tempdir().unwrap();
    let mut command = Command::new(BENCH);
    command
        .args(["--quick", "--no-drowse", "--peers=direct", "--only=request/64B,bulk/up", "--out"])
        .arg(directory.path());
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let table = std::fs::read_to_string(directory.path().join("latest.md")).unwrap();
    assert_eq!(String::from_utf8(output.stdout).unwrap(), table);
    let report: Report =
        serde_json::from_str(&std::fs::read_to_string(directory.path().join("latest.json")).unwrap())
            .unwrap();
    let cases: Vec<&str> = report.measurements.iter().map(|measurement| measurement.case.as_str()).collect();
    assert_eq!(cases, ["request/64B/1", "request/64B/32", "request/64B/256", "request/64B/512", "bulk/up"]);
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
