//! A new connection for each request, several at a time: connect, request, answer, close.
//!
//! The client closes first, as most do, and waits for the other side's end, so no connection is reset. Each then keeps
//! its port for a minute (`TIME_WAIT`; a port on the loopback may be used again after a second,
//! `net.ipv4.tcp_tw_reuse`), in the client and, towards the backend, in the proxy. Both ends listen on another port
//! in each measurement, so it is enough that one measurement makes fewer connections than there are ports.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use hdrhistogram::Histogram;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
use serde::{Deserialize, Serialize};

use crate::client::load::LoadResult;
use crate::client::{ANSWER_WITHIN, histogram, per_second};
use crate::patient::Patient;
use crate::wire::{Command, Pattern};

/// Connections of one measurement: well below the 28,232 ports that Linux gives out (`ip_local_port_range`).
const CONNECTIONS_MAX: u64 = 20_000;
/// Requests are short: the answer must fit into the buffers while nobody reads it.
const REQUEST_LEN_MAX: usize = 16 * 1024;

/// A closed loop of connections with one request each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FreshLoad {
    /// Connections at the same time.
    pub at_once: usize,
    /// Bytes of a request and of its answer.
    pub request_len: usize,
    /// Time before anything counts.
    pub warm_up_time: Duration,
    /// Time that counts; it ends early when so many connections were made as ports allow.
    pub measured_time: Duration,
}

/// What one thread saw.
struct Tally {
    requests: u64,
    latency: Histogram<u64>,
    last_end_at: Duration,
}

impl FreshLoad {
    /// Runs the load against `address`. The rate is that of whole connections, until the last one was closed; a
    /// latency is from just before the connect until the whole answer was there.
    ///
    /// # Errors
    /// When a connection fails, stalls, is reset, or brings a wrong answer.
    pub fn run(&self, address: SocketAddr, pattern: &Pattern) -> Result<LoadResult> {
        ensure!(
            self.at_once > 0 && (1..=REQUEST_LEN_MAX).contains(&self.request_len),
            "a load has connections, and requests of 1 to {REQUEST_LEN_MAX} bytes"
        );
        let made = AtomicU64::new(0);
        let counts_from = drowse::clock::now() + self.warm_up_time;
        let tallies = thread::scope(|scope| {
            let run = || self.run_one(address, pattern, counts_from, &made);
            let threads: Vec<_> = (0..self.at_once).map(|_| scope.spawn(run)).collect();
            threads
                .into_iter()
                .map(|thread| thread.join().unwrap_or_else(|_| bail!("a client's thread panicked")))
                .collect::<Result<Vec<Tally>>>()
        })?;
        let mut all = Tally { requests: 0, latency: histogram()?, last_end_at: counts_from };
        for tally in tallies {
            all.requests += tally.requests;
            all.latency.add(tally.latency).context("add up latencies")?;
            all.last_end_at = all.last_end_at.max(tally.last_end_at);
        }
        ensure!(!all.latency.is_empty(), "no connection ended in the measured time");
        Ok(LoadResult {
            per_second: per_second(all.latency.len(), all.last_end_at.saturating_sub(counts_from)),
            requests: all.requests,
            bytes: 2 * all.requests * self.request_len as u64,
            latency: Some(all.latency),
            latency_since_sent: None,
            send_delay: None,
        })
    }

    fn run_one(
        &self,
        address: SocketAddr,
        pattern: &Pattern,
        counts_from: Duration,
        made: &AtomicU64,
    ) -> Result<Tally> {
        let ends_at = counts_from + self.measured_time;
        let mut tally = Tally { requests: 0, latency: histogram()?, last_end_at: counts_from };
        let mut answer = vec![0; self.request_len];
        let mut message = Command::Echo.encode().to_vec();
        let command_len = message.len();
        while drowse::clock::now() < ends_at {
            let number = made.fetch_add(1, Ordering::Relaxed);
            if number >= CONNECTIONS_MAX {
                break;
            }
            message.truncate(command_len);
            message.extend_from_slice(pattern.at(number, self.request_len)?);
            let started_at = drowse::clock::now();
            let stream = exchange(address, &message, &mut answer)?;
            let answered_at = drowse::clock::now();
            ensure!(message.ends_with(&answer), "the answer is not what was sent");
            close(&stream)?;
            tally.requests += 1;
            tally.last_end_at = drowse::clock::now();
            if tally.last_end_at >= counts_from {
                let latency = answered_at.saturating_sub(started_at);
                tally.latency.saturating_record(drowse::clock::as_nanos(latency));
            }
        }
        Ok(tally)
    }
}

/// Connects, sends `message` and receives `answer`, with as few system calls as a lean client needs.
fn exchange(address: SocketAddr, message: &[u8], answer: &mut [u8]) -> Result<TcpStream> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let socket =
        socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None).context("make a socket")?;
    // The timeout for sending is that of connecting, too (socket(7)).
    set_socket_timeout(&socket, Timeout::Send, Some(ANSWER_WITHIN)).context("set a write timeout")?;
    set_socket_timeout(&socket, Timeout::Recv, Some(ANSWER_WITHIN)).context("set a read timeout")?;
    rustix::net::connect(&socket, &address).context("connect")?;
    let mut stream = TcpStream::from(socket);
    stream.write_all(message).context("send a request")?;
    Patient(&stream).read_exact(answer).context("receive an answer")?;
    Ok(stream)
}

/// Ends a connection from this side first, and sees the other side end it, too.
fn close(stream: &TcpStream) -> Result<()> {
    stream.shutdown(Shutdown::Write).context("end a connection")?;
    let len = Patient(stream).read(&mut [0]).context("wait for the end of a connection")?;
    ensure!(len == 0, "more came back than was sent");
    Ok(())
}
