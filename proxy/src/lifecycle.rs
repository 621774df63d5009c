//! The rules of the whole program: when the backend starts, when clients are let through, when it stops.
//!
//! PURE. Owns: the state and every decision on it. Must never: do I/O, read a clock, or fail; a failure is an
//! event. Time and counters come with each event, what is to be done goes out as commands.
//!
//! ```text
//! asleep -> waking -> awake -> settling -> stopping -> asleep
//!              \________\________________________\__-> failed (back-off) -> waking
//! ```

use std::time::Duration;

use crate::accounting::Totals;
use crate::activation::{BackendState, Failure};
use crate::clock::Monotonic;
use crate::idle::{self, Decision, IdlePolicy, Observed};

/// The first back-off after a failure; it doubles with each further one.
pub const BACKOFF_MIN: Duration = Duration::from_millis(250);
/// The longest back-off. A backend that was awake for so long is forgiven all earlier failures.
pub const BACKOFF_MAX: Duration = Duration::from_secs(30);
/// How long silent flows get to close, FIN first, before the backend is looked at again.
pub const CLOSING_TIME: Duration = Duration::from_secs(2);
/// How often handed-off flows are looked at that an exit waits for.
pub const DRAIN_LOOK_PAUSE: Duration = Duration::from_millis(100);
/// The shortest time between two tries to put the backend to sleep after a veto or a stop that failed, however short the
/// idle time is.
pub const SETTLE_PAUSE_MIN: Duration = Duration::from_secs(1);
/// The same after a look that found the backend in use.
pub const USED_PAUSE_MIN: Duration = Duration::from_millis(100);
const _: () = assert!(BACKOFF_MIN.as_millis() < BACKOFF_MAX.as_millis());

/// What happens to an idle backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum IdleAction {
    /// It is stopped.
    Stop,
    /// Nothing; it may stop itself.
    None,
}

/// Who starts the backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ownership {
    /// Nobody that we know: a plain proxy.
    Foreign,
    /// A service manager, where it lives on when we exit.
    Managed,
    /// We do; it ends with us.
    Own,
}

/// The user's choices that the rules depend on.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// Who starts the backend.
    pub ownership: Ownership,
    /// How long nobody may use the backend before it is put to sleep.
    pub idle_time: Duration,
    /// What counts as use.
    pub idle_policy: IdlePolicy,
    /// What is done to an idle backend.
    pub idle_action: IdleAction,
    /// How long drowse itself stays with nothing to do.
    pub exit_idle_time: Duration,
    /// How long a client waits for the backend.
    pub start_timeout: Duration,
    /// How long somebody else's stop may take.
    pub stop_timeout: Duration,
    /// How long open flows may take to end when drowse is asked to stop.
    pub drain_time: Duration,
}

/// The state of the backend as users see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// Not running; the next client starts it.
    Asleep,
    /// Starting, or running but not accepting connections. Clients are held until `deadline`.
    Waking {
        /// When the clients that are held at this moment are given up.
        deadline: Monotonic,
        /// Whether a start of ours is waited for: then the backend's end fails those who wait. Else it ran
        /// already and refused somebody.
        started_by_us: bool,
    },
    /// Accepting connections.
    Awake,
    /// Idle for long enough: looking once more, before it is stopped.
    Settling(Settling),
    /// On its way down. Clients are held for the next start.
    Stopping(Stopping),
    /// The last start failed or the backend crashed. Clients are held; no start before `until`.
    Failed {
        /// When the next start may be tried.
        until: Monotonic,
        /// What went wrong.
        failure: Failure,
    },
}

/// The steps of settling.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Settling {
    /// The last look: accept queues, counters, the busy command.
    Looking,
    /// Silent flows are being closed; if any is left at this moment, the backend is in use after all.
    Closing(Monotonic),
}

/// Who stops the backend, and what comes after.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stopping {
    /// We do, because it is idle or because we exit.
    Ours,
    /// We do, after a start that took too long; this failure follows.
    Abandoned(Failure),
    /// Somebody else does; waited for until this moment.
    Foreign(Monotonic),
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A client was accepted; it is held.
    ClientAccepted,
    /// A held client went away.
    ClientLeft,
    /// A held client was connected to the backend and is a flow now.
    ClientPaired,
    /// A client was accepted that may use the backend while it is awake, but not wake it.
    StrangerAccepted,
    /// A stranger was connected to the backend, or could not be, or left.
    StrangerEnded,
    /// The backend did not take the connection for a held client, which is held on.
    ClientRefused,
    /// The start job ended.
    Started(Result<(), Failure>),
    /// The backend accepts connections.
    BackendReady,
    /// The stop job ended. After an error the backend may still run.
    Stopped(Result<(), Failure>),
    /// The manager says that the backend runs.
    BackendUp,
    /// The manager says that somebody stops the backend.
    BackendGoingDown,
    /// The manager says that the backend is gone, and why if it was no clean end.
    BackendDown(Option<Failure>),
    /// The last look found nothing.
    Quiet,
    /// The last look found somebody who is on the way to the backend.
    Arriving,
    /// The busy command vetoed.
    Busy,
    /// Counters changed, or a deadline passed.
    Tick,
    /// Somebody mended what failed: the next start may be tried at once.
    Forgive,
    /// We are asked to exit.
    Terminate,
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Run the start job. A `Started` follows.
    StartBackend,
    /// Run the stop job, ending a start job that still runs. A `Stopped` follows.
    StopBackend,
    /// Watch for the backend to accept connections. A `BackendReady` follows unless `StopProbing` comes first.
    Probe,
    /// Stop watching.
    StopProbing,
    /// Reset every held client.
    ResetHeld,
    /// Reset every stranger that has no connection to the backend yet.
    ResetStrangers,
    /// Reset every open flow.
    ResetFlows,
    /// End every open flow as soon as the client has what the backend sent.
    BackendGone,
    /// Close, FIN first, the flows that moved no byte for the idle time.
    CloseSilent,
    /// Look at accept queues, counters and the busy command. A `Quiet` or a `Busy` follows.
    LookAgain,
    /// Tell people of a failure.
    Report(Failure),
    /// Accept no further clients.
    StopAccepting,
    /// Exit, unless a client is found in an accept queue at the last moment.
    Exit,
}

/// The state machine.
#[derive(Clone, Debug)]
pub struct Lifecycle {
    rules: Rules,
    state: State,
    since: Monotonic,
    /// Clients that are accepted and not yet paired, but for strangers.
    held: u64,
    /// Clients that are accepted and not yet paired, and may not wake the backend: there are some only while it is awake.
    strangers: u64,
    /// A start job runs.
    starting: bool,
    /// Nothing before this moment counts as quiet.
    quiet_from: Monotonic,
    /// Failures in a row.
    failures: u32,
    /// Exit when the last client is served, at this moment at the latest.
    draining: Option<Monotonic>,
    /// Our own backend is being stopped so that we can exit for want of work.
    leaving: bool,
    /// Clients that were held when the backend became ready and have no connection yet.
    to_pair: u64,
    /// When counters were last looked at.
    looked_at: Monotonic,
}

impl Lifecycle {
    /// The machine at the start of the program, with what the manager says of the backend.
    #[must_use]
    pub fn new(rules: Rules, backend: BackendState, now: Monotonic) -> Self {
        let state = match (rules.ownership, backend) {
            (Ownership::Foreign, _) | (_, BackendState::Up) => State::Awake,
            (_, BackendState::GoingDown) => {
                State::Stopping(Stopping::Foreign(now.saturating_add(rules.stop_timeout)))
            }
            (_, BackendState::Down) => State::Asleep,
        };
        Self {
            rules,
            state,
            since: now,
            held: 0,
            strangers: 0,
            starting: false,
            quiet_from: now,
            failures: 0,
            draining: None,
            leaving: false,
            to_pair: 0,
            looked_at: now,
        }
    }

    /// The state, as users see it.
    #[must_use]
    pub fn state(&self) -> &State {
        &self.state
    }

    /// Since when it is in this state.
    #[must_use]
    pub fn since(&self) -> Monotonic {
        self.since
    }

    /// Clients that are accepted and not yet paired.
    #[must_use]
    pub fn held(&self) -> u64 {
        self.held + self.strangers
    }

    /// Whether it was asked to exit.
    #[must_use]
    pub fn is_draining(&self) -> bool {
        self.draining.is_some()
    }

    /// Whether the backend is stopped because drowse exits, asked to or for want of work.
    #[must_use]
    pub fn is_exiting(&self) -> bool {
        self.is_draining() || self.leaving
    }

    /// Whether held clients are to be connected to the backend, or wait.
    #[must_use]
    pub fn is_awake(&self) -> bool {
        matches!(self.state, State::Awake | State::Settling(_))
    }

    /// Whether new connections are to go straight to the backend: it is awake and stays so, and whoever waited for it
    /// is connected.
    #[must_use]
    pub fn hands_off(&self) -> bool {
        self.state == State::Awake && self.to_pair == 0 && self.draining.is_none()
    }

    /// What the idle decision says at `now`, if the backend is awake and may be put to sleep.
    #[must_use]
    pub fn idle(&self, totals: &Totals, now: Monotonic) -> Option<Decision> {
        let sleeps = self.rules.ownership != Ownership::Foreign && self.rules.idle_action == IdleAction::Stop;
        (sleeps && self.state == State::Awake).then(|| {
            let seen = Observed { held: self.held(), totals: *totals, quiet_from: self.quiet_from };
            idle::decide(self.rules.idle_policy, self.rules.idle_time, &seen, now)
        })
    }

    /// When to send the next `Tick` if nothing happens before.
    #[must_use]
    pub fn deadline(&self, totals: &Totals, now: Monotonic) -> Option<Monotonic> {
        let own = match &self.state {
            State::Waking { deadline, .. } => Some(*deadline),
            State::Failed { until, .. } if self.held > 0 => Some(*until),
            State::Settling(Settling::Closing(deadline)) | State::Stopping(Stopping::Foreign(deadline)) => {
                Some(*deadline)
            }
            State::Awake if !self.starting && self.draining.is_none() => match self.idle(totals, now) {
                // Bytes of handed-off flows are known only after a look, and the sooner, the more exactly.
                Some(Decision::WaitUntil(at)) if totals.handed_off_open > 0 => {
                    let pause = (self.rules.idle_time / 4).max(idle::LOOK_PAUSE_MIN);
                    Some(at.min(self.looked_at.saturating_add(pause)))
                }
                Some(Decision::WaitUntil(at) | Decision::LookAt(at)) => Some(at),
                Some(Decision::Settle) => Some(now),
                Some(Decision::Busy) | None => None,
            },
            State::Awake
            | State::Asleep
            | State::Failed { .. }
            | State::Settling(Settling::Looking)
            | State::Stopping(Stopping::Ours | Stopping::Abandoned(_)) => None,
        };
        // Nobody tells us when a handed-off flow closes that our exit waits for.
        let pause = if self.is_draining() { DRAIN_LOOK_PAUSE } else { self.rules.exit_idle_time };
        let look = now.saturating_add(pause.max(idle::LOOK_PAUSE_MIN));
        let exit = self.exit_at(totals).map(|at| if totals.handed_off_open > 0 { look } else { at });
        let drain = self.draining.filter(|_| !self.is_stopping_our_own());
        let drained = drain.filter(|_| self.cuts_handed_off(totals)).map(|_| look);
        [own, exit, drain, drained].into_iter().flatten().min().filter(|at| *at != Monotonic::MAX)
    }

    /// Takes one event and says what is to be done, in this order.
    pub fn step(&mut self, event: Event, totals: &Totals, now: Monotonic) -> Vec<Command> {
        let mut todo = Vec::new();
        self.count(&event, &mut todo, now);
        match self.state.clone() {
            State::Asleep => self.asleep(&event, &mut todo, now),
            State::Waking { deadline, started_by_us } => {
                self.waking(event, deadline, started_by_us, totals, &mut todo, now);
            }
            State::Awake => self.awake(event, &mut todo, now),
            State::Settling(step) => self.settling(event, step, totals, &mut todo, now),
            State::Stopping(stopping) => self.stopping(event, stopping, &mut todo, now),
            State::Failed { until, .. } => self.failed(&event, until, &mut todo, now),
        }
        if !self.is_awake() {
            self.reset_strangers(&mut todo);
        }
        if self.idle(totals, now) == Some(Decision::Settle) && !self.starting && self.draining.is_none() {
            self.enter(State::Settling(Settling::Looking), now);
            todo.push(Command::LookAgain);
        }
        self.leave(totals, &mut todo, now);
        todo
    }

    /// What an event means whatever the state.
    fn count(&mut self, event: &Event, todo: &mut Vec<Command>, now: Monotonic) {
        match event {
            Event::ClientAccepted => self.held += 1,
            Event::ClientLeft | Event::ClientPaired => {
                self.held = self.held.saturating_sub(1);
                self.to_pair = self.to_pair.saturating_sub(1);
            }
            Event::StrangerAccepted => self.strangers += 1,
            Event::StrangerEnded => self.strangers = self.strangers.saturating_sub(1),
            Event::Started(_) => self.starting = false,
            Event::Forgive => self.failures = 0,
            Event::Tick => self.looked_at = now,
            Event::Terminate if self.draining.is_none() => {
                self.draining = Some(now.saturating_add(self.rules.drain_time));
                todo.push(Command::StopAccepting);
            }
            // Asked twice: no more patience.
            Event::Terminate => self.draining = Some(now),
            Event::ClientRefused
            | Event::BackendReady
            | Event::Stopped(_)
            | Event::BackendUp
            | Event::BackendGoingDown
            | Event::BackendDown(_)
            | Event::Quiet
            | Event::Arriving
            | Event::Busy => {}
        }
    }

    fn asleep(&mut self, event: &Event, todo: &mut Vec<Command>, now: Monotonic) {
        match event {
            Event::ClientAccepted | Event::ClientRefused => self.wake(todo, now),
            Event::BackendUp => self.enter(State::Awake, now),
            Event::BackendGoingDown => self.wait_for_stop(now),
            Event::ClientLeft
            | Event::ClientPaired
            | Event::StrangerAccepted
            | Event::StrangerEnded
            | Event::Started(_)
            | Event::BackendReady
            | Event::Stopped(_)
            | Event::BackendDown(_)
            | Event::Quiet
            | Event::Forgive
            | Event::Arriving
            | Event::Busy
            | Event::Tick
            | Event::Terminate => {}
        }
    }

    fn waking(
        &mut self,
        event: Event,
        deadline: Monotonic,
        started_by_us: bool,
        totals: &Totals,
        todo: &mut Vec<Command>,
        now: Monotonic,
    ) {
        match event {
            Event::BackendReady => {
                self.enter(State::Awake, now);
            }
            Event::Started(Err(failure)) => {
                todo.push(Command::StopProbing);
                self.fail(failure, todo, now);
            }
            // While the start job runs its result tells; this may be the echo of an earlier stop.
            Event::BackendDown(failure) if !self.starting => {
                todo.push(Command::StopProbing);
                match failure {
                    Some(failure) if started_by_us => self.fail(failure, todo, now),
                    Some(failure) => self.crash(failure, todo, now),
                    None if started_by_us => {
                        let message = match self.rules.ownership {
                            Ownership::Own => {
                                "it ended before it accepted a connection; it must stay in the foreground"
                            }
                            Ownership::Managed | Ownership::Foreign => {
                                "it ended before it accepted a connection"
                            }
                        };
                        self.fail(Failure::new("success", message), todo, now);
                    }
                    None => self.gone(todo, now),
                }
            }
            Event::Tick if now >= deadline => self.give_up(totals, todo, now),
            Event::Tick
            | Event::Started(Ok(()))
            | Event::BackendDown(_)
            | Event::ClientAccepted
            | Event::ClientLeft
            | Event::ClientPaired
            | Event::StrangerAccepted
            | Event::StrangerEnded
            | Event::ClientRefused
            | Event::Stopped(_)
            | Event::BackendUp
            | Event::BackendGoingDown
            | Event::Quiet
            | Event::Forgive
            | Event::Arriving
            | Event::Busy
            | Event::Terminate => {}
        }
    }

    fn awake(&mut self, event: Event, todo: &mut Vec<Command>, now: Monotonic) {
        match event {
            Event::ClientRefused => {
                let deadline = now.saturating_add(self.rules.start_timeout);
                self.enter(State::Waking { deadline, started_by_us: false }, now);
                todo.push(Command::Probe);
            }
            Event::Started(Err(failure)) => self.crash(failure, todo, now),
            Event::BackendDown(Some(failure)) if !self.starting => self.crash(failure, todo, now),
            Event::BackendDown(None) if !self.starting => self.gone(todo, now),
            Event::BackendGoingDown => self.wait_for_stop(now),
            Event::BackendDown(_)
            | Event::Started(Ok(()))
            | Event::ClientAccepted
            | Event::ClientLeft
            | Event::ClientPaired
            | Event::StrangerAccepted
            | Event::StrangerEnded
            | Event::BackendReady
            | Event::Stopped(_)
            | Event::BackendUp
            | Event::Quiet
            | Event::Forgive
            | Event::Arriving
            | Event::Busy
            | Event::Tick
            | Event::Terminate => {}
        }
    }

    fn settling(
        &mut self,
        event: Event,
        step: Settling,
        totals: &Totals,
        todo: &mut Vec<Command>,
        now: Monotonic,
    ) {
        match event {
            // Somebody uses it after all: back to awake, and nobody noticed.
            Event::ClientAccepted
            | Event::StrangerAccepted
            | Event::ClientRefused
            | Event::BackendDown(_)
            | Event::BackendGoingDown => {
                self.enter(State::Awake, now);
                self.awake(event, todo, now);
            }
            Event::Busy | Event::Terminate => self.stay_awake(SETTLE_PAUSE_MIN, now),
            Event::Arriving => self.stay_awake(USED_PAUSE_MIN, now),
            Event::Quiet if !self.is_quiet(totals, now) => self.stay_awake(USED_PAUSE_MIN, now),
            Event::Quiet if totals.flows_open > 0 => {
                self.state = State::Settling(Settling::Closing(now + CLOSING_TIME));
                todo.push(Command::CloseSilent);
            }
            Event::Quiet => self.stop(Stopping::Ours, todo, now),
            Event::Tick => match step {
                // That the silent flows of the proxy were closed is no use of them; others may have been used meanwhile.
                Settling::Closing(_)
                    if totals.flows_open == 0
                        && totals.handed_off_activity.saturating_add(self.rules.idle_time) <= now =>
                {
                    self.stop(Stopping::Ours, todo, now);
                }
                Settling::Closing(deadline) if now >= deadline => self.stay_awake(SETTLE_PAUSE_MIN, now),
                Settling::Closing(_) | Settling::Looking => {}
            },
            Event::ClientLeft
            | Event::ClientPaired
            | Event::StrangerEnded
            | Event::Started(_)
            | Event::BackendReady
            | Event::Stopped(_)
            | Event::Forgive
            | Event::BackendUp => {}
        }
    }

    fn stopping(&mut self, event: Event, stopping: Stopping, todo: &mut Vec<Command>, now: Monotonic) {
        match (stopping, event) {
            (Stopping::Ours, Event::Stopped(Err(failure))) => {
                todo.push(Command::Report(failure));
                if self.draining.is_some() && self.held == 0 {
                    self.enter(State::Asleep, now);
                } else {
                    // It may still run: serve, and try again after the idle time.
                    self.stay_awake(SETTLE_PAUSE_MIN, now);
                }
            }
            (Stopping::Abandoned(first), Event::Stopped(result)) => {
                if let Err(failure) = result {
                    todo.push(Command::Report(failure));
                }
                self.back_off(first, now);
            }
            (Stopping::Foreign(_), Event::BackendDown(Some(failure))) => self.crash(failure, todo, now),
            (Stopping::Ours, Event::Stopped(Ok(()))) | (Stopping::Foreign(_), Event::BackendDown(None)) => {
                self.gone(todo, now);
            }
            (Stopping::Foreign(deadline), Event::Tick) if now >= deadline => self.gone(todo, now),
            (Stopping::Foreign(_), Event::BackendUp) => {
                self.enter(State::Awake, now);
            }
            (Stopping::Ours | Stopping::Abandoned(_) | Stopping::Foreign(_), _) => {}
        }
    }

    fn failed(&mut self, event: &Event, until: Monotonic, todo: &mut Vec<Command>, now: Monotonic) {
        match event {
            Event::BackendUp => {
                self.enter(State::Awake, now);
            }
            Event::Forgive if self.held > 0 => self.wake(todo, now),
            Event::Forgive => {
                if let State::Failed { until, .. } = &mut self.state {
                    *until = now;
                }
            }
            Event::ClientAccepted | Event::ClientRefused | Event::Tick => {
                if self.held > 0 && now >= until {
                    self.wake(todo, now);
                }
            }
            Event::ClientLeft
            | Event::ClientPaired
            | Event::StrangerAccepted
            | Event::StrangerEnded
            | Event::Started(_)
            | Event::BackendReady
            | Event::Stopped(_)
            | Event::BackendGoingDown
            | Event::BackendDown(_)
            | Event::Quiet
            | Event::Arriving
            | Event::Busy
            | Event::Terminate => {}
        }
    }

    /// Whether the idle decision still stands after a look.
    fn is_quiet(&self, totals: &Totals, now: Monotonic) -> bool {
        let seen = Observed { held: self.held(), totals: *totals, quiet_from: self.quiet_from };
        idle::decide(self.rules.idle_policy, self.rules.idle_time, &seen, now) == Decision::Settle
    }

    /// Starts the backend for the clients that are held.
    fn wake(&mut self, todo: &mut Vec<Command>, now: Monotonic) {
        let started_by_us = self.rules.ownership != Ownership::Foreign;
        let deadline = now.saturating_add(self.rules.start_timeout);
        self.enter(State::Waking { deadline, started_by_us }, now);
        self.leaving = false;
        if started_by_us && !self.starting {
            self.starting = true;
            todo.push(Command::StartBackend);
        }
        todo.push(Command::Probe);
    }

    fn stop(&mut self, stopping: Stopping, todo: &mut Vec<Command>, now: Monotonic) {
        self.starting = false;
        self.enter(State::Stopping(stopping), now);
        todo.push(Command::StopBackend);
    }

    /// Somebody else stops the backend.
    fn wait_for_stop(&mut self, now: Monotonic) {
        let deadline = now.saturating_add(self.rules.stop_timeout);
        self.enter(State::Stopping(Stopping::Foreign(deadline)), now);
    }

    /// The backend ended cleanly.
    fn gone(&mut self, todo: &mut Vec<Command>, now: Monotonic) {
        todo.push(Command::BackendGone);
        self.enter(State::Asleep, now);
        if self.held > 0 {
            self.wake(todo, now);
        }
    }

    /// The backend ended in a failure while clients may have been using it. Held clients stay held.
    fn crash(&mut self, failure: Failure, todo: &mut Vec<Command>, now: Monotonic) {
        todo.push(Command::BackendGone);
        todo.push(Command::Report(failure.clone()));
        self.back_off(failure, now);
    }

    /// A start failed: nobody is held any longer.
    fn fail(&mut self, failure: Failure, todo: &mut Vec<Command>, now: Monotonic) {
        todo.push(Command::Report(failure.clone()));
        self.reset_held(todo);
        self.back_off(failure, now);
    }

    /// Nobody could connect for too long. A backend that is ours to stop, and that nobody uses, is stopped, so that
    /// the next start is a fresh one.
    fn give_up(&mut self, totals: &Totals, todo: &mut Vec<Command>, now: Monotonic) {
        let waited = humantime::format_duration(self.rules.start_timeout);
        let message = format!("the backend did not accept a connection within {waited}");
        let failure = Failure::new("start-timeout", message);
        todo.push(Command::StopProbing);
        let is_ours =
            self.rules.ownership != Ownership::Foreign && self.rules.idle_action == IdleAction::Stop;
        if !is_ours || totals.flows_open + totals.handed_off_open > 0 {
            return self.fail(failure, todo, now);
        }
        todo.push(Command::Report(failure.clone()));
        self.reset_held(todo);
        self.stop(Stopping::Abandoned(failure), todo, now);
    }

    fn reset_held(&mut self, todo: &mut Vec<Command>) {
        if self.held > 0 {
            todo.push(Command::ResetHeld);
            self.held = 0;
        }
    }

    fn reset_strangers(&mut self, todo: &mut Vec<Command>) {
        if self.strangers > 0 {
            todo.push(Command::ResetStrangers);
            self.strangers = 0;
        }
    }

    fn back_off(&mut self, failure: Failure, now: Monotonic) {
        if self.is_awake() && now.saturating_sub(self.since) >= BACKOFF_MAX {
            self.failures = 0;
        }
        let doubled = BACKOFF_MIN.saturating_mul(1 << self.failures.min(16));
        self.failures += 1;
        self.enter(State::Failed { until: now + doubled.min(BACKOFF_MAX), failure }, now);
    }

    /// The one place where the state changes for users.
    fn enter(&mut self, state: State, now: Monotonic) {
        if self.is_awake() && matches!(state, State::Asleep | State::Stopping(_)) {
            self.failures = 0;
        }
        if state == State::Awake {
            self.quiet_from = now;
        }
        if !self.is_awake() {
            self.to_pair = self.held;
        }
        if !(self.is_awake() && matches!(state, State::Awake | State::Settling(_))) {
            self.since = now;
        }
        self.state = state;
    }

    /// It could not be put to sleep; the next try is not before the idle time has passed, or at least `pause`.
    fn stay_awake(&mut self, pause: Duration, now: Monotonic) {
        self.enter(State::Awake, now);
        self.quiet_from = now + pause.saturating_sub(self.rules.idle_time);
    }

    /// When there is nothing left to do for us, and since when.
    fn exit_at(&self, totals: &Totals) -> Option<Monotonic> {
        let nothing_to_do = self.held() == 0
            && totals.flows_open == 0
            && !self.starting
            && match self.state {
                State::Asleep | State::Failed { .. } => true,
                State::Awake => {
                    self.rules.ownership == Ownership::Foreign || self.rules.idle_action == IdleAction::None
                }
                State::Waking { .. } | State::Settling(_) | State::Stopping(_) => false,
            };
        let since = self.since.max(self.quiet_from).max(totals.last_activity);
        nothing_to_do.then(|| since.saturating_add(self.rules.exit_idle_time))
    }

    /// Whether flows that were handed off would end with us, because the backend does.
    fn cuts_handed_off(&self, totals: &Totals) -> bool {
        self.rules.ownership == Ownership::Own && totals.handed_off_open > 0
    }

    /// A backend of our own must be gone before we are.
    fn is_stopping_our_own(&self) -> bool {
        self.rules.ownership == Ownership::Own && matches!(self.state, State::Stopping(_))
    }

    /// Exits when asked to or when there is nothing left to do; a backend of our own is stopped first.
    fn leave(&mut self, totals: &Totals, todo: &mut Vec<Command>, now: Monotonic) {
        if self.is_stopping_our_own() {
            return;
        }
        let Some(deadline) = self.draining else {
            let left = self.leaving && self.state == State::Asleep;
            let due = totals.handed_off_open == 0 && self.exit_at(totals).is_some_and(|at| at <= now);
            if left || due {
                self.exit(todo, now);
            }
            return;
        };
        if matches!(self.state, State::Failed { .. }) {
            self.reset_held(todo);
        }
        let served = self.held() == 0 && totals.flows_open == 0 && !self.cuts_handed_off(totals);
        if !served && now >= deadline {
            self.reset_held(todo);
            self.reset_strangers(todo);
            todo.push(Command::ResetFlows);
        }
        if served || now >= deadline {
            self.exit(todo, now);
        }
    }

    fn exit(&mut self, todo: &mut Vec<Command>, now: Monotonic) {
        // After a failure it may still run: a start that was given up, a stop that did not work.
        let down = self.state == State::Asleep && !self.starting;
        if self.rules.ownership == Ownership::Own && !down {
            self.leaving = true;
            todo.push(Command::StopProbing);
            self.stop(Stopping::Ours, todo, now);
        } else {
            todo.push(Command::Exit);
        }
    }
}
