//! Probes: whether this kernel does what the plane rests on, seen on connections of drowse with itself.
//!
//! Owns: one probe for each behaviour, and what is known to be wrong that no probe can see. Must never: leave anything
//! behind (a socket, an entry of a map, a count, an announcement), or go on after the first failure.
//! Rests on: nobody using the plane yet. All of them take some milliseconds; only a failure, or a machine that is very busy,
//! takes longer.
//!
//! Each probe has a flow `sender -> source -> target -> receiver`: the outer sockets are somebody else's, the inner ones
//! are drowse's and in the maps.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use drowse_ebpf::{Direction, SEGMENT_OVERHEAD, Taken};
use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::event::{PollFlags, Timespec};
use rustix::io::retry_on_intr;
use rustix::net::{Shutdown, shutdown, sockopt};
use rustix::system::uname;

mod loopback;
pub(super) mod peers;

use super::{Announcements, Redirector, Sockmap};
use crate::ebpf::kernel_release;
use crate::plane::copy::{self, Received, Sent};
use crate::sys;
use loopback::{Deadline, Loopback, give, stream};

/// The time for all probes, which take some twenty milliseconds, and as much again for those of [`peers`]. A machine that
/// boots is busy, and one that is virtual may stand still for two seconds; what is late there is no failure.
const WITHIN: Duration = Duration::from_secs(5);

/// A message: fits into all buffers.
const MESSAGE: usize = 1000;

/// Messages that are on their way at once.
const BURST: usize = 8;

/// More bytes than all buffers between a sender and a receiver that does not read may take.
const HELD_MAX: u64 = 4 << 20;

/// How often a full target is filled up, while acknowledgements still make room. With more redirected bytes than this, one
/// by one, the backlog alone would have no room.
const FILLS_MAX: u64 = 16;

const _: () = assert!(FILLS_MAX * SEGMENT_OVERHEAD < loopback::QUEUE_BYTES as u64 * 2);

/// How often the end of a stream is tried: whether bytes are on their way just then is a matter of luck.
const ENDS: usize = 4;

/// One behaviour.
type Probe = fn(&mut Probes<'_>) -> anyhow::Result<()>;

/// All of them. The first ones are those that the others rest on.
const ALL: [Probe; 5] = [
    tells_the_send_queue,
    moves_what_was_queued,
    arrives_in_the_send_queue,
    survives_the_end_of_a_stream,
    holds_a_sender_back,
];

/// Why this kernel should not be trusted with the plane, if so: a use after free in sockmap (CVE-2026-43016) that the
/// plane's own traffic can hit and no probe can see. A kernel of a distribution may have the fix under another number.
#[must_use]
pub fn known_fault() -> Option<String> {
    fault_of(&uname().release().to_string_lossy())
}

/// `release` is what uname(2) says.
fn fault_of(release: &str) -> Option<String> {
    let has_fix = match kernel_release(release) {
        Some((6, 1, patch)) => patch >= 191,
        Some((6, 12, patch)) => patch >= 81,
        Some((6, 18, patch)) => patch >= 44,
        Some((major, minor, _)) => (major, minor) >= (7, 1),
        None => false,
    };
    (!has_fix).then(|| {
        format!(
            "Linux {release} may lack the fix of a use after free in sockmap (CVE-2026-43016), which is in 6.1.191, \
             6.12.81, 6.18.44 and 7.1; a distribution may have it under another number"
        )
    })
}

/// Tries everything. Takes the announcements of the probes, and all others.
pub(super) fn run(sockmap: &Sockmap, announcements: &mut Announcements) -> anyhow::Result<()> {
    let mut probes =
        Probes { redirector: sockmap.redirector()?, announcements, loopback: Loopback::open(WITHIN)? };
    let result = ALL.iter().try_for_each(|probe| probe(&mut probes));
    while probes.announcements.take().is_some() {}
    sockmap.counters.clear();
    result
}

/// What the probes work with.
struct Probes<'a> {
    redirector: Redirector,
    announcements: &'a mut Announcements,
    loopback: Loopback,
}

impl Probes<'_> {
    /// A new flow; both of our sockets are in the map of targets.
    fn flow(&mut self) -> anyhow::Result<Flow<'_>> {
        let (sender, source) = self.loopback.pair()?;
        let (target, receiver) = self.loopback.pair()?;
        let (source_cookie, target_cookie) =
            (sockopt::socket_cookie(&source)?, sockopt::socket_cookie(&target)?);
        let flow = Flow {
            redirector: &mut self.redirector,
            announcements: self.announcements,
            deadline: self.loopback.deadline,
            sender,
            source,
            target,
            receiver,
            source_cookie,
            target_cookie,
        };
        flow.redirector
            .join(&flow.source, source_cookie)
            .and_then(|()| flow.redirector.join(&flow.target, target_cookie))
            .context("the kernel takes no connection into a sockmap")?;
        Ok(flow)
    }
}

/// A flow of a probe. It is out of the maps, and its connections are gone, when it is dropped.
struct Flow<'a> {
    redirector: &'a mut Redirector,
    announcements: &'a mut Announcements,
    deadline: Deadline,
    sender: OwnedFd,
    source: OwnedFd,
    target: OwnedFd,
    receiver: OwnedFd,
    source_cookie: u64,
    target_cookie: u64,
}

impl Flow<'_> {
    /// The kernel moves what comes from the sender, and announces it by the cookie of the source.
    fn begin(&mut self) -> anyhow::Result<()> {
        let direction =
            Direction { target: self.target_cookie, token: self.source_cookie, ..Direction::default() };
        self.redirector
            .begin(&self.source, self.source_cookie, direction)
            .context("the kernel takes no connection into a sockmap with a program")
    }

    /// It moves what comes from the receiver, too.
    fn begin_back(&mut self) -> anyhow::Result<()> {
        let direction =
            Direction { target: self.source_cookie, token: self.target_cookie, ..Direction::default() };
        self.redirector
            .begin(&self.target, self.target_cookie, direction)
            .context("the kernel takes no connection into a sockmap with a program")
    }

    fn progress(&self) -> Direction {
        self.redirector.progress(self.source_cookie).unwrap_or_default()
    }

    /// Waits until the program has seen all `bytes` that were sent.
    fn is_seen(&self, bytes: u64) -> anyhow::Result<Direction> {
        let mut progress = self.progress();
        let seen = self.deadline.until(|| {
            progress = self.progress();
            progress.redirected + progress.passed == bytes
        });
        let saw = progress.redirected + progress.passed;
        ensure!(seen, "the program saw {saw} of {bytes} bytes that a socket received");
        Ok(progress)
    }

    /// Takes the announcements there are. Returns whether one is of the way from sender to receiver.
    fn is_announced(&mut self) -> bool {
        let mut found = false;
        while let Some(token) = self.announcements.take() {
            found |= token == self.source_cookie;
        }
        found
    }
}

impl Drop for Flow<'_> {
    fn drop(&mut self) {
        for cookie in [self.source_cookie, self.target_cookie] {
            self.redirector.end(cookie);
        }
        for cookie in [self.source_cookie, self.target_cookie] {
            self.redirector.leave(cookie);
        }
    }
}

/// `WRITE_SEQ_OFFSET` and the two others: the program sees what is in a send queue, and how much room there is.
fn tells_the_send_queue(probes: &mut Probes<'_>) -> anyhow::Result<()> {
    let mut flow = probes.flow()?;
    flow.begin()?;
    give(&flow.sender, 0, MESSAGE)?;
    let empty = flow.is_seen(MESSAGE as u64)?;
    ensure!(
        empty.passed == 0,
        "the program does not find the room of an empty send queue: {} of {MESSAGE} bytes were not redirected",
        empty.passed
    );
    flow.deadline.expect(&flow.receiver, 0, MESSAGE).context("redirected bytes do not arrive")?;

    flow.redirector.end(flow.source_cookie);
    let filled = fill(&flow.target)?;
    let mut written = 0;
    flow.begin()?;
    for sent in 1..=FILLS_MAX {
        give(&flow.sender, sent, 1)?;
        let full = flow.is_seen(sent)?;
        if sent == 1 {
            let (expected, seen) = (MESSAGE as u64 + filled, u64::from(full.base.wrapping_sub(empty.base)));
            ensure!(
                seen == expected,
                "the program does not see what is written to a socket: {seen} bytes instead of {expected}"
            );
        }
        if full.passed > 0 {
            return Ok(());
        }
        written += fill(&flow.target)?;
        flow.redirector.publish(flow.source_cookie, Taken { bytes: 0, written })?;
    }
    bail!(
        "the program does not see that a send queue is full: it redirects to one with {} bytes",
        filled + written
    );
}

/// Sends until there is no room. Returns how many bytes that were.
fn fill(to: &OwnedFd) -> anyhow::Result<u64> {
    let mut filled = 0;
    while filled <= HELD_MAX {
        match copy::send(to, &stream(0, 16 * MESSAGE)) {
            Sent::Bytes(bytes) => filled += bytes as u64,
            Sent::NoRoom => return Ok(filled),
            Sent::Reset => bail!("a connection over the loopback fails"),
        }
    }
    bail!("a socket takes {filled} bytes for a peer that does not read");
}

/// The poke of [`Redirector::begin`]: what was queued before the beginning is moved, and comes first.
fn moves_what_was_queued(probes: &mut Probes<'_>) -> anyhow::Result<()> {
    let mut flow = probes.flow()?;
    give(&flow.sender, 0, MESSAGE)?;
    ensure!(
        flow.deadline.wait(&[(&flow.source, PollFlags::IN)]),
        "bytes that were sent over the loopback did not arrive"
    );
    flow.begin()?;
    flow.deadline
        .expect(&flow.receiver, 0, MESSAGE)
        .context("bytes that were queued before the kernel took over are not moved")?;
    give(&flow.sender, MESSAGE as u64, MESSAGE)?;
    flow.deadline
        .expect(&flow.receiver, MESSAGE as u64, MESSAGE)
        .context("bytes that came after those queued before the kernel took over are not moved")
}

/// [`sys::written_position`]: what was redirected counts there, so a FIN can wait for it.
fn arrives_in_the_send_queue(probes: &mut Probes<'_>) -> anyhow::Result<()> {
    let mut flow = probes.flow()?;
    let position = |flow: &Flow<'_>| sys::written_position(flow.target.as_fd());
    let before = position(&flow).context("the kernel does not tell how much was written to a socket")?;
    give(&flow.target, 0, MESSAGE)?;
    flow.begin()?;
    give(&flow.sender, MESSAGE as u64, MESSAGE)?;
    flow.deadline.expect(&flow.receiver, 0, 2 * MESSAGE).context("redirected bytes do not arrive")?;
    let mut counted = 0;
    let is_all = flow.deadline.until(|| {
        counted = position(&flow).map_or(counted, |position| position.wrapping_sub(before));
        counted == 2 * MESSAGE as u64
    });
    ensure!(is_all, "redirected bytes are not told in TCP_INFO: {counted} instead of {}", 2 * MESSAGE);
    Ok(())
}

/// A FIN is heard of, and costs neither the bytes on their way nor the other direction.
fn survives_the_end_of_a_stream(probes: &mut Probes<'_>) -> anyhow::Result<()> {
    for _ in 0..ENDS {
        let mut flow = probes.flow()?;
        flow.begin()?;
        flow.begin_back()?;
        let bytes = BURST * MESSAGE;
        for position in (0..bytes).step_by(MESSAGE) {
            give(&flow.sender, position as u64, MESSAGE)?;
            give(&flow.receiver, position as u64, MESSAGE)?;
        }
        shutdown(&flow.sender, Shutdown::Write)?;
        let deadline = flow.deadline;
        deadline
            .expect(&flow.sender, 0, bytes)
            .context("bytes on their way to a socket are lost when its stream ends")?;
        deadline
            .expect(&flow.receiver, 0, bytes)
            .context("bytes that were redirected before their stream ended are lost")?;
        ensure!(
            deadline.wait(&[(&flow.source, PollFlags::RDHUP)]),
            "the end of a stream that is redirected is not told (no EPOLLRDHUP)"
        );
        let end = copy::receive(&flow.source, &mut [0; 8]);
        ensure!(end == Received::Finished, "the end of a stream that is redirected reads as {end:?}");
        for socket in [&flow.source, &flow.target] {
            sockopt::socket_error(socket)?.context("the end of a stream breaks a socket of its flow")?;
        }
        give(&flow.receiver, bytes as u64, MESSAGE)?;
        deadline
            .expect(&flow.sender, bytes as u64, MESSAGE)
            .context("no bytes come back any more once a stream has ended")?;
    }
    Ok(())
}

/// A receiver that does not read: its sender is stopped, hears when there is room, every byte arrives in order, and the
/// kernel moves bytes again by itself once user space has moved those that were passed.
fn holds_a_sender_back(probes: &mut Probes<'_>) -> anyhow::Result<()> {
    let mut flow = probes.flow()?;
    flow.begin()?;
    let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    epoll::add(&epoll, &flow.sender, EventData::new_u64(0), EventFlags::OUT | EventFlags::ET)?;
    let mut relay = Relay {
        position: sys::written_position(flow.target.as_fd())?,
        flow: &mut flow,
        sent: 0,
        got: 0,
        taken: Taken::default(),
        pending: Vec::new(),
    };
    relay.send_until_held_back(epoll.as_fd())?;

    let held = relay.sent;
    let deadline = relay.flow.deadline;
    // What it is told before it is read from counts for nothing: it has sent until it had no room again.
    while !is_told(epoll.as_fd()) {
        if !relay.turn()? {
            let receiver = relay.flow.receiver.as_fd();
            ensure!(
                deadline.wait_briefly(&[(receiver, PollFlags::IN), (epoll.as_fd(), PollFlags::IN)]),
                "a writer that waits for room by edge-triggered epoll is not told of it ({} of {held} bytes came)",
                relay.got
            );
        }
    }
    let redirected = relay.flow.progress().redirected;
    loop {
        while relay.turn()? {}
        let is_all = relay.got == relay.sent;
        if is_all && relay.flow.progress().redirected > redirected && relay.sent > held {
            return Ok(());
        }
        if is_all {
            relay.send(MESSAGE)?;
        }
        let receiver = relay.flow.receiver.as_fd();
        if !deadline.wait_briefly(&[(receiver, PollFlags::IN)]) {
            ensure!(is_all, "bytes that were held back are lost: {} of {} came", relay.got, relay.sent);
            bail!("the kernel does not redirect again once all passed bytes were moved");
        }
    }
}

/// Whether edge-triggered epoll reports anything.
fn is_told(epoll: BorrowedFd<'_>) -> bool {
    let mut events = Vec::with_capacity(1);
    let now = Timespec::default();
    retry_on_intr(|| epoll::wait(epoll, spare_capacity(&mut events), Some(&now))).is_ok_and(|told| told > 0)
}

/// What a worker does for one direction, with a receiver that checks what it gets.
struct Relay<'a, 'b> {
    flow: &'a mut Flow<'b>,
    /// [`sys::written_position`] of the target at the beginning.
    position: u64,
    sent: u64,
    got: u64,
    /// What is published.
    taken: Taken,
    /// Passed bytes that the target had no room for.
    pending: Vec<u8>,
}

impl Relay<'_, '_> {
    /// Sends as an edge-triggered writer, until there is no room and the kernel has begun to pass and said so.
    fn send_until_held_back(&mut self, epoll: BorrowedFd<'_>) -> anyhow::Result<()> {
        let mut is_announced = false;
        let deadline = self.flow.deadline;
        loop {
            while self.send(16 * MESSAGE)? {
                ensure!(
                    self.sent <= HELD_MAX,
                    "a sender is not held back: {} bytes were taken for a peer that does not read",
                    self.sent
                );
            }
            let passed = self.flow.progress().passed;
            is_announced |= self.flow.is_announced();
            if passed > 0 && is_announced && !is_told(epoll) {
                return Ok(());
            }
            let news = [(epoll, PollFlags::IN), (self.flow.announcements.as_fd(), PollFlags::IN)];
            if !deadline.wait_briefly(&news) {
                ensure!(passed > 0, "no bytes are passed to user space for a peer that does not read");
                bail!("it is not announced that bytes are passed to user space");
            }
        }
    }

    /// Sends at most `count` more bytes. Returns whether there was room for one.
    fn send(&mut self, count: usize) -> anyhow::Result<bool> {
        match copy::send(&self.flow.sender, &stream(self.sent, count)) {
            Sent::Bytes(bytes) => self.sent += bytes as u64,
            Sent::NoRoom => return Ok(false),
            Sent::Reset => bail!("a connection over the loopback fails"),
        }
        Ok(true)
    }

    /// Receives, and moves what was passed. Returns whether anything moved.
    fn turn(&mut self) -> anyhow::Result<bool> {
        let received = self.receive()?;
        let moved = self.move_passed()?;
        Ok(received || moved)
    }

    fn receive(&mut self) -> anyhow::Result<bool> {
        let mut buffer = vec![0; 64 * MESSAGE];
        match copy::receive(&self.flow.receiver, &mut buffer) {
            Received::Bytes(bytes) => {
                buffer.truncate(bytes);
                let in_order = buffer == stream(self.got, bytes);
                ensure!(in_order, "bytes that were held back come in another order, after {}", self.got);
                self.got += bytes as u64;
                Ok(true)
            }
            Received::Nothing => Ok(false),
            end @ (Received::Finished | Received::Reset) => bail!("a held-back stream ends ({end:?})"),
        }
    }

    fn move_passed(&mut self) -> anyhow::Result<bool> {
        let progress = self.flow.progress();
        let waiting = progress.passed - self.taken.bytes;
        if self.pending.is_empty() {
            let given = progress.redirected + self.taken.written;
            let position = sys::written_position(self.flow.target.as_fd());
            let is_delivered = position.is_ok_and(|position| position.wrapping_sub(self.position) >= given);
            if waiting == 0 || !is_delivered {
                return Ok(false);
            }
            let mut buffer = vec![0; usize::try_from(waiting)?.min(64 * MESSAGE)];
            match copy::receive(&self.flow.source, &mut buffer) {
                Received::Bytes(bytes) => {
                    buffer.truncate(bytes);
                    self.pending = buffer;
                    self.taken.bytes += bytes as u64;
                }
                Received::Nothing => return Ok(false),
                end @ (Received::Finished | Received::Reset) => {
                    bail!("{waiting} bytes that were passed to user space cannot be received ({end:?})")
                }
            }
        }
        match copy::send(&self.flow.target, &self.pending) {
            Sent::Bytes(bytes) => {
                self.pending.drain(..bytes);
                self.taken.written += bytes as u64;
            }
            Sent::NoRoom => return Ok(false),
            Sent::Reset => bail!("a socket that bytes were redirected to cannot be written to"),
        }
        if self.pending.is_empty() {
            self.flow.redirector.publish(self.flow.source_cookie, self.taken)?;
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_with_the_fix_are_told_from_those_without() {
        for good in ["6.1.191", "6.12.81+deb13-amd64", "6.18.44-x", "6.18.100", "7.1.0", "7.3.0-rc7", "8.0.1"]
        {
            assert_eq!(fault_of(good), None, "{good}");
        }
        for bad in
            ["6.1.190", "6.1.0-44-amd64", "6.6.150", "6.8.0-60-generic", "6.12.80", "6.18.43", "7.0.9", "x"]
        {
            let reason = fault_of(bad).unwrap();
            assert!(reason.contains(bad) && reason.contains("6.18.44"), "{reason}");
        }
    }

    #[test]
    fn no_two_parts_of_a_stream_are_alike() {
        assert_eq!(stream(5, 10), stream(0, 15)[5..]);
        let parts: std::collections::BTreeSet<_> =
            (0..HELD_MAX).step_by(MESSAGE).map(|position| stream(position, 16)).collect();
        assert_eq!(parts.len() as u64, HELD_MAX.div_ceil(MESSAGE as u64));
    }
}
