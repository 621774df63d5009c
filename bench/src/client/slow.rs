//! A client that stops reading in the middle of a download, and wants all of it later.

use std::net::{SocketAddr, TcpStream};

use anyhow::{Context, Result, ensure};

use crate::backend::receive;
use crate::client::{ANSWER_WITHIN, connect};
use crate::process::readable_within;
use crate::wire::{Command, Pattern, Receipt};

/// A download that nobody reads. Dropping it gives it up.
#[derive(Debug)]
pub struct SlowReader {
    stream: TcpStream,
    bytes: u64,
}

impl SlowReader {
    /// Asks for `bytes` bytes, sees that they begin to come, and reads none of them.
    ///
    /// # Errors
    /// When they do not come.
    pub fn stall(address: SocketAddr, bytes: u64) -> Result<Self> {
        let stream = connect(address, Command::Download(bytes))?;
        ensure!(readable_within(&stream, ANSWER_WITHIN)?, "the slow reader's download did not begin");
        Ok(Self { stream, bytes })
    }

    /// Reads all of it.
    ///
    /// # Errors
    /// When a byte is missing or wrong, or the connection broke while it stood still.
    pub fn finish(self, pattern: &Pattern) -> Result<()> {
        let receipt = receive(&self.stream, pattern, self.bytes).context("the slow reader's download")?;
        Receipt::check(receipt.encode(), self.bytes).context("the slow reader's download")
    }
}
