//! What the tests of the planes share: flows, patterns of bytes, and waiting with a deadline.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use drowse::accounting::{Accounting, Totals};
use drowse::admission::Seat;
use drowse::clock;
use drowse::plane::{Flow, Plane};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use socket2::{Domain, Socket, Type};

use super::{MakePlane, WORKERS};

/// How long anything may take that is expected to happen.
pub const PATIENCE: Duration = Duration::from_mins(1);
pub const KIB: usize = 1024;
pub const MIB: usize = 1024 * KIB;

/// The bytes of a stream that sender and receiver both know.
pub struct Pattern(pub u64);

impl Pattern {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
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

/// How two sockets of a pair are made.
#[derive(Clone, Copy, Debug)]
pub enum Kind {
    Tcp,
    Unix,
    /// TCP with small fixed buffers, so that it congests soon.
    SmallTcp,
}

/// The buffer of [`Kind::SmallTcp`], which the kernel doubles.
pub const SMALL_BUFFER: usize = 64 * KIB;

pub fn pair(kind: Kind) -> (Socket, Socket) {
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
        self.plane.open(Flow { client: accepted.into(), backend: connected.into(), seat: Seat::default() });
        (near, far)
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

pub fn send(mut socket: &Socket, bytes: &[u8]) {
    socket.write_all(bytes).unwrap();
}

pub fn finish(socket: &Socket) {
    socket.shutdown(Shutdown::Write).unwrap();
}

pub fn expect(mut socket: &Socket, bytes: &[u8]) {
    let mut received = vec![0; bytes.len()];
    socket.read_exact(&mut received).unwrap();
    assert!(received == bytes, "other bytes arrived than were sent");
}

pub fn expect_end(mut socket: &Socket) {
    assert_eq!(socket.read(&mut [0; 16]).unwrap(), 0, "a clean end");
}

/// Receives until the end, which must be a reset.
pub fn until_reset(mut socket: &Socket) -> Vec<u8> {
    let mut bytes = Vec::new();
    let error = socket.read_to_end(&mut bytes).unwrap_err();
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
pub fn send_until_full_for(mut socket: &Socket, bytes: &[u8], for_time: Duration) -> usize {
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
pub fn receive_in_chunks(mut socket: &Socket, seed: u64) -> Vec<u8> {
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
