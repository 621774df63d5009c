//! The life of a flow: open, and one of three ends (both FINs passed on, a reset passed on, closed for silence).
//!
//! Owns: when a flow is over and how its sockets are closed. Must never: end a flow with a FIN when a byte of it
//! was lost; whatever ends it in an unforeseen way is a reset, which is what `Drop` does.
//! Rests on: a RST leaves the receive queue readable (`tcp_reset`), and a close with `SO_LINGER` zero throws the
//! send queue away. So the last answer of a peer that resets is read, and drained, before the reset is passed on.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use rustix::event::epoll::EventFlags;

use super::Side;
use super::direction::{Direction, End, Pumped, Tools};
use super::redirected::Held;
use crate::accounting::{Accounting, Counters};
use crate::admission::Seat;
use crate::clock::{self, Monotonic};
use crate::plane::{Flow, sockmap};

/// How long the last bytes before a reset may take. A peer hears of a reset within a second.
const RESET_WAIT: Duration = Duration::from_millis(500);

/// How long the peers of a silent flow have to answer our FINs.
const FIN_WAIT: Duration = Duration::from_secs(1);

/// The flow's entry in the counters: counted open from `new` to `Drop`.
#[derive(Debug)]
pub(super) struct Ticket {
    accounting: Arc<Accounting>,
    worker: usize,
    load: Arc<AtomicUsize>,
}

impl Ticket {
    pub(super) fn new(accounting: Arc<Accounting>, worker: usize, load: Arc<AtomicUsize>) -> Self {
        load.fetch_add(1, Relaxed);
        let ticket = Self { accounting, worker, load };
        if let Some(counters) = ticket.counters() {
            counters.opened(clock::now());
        }
        ticket
    }

    fn counters(&self) -> Option<&Counters> {
        self.accounting.worker(self.worker)
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.load.fetch_sub(1, Relaxed);
        self.accounting.closed(self.worker, clock::now());
    }
}

/// The flow's entry among those that the kernel moves: counted open from `new` to `Drop`.
#[derive(Debug)]
struct InKernel(Arc<sockmap::Counters>);

impl InKernel {
    fn new(counters: Arc<sockmap::Counters>) -> Self {
        counters.opened();
        Self(counters)
    }
}

impl Drop for InKernel {
    fn drop(&mut self) {
        self.0.closed();
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Bytes travel.
    Open,
    /// A reset is to be passed on, once the last bytes are drained or at this time.
    Resetting(Monotonic),
    /// Both sides were sent a FIN; over when both have answered, or at this time.
    Silenced(Monotonic),
}

/// What a flow needs after its turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Turn {
    /// Nothing before the next event.
    Idle,
    /// Another turn in a few milliseconds, if there is no event before: something is waited for that none tells.
    Wait,
    /// Another turn soon.
    More,
    /// It has ended: drop it.
    Over,
}

/// A flow in the hands of a worker.
#[derive(Debug)]
#[expect(clippy::struct_excessive_bools, reason = "independent facts about one flow")]
pub(super) struct LiveFlow {
    client: End,
    backend: End,
    to_backend: Direction,
    to_client: Direction,
    phase: Phase,
    last_activity: Monotonic,
    /// Whether it waits for another turn.
    pub(super) queued: bool,
    /// Whether it waits for the next tick.
    pub(super) ticking: bool,
    /// Nobody is left to read what the client still sends.
    pub(super) backend_gone: bool,
    /// Both sockets may be closed without a reset.
    clean: bool,
    /// It is, or was, moved by the kernel.
    in_kernel: Option<InKernel>,
    _seat: Seat,
    /// Dropped after the sockets, so that a flow that is counted closed is closed.
    ticket: Ticket,
}

impl LiveFlow {
    pub(super) fn new(flow: Flow, ticket: Ticket) -> Self {
        Self {
            client: End::new(flow.client, Side::Client),
            backend: End::new(flow.backend, Side::Backend),
            to_backend: Direction::new(),
            to_client: Direction::new(),
            phase: Phase::Open,
            last_activity: clock::now(),
            queued: false,
            ticking: false,
            backend_gone: false,
            clean: false,
            in_kernel: None,
            _seat: flow.seat,
            ticket,
        }
    }

    /// Both sockets, made fit for a worker.
    pub(super) fn prepare(&self) -> rustix::io::Result<()> {
        self.client.prepare()?;
        self.backend.prepare()
    }

    pub(super) fn end(&self, side: Side) -> &End {
        match side {
            Side::Client => &self.client,
            Side::Backend => &self.backend,
        }
    }

    /// Takes note of an event on one socket.
    pub(super) fn note(&mut self, side: Side, flags: EventFlags) {
        match side {
            Side::Client => self.client.note(flags, self.to_client.shut),
            Side::Backend => self.backend.note(flags, self.to_backend.shut),
        }
    }

    pub(super) fn end_mut(&mut self, side: Side) -> &mut End {
        match side {
            Side::Client => &mut self.client,
            Side::Backend => &mut self.backend,
        }
    }

    /// The kernel began to pass what comes from `side`, or wants the short cut opened anew.
    pub(super) fn announce(&mut self, side: Side) {
        let direction = match side {
            Side::Client => &mut self.to_backend,
            Side::Backend => &mut self.to_client,
        };
        direction.begin_passing();
        direction.short_cut.expire();
    }

    /// Whether bytes still travel.
    fn is_open(&self) -> bool {
        self.phase == Phase::Open
    }

    /// Moves what can be moved and draws the conclusions.
    pub(super) fn turn(&mut self, tools: &mut Tools) -> Turn {
        let pumped = self.pump(tools);
        if !self.is_open() {
            self.close_short_cuts(tools);
        }
        match self.phase {
            Phase::Open if self.client.reset || self.backend.reset => {
                self.phase = Phase::Resetting(tools.now + RESET_WAIT);
                self.close_short_cuts(tools);
                // The other direction may have more to say now that its peer is known to be dead.
                self.pump(tools);
                self.resetting(tools, tools.now + RESET_WAIT)
            }
            Phase::Open if (self.to_backend.is_done() || self.backend_gone) && self.to_client.is_done() => {
                self.clean = true;
                Turn::Over
            }
            Phase::Open if pumped.more => Turn::More,
            Phase::Open if pumped.wait => Turn::Wait,
            Phase::Open => Turn::Idle,
            Phase::Resetting(until) => self.resetting(tools, until),
            Phase::Silenced(until) => self.silenced(tools, until),
        }
    }

    /// Both sides get a reset as soon as what we hold for them is sent.
    pub(super) fn condemn(&mut self, now: Monotonic) {
        self.to_backend.condemn();
        self.to_client.condemn();
        if !matches!(self.phase, Phase::Resetting(_)) {
            self.phase = Phase::Resetting(now + RESET_WAIT);
        }
    }

    /// Closes the flow, FIN first, if it moved no byte for `silent_for`; bytes that just arrived count. When
    /// something waits to be sent to a peer that takes nothing, a FIN would be a lie: that flow is reset.
    pub(super) fn close_silent(&mut self, silent_for: Duration, tools: &mut Tools) {
        if !self.is_open() || tools.now.saturating_sub(self.last_activity) < silent_for {
            return;
        }
        self.client.readable = true;
        self.backend.readable = true;
        self.pump(tools);
        self.close_short_cuts(tools);
        let is_silent = tools.now.saturating_sub(self.last_activity) >= silent_for;
        if self.client.reset || self.backend.reset || !is_silent {
            return;
        }
        let held = [
            self.to_backend.hold(&self.backend, silent_for, tools),
            self.to_client.hold(&self.client, silent_for, tools),
        ];
        if held.contains(&Held::Busy) {
            self.to_backend.begin_passing();
            self.to_client.begin_passing();
            return;
        }
        if !self.to_backend.is_flushed() || !self.to_client.is_flushed() || held.contains(&Held::Stuck) {
            self.condemn(tools.now);
            return;
        }
        self.to_backend.ended = true;
        self.to_client.ended = true;
        self.phase = Phase::Silenced(tools.now + FIN_WAIT);
    }

    /// Has the peers send everything to us again.
    fn close_short_cuts(&mut self, tools: &mut Tools) {
        for direction in [&mut self.to_backend, &mut self.to_client] {
            let last = direction.close_short_cut(tools);
            self.last_activity = self.last_activity.max(last.unwrap_or(Monotonic::ZERO));
        }
    }

    /// Gives back what the flow borrowed.
    pub(super) fn release(&mut self, tools: &mut Tools) {
        self.to_backend.release(&mut tools.pipes);
        self.to_client.release(&mut tools.pipes);
        self.close_short_cuts(tools);
        self.to_backend.forget(tools);
        self.to_client.forget(tools);
    }

    fn pump(&mut self, tools: &mut Tools) -> Pumped {
        let there = self.to_backend.pump(&mut self.client, &mut self.backend, tools);
        let back = self.to_client.pump(&mut self.backend, &mut self.client, tools);
        if let Some(counters) = self.ticket.counters() {
            if there.bytes > 0 {
                counters.to_backend(there.bytes, tools.now);
            }
            if back.bytes > 0 {
                counters.to_client(back.bytes, tools.now);
            }
        }
        if there.bytes + back.bytes > 0 {
            self.last_activity = tools.now;
        }
        if let Some(redirector) = &tools.redirector
            && self.in_kernel.is_none()
            && (self.to_backend.is_in_kernel() || self.to_client.is_in_kernel())
        {
            self.in_kernel = Some(InKernel::new(redirector.counters()));
        }
        Pumped {
            bytes: there.bytes + back.bytes,
            more: there.more || back.more,
            wait: there.wait || back.wait,
        }
    }

    /// Over when each living side has acknowledged all that it will get, or when it has had time enough.
    fn resetting(&mut self, tools: &Tools, until: Monotonic) -> Turn {
        let drained = |end: &End, inbound: &mut Direction| {
            let is_sent = |inbound: &mut Direction| inbound.is_flushed() && inbound.is_delivered(end, tools);
            end.reset || (inbound.ended && is_sent(inbound) && end.unsent_bytes() == 0)
        };
        let drained =
            drained(&self.client, &mut self.to_client) && drained(&self.backend, &mut self.to_backend);
        if drained || tools.now >= until {
            return Turn::Over;
        }
        let is_open = |inbound: &Direction| !inbound.ended && !inbound.is_redirected();
        let more = (self.client.readable && self.backend.writable && is_open(&self.to_backend))
            || (self.backend.readable && self.client.writable && is_open(&self.to_client));
        if more { Turn::More } else { Turn::Wait }
    }

    /// What the peers say after our FIN can go nowhere.
    fn silenced(&mut self, tools: &mut Tools, until: Monotonic) -> Turn {
        let more = self.client.discard(tools) | self.backend.discard(tools);
        if (self.client.finished && self.backend.finished) || tools.now >= until {
            self.clean = true;
            return Turn::Over;
        }
        if more { Turn::More } else { Turn::Wait }
    }
}

impl Drop for LiveFlow {
    fn drop(&mut self) {
        if !self.clean {
            self.client.close_with_reset();
            self.backend.close_with_reset();
        }
    }
}
