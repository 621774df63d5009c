//! The load generator: the client's side of every benchmark.
//!
//! Owns: connections to a peer, their load, and checking every answer. Must never: know which peer it talks to.
//! Requests are a closed loop: each connection sends its next request when the answer to the last one has arrived,
//! so latencies are those of an unhurried client, not those of a fixed arrival rate.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use hdrhistogram::Histogram;
use rustix::event::Timespec;
use rustix::event::epoll::{self, EventData, EventFlags};

use crate::backend::{receive, send};
use crate::wire::{ANSWER_LEN, CHUNK_LEN, Command, Pattern, Receipt, Stamp};

/// A connection that gets no answer for this long has failed.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);
/// Latencies are kept between 1 microsecond and this, with three digits.
const LATENCY_MAX_NS: u64 = 60_000_000_000;
/// Connections opened, or used, at once where there are many: below the usual backlogs, and quick on a busy machine.
const BATCH: usize = 100;
/// A whole request, so that a closed loop never meets a full send buffer.
const REQUEST_LEN_MAX: usize = 16 * 1024;

/// A connection to `address` that has sent `command`.
///
/// # Errors
/// When the connection or the command fails.
pub fn connect(address: SocketAddr, command: Command) -> Result<TcpStream> {
    let mut stream = TcpStream::connect_timeout(&address, ANSWER_WITHIN).context("connect")?;
    stream.set_nodelay(true).context("set TCP_NODELAY")?;
    stream.set_read_timeout(Some(ANSWER_WITHIN)).context("set a read timeout")?;
    stream.set_write_timeout(Some(ANSWER_WITHIN)).context("set a write timeout")?;
    stream.write_all(&command.encode()).context("send the command")?;
    Ok(stream)
}

/// Shows that the way to the backend works, before anything is timed.
///
/// # Errors
/// When it does not.
pub fn warm_up(address: SocketAddr, pattern: &Pattern) -> Result<()> {
    exchange_all(&[connect(address, Command::Echo)?], pattern, 0).context("first exchange")
}

/// Asks the backend when it began to listen.
///
/// # Errors
/// When there is no answer.
pub fn stamp(address: SocketAddr) -> Result<(Stamp, TcpStream)> {
    let mut stream = connect(address, Command::Stamp)?;
    let mut answer = [0; ANSWER_LEN];
    stream.read_exact(&mut answer).context("receive the backend's stamp")?;
    Ok((Stamp::decode(answer), stream))
}

/// Which way a bulk transfer goes, as the client sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// To the backend.
    Up,
    /// From the backend.
    Down,
    /// Both at once over one connection.
    Both,
}

/// Moves `bytes` bytes in each of the directions, and returns all bytes per second: from the first byte until the
/// last one is known to have arrived.
///
/// # Errors
/// When a byte is missing or wrong, or the connection breaks or stalls.
pub fn bulk(address: SocketAddr, pattern: &Pattern, direction: Direction, bytes: u64) -> Result<f64> {
    let command = match direction {
        Direction::Up => Command::Upload(bytes),
        Direction::Down => Command::Download(bytes),
        Direction::Both => Command::Both(bytes),
    };
    let stream = connect(address, command)?;
    let started = drowse::clock::now();
    let moved = match direction {
        Direction::Up => {
            send(&stream, pattern, bytes)?;
            check_receipt(&stream, bytes)?;
            bytes
        }
        Direction::Down => {
            Receipt::check(receive(&stream, pattern, bytes)?.encode(), bytes).context("download")?;
            bytes
        }
        Direction::Both => {
            thread::scope(|scope| {
                let sender = scope.spawn(|| send(&stream, pattern, bytes));
                let receipt = receive(&stream, pattern, bytes)?;
                sender.join().unwrap_or_else(|_| bail!("the sending thread panicked"))?;
                Receipt::check(receipt.encode(), bytes).context("download")
            })?;
            check_receipt(&stream, bytes)?;
            2 * bytes
        }
    };
    let seconds = drowse::clock::now().saturating_sub(started).as_secs_f64();
    #[expect(clippy::cast_precision_loss, reason = "a rate needs no more than 52 bits")]
    Ok(moved as f64 / seconds)
}

fn check_receipt(mut stream: &TcpStream, bytes: u64) -> Result<()> {
    let mut answer = [0; ANSWER_LEN];
    stream.read_exact(&mut answer).context("receive the receipt")?;
    Receipt::check(answer, bytes)
}

/// Opens `count` flows, shows that each of them works, and leaves them open.
///
/// # Errors
/// When one of them does not open or answer.
pub fn open_flows(address: SocketAddr, pattern: &Pattern, count: usize) -> Result<Vec<TcpStream>> {
    let mut flows = Vec::with_capacity(count);
    while flows.len() < count {
        let batch = (count - flows.len()).min(BATCH);
        let opened = (0..batch).map(|_| connect(address, Command::Echo)).collect::<Result<Vec<_>>>();
        let opened = opened.with_context(|| format!("open more flows beside {}", flows.len()))?;
        exchange_all(&opened, pattern, 0)?;
        flows.extend(opened);
    }
    Ok(flows)
}

/// Exchanges one request over each of many echo connections, many at a time.
///
/// # Errors
/// When an answer is missing or wrong.
pub fn exchange_all(flows: &[TcpStream], pattern: &Pattern, position: u64) -> Result<()> {
    let request = pattern.at(position, 64)?;
    for batch in flows.chunks(BATCH) {
        for mut flow in batch {
            flow.write_all(request).context("send a request")?;
        }
        for mut flow in batch {
            let mut answer = [0; 64];
            flow.read_exact(&mut answer).context("receive an answer")?;
            ensure!(answer == request, "the answer is not what was sent");
        }
    }
    Ok(())
}

/// A closed loop of requests.
#[derive(Debug, Clone, Copy)]
pub struct RequestLoad {
    /// Connections, each with one request on its way at a time.
    pub connections: usize,
    /// Bytes of a request and of its answer.
    pub request_len: usize,
    /// Time before anything counts.
    pub warm_up_time: Duration,
    /// Time that counts: no request is sent after it, and the answers still on their way then count, too.
    pub measured_time: Duration,
}

/// What a closed loop of requests showed.
#[derive(Debug)]
pub struct RequestRate {
    /// Answers per second, from the end of the warm-up until the last answer.
    pub per_second: f64,
    /// From sending a request until its whole answer was there, in nanoseconds.
    pub latency: Histogram<u64>,
    /// All requests that were answered, those of the warm-up included.
    pub requests: u64,
}

/// One connection of a closed loop.
#[derive(Debug)]
struct Requester {
    stream: TcpStream,
    request: Vec<u8>,
    answer: Vec<u8>,
    received_len: usize,
    position: u64,
    sent_at: Duration,
}

impl Requester {
    fn send_next(&mut self, pattern: &Pattern, now: Duration) -> Result<()> {
        self.position += 1;
        self.request.clear();
        self.request.extend_from_slice(pattern.at(self.position, self.answer.len())?);
        self.received_len = 0;
        self.sent_at = now;
        let written = self.stream.write(&self.request).context("send a request")?;
        ensure!(written == self.request.len(), "an idle connection took only {written} bytes of a request");
        Ok(())
    }

    /// Reads what has arrived; true when the answer is whole, and right.
    fn receive(&mut self) -> Result<bool> {
        let room = self.answer.get_mut(self.received_len..).context("size a read")?;
        match self.stream.read(room) {
            Ok(0) => bail!("the connection was closed in the middle of the load"),
            Ok(len) => self.received_len += len,
            Err(err) if matches!(err.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(err) => return Err(err).context("receive an answer"),
        }
        if self.received_len < self.answer.len() {
            return Ok(false);
        }
        ensure!(self.answer == self.request, "the answer is not what was sent");
        Ok(true)
    }
}

impl RequestLoad {
    /// Runs the load against `address`.
    ///
    /// # Errors
    /// When a connection fails, stalls, or brings a wrong answer.
    pub fn run(&self, address: SocketAddr, pattern: &Pattern) -> Result<RequestRate> {
        ensure!(
            (1..=REQUEST_LEN_MAX.min(CHUNK_LEN)).contains(&self.request_len),
            "a request has 1 to 16384 bytes"
        );
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).context("create an epoll instance")?;
        let mut requesters = self.connect_all(address)?;
        for (index, requester) in requesters.iter().enumerate() {
            let token = EventData::new_u64(index as u64);
            epoll::add(&epoll, &requester.stream, token, EventFlags::IN).context("watch a connection")?;
        }
        let mut latency = Histogram::new_with_bounds(1_000, LATENCY_MAX_NS, 3).context("make a histogram")?;
        let counts_from = drowse::clock::now() + self.warm_up_time;
        let ends_at = counts_from + self.measured_time;
        for requester in &mut requesters {
            requester.send_next(pattern, drowse::clock::now())?;
        }
        let mut on_their_way = requesters.len();
        let mut requests = 0;
        let mut last_answer_at = counts_from;
        let mut events = Vec::with_capacity(self.connections);
        let patience = Timespec::try_from(ANSWER_WITHIN).context("set a deadline")?;
        while on_their_way > 0 {
            events.clear();
            match epoll::wait(&epoll, rustix::buffer::spare_capacity(&mut events), Some(&patience)) {
                Ok(0) => bail!("no answer for {ANSWER_WITHIN:?} on any of {on_their_way} connections"),
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(err) => return Err(err).context("wait for answers"),
            }
            for event in &events {
                let index = usize::try_from(event.data.u64()).context("index a connection")?;
                let requester = requesters.get_mut(index).context("index a connection")?;
                if !requester.receive()? {
                    continue;
                }
                let now = drowse::clock::now();
                last_answer_at = now;
                requests += 1;
                if now >= counts_from {
                    latency.saturating_record(drowse::clock::as_nanos(now.saturating_sub(requester.sent_at)));
                }
                if now < ends_at {
                    requester.send_next(pattern, now)?;
                } else {
                    on_their_way -= 1;
                }
            }
        }
        ensure!(!latency.is_empty(), "no answer arrived in the measured time");
        #[expect(clippy::cast_precision_loss, reason = "a rate needs no more than 52 bits")]
        let per_second = latency.len() as f64 / last_answer_at.saturating_sub(counts_from).as_secs_f64();
        Ok(RequestRate { per_second, latency, requests })
    }

    fn connect_all(&self, address: SocketAddr) -> Result<Vec<Requester>> {
        (0..self.connections)
            .map(|index| {
                let stream = connect(address, Command::Echo)?;
                stream.set_nonblocking(true).context("make a connection non-blocking")?;
                Ok(Requester {
                    stream,
                    request: Vec::with_capacity(self.request_len),
                    answer: vec![0; self.request_len],
                    received_len: 0,
                    position: index as u64 * 7919,
                    sent_at: Duration::ZERO,
                })
            })
            .collect()
    }
}
