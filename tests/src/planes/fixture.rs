//! What the tests of the planes share: flows, patterns of bytes, and waiting with a deadline.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr};
use std::ops::Range;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use drowse::accounting::{Accounting, Totals};
use drowse::admission::Seat;
use drowse::clock;
use drowse::plane::{Flow, Plane};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use socket2::{Domain, Protocol, Socket, Type};

use super::{MakePlane, WORKERS};
use crate::random;

/// How long anything may take that is expected to happen.
pub const PATIENCE: Duration = Duration::from_mins(1);
pub const KIB: usize = 1024;
pub const MIB: usize = 1024 * KIB;

/// The bytes of a stream that sender and receiver both know.
pub struct Pattern(pub u64);

impl Pattern {
    pub fn next(&mut self) -> u64 {
        random::next(&mut self.0)
    }

    pub fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() % limit as u64).unwrap()
    }

    pub fn bytes(seed: u64, len: usize) -> Vec<u8> {
        let mut pattern = Self(seed | 1);
        let mut bytes = Vec::with_capacity(len + 8);
        while bytes.len() < len {
            bytes.extend_from_slice(&pattern.next().to_ne_bytes());
        }
        bytes.truncate(len);
        bytes
    }
}

/// A stream of any length of which nobody holds more than a block: each place of it can be made again.
#[derive(Debug)]
pub struct Endless(Vec<u8>);

impl Endless {
    const PIECE: usize = 64 * KIB;
    const PLACES: usize = MIB;

    pub fn new(seed: u64) -> Self {
        Self(Pattern::bytes(seed, Self::PLACES + Self::PIECE))
    }

    /// Some of the bytes from `position` on. No two pieces of the first 64 GiB begin in the same place of the
    /// block.
    pub fn at(&self, position: usize) -> &[u8] {
        let (piece, skip) = (position / Self::PIECE, position % Self::PIECE);
        let place = piece * 7919 % Self::PLACES;
        &self.0[place + skip..place + Self::PIECE]
    }

    /// The same, up to `end`.
    pub fn up_to(&self, position: usize, end: usize) -> &[u8] {
        let bytes = self.at(position);
        &bytes[..bytes.len().min(end.saturating_sub(position))]
    }

    /// Whether `bytes` are those from `position` on.
    pub fn check(&self, mut position: usize, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let expected = self.up_to(position, position + bytes.len());
            let (received, rest) = bytes.split_at(expected.len());
            assert!(received == expected, "other bytes arrived than were sent, after {position}");
            position += received.len();
            bytes = rest;
        }
    }

    /// Sends what is in `range`.
    pub fn send(&self, socket: &Socket, range: Range<usize>) {
        let mut position = range.start;
        while position < range.end {
            let bytes = self.up_to(position, range.end);
            send(socket, bytes);
            position += bytes.len();
        }
    }

    /// Sends what is in `range`, without blocking, until there has been no room `for_time`. Returns where it
    /// stopped.
    pub fn send_until_full_for(&self, socket: &Socket, range: Range<usize>, for_time: Duration) -> usize {
        range.start + fill(socket, for_time, |sent| self.up_to(range.start + sent, range.end))
    }

    /// Receives what is in `range`.
    pub fn expect(&self, socket: &Socket, range: Range<usize>) {
        let mut buffer = vec![0; Self::PIECE];
        let mut position = range.start;
        while position < range.end {
            let room = buffer.len().min(range.end - position);
            let count = Patient(socket).read(&mut buffer[..room]).unwrap();
            assert!(count > 0, "the stream ended after {position} bytes");
            self.check(position, &buffer[..count]);
            position += count;
        }
    }
}

/// How two sockets of a pair are made. Of a client's pair the plane has the far one, of a backend's the near
/// one.
#[derive(Clone, Copy, Debug)]
pub enum Kind {
    Tcp,
    Unix,
    /// TCP with small fixed buffers, so that it congests soon.
    SmallTcp,
    Tcp6,
    /// The far socket is of IPv6 and has IPv4 addresses.
    FarMapped,
    /// The near socket is of IPv6 and has IPv4 addresses.
    NearMapped,
    Mptcp,
    /// The near socket knows MPTCP, the far one's listener is plain TCP.
    NearMptcp,
    /// The near socket is plain TCP, the far one's listener knows MPTCP.
    FarMptcp,
}

/// The buffer of [`Kind::SmallTcp`], which the kernel doubles.
pub const SMALL_BUFFER: usize = 64 * KIB;

/// An address of this machine and a protocol.
type Way = (IpAddr, Protocol);

const TCP4: Way = (IpAddr::V4(Ipv4Addr::LOCALHOST), Protocol::TCP);
const TCP6: Way = (IpAddr::V6(Ipv6Addr::LOCALHOST), Protocol::TCP);
const MAPPED: Way = (IpAddr::V6(Ipv4Addr::LOCALHOST.to_ipv6_mapped()), Protocol::TCP);
const MPTCP: Way = (TCP4.0, Protocol::MPTCP);

fn connect(near: Way, far: Way, window: Option<usize>) -> (Socket, Socket) {
    let socket = |(address, protocol): Way| {
        let domain = Domain::for_address(SocketAddr::new(address, 0));
        let socket = Socket::new(domain, Type::STREAM, Some(protocol)).unwrap();
        // Before the handshake, which says how large it may get. The accepted socket gets the listener's.
        if let Some(window) = window {
            socket.set_recv_buffer_size(window).unwrap();
        }
        socket
    };
    let listener = socket(far);
    // Ports of connections that just ended may be taken again.
    listener.set_reuse_address(true).unwrap();
    listener.bind(&SocketAddr::new(far.0, 0).into()).unwrap();
    listener.listen(1).unwrap();
    let port = listener.local_addr().unwrap().as_socket().unwrap().port();
    let connecting = socket(near);
    connecting.connect(&SocketAddr::new(near.0, port).into()).unwrap();
    (connecting, listener.accept().unwrap().0)
}

/// Nothing that is done with the socket takes longer than [`PATIENCE`].
pub fn limit_waiting(socket: &Socket) {
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket.set_write_timeout(Some(PATIENCE)).unwrap();
}

/// Two TCP sockets that take a few bytes at a time.
pub fn pair_with_window(window: usize) -> (Socket, Socket) {
    let (near, far) = connect(TCP4, TCP4, Some(window));
    [&near, &far].into_iter().for_each(limit_waiting);
    (near, far)
}

pub fn pair(kind: Kind) -> (Socket, Socket) {
    let connect = |near, far| connect(near, far, None);
    let (near, far) = match kind {
        Kind::Unix => Socket::pair(Domain::UNIX, Type::STREAM, None).unwrap(),
        Kind::Tcp | Kind::SmallTcp => connect(TCP4, TCP4),
        Kind::Tcp6 => connect(TCP6, TCP6),
        Kind::FarMapped => connect(TCP4, MAPPED),
        Kind::NearMapped => connect(MAPPED, TCP4),
        Kind::Mptcp => connect(MPTCP, MPTCP),
        Kind::NearMptcp => connect(MPTCP, TCP4),
        Kind::FarMptcp => connect(TCP4, MPTCP),
    };
    for socket in [&near, &far] {
        limit_waiting(socket);
        if matches!(kind, Kind::SmallTcp) {
            socket.set_send_buffer_size(SMALL_BUFFER).unwrap();
            socket.set_recv_buffer_size(SMALL_BUFFER).unwrap();
        }
    }
    (near, far)
}

/// A plane under test and its counters.
pub struct Bed {
    pub plane: Box<dyn Plane>,
    pub accounting: Arc<Accounting>,
}

impl Bed {
    pub fn new(make: MakePlane) -> Self {
        let accounting = Accounting::new(WORKERS);
        Self { plane: make(Arc::clone(&accounting)), accounting }
    }

    /// Opens a flow; returns the client's and the backend's socket.
    pub fn flow(&self, client: Kind, backend: Kind) -> (Socket, Socket) {
        let (near, accepted) = pair(client);
        let (connected, far) = pair(backend);
        self.open(accepted, connected);
        (near, far)
    }

    /// Gives the plane its two sockets.
    pub fn open(&self, client: Socket, backend: Socket) {
        self.plane.open(Flow { client: client.into(), backend: backend.into(), seat: Seat::default() });
    }

    pub fn tcp(&self) -> (Socket, Socket) {
        self.flow(Kind::Tcp, Kind::Tcp)
    }

    /// Waits until no flow is open, woken by the plane itself.
    pub fn all_closed(&self) -> Totals {
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

pub fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    let until = clock::now() + PATIENCE;
    while !is_so() {
        assert!(clock::now() < until, "not in time: {what}");
        thread::park_timeout(Duration::from_millis(1));
    }
}

pub fn elapsed(since: clock::Monotonic) -> Duration {
    clock::now().saturating_sub(since)
}

/// Receives from a socket that blocks. One that is in a sockmap may say that there is nothing before its time is up
/// (`tcp_bpf_recvmsg`).
pub struct Patient<'a>(pub &'a Socket);

impl Read for Patient<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let until = clock::now() + PATIENCE;
        loop {
            match self.0.read(buffer) {
                Err(error) if error.kind() == ErrorKind::WouldBlock && clock::now() < until => {}
                result => return result,
            }
        }
    }
}

pub fn send(mut socket: &Socket, bytes: &[u8]) {
    socket.write_all(bytes).unwrap();
}

pub fn finish(socket: &Socket) {
    socket.shutdown(Shutdown::Write).unwrap();
}

pub fn expect(socket: &Socket, bytes: &[u8]) {
    let mut received = vec![0; bytes.len()];
    Patient(socket).read_exact(&mut received).unwrap();
    assert!(received == bytes, "other bytes arrived than were sent");
}

pub fn expect_end(socket: &Socket) {
    assert_eq!(Patient(socket).read(&mut [0; 16]).unwrap(), 0, "a clean end");
}

/// Receives until the end, which must be a reset.
pub fn until_reset(socket: &Socket) -> Vec<u8> {
    let mut bytes = Vec::new();
    let error = Patient(socket).read_to_end(&mut bytes).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    bytes
}

pub fn reset(socket: Socket) {
    socket.set_linger(Some(Duration::ZERO)).unwrap();
    drop(socket);
}

/// Sends without blocking until the socket stays full. Returns how many bytes it took.
pub fn send_until_full(socket: &Socket, bytes: &[u8]) -> usize {
    send_until_full_for(socket, bytes, Duration::from_millis(100))
}

/// Sends without blocking until the socket has had no room `for_time`.
pub fn send_until_full_for(socket: &Socket, bytes: &[u8], for_time: Duration) -> usize {
    fill(socket, for_time, |sent| &bytes[sent..])
}

/// Sends what `next` has after so many bytes, until that is nothing or there has been no room `for_time`.
fn fill<'a>(mut socket: &Socket, for_time: Duration, next: impl Fn(usize) -> &'a [u8]) -> usize {
    socket.set_nonblocking(true).unwrap();
    let mut sent = 0;
    loop {
        let bytes = next(sent);
        if bytes.is_empty() {
            break;
        }
        match socket.write(bytes) {
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

pub fn is_ready(socket: &Socket, flags: PollFlags, within: Duration) -> bool {
    let mut fds = [PollFd::new(socket, flags)];
    let timeout = rustix::time::Timespec::try_from(within).unwrap();
    poll(&mut fds, Some(&timeout)).unwrap() > 0
}

pub fn ping(client: &Socket, backend: &Socket) {
    send(client, b"ping");
    expect(backend, b"ping");
    send(backend, b"pong");
    expect(client, b"pong");
}

pub fn open_fds() -> usize {
    // The directory's own descriptor is among them.
    std::fs::read_dir("/proc/self/fd").unwrap().count() - 1
}

pub fn resident_bytes() -> usize {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4 * KIB
}

pub fn limit_fds(soft: u64) {
    let maximum = getrlimit(Resource::Nofile).maximum;
    setrlimit(Resource::Nofile, Rlimit { current: Some(soft), maximum }).unwrap();
}

pub fn raise_fd_limit() {
    let maximum = getrlimit(Resource::Nofile).maximum;
    setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }).unwrap();
}

/// Sends in random chunks, then the FIN.
pub fn send_in_chunks(socket: &Socket, seed: u64, bytes: &[u8]) {
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
pub fn receive_in_chunks(socket: &Socket, seed: u64) -> Vec<u8> {
    let mut random = Pattern(seed | 1);
    let mut bytes = Vec::new();
    let mut buffer = vec![0; 100 * KIB];
    loop {
        let limit = [10, KIB, 100 * KIB][random.below(3)];
        let count = Patient(socket).read(&mut buffer[..=random.below(limit)]).unwrap();
        if count == 0 {
            return bytes;
        }
        bytes.extend_from_slice(&buffer[..count]);
    }
}

/// How often threads of this process with such a name, of which there is one, gave up the processor to wait.
pub fn voluntary_switches(is_meant: impl Fn(&str) -> bool) -> usize {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let switches: Vec<usize> = tasks
        .filter_map(|task| {
            // A thread may end meanwhile.
            let status = std::fs::read_to_string(task.unwrap().path().join("status")).ok()?;
            let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
            is_meant(field("Name:")?).then(|| field("voluntary_ctxt_switches:").unwrap().parse().unwrap())
        })
        .collect();
    assert!(!switches.is_empty(), "no thread has such a name");
    switches.iter().sum()
}

/// Everything that a flow is for: bytes both ways, many both ways at once, the end of one half, then of the
/// other.
pub fn exercise(client: &Socket, backend: &Socket) {
    const BULK: usize = MIB;
    let stream = Endless::new(30);
    ping(client, backend);
    thread::scope(|scope| {
        for (sender, receiver) in [(client, backend), (backend, client)] {
            scope.spawn(|| stream.send(sender, 0..BULK));
            scope.spawn(|| stream.expect(receiver, 0..BULK));
        }
    });
    send(client, b"a question");
    finish(client);
    expect(backend, b"a question");
    expect_end(backend);
    send(backend, b"an answer");
    finish(backend);
    expect(client, b"an answer");
    expect_end(client);
}
