//! One direction of a flow: from where the bytes come, what waits to be sent, where they go.
//!
//! Owns: the choice between buffer and pipe, back-pressure, the passing on of the FIN. Must never: read while
//! something waits to be sent, or hold a pipe or a buffer while nothing does.
//! Rests on: epoll(7), "a short read or write means that the socket is drained or full", true of stream sockets
//! but for a FIN, an error or urgent data that came with the bytes; those are announced and set `End::eager`.

use std::os::fd::{AsFd, OwnedFd};

use rustix::event::epoll::EventFlags;
use rustix::net::{AddressFamily, Shutdown, sockopt};

use super::Mode;
use crate::clock::Monotonic;
use crate::plane::copy::{self, Received, Sent};
use crate::plane::splice::{Filled, Pipe, PipePool};

/// Bytes of a worker's buffer: the most that one `recv` takes, and the most that a direction keeps back.
pub(super) const BUFFER_BYTES: usize = 64 * 1024;

/// Reads of bytes that nobody wants, in one turn.
const DISCARDS_A_TURN: usize = 16;

/// What a worker lends to the flow whose turn it is.
#[derive(Debug)]
pub(super) struct Tools {
    pub(super) mode: Mode,
    pub(super) buffer: Box<[u8]>,
    pub(super) pipes: PipePool,
    /// The time of the wake-up.
    pub(super) now: Monotonic,
}

/// One of the two sockets of a flow, with what we know of it.
#[derive(Debug)]
#[expect(clippy::struct_excessive_bools, reason = "independent facts about one socket")]
pub(super) struct End {
    pub(super) socket: OwnedFd,
    pub(super) is_tcp: bool,
    /// Something may be there to receive: an event said so, and no read has come back short since.
    pub(super) readable: bool,
    /// There may be room to send: no send has come back short since the last event.
    pub(super) writable: bool,
    /// A FIN, an error or urgent data was announced: a short read does not mean that nothing is left.
    eager: bool,
    /// The connection is dead. What it sent before may still be there to receive.
    pub(super) reset: bool,
    /// The last byte was received, as far as a flow that is being closed cares.
    pub(super) finished: bool,
}

impl End {
    pub(super) fn new(socket: OwnedFd) -> Self {
        let is_tcp = sockopt::socket_domain(&socket)
            .is_ok_and(|domain| domain == AddressFamily::INET || domain == AddressFamily::INET6);
        Self { socket, is_tcp, readable: false, writable: true, eager: false, reset: false, finished: false }
    }

    /// Makes the socket fit for a worker.
    pub(super) fn prepare(&self) -> rustix::io::Result<()> {
        rustix::io::ioctl_fionbio(&self.socket, true)?;
        if self.is_tcp {
            sockopt::set_tcp_nodelay(&self.socket, true)?;
            sockopt::set_socket_keepalive(&self.socket, true)?;
        }
        // An urgent byte stays in the stream instead of being lost.
        sockopt::set_socket_oobinline(&self.socket, true)
    }

    /// Takes note of what epoll reported. `fin_sent`: whether we have shut our side of this socket down.
    pub(super) fn note(&mut self, flags: EventFlags, fin_sent: bool) {
        let last = EventFlags::RDHUP | EventFlags::HUP | EventFlags::ERR | EventFlags::PRI;
        self.readable |= flags.intersects(EventFlags::IN | last);
        self.eager |= flags.intersects(last);
        self.writable |= flags.contains(EventFlags::OUT);
        // TCP reports HUP when both sides are shut or the connection is dead (`tcp_poll`).
        let dead = self.is_tcp && !fin_sent && flags.contains(EventFlags::HUP);
        if dead || flags.contains(EventFlags::ERR) {
            self.mark_reset();
        }
    }

    /// The socket's error is reported once, to whichever call comes first; the fact is kept here.
    pub(super) fn mark_reset(&mut self) {
        self.reset = true;
        self.readable = true;
        self.eager = true;
    }

    /// Receives and throws away, a bounded number of times. Returns whether there may be more.
    pub(super) fn discard(&mut self, tools: &mut Tools) -> bool {
        for _ in 0..DISCARDS_A_TURN {
            if !self.readable || self.finished {
                return false;
            }
            match copy::receive(&self.socket, &mut tools.buffer) {
                Received::Bytes(_) => {}
                Received::Nothing => self.readable = false,
                Received::Finished | Received::Reset => self.finished = true,
            }
        }
        self.readable && !self.finished
    }

    /// Bytes that our kernel still holds for the peer. A close with a reset would throw them away.
    pub(super) fn unsent_bytes(&self) -> usize {
        if self.is_tcp { crate::sys::send_queue_bytes(self.socket.as_fd()).unwrap_or(0) } else { 0 }
    }

    /// Lets the coming close send a RST (`SO_LINGER` with no time, socket(7)); a unix socket has none.
    pub(super) fn close_with_reset(&self) {
        if self.is_tcp && !self.reset {
            // It fails only for what is no socket, and then there is nobody to reset.
            let _ = sockopt::set_socket_linger(&self.socket, Some(std::time::Duration::ZERO));
        }
    }
}

/// What was taken from one end and could not be sent yet.
#[derive(Debug)]
enum Pending {
    Nothing,
    Bytes { bytes: Vec<u8>, sent: usize },
    Piped(Pipe),
}

/// What a turn of one direction came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Pumped {
    /// Bytes that were delivered to the other end's socket.
    pub(super) bytes: usize,
    /// The turn ended for fairness; there is more to do at once.
    pub(super) more: bool,
}

/// One direction of a flow.
#[derive(Debug)]
pub(super) struct Direction {
    pending: Pending,
    /// Nothing more will be read.
    pub(super) ended: bool,
    /// The FIN was passed on, or need not be.
    pub(super) shut: bool,
    /// The last read filled the buffer: the next bytes go through a pipe.
    bulk: bool,
}

impl Direction {
    pub(super) fn new() -> Self {
        Self { pending: Pending::Nothing, ended: false, shut: false, bulk: false }
    }

    /// Whether nothing waits to be sent.
    pub(super) fn is_flushed(&self) -> bool {
        matches!(self.pending, Pending::Nothing)
    }

    /// Whether everything, the FIN included, has been passed on.
    pub(super) fn is_done(&self) -> bool {
        self.ended && self.shut && self.is_flushed()
    }

    /// Stops reading, and passes no FIN on after what waits to be sent.
    pub(super) fn condemn(&mut self) {
        self.ended = true;
        self.shut = true;
    }

    /// Moves what can be moved, up to a fair share.
    pub(super) fn pump(&mut self, from: &mut End, to: &mut End, tools: &mut Tools) -> Pumped {
        let mut bytes = 0;
        loop {
            bytes += self.flush(to, &mut tools.pipes);
            if to.reset {
                self.release(&mut tools.pipes);
                self.condemn();
            }
            if !self.is_flushed() {
                return Pumped { bytes, more: false };
            }
            if self.ended {
                self.pass_fin(from, to);
                return Pumped { bytes, more: false };
            }
            if !from.readable || !to.writable {
                return Pumped { bytes, more: false };
            }
            if bytes >= tools.turn_bytes() {
                return Pumped { bytes, more: true };
            }
            let pipe = if self.bulk { tools.pipes.take() } else { None };
            match pipe {
                Some(pipe) => self.splice(pipe, from, &mut tools.pipes),
                None => bytes += self.copy(from, to, tools),
            }
        }
    }

    /// Throws away what waits to be sent; a pipe goes back to its pool.
    pub(super) fn release(&mut self, pipes: &mut PipePool) {
        if let Pending::Piped(pipe) = std::mem::replace(&mut self.pending, Pending::Nothing) {
            pipes.put(pipe);
        }
    }

    fn pass_fin(&mut self, from: &End, to: &mut End) {
        if self.shut || from.reset {
            return;
        }
        self.shut = true;
        // ENOTCONN: the connection is dead, and its error was already reported elsewhere.
        if rustix::net::shutdown(&to.socket, Shutdown::Write).is_err() {
            to.mark_reset();
        }
    }

    /// Sends what waits, until it is gone or the socket has no room. Returns the bytes sent.
    fn flush(&mut self, to: &mut End, pipes: &mut PipePool) -> usize {
        let mut bytes = 0;
        while to.writable && !to.reset {
            let sent = match &mut self.pending {
                Pending::Nothing => return bytes,
                Pending::Bytes { bytes, sent } => {
                    copy::send(&to.socket, bytes.get(*sent..).unwrap_or_default())
                }
                Pending::Piped(pipe) => pipe.flush_to(&to.socket),
            };
            match sent {
                Sent::Bytes(count) => {
                    bytes += count;
                    self.sent(count, pipes);
                }
                Sent::NoRoom => to.writable = false,
                Sent::Reset => to.mark_reset(),
            }
        }
        bytes
    }

    /// Takes `count` bytes off what waits; gives buffer or pipe back with the last one.
    fn sent(&mut self, count: usize, pipes: &mut PipePool) {
        self.pending = match std::mem::replace(&mut self.pending, Pending::Nothing) {
            Pending::Bytes { bytes, sent } if sent + count < bytes.len() => {
                Pending::Bytes { bytes, sent: sent + count }
            }
            Pending::Piped(pipe) if !pipe.is_empty() => Pending::Piped(pipe),
            Pending::Piped(pipe) => {
                pipes.put(pipe);
                Pending::Nothing
            }
            Pending::Bytes { .. } | Pending::Nothing => Pending::Nothing,
        };
    }

    /// One `recv` and one `send`. Returns the bytes sent.
    fn copy(&mut self, from: &mut End, to: &mut End, tools: &mut Tools) -> usize {
        let received = match copy::receive(&from.socket, &mut tools.buffer) {
            Received::Bytes(count) => tools.buffer.get(..count).unwrap_or_default(),
            Received::Nothing => {
                from.readable = false;
                return 0;
            }
            Received::Finished => {
                self.ended = true;
                return 0;
            }
            Received::Reset => {
                from.mark_reset();
                self.ended = true;
                return 0;
            }
        };
        let filled = received.len() == tools.buffer.len();
        from.readable = filled || from.eager;
        self.bulk = filled && tools.mode == Mode::Splice;
        let sent = match copy::send(&to.socket, received) {
            Sent::Bytes(count) => count,
            Sent::NoRoom => 0,
            Sent::Reset => {
                to.mark_reset();
                return 0;
            }
        };
        let rest = received.get(sent..).unwrap_or_default();
        if !rest.is_empty() {
            to.writable = false;
            self.pending = Pending::Bytes { bytes: rest.to_vec(), sent: 0 };
        }
        sent
    }

    /// One `splice` into a pipe; what it took waits to be flushed.
    fn splice(&mut self, mut pipe: Pipe, from: &mut End, pipes: &mut PipePool) {
        match pipe.fill_from(&from.socket) {
            Filled::Bytes(count) => {
                self.bulk = count >= BUFFER_BYTES;
                self.pending = Pending::Piped(pipe);
                return;
            }
            Filled::Nothing => from.readable = false,
            Filled::Unclear => self.bulk = false,
            Filled::Reset => {
                from.mark_reset();
                self.ended = true;
            }
        }
        pipes.put(pipe);
    }
}

impl Tools {
    pub(super) fn new(mode: Mode) -> Self {
        let buffer = vec![0; BUFFER_BYTES].into_boxed_slice();
        Self { mode, buffer, pipes: PipePool::default(), now: Monotonic::ZERO }
    }

    /// The bytes that one direction may move before others have their turn.
    fn turn_bytes(&self) -> usize {
        self.buffer.len() * 8
    }
}
