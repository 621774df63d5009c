//! Every plane moves the same bytes: one suite, run for each plane.
//!
//! A flow here is client <-> C | B <-> backend; C and B belong to the plane. All waiting has a deadline: sockets
//! time out, and what no socket tells is asked for again until [`PATIENCE`] is over.
#![expect(clippy::indexing_slicing, clippy::panic, clippy::unwrap_used, reason = "fixtures fail as tests do")]

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use drowse::accounting::{Accounting, Totals};
use drowse::admission::Seat;
use drowse::clock;
use drowse::plane::forward::{Forward, Mode};
use drowse::plane::{Flow, Plane};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use socket2::{Domain, Socket, Type};

const PATIENCE: Duration = Duration::from_mins(1);
const WORKERS: usize = 2;
const KIB: usize = 1024;
const MIB: usize = 1024 * KIB;

/// A plane by its constructor.
type MakePlane = fn(Arc<Accounting>) -> Box<dyn Plane>;

macro_rules! every_plane {
    ({ $($plane:ident = $make:expr;)* } for $tests:tt) => {
        $(every_plane!(@plane $plane, $make, $tests);)*
    };
    (@plane $plane:ident, $make:expr, [$($test:ident,)*]) => {
        mod $plane {
            $(#[test] fn $test() { super::$test($make); })*
        }
    };
}

every_plane! { {
    copy = |accounting| Box::new(super::Forward::new(super::Mode::Copy, super::WORKERS, accounting).unwrap());
    splice = |accounting| Box::new(super::Forward::new(super::Mode::Splice, super::WORKERS, accounting).unwrap());
    } for [
        mixed_flows_arrive_whole,
        half_close_by_the_client_gets_a_reply,
        half_close_by_the_backend_gets_a_reply,
        half_close_by_both_at_once,
        half_close_passes_a_congested_other_direction,
        backend_speaks_first,
        bytes_before_the_flow_opens_arrive,
        slow_reader_blocks_the_sender,
        reset_by_the_client_reaches_the_backend,
        reset_by_the_backend_reaches_the_client,
        reset_after_the_fin_is_passed_on,
        last_answer_before_a_reset_arrives_whole,
        last_answer_arrives_when_the_request_hits_the_reset,
        killed_backend_with_a_stalled_client,
        killed_client_with_a_stalled_backend,
        short_flows_leave_nothing_behind,
        thousand_flows_at_once,
        tiny_and_huge_writes,
        congested_and_free_in_turn,
        urgent_bytes_stay_in_the_stream,
        idle_flows_hold_nothing_but_sockets,
        no_descriptor_left_for_pipes,
        silent_flows_are_closed_active_ones_stay,
        silent_peers_that_do_not_answer_are_closed,
        silent_congested_flow_is_reset,
        reset_all_resets_both_sides,
        reset_all_delivers_what_was_taken,
        dropped_plane_resets_its_flows,
        one_busy_flow_does_not_starve_others,
    ]
}

/// The bytes of a stream that sender and receiver both know.
struct Pattern(u64);

impl Pattern {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() % limit as u64).unwrap()
    }

    fn bytes(seed: u64, len: usize) -> Vec<u8> {
        let mut pattern = Self(seed | 1);
        let mut bytes = Vec::with_capacity(len + 8);
        while bytes.len() < len {
            bytes.extend_from_slice(&pattern.next().to_ne_bytes());
        }
        bytes.truncate(len);
        bytes
    }
}

/// How two sockets of a pair are made.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Tcp,
    Unix,
    /// TCP with small fixed buffers, so that it congests soon.
    SmallTcp,
}

const SMALL_BUFFER: usize = 64 * KIB;

fn pair(kind: Kind) -> (Socket, Socket) {
    let (near, far) = match kind {
        Kind::Unix => Socket::pair(Domain::UNIX, Type::STREAM, None).unwrap(),
        Kind::Tcp | Kind::SmallTcp => {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            (near.into(), listener.accept().unwrap().0.into())
        }
    };
    for socket in [&near, &far] {
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket.set_write_timeout(Some(PATIENCE)).unwrap();
        if matches!(kind, Kind::SmallTcp) {
            socket.set_send_buffer_size(SMALL_BUFFER).unwrap();
            socket.set_recv_buffer_size(SMALL_BUFFER).unwrap();
        }
    }
    (near, far)
}

/// A plane under test and its counters.
struct Bed {
    plane: Box<dyn Plane>,
    accounting: Arc<Accounting>,
}

impl Bed {
    fn new(make: MakePlane) -> Self {
        let accounting = Accounting::new(WORKERS);
        Self { plane: make(Arc::clone(&accounting)), accounting }
    }

    /// Opens a flow; returns the client's and the backend's socket.
    fn flow(&self, client: Kind, backend: Kind) -> (Socket, Socket) {
        let (near, accepted) = pair(client);
        let (connected, far) = pair(backend);
        self.plane.open(Flow { client: accepted.into(), backend: connected.into(), seat: Seat::default() });
        (near, far)
    }

    fn tcp(&self) -> (Socket, Socket) {
        self.flow(Kind::Tcp, Kind::Tcp)
    }

    /// Waits until no flow is open, woken by the plane itself.
    fn all_closed(&self) -> Totals {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let accounting = Arc::clone(&self.accounting);
        runtime.block_on(async move {
            let closed = async {
                while accounting.totals().flows_open > 0 {
                    accounting.few_open().await;
                }
            };
            let patience = tokio::time::timeout(PATIENCE, closed).await;
            assert!(patience.is_ok(), "flows are still open: {:?}", accounting.totals());
            accounting.totals()
        })
    }
}

fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    let until = clock::now() + PATIENCE;
    while !is_so() {
        assert!(clock::now() < until, "not in time: {what}");
        thread::park_timeout(Duration::from_millis(1));
    }
}

fn elapsed(since: clock::Monotonic) -> Duration {
    clock::now().saturating_sub(since)
}

fn send(mut socket: &Socket, bytes: &[u8]) {
    socket.write_all(bytes).unwrap();
}

fn finish(socket: &Socket) {
    socket.shutdown(Shutdown::Write).unwrap();
}

fn expect(mut socket: &Socket, bytes: &[u8]) {
    let mut received = vec![0; bytes.len()];
    socket.read_exact(&mut received).unwrap();
    assert!(received == bytes, "other bytes arrived than were sent");
}

fn expect_end(mut socket: &Socket) {
    assert_eq!(socket.read(&mut [0; 16]).unwrap(), 0, "a clean end");
}

/// Receives until the end, which must be a reset.
fn until_reset(mut socket: &Socket) -> Vec<u8> {
    let mut bytes = Vec::new();
    let error = socket.read_to_end(&mut bytes).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    bytes
}

fn reset(socket: Socket) {
    socket.set_linger(Some(Duration::ZERO)).unwrap();
    drop(socket);
}

/// Sends without blocking until the socket stays full. Returns how many bytes it took.
fn send_until_full(socket: &Socket, bytes: &[u8]) -> usize {
    send_until_full_for(socket, bytes, Duration::from_millis(100))
}

/// Sends without blocking until the socket has had no room `for_time`.
fn send_until_full_for(mut socket: &Socket, bytes: &[u8], for_time: Duration) -> usize {
    socket.set_nonblocking(true).unwrap();
    let mut sent = 0;
    while sent < bytes.len() {
        match socket.write(&bytes[sent..]) {
            Ok(count) => sent += count,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                if !is_ready(socket, PollFlags::OUT, for_time) {
                    break;
                }
            }
            Err(error) => panic!("send: {error}"),
        }
    }
    socket.set_nonblocking(false).unwrap();
    sent
}

fn is_ready(socket: &Socket, flags: PollFlags, within: Duration) -> bool {
    let mut fds = [PollFd::new(socket, flags)];
    let timeout = rustix::time::Timespec::try_from(within).unwrap();
    poll(&mut fds, Some(&timeout)).unwrap() > 0
}

fn ping(client: &Socket, backend: &Socket) {
    send(client, b"ping");
    expect(backend, b"ping");
    send(backend, b"pong");
    expect(client, b"pong");
}

fn open_fds() -> usize {
    // The directory's own descriptor is among them.
    std::fs::read_dir("/proc/self/fd").unwrap().count() - 1
}

fn resident_bytes() -> usize {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4 * KIB
}

fn limit_fds(soft: u64) {
    let maximum = getrlimit(Resource::Nofile).maximum;
    setrlimit(Resource::Nofile, Rlimit { current: Some(soft), maximum }).unwrap();
}

fn raise_fd_limit() {
    let maximum = getrlimit(Resource::Nofile).maximum;
    setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }).unwrap();
}

/// Sends in random chunks, then the FIN.
fn send_in_chunks(socket: &Socket, seed: u64, bytes: &[u8]) {
    let mut random = Pattern(seed | 1);
    let mut rest = bytes;
    while !rest.is_empty() {
        let limit = [1, 100, 4 * KIB, 200 * KIB][random.below(4)];
        let (chunk, after) = rest.split_at((random.below(limit) + 1).min(rest.len()));
        send(socket, chunk);
        rest = after;
    }
    finish(socket);
}

/// Receives in random chunks until the FIN.
fn receive_in_chunks(mut socket: &Socket, seed: u64) -> Vec<u8> {
    let mut random = Pattern(seed | 1);
    let mut bytes = Vec::new();
    let mut buffer = vec![0; 100 * KIB];
    loop {
        let limit = [10, KIB, 100 * KIB][random.below(3)];
        let count = socket.read(&mut buffer[..=random.below(limit)]).unwrap();
        if count == 0 {
            return bytes;
        }
        bytes.extend_from_slice(&buffer[..count]);
    }
}

fn mixed_flows_arrive_whole(make: MakePlane) {
    let bed = Bed::new(make);
    let kinds = [Kind::Tcp, Kind::Unix, Kind::SmallTcp];
    let mut random = Pattern(0x5eed);
    let mut expected = Totals::default();
    thread::scope(|scope| {
        for flow in 0..64_usize {
            let (client, backend) = bed.flow(kinds[flow % 3], kinds[flow / 3 % 3]);
            let limit = [1, 1000, 100 * KIB, MIB][random.below(4)];
            let there = Pattern::bytes(random.next(), random.below(limit));
            let back = Pattern::bytes(random.next(), random.below(limit));
            expected.bytes_to_backend += there.len() as u64;
            expected.bytes_to_client += back.len() as u64;
            let seed = random.next();
            scope.spawn(move || {
                thread::scope(|scope| {
                    scope.spawn(|| send_in_chunks(&client, seed, &there));
                    scope.spawn(|| send_in_chunks(&backend, seed ^ 2, &back));
                    scope.spawn(|| assert!(receive_in_chunks(&backend, seed ^ 4) == there, "to the backend"));
                    scope.spawn(|| assert!(receive_in_chunks(&client, seed ^ 8) == back, "to the client"));
                });
            });
        }
    });
    let totals = bed.all_closed();
    assert_eq!(totals.flows_total, 64);
    assert_eq!(totals.bytes_to_backend, expected.bytes_to_backend);
    assert_eq!(totals.bytes_to_client, expected.bytes_to_client);
}

fn half_close(kind: Kind, make: MakePlane, client_first: bool) {
    let bed = Bed::new(make);
    let (client, backend) = bed.flow(kind, kind);
    let (first, second) = if client_first { (&client, &backend) } else { (&backend, &client) };
    let request = Pattern::bytes(1, 10 * KIB);
    let reply = Pattern::bytes(2, 3 * MIB);
    send(first, &request);
    finish(first);
    expect(second, &request);
    expect_end(second);
    thread::scope(|scope| {
        scope.spawn(|| {
            send(second, &reply);
            finish(second);
        });
        expect(first, &reply);
        expect_end(first);
    });
    let totals = bed.all_closed();
    assert_eq!(totals.bytes_to_backend + totals.bytes_to_client, (request.len() + reply.len()) as u64);
}

fn half_close_by_the_client_gets_a_reply(make: MakePlane) {
    half_close(Kind::Tcp, make, true);
    half_close(Kind::Unix, make, true);
}

fn half_close_by_the_backend_gets_a_reply(make: MakePlane) {
    half_close(Kind::Tcp, make, false);
    half_close(Kind::Unix, make, false);
}

fn half_close_by_both_at_once(make: MakePlane) {
    let bed = Bed::new(make);
    for round in 0..200 {
        let kind = if round % 2 == 0 { Kind::Tcp } else { Kind::Unix };
        let (client, backend) = bed.flow(kind, kind);
        thread::scope(|scope| {
            for socket in [&client, &backend] {
                scope.spawn(|| {
                    send(socket, b"last words");
                    finish(socket);
                });
            }
        });
        for socket in [&client, &backend] {
            expect(socket, b"last words");
            expect_end(socket);
        }
    }
    assert_eq!(bed.all_closed().flows_total, 200);
}

fn half_close_passes_a_congested_other_direction(make: MakePlane) {
    let bed = Bed::new(make);
    let (client, backend) = bed.flow(Kind::SmallTcp, Kind::SmallTcp);
    let flood = Pattern::bytes(3, 8 * MIB);
    let sent = send_until_full(&backend, &flood);
    assert!(sent < flood.len(), "the direction to the client is congested");
    send(&client, b"enough");
    finish(&client);
    expect(&backend, b"enough");
    expect_end(&backend);
    thread::scope(|scope| {
        scope.spawn(|| {
            send(&backend, &flood[sent..]);
            finish(&backend);
        });
        expect(&client, &flood);
        expect_end(&client);
    });
    bed.all_closed();
}

fn backend_speaks_first(make: MakePlane) {
    let bed = Bed::new(make);
    let (client, backend) = bed.tcp();
    send(&backend, b"220 hello");
    expect(&client, b"220 hello");
    ping(&client, &backend);
}

fn bytes_before_the_flow_opens_arrive(make: MakePlane) {
    let bed = Bed::new(make);
    let (client, accepted) = pair(Kind::Tcp);
    let (connected, backend) = pair(Kind::Tcp);
    send(&client, b"early request");
    finish(&client);
    send(&backend, b"early answer");
    finish(&backend);
    for socket in [&accepted, &connected] {
        assert!(is_ready(socket, PollFlags::RDHUP, PATIENCE), "bytes and FIN are there");
    }
    bed.plane.open(Flow { client: accepted.into(), backend: connected.into(), seat: Seat::default() });
    assert_eq!(bed.accounting.totals().flows_total, 1, "counted at once");
    expect(&backend, b"early request");
    expect_end(&backend);
    expect(&client, b"early answer");
    expect_end(&client);
    bed.all_closed();
}

fn slow_reader_blocks_the_sender(make: MakePlane) {
    let bed = Bed::new(make);
    let flood = Pattern::bytes(4, 64 * MIB);
    for to_backend in [true, false] {
        let (client, accepted) = pair(Kind::SmallTcp);
        let (connected, backend) = pair(Kind::SmallTcp);
        bed.plane.open(Flow { client: accepted.into(), backend: connected.into(), seat: Seat::default() });
        let (sender, reader) = if to_backend { (&client, &backend) } else { (&backend, &client) };
        let resident_before = resident_bytes();
        let sent = send_until_full(sender, &flood);
        let grown = resident_bytes().saturating_sub(resident_before);
        // The kernel doubles each of the four buffers.
        assert!(
            sent < 4 * MIB + 4 * 2 * SMALL_BUFFER,
            "{sent} bytes were taken for a reader that does not read"
        );
        assert!(grown < 4 * MIB, "memory grew by {grown} bytes");
        expect(reader, &flood[..sent]);
        ping(&client, &backend);
    }
}

fn reset_in_mid_stream(make: MakePlane, by_client: bool) {
    let bed = Bed::new(make);
    let bytes = Pattern::bytes(5, 300 * KIB);
    for _ in 0..20 {
        let (client, backend) = bed.tcp();
        ping(&client, &backend);
        let (dying, other) = if by_client { (client, backend) } else { (backend, client) };
        send_until_full(&dying, &bytes);
        reset(dying);
        let received = until_reset(&other);
        assert!(bytes.starts_with(&received), "what arrives is what was sent");
        assert_eq!(bed.all_closed().flows_open, 0);
    }
}

fn reset_by_the_client_reaches_the_backend(make: MakePlane) {
    reset_in_mid_stream(make, true);
}

fn reset_by_the_backend_reaches_the_client(make: MakePlane) {
    reset_in_mid_stream(make, false);
}

fn reset_after_the_fin_is_passed_on(make: MakePlane) {
    let bed = Bed::new(make);
    for by_client in [true, false] {
        let (client, backend) = bed.tcp();
        let (dying, other) = if by_client { (client, backend) } else { (backend, client) };
        finish(&dying);
        expect_end(&other);
        reset(dying);
        // The end of the stream was read already; the reset shows when more is sent.
        eventually("the reset", || (&other).write(b"x").is_err());
        bed.all_closed();
    }
}

fn last_answer_before_a_reset_arrives_whole(make: MakePlane) {
    let bed = Bed::new(make);
    let answer = Pattern::bytes(6, 200 * KIB);
    for kind in [Kind::Tcp, Kind::Tcp, Kind::Unix] {
        let (client, backend) = bed.flow(kind, kind);
        send(&client, b"a request that is never read");
        assert!(is_ready(&backend, PollFlags::IN, PATIENCE));
        send(&backend, &answer[..30 * KIB]);
        if matches!(kind, Kind::Tcp) {
            eventually("acknowledged", || drowse::sys::send_queue_bytes(backend.as_fd()).unwrap() == 0);
        }
        drop(backend);
        bed.all_closed();
        // The client looks only now: nothing that was on its way may have been thrown away.
        if matches!(kind, Kind::Tcp) {
            assert!(until_reset(&client) == answer[..30 * KIB]);
        } else {
            expect(&client, &answer[..30 * KIB]);
        }
    }
}

fn last_answer_arrives_when_the_request_hits_the_reset(make: MakePlane) {
    let bed = Bed::new(make);
    let request = Pattern::bytes(7, 4 * MIB);
    let answer = Pattern::bytes(8, 20 * KIB);
    for _ in 0..20 {
        let (client, backend) = bed.tcp();
        thread::scope(|scope| {
            scope.spawn(|| {
                // It fails in the middle, sooner or later.
                let _ = (&client).write_all(&request);
            });
            expect(&backend, &request[..KIB]);
            send(&backend, &answer);
            eventually("acknowledged", || drowse::sys::send_queue_bytes(backend.as_fd()).unwrap() == 0);
            drop(backend);
        });
        bed.all_closed();
        let mut received = Vec::new();
        // The failed send may have reported the reset; the bytes are there nevertheless.
        let _ = (&client).read_to_end(&mut received);
        assert!(received == answer, "{} of {} bytes", received.len(), answer.len());
    }
}

fn killed_with_a_stalled_peer(make: MakePlane, backend_dies: bool) {
    let bed = Bed::new(make);
    let flood = Pattern::bytes(9, 64 * MIB);
    let (client, backend) = bed.flow(Kind::SmallTcp, Kind::SmallTcp);
    let (dying, stalled) = if backend_dies { (backend, client) } else { (client, backend) };
    let sent = send_until_full(&dying, &flood);
    assert!(sent < flood.len());
    reset(dying);
    assert!(is_ready(&stalled, PollFlags::RDHUP, Duration::from_secs(1)), "the peer hears within a second");
    assert!(flood.starts_with(&until_reset(&stalled)));
    bed.all_closed();
}

fn killed_backend_with_a_stalled_client(make: MakePlane) {
    killed_with_a_stalled_peer(make, true);
}

fn killed_client_with_a_stalled_backend(make: MakePlane) {
    killed_with_a_stalled_peer(make, false);
}

fn short_flows_leave_nothing_behind(make: MakePlane) {
    const FLOWS: usize = 10_000;
    let fds_before = open_fds();
    let bed = Bed::new(make);
    let bytes = Pattern::bytes(10, 70 * KIB);
    let mut expected = 0;
    for flow in 0..FLOWS {
        let kind = if flow % 4 == 0 { Kind::Tcp } else { Kind::Unix };
        let (client, backend) = bed.flow(kind, kind);
        let request = &bytes[..=flow % 100];
        let answer = if flow % 100 == 0 { &bytes[..] } else { &bytes[..flow % 1000] };
        send(&client, request);
        finish(&client);
        expect(&backend, request);
        send(&backend, answer);
        drop(backend);
        expect(&client, answer);
        expect_end(&client);
        expected += (request.len() + answer.len()) as u64;
    }
    let totals = bed.all_closed();
    assert_eq!(totals.flows_total, FLOWS as u64);
    assert_eq!(totals.flows_open, 0);
    assert_eq!(totals.bytes_to_backend + totals.bytes_to_client, expected);
    assert!(totals.last_activity <= clock::now() && totals.last_activity > Duration::ZERO);
    drop(bed);
    assert_eq!(open_fds(), fds_before, "descriptors leak");
}

fn thousand_flows_at_once(make: MakePlane) {
    raise_fd_limit();
    let bed = Bed::new(make);
    let flows: Vec<_> = (0..1000_u64).map(|flow| (flow, bed.tcp())).collect();
    assert_eq!(bed.accounting.totals().flows_open, 1000);
    for round in 0..3 {
        for (flow, (client, backend)) in &flows {
            send(client, &Pattern::bytes(flow + round, 300));
            send(backend, &Pattern::bytes(flow + round + 5000, 4000));
        }
        for (flow, (client, backend)) in &flows {
            expect(backend, &Pattern::bytes(flow + round, 300));
            expect(client, &Pattern::bytes(flow + round + 5000, 4000));
        }
    }
    drop(flows);
    let totals = bed.all_closed();
    assert_eq!((totals.bytes_to_backend, totals.bytes_to_client), (900_000, 12_000_000));
}

fn tiny_and_huge_writes(make: MakePlane) {
    let bed = Bed::new(make);
    for kind in [Kind::Tcp, Kind::Unix] {
        let (client, backend) = bed.flow(kind, kind);
        for (sender, receiver) in [(&client, &backend), (&backend, &client)] {
            let tiny = Pattern::bytes(11, 2000);
            let huge = Pattern::bytes(12, 32 * MIB);
            thread::scope(|scope| {
                scope.spawn(|| {
                    tiny.chunks(1).for_each(|byte| send(sender, byte));
                    send(sender, &huge);
                    tiny.chunks(1).for_each(|byte| send(sender, byte));
                });
                expect(receiver, &tiny);
                expect(receiver, &huge);
                expect(receiver, &tiny);
            });
        }
    }
}

fn congested_and_free_in_turn(make: MakePlane) {
    let bed = Bed::new(make);
    let mut random = Pattern(0xc0de);
    let bytes = Pattern::bytes(13, 96 * MIB);
    for kind in [Kind::SmallTcp, Kind::Unix] {
        let (client, backend) = bed.flow(kind, kind);
        for (sender, receiver) in [(&client, &backend), (&backend, &client)] {
            let (mut sent, mut received, mut rounds) = (0, 0, 0);
            while sent < bytes.len() && rounds < 300 {
                sent += send_until_full_for(sender, &bytes[sent..], Duration::from_millis(1));
                let count = random.below(sent - received + 1);
                expect(receiver, &bytes[received..received + count]);
                received += count;
                rounds += 1;
            }
            assert!(rounds >= 200, "congested only {rounds} times");
            expect(receiver, &bytes[received..sent]);
        }
    }
}

fn urgent_bytes_stay_in_the_stream(make: MakePlane) {
    let bed = Bed::new(make);
    let bulk = Pattern::bytes(14, 300 * KIB);
    let (client, backend) = bed.tcp();
    for (sender, receiver) in [(&client, &backend), (&backend, &client)] {
        thread::scope(|scope| {
            scope.spawn(|| {
                send(sender, b"before");
                assert_eq!(sender.send_out_of_band(b"!").unwrap(), 1);
                send(sender, b"between");
                send(sender, &bulk);
                assert_eq!(sender.send_out_of_band(b"?").unwrap(), 1);
                send(sender, &bulk);
            });
            expect(receiver, b"before!between");
            expect(receiver, &bulk);
            expect(receiver, b"?");
            expect(receiver, &bulk);
        });
    }
}

fn idle_flows_hold_nothing_but_sockets(make: MakePlane) {
    const FLOWS: usize = 200;
    raise_fd_limit();
    let bed = Bed::new(make);
    let bulk = Pattern::bytes(15, 300 * KIB);
    let fds_before = open_fds();
    let flows: Vec<_> = (0..FLOWS).map(|_| bed.flow(Kind::SmallTcp, Kind::SmallTcp)).collect();
    // All of them congested at the same time, then drained.
    let taken: Vec<_> =
        flows.iter().map(|(client, _)| send_until_full_for(client, &bulk, Duration::ZERO)).collect();
    for ((client, backend), taken) in flows.iter().zip(taken) {
        thread::scope(|scope| {
            scope.spawn(|| send(client, &bulk[taken..]));
            expect(backend, &bulk);
        });
        ping(client, backend);
    }
    let pipes = (open_fds() - fds_before - FLOWS * 4) / 2;
    assert!(pipes <= WORKERS * 16, "{pipes} pipes are kept");
}

fn no_descriptor_left_for_pipes(make: MakePlane) {
    let bed = Bed::new(make);
    let bulk = Pattern::bytes(16, 16 * MIB);
    let (client, backend) = bed.tcp();
    ping(&client, &backend);
    let soft = getrlimit(Resource::Nofile).current;
    limit_fds(0);
    assert!(client.try_clone().is_err(), "no descriptor can be had");
    thread::scope(|scope| {
        for socket in [&client, &backend] {
            scope.spawn(|| {
                send(socket, &bulk);
                finish(socket);
            });
        }
        for socket in [&client, &backend] {
            scope.spawn(|| {
                expect(socket, &bulk);
                expect_end(socket);
            });
        }
    });
    limit_fds(soft.unwrap());
    bed.all_closed();
}

fn silent_flows_are_closed_active_ones_stay(make: MakePlane) {
    let silent_for = Duration::from_millis(200);
    let bed = Bed::new(make);
    let silent = [Kind::Tcp, Kind::Unix].map(|kind| bed.flow(kind, kind));
    let active = [Kind::Tcp, Kind::Unix].map(|kind| bed.flow(kind, kind));
    for (client, backend) in silent.iter().chain(&active) {
        ping(client, backend);
    }
    let since = clock::now();
    while elapsed(since) < silent_for {
        for (client, backend) in &active {
            ping(client, backend);
        }
    }
    // Bytes that the worker may not have seen yet count too.
    send(&active[0].0, b"just now");
    bed.plane.close_silent(silent_for);
    for (client, backend) in &silent {
        expect_end(client);
        expect_end(backend);
        // What is said after the FIN goes nowhere and hurts nobody.
        send(client, b"close notify");
    }
    drop(silent);
    expect(&active[0].1, b"just now");
    for (client, backend) in &active {
        ping(client, backend);
    }
    eventually("silent flows end", || bed.accounting.totals().flows_open == 2);
    drop(active);
    bed.all_closed();
}

fn silent_peers_that_do_not_answer_are_closed(make: MakePlane) {
    let bed = Bed::new(make);
    let (client, backend) = bed.tcp();
    ping(&client, &backend);
    let since = clock::now();
    bed.plane.close_silent(Duration::ZERO);
    bed.all_closed();
    let took = elapsed(since);
    assert!(took >= Duration::from_secs(1) && took < Duration::from_secs(5), "{took:?}");
    expect_end(&client);
    expect_end(&backend);
}

fn silent_congested_flow_is_reset(make: MakePlane) {
    let bed = Bed::new(make);
    let flood = Pattern::bytes(17, 16 * MIB);
    let (client, backend) = bed.flow(Kind::SmallTcp, Kind::SmallTcp);
    assert!(send_until_full(&client, &flood) < flood.len());
    // A worker that was kept waiting may have moved a byte just now; then the flow rightly stays.
    eventually("the silent flow ends", || {
        bed.plane.close_silent(Duration::from_millis(10));
        bed.accounting.totals().flows_open == 0
    });
    assert!(flood.starts_with(&until_reset(&backend)), "a stream that was cut short has no clean end");
    until_reset(&client);
}

fn reset_all_resets_both_sides(make: MakePlane) {
    let bed = Bed::new(make);
    let flows: Vec<_> = (0..50).map(|_| bed.tcp()).collect();
    let unix = bed.flow(Kind::Unix, Kind::Unix);
    for (client, backend) in &flows {
        ping(client, backend);
    }
    bed.plane.reset_all();
    assert_eq!(bed.all_closed().flows_total, 51);
    for (client, backend) in &flows {
        assert!(until_reset(client).is_empty());
        assert!(until_reset(backend).is_empty());
    }
    expect_end(&unix.0);
    expect_end(&unix.1);
    let (client, backend) = bed.tcp();
    ping(&client, &backend);
}

fn reset_all_delivers_what_was_taken(make: MakePlane) {
    let bed = Bed::new(make);
    let flood = Pattern::bytes(18, 16 * MIB);
    let (client, backend) = bed.flow(Kind::SmallTcp, Kind::SmallTcp);
    let sent = send_until_full(&client, &flood);
    assert!(sent < flood.len());
    let since = clock::now();
    bed.plane.reset_all();
    bed.all_closed();
    assert!(elapsed(since) < Duration::from_secs(2), "a reader that does not read holds nothing up");
    assert!(flood.starts_with(&until_reset(&backend)));
    until_reset(&client);
}

fn dropped_plane_resets_its_flows(make: MakePlane) {
    let bed = Bed::new(make);
    let (client, backend) = bed.tcp();
    ping(&client, &backend);
    let Bed { plane, accounting } = bed;
    drop(plane);
    assert_eq!(accounting.totals().flows_open, 0, "closed before the drop returns");
    assert!(until_reset(&client).is_empty());
    assert!(until_reset(&backend).is_empty());
}

fn one_busy_flow_does_not_starve_others(make: MakePlane) {
    let bed = Bed::new(make);
    let bulk = vec![7; MIB];
    // Every worker has busy flows in both directions.
    let busy: Vec<_> = (0..WORKERS * 2).map(|_| bed.tcp()).collect();
    let (client, backend) = bed.tcp();
    let done = std::sync::atomic::AtomicBool::new(false);
    let is_done = || done.load(std::sync::atomic::Ordering::Relaxed);
    thread::scope(|scope| {
        for (client, backend) in &busy {
            for (sender, receiver) in [(client, backend), (backend, client)] {
                scope.spawn(|| {
                    while !is_done() {
                        send(sender, &bulk);
                    }
                    finish(sender);
                });
                scope.spawn(|| std::io::copy(&mut &*receiver, &mut std::io::sink()).unwrap());
            }
        }
        for _ in 0..50 {
            ping(&client, &backend);
        }
        done.store(true, std::sync::atomic::Ordering::Relaxed);
    });
}
