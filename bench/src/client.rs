//! The load generator: the client's side of every benchmark.
//!
//! Owns: connections to a peer, their load, and checking every answer. Must never: know which peer it talks to.
//! [`load`] is what a case asks for; [`closed`], [`paced`], [`fresh`] and [`bulk`] are the kinds of it, and [`slow`] is
//! the client that the others must not wait for. [`echo`] are the connections that the first two share.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use hdrhistogram::Histogram;

use crate::wire::{ANSWER_LEN, Command, Pattern, Stamp};

pub mod bulk;
pub mod closed;
pub mod echo;
pub mod fresh;
pub mod load;
pub mod paced;
pub mod slow;

/// A connection that gets no answer for this long has failed.
pub const ANSWER_WITHIN: Duration = Duration::from_secs(10);
/// Latencies are kept between [`LATENCY_MIN_NS`] and this, with three digits.
const LATENCY_MAX_NS: u64 = 60_000_000_000;
const LATENCY_MIN_NS: u64 = 1_000;
/// Connections opened, or used, at once where there are many: below the usual backlogs, and quick on a busy machine.
const BATCH: usize = 100;

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

/// A histogram for latencies in nanoseconds; all have the same bounds, so that they can be added up.
///
/// # Errors
/// Never with these bounds.
fn histogram() -> Result<Histogram<u64>> {
    Histogram::new_with_bounds(LATENCY_MIN_NS, LATENCY_MAX_NS, 3).context("make a histogram")
}

/// `count` things in `time`, per second.
#[expect(clippy::cast_precision_loss, reason = "a rate needs no more than 52 bits")]
fn per_second(count: u64, time: Duration) -> f64 {
    count as f64 / time.as_secs_f64()
}
