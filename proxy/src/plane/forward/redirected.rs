//! A direction whose bytes the kernel moves, until it passes some: then they are moved here, in order.
//!
//! Owns: when a direction goes over to the kernel, when it passes and when it redirects again, and whether everything that
//! was given to a socket is in its send queue. Must never: send while redirected bytes are on their way to the same socket
//! (these would be overtaken), pass a FIN on before they are there (they would be lost), or take a socket out of the verdict's
//! map while bytes may come: the kernel takes the program away without the socket's lock, and drops a segment that is being
//! dealt with at this moment (`sk_psock_verdict_recv` finds no program). So a direction stays with the kernel until the flow
//! ends, and one that turns out to be bulk is passed and copied until it is calm.
//! Rests on: the protocol of `drowse_ebpf::Taken` and the guard in `proxy-ebpf/src/redirect.rs`; what is passed being
//! charged to its source, so that the window closes; a queue of passed bytes that outlives the connection (`sock_map_destroy`,
//! Linux 6.0; before, a reset or `TIME_WAIT` took it along).
//!
//! ```text
//! user space (until it is calm) -> redirecting <-> passing
//! ```

use std::io;
use std::os::fd::AsFd as _;
use std::sync::atomic::{Ordering, fence};
use std::time::Duration;

use drowse_ebpf::{Direction as Progress, Taken};
use rustix::io::Errno;
use rustix::net::{RecvFlags, recv, sockopt};

use super::direction::{Direction, End, Pumped, Tools};
use crate::clock::Monotonic;
use crate::plane::copy::{self, Received};
use crate::plane::sockmap::Redirector;
use crate::sys;

/// Passed bytes in one go that make a direction bulk: it is not redirected again before it is calm.
const BULK_BYTES: u64 = 512 * 1024;

/// What we know of a direction that the kernel moves.
#[derive(Debug)]
pub(super) struct Redirected {
    source: u64,
    /// Bytes that were passed and that we received.
    received: u64,
    /// Bytes that we sent to the target.
    pub(super) written: u64,
    /// [`sys::written_position`] of the target at the beginning.
    position: u64,
    /// The kernel passes, and we move.
    passing: bool,
    /// [`Redirected::received`] when it began to pass.
    passing_since: u64,
    /// So many redirected bytes are known to be in the target's send queue.
    arrived: u64,
}

/// What is found of a direction that is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Held {
    /// Nothing came, and nothing is on its way.
    Silent,
    /// Nothing came, but something that came before waits for a peer that takes nothing.
    Stuck,
    /// Bytes came.
    Busy,
}

impl Redirected {
    /// Whether everything that was given to `to` is in its send queue.
    fn has_arrived(&mut self, progress: &Progress, to: &End) -> bool {
        if to.reset || self.arrived == progress.redirected {
            return true;
        }
        let given = progress.redirected + self.written;
        let position = sys::written_position(to.socket.as_fd());
        let arrived = position.is_ok_and(|position| position.wrapping_sub(self.position) >= given);
        if arrived {
            self.arrived = progress.redirected;
        }
        arrived
    }

    /// Lets the kernel redirect again, once nothing that was passed is outstanding. Returns whether it does: something may
    /// have been passed meanwhile.
    fn publish(&self, redirector: &mut Redirector) -> io::Result<bool> {
        redirector.publish(self.source, Taken { bytes: self.received, written: self.written })?;
        // The other side of the bargain in `proxy-ebpf/src/redirect.rs`: first tell, then look.
        fence(Ordering::SeqCst);
        let passed = redirector.progress(self.source).map(|progress| progress.passed);
        Ok(passed == Some(self.received))
    }
}

impl Direction {
    /// Lets the kernel move the bytes from now on, if it does. `from` must have no bytes that somebody has read a part of.
    /// Returns whether it does.
    pub(super) fn enrol(&mut self, from: &mut End, to: &mut End, tools: &mut Tools) -> bool {
        let Some(redirector) = &mut tools.redirector else { return false };
        if self.calm < redirector.calm_bursts() {
            return false;
        }
        self.calm = 0;
        let fits = self.redirected.is_none()
            && self.is_flushed()
            && !self.ended
            && !from.eager
            && !from.reset
            && !to.reset
            && join(from, to, redirector)
            && has_read_all(from);
        if !fits {
            return false;
        }
        let Ok(position) = sys::written_position(to.socket.as_fd()) else { return false };
        let direction = Progress {
            target: to.cookie,
            token: from.token,
            to_client: u32::from(to.is_client),
            ..Progress::default()
        };
        if redirector.begin(&from.socket, from.cookie, direction).is_err() {
            return false;
        }
        self.redirected = Some(Redirected {
            source: from.cookie,
            received: 0,
            written: 0,
            position,
            passing: false,
            passing_since: 0,
            arrived: 0,
        });
        from.listens = false;
        true
    }

    /// Whether the kernel decides what comes to us.
    pub(super) fn is_redirected(&self) -> bool {
        self.redirected.is_some()
    }

    /// The kernel passes; there is something to move.
    pub(super) fn begin_passing(&mut self) {
        if let Some(redirected) = self.redirected.as_mut().filter(|redirected| !redirected.passing) {
            redirected.passing = true;
            redirected.passing_since = redirected.received;
        }
    }

    /// Moves what the kernel passed, up to a fair share, and sees to the end of the stream.
    pub(super) fn pump_redirected(&mut self, from: &mut End, to: &mut End, tools: &mut Tools) -> Pumped {
        let mut moved = 0;
        let done = |bytes, more, wait| Pumped { bytes, more, wait };
        if from.eager {
            self.begin_passing();
        }
        loop {
            let (Some(redirected), Some(redirector)) = (&mut self.redirected, &mut tools.redirector) else {
                return done(moved, false, false);
            };
            if !redirected.passing {
                return done(moved, false, false);
            }
            from.listens = true;
            let Some(progress) = redirector.progress(redirected.source) else {
                // Nobody but us removes it.
                from.mark_reset();
                self.condemn();
                return done(moved, false, false);
            };
            let waiting = progress.passed.saturating_sub(redirected.received);
            if waiting == 0 && !from.eager {
                let is_bulk = redirected.received - redirected.passing_since >= BULK_BYTES;
                if is_bulk && self.calm < redirector.calm_bursts() {
                    return done(moved, false, false);
                }
                match redirected.publish(redirector) {
                    Ok(true) => {
                        redirected.passing = false;
                        from.listens = false;
                        return done(moved, false, false);
                    }
                    Ok(false) => continue,
                    // The kernel has no memory just now, say.
                    Err(_) => return done(moved, false, true),
                }
            }
            if !redirected.has_arrived(&progress, to) {
                return done(moved, false, true);
            }
            if !to.writable {
                return done(moved, false, false);
            }
            if moved >= tools.turn_bytes {
                return done(moved, true, false);
            }
            // One byte where there is none asks for the end of the stream.
            let size = usize::try_from(waiting).unwrap_or(usize::MAX).clamp(1, tools.buffer.len());
            let buffer = tools.buffer.get_mut(..size).unwrap_or_default();
            match copy::receive(&from.socket, buffer) {
                Received::Bytes(count) => {
                    redirected.received += count as u64;
                    let sent = self.receive(buffer.get(..count).unwrap_or_default(), to, tools.mode);
                    moved += sent;
                    if !self.is_flushed() || to.reset {
                        return done(moved, false, false);
                    }
                }
                // Passed bytes are on their way into the queue that is read here.
                _ if waiting > 0 => return done(moved, false, true),
                // Urgent data was announced, not an end: it is passed from now on.
                Received::Nothing => return done(moved, false, false),
                Received::Finished => {
                    let passed = redirector.progress(redirected.source).map(|progress| progress.passed);
                    self.ended = passed == Some(redirected.received);
                    return done(moved, self.ended, !self.ended);
                }
                Received::Reset => {
                    from.mark_reset();
                    self.ended = true;
                    return done(moved, false, false);
                }
            }
        }
    }

    /// Nothing is redirected from now on; what comes is passed, until [`Direction::begin_passing`] and a turn.
    pub(super) fn hold(&mut self, to: &End, silent_for: Duration, tools: &mut Tools) -> Held {
        let (Some(redirected), Some(redirector)) = (&mut self.redirected, &mut tools.redirector) else {
            return Held::Silent;
        };
        let nothing = Taken { bytes: u64::MAX, written: 0 };
        let is_held = redirector.publish(redirected.source, nothing).is_ok();
        fence(Ordering::SeqCst);
        let progress = redirector.progress(redirected.source).unwrap_or_default();
        let last = Monotonic::from_nanos(progress.last_activity_ns);
        redirected.passing = false;
        if !is_held || tools.now.saturating_sub(last) < silent_for {
            Held::Busy
        } else if progress.passed != redirected.received || !redirected.has_arrived(&progress, to) {
            Held::Stuck
        } else {
            Held::Silent
        }
    }

    /// Whether no redirected byte is on its way to `to`.
    pub(super) fn is_delivered(&mut self, to: &End, tools: &Tools) -> bool {
        let Some(progress) = self.progress(tools) else { return true };
        self.redirected.as_mut().is_none_or(|redirected| redirected.has_arrived(&progress, to))
    }

    fn progress(&self, tools: &Tools) -> Option<Progress> {
        let redirected = self.redirected.as_ref().map(|redirected| redirected.source);
        tools.redirector.as_ref()?.progress(redirected.or(self.short_cut.source())?)
    }

    /// Takes the direction out of the kernel's books; its sockets are about to be closed.
    pub(super) fn forget(&mut self, tools: &mut Tools) {
        if let (Some(redirected), Some(redirector)) = (self.redirected.take(), &mut tools.redirector) {
            redirector.forget(redirected.source);
        }
    }
}

/// Whether nothing is queued. What came since we last looked may have been read in part, up to an urgent byte; the kernel
/// would move the whole segment.
fn has_read_all(from: &End) -> bool {
    let peek = RecvFlags::DONTWAIT | RecvFlags::PEEK;
    matches!(recv(&from.socket, &mut [0; 1], peek), Err(Errno::AGAIN))
}

/// Makes both sockets of a flow ones that bytes can be redirected to. Returns whether they are.
pub(super) fn join(from: &mut End, to: &mut End, redirector: &mut Redirector) -> bool {
    if from.member.is_none() || to.member.is_none() {
        let joined = from.join(redirector) && to.join(redirector);
        if !joined {
            redirector.leave(from.cookie);
            redirector.counters().refused();
        }
        from.member = Some(joined);
        to.member = Some(joined);
    }
    from.member == Some(true)
}

impl End {
    fn join(&mut self, redirector: &mut Redirector) -> bool {
        self.cookie = sockopt::socket_cookie(&self.socket).unwrap_or(0);
        self.is_tcp && self.cookie != 0 && redirector.join(&self.socket, self.cookie).is_ok()
    }
}
