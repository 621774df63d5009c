//! One worker: a thread with an epoll of its own, and the flows that it was given.
//!
//! Owns: the loop, whose turn it is, the clock of the wake-up. Must never: block but in epoll, or share a flow.
//! Rests on: a socket is registered once, edge-triggered; an edge that comes while a flow has its turn is reported
//! at the next wait, epoll(7). The eventfd is never read: each write is an edge of its own.

use std::cell::OnceCell;
use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::Duration;

use anyhow::Context;
use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::io::Errno;
use rustix::time::Timespec;
use tracing::{error, warn};

use super::direction::Tools;
use super::flow::{LiveFlow, Turn};
use super::{Command, Mode, Side, Token};
use crate::clock::{self, Monotonic};
use crate::plane::sockmap::Sockmap;
use crate::report::tell;

/// Events that one wait returns at most.
const EVENTS_MAX: usize = 256;

/// How often flows are looked at that wait for what no event tells: a queue to drain, time to pass.
const TICK: Duration = Duration::from_millis(1);

/// The eventfd's mark among the events; no flow gets this number.
const WAKE: u64 = u64::MAX;

/// What a worker thread owns for as long as it lives.
#[derive(Debug)]
pub(super) struct Worker {
    pub(super) epoll: OwnedFd,
    pub(super) commands: Receiver<Command>,
    pub(super) mode: Mode,
    index: usize,
    /// The way into the kernel, from the moment that there is one.
    sockmap: OnceCell<Arc<Sockmap>>,
}

impl Worker {
    /// The worker number `index`, which hears of its commands through `wake`.
    pub(super) fn new(
        wake: &Arc<OwnedFd>,
        commands: Receiver<Command>,
        mode: Mode,
        index: usize,
    ) -> rustix::io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        epoll::add(&epoll, wake, EventData::new_u64(WAKE), EventFlags::IN | EventFlags::ET)?;
        Ok(Self { epoll, commands, mode, index, sockmap: OnceCell::new() })
    }

    /// Works until the commands' sender is gone. A panic resets the worker's flows, and it starts anew.
    pub(super) fn run(&self) {
        loop {
            match catch_unwind(AssertUnwindSafe(|| Table::new(self).serve())) {
                Ok(Ok(())) => return,
                Ok(Err(error)) => {
                    error!("forwarding worker stops, its flows are reset: {error:#}");
                    return;
                }
                Err(_) => error!("forwarding worker panicked, its flows are reset; this is a bug in drowse"),
            }
        }
    }
}

/// The flows of a worker. Numbers are never used twice, so an event that comes late finds nothing.
struct Table<'a> {
    worker: &'a Worker,
    flows: HashMap<u64, LiveFlow>,
    next_id: u64,
    /// Flows that stopped for fairness.
    queue: Vec<u64>,
    /// Flows that wait for the next tick, and when that is.
    ticking: Vec<u64>,
    next_tick: Monotonic,
    tools: Tools,
}

impl<'a> Table<'a> {
    fn new(worker: &'a Worker) -> Self {
        let mut table = Self {
            worker,
            flows: HashMap::new(),
            next_id: 0,
            queue: Vec::new(),
            ticking: Vec::new(),
            next_tick: Monotonic::ZERO,
            tools: Tools::new(worker.mode),
        };
        table.find_redirector();
        table
    }

    /// Opens the way into the kernel, if there is one.
    fn find_redirector(&mut self) {
        let redirector = self.worker.sockmap.get().map(|sockmap| sockmap.redirector()).transpose();
        self.tools.redirector = redirector.unwrap_or_else(|error| {
            warn!("flows of worker {} are moved by user space: {error:#}", self.worker.index);
            None
        });
    }

    fn serve(&mut self) -> anyhow::Result<()> {
        let mut events = Vec::with_capacity(EVENTS_MAX);
        // Commands that came before a panic are not announced again.
        let mut goes_on = self.obey();
        while goes_on {
            goes_on = self.round(&mut events)?;
        }
        Ok(())
    }

    /// Waits once and deals with what happened. Returns whether to go on.
    fn round(&mut self, events: &mut Vec<epoll::Event>) -> anyhow::Result<bool> {
        match epoll::wait(&self.worker.epoll, spare_capacity(events), self.timeout().as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(errno).context("wait for events"),
        }
        // Commands first: flows are to be reset before the backend is stopped, and its end is no end of theirs.
        let is_wake = |event: &epoll::Event| {
            let data = event.data;
            data.u64() == WAKE
        };
        if events.iter().any(is_wake) && !self.obey() {
            return Ok(false);
        }
        self.tools.now = clock::now();
        let queue = std::mem::take(&mut self.queue);
        for event in events.drain(..) {
            let (data, flags) = (event.data, event.flags);
            self.event(data.u64(), flags);
        }
        for id in queue {
            if let Some(flow) = self.flows.get_mut(&id) {
                flow.queued = false;
            }
            self.turn(id);
        }
        self.tick();
        Ok(true)
    }

    fn timeout(&self) -> Option<Timespec> {
        let wait = if !self.queue.is_empty() {
            Duration::ZERO
        } else if !self.ticking.is_empty() {
            TICK
        } else {
            return None;
        };
        Timespec::try_from(wait).ok()
    }

    fn event(&mut self, data: u64, flags: EventFlags) {
        let token = Token(data);
        let Some(flow) = self.flows.get_mut(&token.flow()) else { return };
        flow.note(token.side(), flags);
        self.turn(token.flow());
    }

    fn turn(&mut self, id: u64) {
        let Some(flow) = self.flows.get_mut(&id) else { return };
        match flow.turn(&mut self.tools) {
            Turn::Over => {
                tell::flow_ended(&flow.end(Side::Client).socket);
                flow.release(&mut self.tools);
                self.flows.remove(&id);
                return;
            }
            Turn::More if !flow.queued => {
                flow.queued = true;
                self.queue.push(id);
            }
            Turn::Wait if !flow.ticking => {
                flow.ticking = true;
                self.ticking.push(id);
            }
            Turn::More | Turn::Wait | Turn::Idle => {}
        }
        for side in [Side::Client, Side::Backend] {
            let end = flow.end_mut(side);
            if end.listens == end.listening {
                continue;
            }
            end.listening = end.listens;
            let (data, flags) = (EventData::new_u64(end.token), end.wanted_events());
            if let Err(errno) = epoll::modify(&self.worker.epoll, &end.socket, data, flags) {
                warn!("reset a flow that could not be registered with epoll: {errno}");
                flow.release(&mut self.tools);
                self.flows.remove(&id);
                return;
            }
        }
    }

    /// Looks at the flows that wait for what no event tells.
    fn tick(&mut self) {
        if self.ticking.is_empty() || self.tools.now < self.next_tick {
            return;
        }
        self.next_tick = self.tools.now + TICK;
        for id in std::mem::take(&mut self.ticking) {
            if let Some(flow) = self.flows.get_mut(&id) {
                flow.ticking = false;
                self.turn(id);
            }
        }
    }

    /// Carries out what was asked for. Returns whether to go on.
    fn obey(&mut self) -> bool {
        self.tools.now = clock::now();
        loop {
            match self.worker.commands.try_recv() {
                Ok(Command::Open(flow)) => self.adopt(*flow),
                Ok(Command::ResetAll) => self.for_each(|flow, tools| flow.condemn(tools.now)),
                Ok(Command::CloseSilent(silent_for)) => {
                    self.for_each(|flow, tools| flow.close_silent(silent_for, tools));
                }
                Ok(Command::Sockmap(sockmap)) => {
                    self.worker.sockmap.get_or_init(|| sockmap);
                    self.find_redirector();
                    self.for_each(|_, _| ());
                }
                Ok(Command::Passing(token)) => {
                    if let Some(flow) = self.flows.get_mut(&token.flow()) {
                        flow.announce(token.side());
                        self.turn(token.flow());
                    }
                }
                Ok(Command::BackendGone) => self.for_each(|flow, _| flow.backend_gone = true),
                #[cfg(test)]
                Ok(Command::Panic) => panic!("asked for by a test"),
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => return false,
            }
        }
    }

    /// Does something to every flow and lets it draw its conclusions.
    fn for_each(&mut self, act: impl Fn(&mut LiveFlow, &mut Tools)) {
        let ids: Vec<u64> = self.flows.keys().copied().collect();
        for id in ids {
            let Some(flow) = self.flows.get_mut(&id) else { continue };
            act(flow, &mut self.tools);
            self.turn(id);
        }
    }

    /// Registers a flow. Bytes that are there already are the first events.
    fn adopt(&mut self, mut flow: LiveFlow) {
        let id = self.next_id;
        self.next_id += 1;
        match self.register(id, &mut flow) {
            Ok(()) => {
                self.flows.insert(id, flow);
                self.turn(id);
            }
            Err(errno) => {
                warn!("reset a flow that could not be registered with epoll: {errno}");
                flow.release(&mut self.tools);
            }
        }
    }

    fn register(&mut self, id: u64, flow: &mut LiveFlow) -> rustix::io::Result<()> {
        flow.prepare()?;
        for side in [Side::Client, Side::Backend] {
            flow.end_mut(side).token = Token::new(self.worker.index, id, side).0;
        }
        for side in [Side::Client, Side::Backend] {
            let end = flow.end_mut(side);
            end.listening = end.listens;
            let (data, flags) = (EventData::new_u64(end.token), end.wanted_events());
            epoll::add(&self.worker.epoll, &end.socket, data, flags)?;
        }
        Ok(())
    }
}

impl Drop for Table<'_> {
    /// Flows that are left after a panic, or at the end, have entries in the kernel's maps.
    fn drop(&mut self) {
        for flow in self.flows.values_mut() {
            flow.release(&mut self.tools);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{ErrorKind, Read as _};
    use std::sync::mpsc;

    use rustix::event::{EventfdFlags, eventfd};

    use super::super::flow::Ticket;
    use super::super::tests::tcp_pair;
    use super::*;
    use crate::accounting::Accounting;
    use crate::admission::Seat;
    use crate::plane::Flow;

    #[test]
    fn a_reset_that_was_asked_for_comes_before_the_backends_end() {
        let wake = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap());
        let (commands, receiver) = mpsc::channel();
        let worker = Worker::new(&wake, receiver, Mode::Copy, 0).unwrap();
        let mut table = Table::new(&worker);
        let mut events = Vec::with_capacity(EVENTS_MAX);
        let (mut client, accepted) = tcp_pair();
        let (connected, backend) = tcp_pair();
        for socket in [&accepted, &connected] {
            socket.set_nonblocking(true).unwrap();
        }
        let flow = Flow { client: accepted.into(), backend: connected.into(), seat: Seat::default() };
        let ticket = Ticket::new(Accounting::new(1), 0, Arc::default());
        table.adopt(LiveFlow::new(flow, ticket));
        assert!(table.round(&mut events).unwrap());

        // The event loop asks for the reset, then has the backend stopped; the worker sees both at once.
        drop(backend);
        commands.send(Command::ResetAll).unwrap();
        rustix::io::write(&wake, &1_u64.to_ne_bytes()).unwrap();
        while !table.flows.is_empty() {
            assert!(table.round(&mut events).unwrap());
        }
        client.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        assert_eq!(client.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    }
}
