//! One direction of a flow: from where the bytes come, what waits to be sent, where they go.
//!
//! Owns: the choice between buffer and pipe, back-pressure, the passing on of the FIN. Must never: read while
//! something waits to be sent, or hold a pipe or a buffer while nothing does.
//! Rests on: epoll(7), "a short read or write means that the socket is drained or full", true of stream sockets
//! but for a FIN, an error or urgent data that came with the bytes; those are announced and set `End::eager`.

use std::os::fd::{AsFd, OwnedFd};

use rustix::event::epoll::EventFlags;
use rustix::io::Errno;
use rustix::net::{AddressFamily, Shutdown, sockopt};

use super::redirected::Redirected;
use super::short_cut::ShortCut;
use super::{Mode, Side};
use crate::clock::Monotonic;
use crate::plane::copy::{self, Received, Sent};
use crate::plane::sockmap::Redirector;
use crate::plane::splice::{Filled, Pipe, PipePool};
use crate::sys;

/// Bytes of a worker's buffer: the most that one `recv` takes, and the most that a direction keeps back.
const BUFFER_BYTES: usize = 128 * 1024;

/// From so many bytes at once a burst is bulk, and `splice` costs less than `recv` and `send`. Measured on loopback:
/// with 16 KiB a GiB costs 78 ms of CPU, with 64 KiB 96 ms, with copying alone 200 to 300 ms.
const BULK_BYTES: usize = 16 * 1024;

/// Bytes that one direction may move before others have their turn.
const TURN_BYTES: usize = 512 * 1024;

/// Reads of bytes that nobody wants, in one turn.
const DISCARDS_A_TURN: usize = 16;

/// What a worker lends to the flow whose turn it is.
#[derive(Debug)]
pub(super) struct Tools {
    pub(super) mode: Mode,
    pub(super) buffer: Box<[u8]>,
    pub(super) pipes: PipePool,
    /// The way into the kernel, if there is one.
    pub(super) redirector: Option<Redirector>,
    pub(super) turn_bytes: usize,
    /// The time of the wake-up.
    pub(super) now: Monotonic,
}

/// One of the two sockets of a flow, with what we know of it.
#[derive(Debug)]
#[expect(clippy::struct_excessive_bools, reason = "independent facts about one socket")]
pub(super) struct End {
    pub(super) socket: OwnedFd,
    pub(super) is_tcp: bool,
    pub(super) is_client: bool,
    /// Its name in the kernel, `SO_COOKIE`. Zero if it has none.
    pub(super) cookie: u64,
    /// What the direction from here is called in announcements.
    pub(super) token: u64,
    /// Whether it can be the target of redirected bytes; `None` before that was tried.
    pub(super) member: Option<bool>,
    /// Whether events of bytes to receive are wanted.
    pub(super) listens: bool,
    /// Whether epoll knows that they are.
    pub(super) listening: bool,
    /// Something may be there to receive: an event said so, and no read has come back short since.
    pub(super) readable: bool,
    /// There may be room to send: no send has come back short since the last event.
    pub(super) writable: bool,
    /// A FIN, an error or urgent data was announced: a short read does not mean that nothing is left.
    pub(super) eager: bool,
    /// The connection is dead. What it sent before may still be there to receive.
    pub(super) reset: bool,
    /// We have sent our FIN.
    fin_sent: bool,
    /// The last byte was received, as far as a flow that is being closed cares.
    pub(super) finished: bool,
}

impl End {
    pub(super) fn new(socket: OwnedFd, side: Side) -> Self {
        let is_tcp = sockopt::socket_domain(&socket)
            .is_ok_and(|domain| domain == AddressFamily::INET || domain == AddressFamily::INET6);
        Self {
            is_tcp,
            is_client: side == Side::Client,
            cookie: 0,
            token: 0,
            member: None,
            listens: true,
            listening: true,
            readable: false,
            writable: true,
            eager: false,
            reset: false,
            fin_sent: false,
            finished: false,
            socket,
        }
    }

    /// Makes the socket fit for a worker.
    pub(super) fn prepare(&self) -> rustix::io::Result<()> {
        rustix::io::ioctl_fionbio(&self.socket, true)?;
        if self.is_tcp {
            sockopt::set_tcp_nodelay(&self.socket, true)?;
            sockopt::set_socket_keepalive(&self.socket, true)?;
        }
        // An urgent byte stays in the stream instead of being lost. MPTCP has neither such bytes nor this.
        match sockopt::set_socket_oobinline(&self.socket, true) {
            Err(Errno::OPNOTSUPP) => Ok(()),
            set => set,
        }
    }

    /// What epoll is to report, once each time. `OUT` comes only after a send found no room; `IN` and `PRI` wake for each
    /// segment (`sock_def_readable`), also for those that are redirected.
    pub(super) fn wanted_events(&self) -> EventFlags {
        let always = EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
        if self.listens { always | EventFlags::IN | EventFlags::PRI } else { always }
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
        if self.is_tcp { sys::send_queue_bytes(self.socket.as_fd()).unwrap_or(0) } else { 0 }
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
    /// There is something to wait for that no event tells.
    pub(super) wait: bool,
}

/// One direction of a flow.
#[derive(Debug)]
pub(super) struct Direction {
    pending: Pending,
    /// Nothing more will be read.
    pub(super) ended: bool,
    /// The FIN was passed on, or need not be.
    pub(super) shut: bool,
    /// The last read was a big one: the next bytes go through a pipe.
    bulk: bool,
    /// Small bursts since the last big one.
    pub(super) calm: u32,
    /// The kernel moves the bytes.
    pub(super) redirected: Option<Redirected>,
    /// The peer sends to the target itself.
    pub(super) short_cut: ShortCut,
}

impl Direction {
    pub(super) fn new() -> Self {
        Self {
            pending: Pending::Nothing,
            ended: false,
            shut: false,
            bulk: false,
            calm: 0,
            redirected: None,
            short_cut: ShortCut::default(),
        }
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
                return Pumped { bytes, ..Pumped::default() };
            }
            if self.ended {
                // A sender that the kernel brings here may take the error off the socket (`sk_stream_error`), which then just
                // seems to have ended.
                if !self.shut
                    && !from.fin_sent
                    && from.member == Some(true)
                    && sys::is_closed(from.socket.as_fd())
                {
                    from.mark_reset();
                }
                let is_due = self.shut || self.is_delivered(to, tools);
                if is_due {
                    self.pass_fin(from, to);
                }
                return Pumped { bytes, wait: !is_due, more: false };
            }
            if self.is_redirected() {
                let pumped = self.pump_redirected(from, to, tools);
                bytes += pumped.bytes;
                if pumped.wait || !pumped.more {
                    return Pumped { bytes, ..pumped };
                }
                if bytes >= tools.turn_bytes {
                    return Pumped { bytes, more: true, wait: false };
                }
                continue;
            }
            if !from.readable || !to.writable {
                if !from.readable && self.is_flushed() && !self.cut_short(from, to, tools) {
                    self.enrol(from, to, tools);
                }
                return Pumped { bytes, ..Pumped::default() };
            }
            if bytes >= tools.turn_bytes {
                return Pumped { bytes, more: true, wait: false };
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
        to.fin_sent = true;
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
                    self.count_written(count);
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
        let size = if tools.mode == Mode::Copy || self.bulk { BUFFER_BYTES } else { BULK_BYTES };
        let size = size.min(tools.buffer.len());
        let buffer = tools.buffer.get_mut(..size).unwrap_or_default();
        let received = match copy::receive(&from.socket, buffer) {
            Received::Bytes(count) => buffer.get(..count).unwrap_or_default(),
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
        from.readable = received.len() == size || from.eager;
        self.receive(received, to, tools.mode)
    }

    /// Sends on a burst that was just received; what there is no room for waits. Returns the bytes sent.
    pub(super) fn receive(&mut self, received: &[u8], to: &mut End, mode: Mode) -> usize {
        self.bulk = received.len() >= BULK_BYTES && mode == Mode::Splice;
        self.calm = if received.len() < BULK_BYTES { self.calm.saturating_add(1) } else { 0 };
        let sent = match copy::send(&to.socket, received) {
            Sent::Bytes(count) => count,
            Sent::NoRoom => 0,
            Sent::Reset => {
                to.mark_reset();
                return 0;
            }
        };
        self.count_written(sent);
        let rest = received.get(sent..).unwrap_or_default();
        if !rest.is_empty() {
            to.writable = false;
            self.pending = Pending::Bytes { bytes: rest.to_vec(), sent: 0 };
        }
        sent
    }

    fn count_written(&mut self, bytes: usize) {
        self.short_cut.expire();
        if let Some(redirected) = &mut self.redirected {
            redirected.written += bytes as u64;
        }
    }

    /// One `splice` into a pipe; what it took waits to be flushed.
    fn splice(&mut self, mut pipe: Pipe, from: &mut End, pipes: &mut PipePool) {
        match pipe.fill_from(&from.socket) {
            Filled::Bytes(count) => {
                self.bulk = count >= BULK_BYTES;
                self.calm = 0;
                self.pending = Pending::Piped(pipe);
                return;
            }
            Filled::Nothing if !from.eager => from.readable = false,
            // At urgent data a socket says EAGAIN however much is queued (`tcp_splice_read`).
            Filled::Nothing | Filled::Unclear => self.bulk = false,
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
        Self {
            mode,
            buffer,
            pipes: PipePool::default(),
            redirector: None,
            turn_bytes: TURN_BYTES,
            now: Monotonic::ZERO,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_turn_is_bounded_and_goes_on_where_it_stopped() {
        for mode in [Mode::Copy, Mode::Splice] {
            let (mut sender, from) = UnixStream::pair().unwrap();
            let (to, mut receiver) = UnixStream::pair().unwrap();
            let (mut from, mut to) =
                (End::new(from.into(), Side::Client), End::new(to.into(), Side::Backend));
            from.note(EventFlags::IN, false);
            let mut tools = Tools::new(mode);
            tools.turn_bytes = 1000;
            tools.buffer = vec![0; 100].into_boxed_slice();
            sender.write_all(&[1; 2500]).unwrap();
            let mut direction = Direction::new();
            let turns: Vec<Pumped> = (0..3).map(|_| direction.pump(&mut from, &mut to, &mut tools)).collect();
            assert_eq!(turns[0], Pumped { bytes: 1000, more: true, wait: false });
            assert_eq!(turns[1], Pumped { bytes: 1000, more: true, wait: false });
            assert_eq!(turns[2], Pumped { bytes: 500, more: false, wait: false });
            receiver.read_exact(&mut [0; 2500]).unwrap();
        }
    }

    #[test]
    fn nothing_is_read_while_something_waits() {
        let (mut sender, from) = UnixStream::pair().unwrap();
        let (to, mut receiver) = UnixStream::pair().unwrap();
        let (mut from, mut to) = (End::new(from.into(), Side::Client), End::new(to.into(), Side::Backend));
        from.note(EventFlags::IN, false);
        to.prepare().unwrap();
        while let Sent::Bytes(_) = copy::send(&to.socket, &[0; 4096]) {}
        let mut tools = Tools::new(Mode::Copy);
        let mut direction = Direction::new();
        sender.write_all(b"first").unwrap();
        assert_eq!(direction.pump(&mut from, &mut to, &mut tools), Pumped::default());
        assert!(!direction.is_flushed() && !to.writable);
        sender.write_all(b"second").unwrap();
        from.note(EventFlags::IN, false);
        assert_eq!(direction.pump(&mut from, &mut to, &mut tools), Pumped::default());
        assert_eq!(rustix::io::ioctl_fionread(&from.socket), Ok(6), "left in the socket");
        receiver.set_nonblocking(true).unwrap();
        while receiver.read(&mut [0; 4096]).is_ok() {}
        to.note(EventFlags::OUT, false);
        assert_eq!(direction.pump(&mut from, &mut to, &mut tools).bytes, 11);
        assert!(direction.is_flushed());
    }
}
