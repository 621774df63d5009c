//! Many echo connections that one thread serves.
//!
//! Owns: the bytes of each connection, one endless piece of the pattern, and comparing what comes back with it. Must
//! never: block on a connection. Watched edge-triggered (`epoll(7)`): a read shorter than its buffer has emptied the
//! socket, so that the usual answer costs one read, and a full socket tells when it has room again. An end that was
//! there with the last bytes has no edge of its own (`EPOLLRDHUP` tells of it).

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustix::event::Timespec;
use rustix::event::epoll::{self, Event, EventData, EventFlags};

use crate::client::open_flows;
use crate::wire::{CHUNK_LEN, Pattern};

/// Where the pieces of two connections begin in the pattern differs by this, so that an answer to another connection
/// shows.
const BETWEEN_FLOWS: u64 = 7_919;

/// One connection.
#[derive(Debug)]
pub struct EchoFlow {
    stream: TcpStream,
    /// Where in the pattern its bytes begin.
    begins_at: u64,
    /// Bytes that shall be sent, that were, and that came back.
    asked: u64,
    sent: u64,
    received: u64,
}

impl EchoFlow {
    /// Sends `bytes` more, now as many as the socket takes and the others as it has room.
    ///
    /// # Errors
    /// When the connection is broken.
    pub fn ask(&mut self, pattern: &Pattern, bytes: u64) -> Result<()> {
        self.asked += bytes;
        self.send(pattern)
    }

    /// Bytes that came back.
    #[must_use]
    pub fn received(&self) -> u64 {
        self.received
    }

    /// Whether all that was asked for came back.
    #[must_use]
    pub fn is_answered(&self) -> bool {
        self.received == self.asked
    }

    fn send(&mut self, pattern: &Pattern) -> Result<()> {
        while self.sent < self.asked {
            let len = usize::try_from(self.asked - self.sent).unwrap_or(CHUNK_LEN).min(CHUNK_LEN);
            match self.stream.write(pattern.at(self.begins_at + self.sent, len)?) {
                Ok(len) => self.sent += len as u64,
                Err(err) if err.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(err) if err.kind() == ErrorKind::Interrupted => {}
                Err(err) => return Err(err).context("send a request"),
            }
        }
        Ok(())
    }

    /// Reads what is there; up to the end of the stream when it `has_ended`.
    fn receive(&mut self, pattern: &Pattern, buffer: &mut [u8], has_ended: bool) -> Result<()> {
        loop {
            let len = match self.stream.read(buffer) {
                Ok(0) => bail!("the connection was closed in the middle of the load"),
                Ok(len) => len,
                Err(err) if err.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(err) if err.kind() == ErrorKind::Interrupted => continue,
                Err(err) => return Err(err).context("receive an answer"),
            };
            let arrived = buffer.get(..len).unwrap_or_default();
            ensure!(
                arrived == pattern.at(self.begins_at + self.received, len)?,
                "the answer is not what was sent"
            );
            self.received += len as u64;
            ensure!(self.received <= self.sent, "more came back than was sent");
            if len < buffer.len() && !has_ended {
                return Ok(());
            }
        }
    }
}

/// All connections of a load.
pub struct EchoFlows<'a> {
    pattern: &'a Pattern,
    epoll: OwnedFd,
    flows: Vec<EchoFlow>,
    events: Vec<Event>,
    buffer: Vec<u8>,
}

impl AsFd for EchoFlows<'_> {
    /// Readable when there is something to do in [`EchoFlows::turn`].
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }
}

impl<'a> EchoFlows<'a> {
    /// Opens `count` connections and shows that each of them works.
    ///
    /// # Errors
    /// When one does not.
    pub fn open(address: SocketAddr, pattern: &'a Pattern, count: usize) -> Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).context("create an epoll instance")?;
        let mut flows = Vec::with_capacity(count);
        for (index, stream) in (0_u64..).zip(open_flows(address, pattern, count)?) {
            stream.set_nonblocking(true).context("make a connection non-blocking")?;
            let events = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
            epoll::add(&epoll, &stream, EventData::new_u64(index), events).context("watch a connection")?;
            flows.push(EchoFlow { stream, begins_at: index * BETWEEN_FLOWS, asked: 0, sent: 0, received: 0 });
        }
        let mut ready = Self {
            pattern,
            epoll,
            flows,
            events: Vec::with_capacity(count.max(1)),
            buffer: vec![0; CHUNK_LEN],
        };
        // A connection that is added tells at once that it has room: not what a load waits for.
        ready.turn(Duration::ZERO, |_, _| Ok(()))?;
        Ok(ready)
    }

    /// As [`EchoFlow::ask`], of the connection `index`.
    ///
    /// # Errors
    /// When the connection is broken, or there is none of that number.
    pub fn ask(&mut self, index: usize, bytes: u64) -> Result<()> {
        self.flows.get_mut(index).context("index a connection")?.ask(self.pattern, bytes)
    }

    /// Waits until something arrived, or has room, or for `timeout` (of which the kernel sees whole milliseconds), and
    /// calls `changed` with each such connection and its number. Returns how many there were.
    ///
    /// # Errors
    /// When a connection is broken or brings wrong bytes, or those of `changed`.
    pub fn turn(
        &mut self,
        timeout: Duration,
        mut changed: impl FnMut(usize, &mut EchoFlow) -> Result<()>,
    ) -> Result<usize> {
        self.events.clear();
        let timeout = Timespec::try_from(timeout).context("set a deadline")?;
        rustix::io::retry_on_intr(|| {
            epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut self.events), Some(&timeout))
        })
        .context("wait for answers")?;
        for event in &self.events {
            let index = usize::try_from(event.data.u64()).context("index a connection")?;
            let flow = self.flows.get_mut(index).context("index a connection")?;
            flow.send(self.pattern)?;
            let flags = event.flags;
            let has_ended = flags.intersects(EventFlags::RDHUP | EventFlags::HUP | EventFlags::ERR);
            flow.receive(self.pattern, &mut self.buffer, has_ended)?;
            changed(index, flow)?;
        }
        Ok(self.events.len())
    }
}
