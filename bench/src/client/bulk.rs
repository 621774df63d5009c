//! Many bytes over one connection.

use std::io::Read;
use std::net::{SocketAddr, TcpStream};
use std::thread;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::backend::{receive, send};
use crate::client::load::LoadResult;
use crate::client::{connect, per_second};
use crate::patient::Patient;
use crate::wire::{ANSWER_LEN, Command, Pattern, Receipt};

/// Which way a bulk transfer goes, as the client sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Direction {
    /// To the backend.
    Up,
    /// From the backend.
    Down,
    /// Both at once over one connection.
    Both,
}

/// A bulk transfer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BulkLoad {
    /// The direction.
    pub direction: Direction,
    /// Bytes to move in each of the directions.
    pub bytes: u64,
}

impl BulkLoad {
    /// Moves the bytes. The rate is that of all bytes, from the first one until the last one is known to have arrived.
    ///
    /// # Errors
    /// When a byte is missing or wrong, or the connection breaks or stalls.
    pub fn run(&self, address: SocketAddr, pattern: &Pattern) -> Result<LoadResult> {
        let bytes = self.bytes;
        let command = match self.direction {
            Direction::Up => Command::Upload(bytes),
            Direction::Down => Command::Download(bytes),
            Direction::Both => Command::Both(bytes),
        };
        let stream = connect(address, command)?;
        let started = drowse::clock::now();
        let moved = match self.direction {
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
                both(&stream, pattern, bytes)?;
                2 * bytes
            }
        };
        let time = drowse::clock::now().saturating_sub(started);
        Ok(LoadResult {
            per_second: per_second(moved, time),
            requests: 1,
            bytes: moved,
            latency: None,
            latency_since_sent: None,
            send_delay: None,
        })
    }
}

fn both(stream: &TcpStream, pattern: &Pattern, bytes: u64) -> Result<()> {
    thread::scope(|scope| {
        let sender = scope.spawn(|| send(stream, pattern, bytes));
        let receipt = receive(stream, pattern, bytes)?;
        sender.join().unwrap_or_else(|_| bail!("the sending thread panicked"))?;
        Receipt::check(receipt.encode(), bytes).context("download")
    })?;
    check_receipt(stream, bytes)
}

fn check_receipt(stream: &TcpStream, bytes: u64) -> Result<()> {
    let mut answer = [0; ANSWER_LEN];
    Patient(stream).read_exact(&mut answer).context("receive the receipt")?;
    Receipt::check(answer, bytes)
}
