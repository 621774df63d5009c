//! Ring 0: every short sequence of events keeps the promises of the lifecycle.
//!
//! A small world plays the part of systemd, the clients and the clock. It offers only events that can happen (no
//! `Started` without a start job), so that whatever breaks an invariant is a fault of the rules.

#![expect(
    clippy::match_wild_err_arm,
    clippy::panic,
    clippy::print_stdout,
    clippy::unchecked_time_subtraction,
    clippy::unwrap_used,
    reason = "fixtures fail as tests do"
)]

use std::time::Duration;

use drowse::accounting::Totals;
use drowse::activation::{BackendState, Failure};
use drowse::idle::IdlePolicy;
use drowse::lifecycle::{Command, Event, IdleAction, Lifecycle, Ownership, Rules, State};

const MINUTE: Duration = Duration::from_mins(1);

fn rules(ownership: Ownership, idle_policy: IdlePolicy) -> Rules {
    Rules {
        ownership,
        idle_time: 15 * MINUTE,
        idle_policy,
        idle_action: IdleAction::Stop,
        exit_idle_time: Duration::MAX,
        start_timeout: 2 * MINUTE,
        stop_timeout: MINUTE,
        drain_time: MINUTE / 6,
    }
}

/// What happens next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    ClientComes,
    ClientLeaves,
    /// Every held client is connected, if the gate is open.
    Pairs,
    /// A held client is refused, if the gate is open.
    Refused,
    /// Somebody who may not wake the backend is let in, which happens only while it is awake.
    StrangerComes,
    /// Every stranger is connected, if the gate is open.
    StrangersPair,
    /// A stranger leaves, or the backend does not take its connection.
    StrangerLeaves,
    FlowsEnd,
    /// A connection goes straight to the backend, which nobody tells us of.
    HandedOff,
    /// It ends, which nobody tells us of.
    HandedOffEnds,
    StartWorks,
    StartFails,
    Ready,
    StopWorks,
    StopFails,
    Up,
    GoingDown,
    DownCleanly,
    Crash,
    Quiet,
    Busy,
    Arriving,
    Forgive,
    /// Time passes to the next deadline.
    Deadline,
    Terminate,
}

const STEPS: [Step; 25] = [
    Step::ClientComes,
    Step::ClientLeaves,
    Step::Pairs,
    Step::Refused,
    Step::StrangerComes,
    Step::StrangersPair,
    Step::StrangerLeaves,
    Step::FlowsEnd,
    Step::HandedOff,
    Step::HandedOffEnds,
    Step::StartWorks,
    Step::StartFails,
    Step::Ready,
    Step::StopWorks,
    Step::StopFails,
    Step::Up,
    Step::GoingDown,
    Step::DownCleanly,
    Step::Crash,
    Step::Quiet,
    Step::Busy,
    Step::Arriving,
    Step::Forgive,
    Step::Deadline,
    Step::Terminate,
];

/// The world around the lifecycle, with a ledger of what became of each client.
#[derive(Clone)]
#[expect(clippy::struct_excessive_bools, reason = "each is one thing that is under way or not")]
struct World {
    rules: Rules,
    lifecycle: Lifecycle,
    now: Duration,
    totals: Totals,
    accepted: u64,
    left: u64,
    paired: u64,
    turned_away: u64,
    /// Strangers that are accepted and not yet paired.
    strangers: u64,
    flows_reset: u64,
    starting: bool,
    stopping: bool,
    probing: bool,
    looking: bool,
    accepting: bool,
    exited: bool,
}

impl World {
    fn new(rules: Rules, backend: BackendState) -> Self {
        let now = 100 * MINUTE;
        Self {
            rules,
            lifecycle: Lifecycle::new(rules, backend, now),
            now,
            totals: Totals::default(),
            accepted: 0,
            left: 0,
            paired: 0,
            turned_away: 0,
            strangers: 0,
            flows_reset: 0,
            starting: false,
            stopping: false,
            probing: false,
            looking: false,
            accepting: true,
            exited: false,
        }
    }

    fn held(&self) -> u64 {
        self.accepted - self.left - self.paired - self.turned_away
    }

    /// The events that a step stands for; none when it cannot happen now.
    fn events(&mut self, step: Step) -> Vec<Event> {
        let failure = || Failure::new("exit-code", "it failed");
        let open = self.lifecycle.is_awake();
        match step {
            Step::ClientComes if self.accepting => {
                self.accepted += 1;
                vec![Event::ClientAccepted]
            }
            Step::ClientLeaves if self.held() > 0 && !open => {
                self.left += 1;
                vec![Event::ClientLeft]
            }
            Step::Pairs if self.held() > 0 && open => {
                let pairs = self.held();
                self.paired += pairs;
                self.totals.flows_open += pairs;
                self.totals.flows_total += pairs;
                self.totals.last_activity = self.now;
                vec![Event::ClientPaired; usize::try_from(pairs).unwrap()]
            }
            Step::Refused if self.held() > 0 && open => vec![Event::ClientRefused],
            Step::StrangerComes => self.stranger_comes(),
            Step::StrangersPair => self.strangers_pair(),
            Step::StrangerLeaves => self.stranger_leaves(),
            Step::FlowsEnd if self.totals.flows_open > 0 => {
                self.totals.flows_open = 0;
                self.totals.last_activity = self.now;
                vec![Event::Tick]
            }
            Step::StartWorks if std::mem::take(&mut self.starting) => vec![Event::Started(Ok(()))],
            Step::StartFails if std::mem::take(&mut self.starting) => vec![Event::Started(Err(failure()))],
            Step::Ready if std::mem::take(&mut self.probing) => vec![Event::BackendReady],
            Step::StopWorks if std::mem::take(&mut self.stopping) => vec![Event::Stopped(Ok(()))],
            Step::StopFails if std::mem::take(&mut self.stopping) => vec![Event::Stopped(Err(failure()))],
            Step::Up => vec![Event::BackendUp],
            Step::GoingDown => vec![Event::BackendGoingDown],
            Step::DownCleanly => vec![Event::BackendDown(None)],
            Step::Crash => vec![Event::BackendDown(Some(failure()))],
            Step::Quiet if std::mem::take(&mut self.looking) => vec![Event::Quiet],
            Step::Busy if std::mem::take(&mut self.looking) => vec![Event::Busy],
            Step::Arriving if std::mem::take(&mut self.looking) => vec![Event::Arriving],
            Step::Forgive => vec![Event::Forgive],
            Step::Deadline => match self.lifecycle.deadline(&self.totals, self.now) {
                Some(at) => {
                    self.now = self.now.max(at);
                    vec![Event::Tick]
                }
                None => vec![],
            },
            Step::Terminate if self.accepting => vec![Event::Terminate],
            Step::ClientComes
            | Step::ClientLeaves
            | Step::Pairs
            | Step::Refused
            | Step::FlowsEnd
            | Step::HandedOff
            | Step::HandedOffEnds
            | Step::StartWorks
            | Step::StartFails
            | Step::Ready
            | Step::StopWorks
            | Step::StopFails
            | Step::Quiet
            | Step::Busy
            | Step::Arriving
            | Step::Terminate => vec![],
        }
    }

    /// A stranger is let in only while the backend is awake.
    fn stranger_comes(&mut self) -> Vec<Event> {
        if !self.accepting || !self.lifecycle.is_awake() {
            return vec![];
        }
        self.strangers += 1;
        vec![Event::StrangerAccepted]
    }

    fn strangers_pair(&mut self) -> Vec<Event> {
        if self.strangers == 0 || !self.lifecycle.is_awake() {
            return vec![];
        }
        let pairs = std::mem::take(&mut self.strangers);
        self.totals.flows_open += pairs;
        self.totals.flows_total += pairs;
        self.totals.last_activity = self.now;
        vec![Event::StrangerEnded; usize::try_from(pairs).unwrap()]
    }

    fn stranger_leaves(&mut self) -> Vec<Event> {
        if self.strangers == 0 {
            return vec![];
        }
        self.strangers -= 1;
        vec![Event::StrangerEnded]
    }

    /// What happens to handed-off flows without an event. Returns whether anything did.
    fn happens_unseen(&mut self, step: Step) -> bool {
        // While the last look is taken, a handshake may end that was under way.
        let can_be = self.lifecycle.hands_off() || self.looking;
        if step == Step::HandedOff && can_be {
            self.totals.handed_off_open += 1;
        } else if step == Step::HandedOffEnds && self.totals.handed_off_open > 0 {
            self.totals.handed_off_open -= 1;
        } else {
            return false;
        }
        self.totals.last_activity = self.now;
        self.totals.handed_off_activity = self.now;
        true
    }

    fn take(&mut self, step: Step) -> bool {
        if self.happens_unseen(step) {
            return true;
        }
        if matches!(step, Step::DownCleanly | Step::Crash) || (step == Step::StopWorks && self.stopping) {
            self.totals.handed_off_open = 0;
        }
        let events = self.events(step);
        for event in &events {
            let commands = self.lifecycle.step(event.clone(), &self.totals, self.now);
            for command in commands {
                self.carry_out(&command);
            }
        }
        !events.is_empty()
    }

    fn carry_out(&mut self, command: &Command) {
        match command {
            Command::StartBackend => {
                assert!(!self.starting, "two start jobs");
                assert!(!self.stopping, "a start job beside a stop job");
                assert!(self.held() > 0, "a start for nobody");
                self.starting = true;
            }
            Command::StopBackend => {
                assert!(!self.stopping, "two stop jobs");
                let draining = self.lifecycle.is_draining();
                assert!(self.totals.flows_open == 0 || draining, "a stop with an open flow");
                assert!(self.held() + self.strangers == 0 || draining, "a stop with a held client");
                let (open, idle_time) = (self.totals.handed_off_open, self.rules.idle_time);
                let silent = self.rules.idle_policy == IdlePolicy::Traffic
                    && self.totals.handed_off_activity + idle_time <= self.now;
                assert!(open == 0 || silent || draining, "a stop with a flow that was handed off");
                self.starting = false;
                self.stopping = true;
            }
            Command::Probe => self.probing = true,
            Command::StopProbing => self.probing = false,
            Command::ResetHeld => {
                assert!(self.held() > 0, "nobody to turn away");
                self.turned_away += self.held();
            }
            Command::ResetStrangers => {
                assert!(self.strangers > 0, "no stranger to turn away");
                self.strangers = 0;
            }
            Command::ResetFlows => {
                self.flows_reset += self.totals.flows_open;
                self.totals.flows_open = 0;
            }
            Command::LookAgain => self.looking = true,
            Command::StopAccepting => self.accepting = false,
            Command::Exit => {
                assert_eq!(self.held() + self.strangers, 0, "left with a held client");
                self.exited = true;
            }
            Command::CloseSilent | Command::BackendGone | Command::Report(_) => {}
        }
    }

    /// What holds after every step.
    fn check(&self) {
        assert_eq!(self.lifecycle.held(), self.held() + self.strangers, "the ledger of held clients");
        assert!(self.strangers == 0 || self.lifecycle.is_awake(), "a stranger waits for the backend");
        if self.exited {
            return;
        }
        let state = self.lifecycle.state();
        assert!(
            self.lifecycle.held() == 0 || !matches!(state, State::Asleep | State::Settling(_)),
            "a client is held and nothing is done for it"
        );
        let sleeps = self.rules.ownership != Ownership::Foreign && self.rules.idle_action == IdleAction::Stop;
        let alone =
            self.lifecycle.held() == 0 && self.totals.flows_open == 0 && self.totals.handed_off_open > 0;
        if sleeps && *state == State::Awake && !self.starting && alone {
            let deadline = self.lifecycle.deadline(&self.totals, self.now);
            assert!(deadline.is_some(), "nobody will see when the flows that were handed off end");
        }
        if self.held() > 0 {
            let deadline = self.lifecycle.deadline(&self.totals, self.now);
            let under_way = self.lifecycle.is_awake() || self.stopping;
            assert!(deadline.is_some() || under_way, "a client may hang for ever");
        }
        assert!(
            !matches!(state, State::Waking { .. }) || self.probing,
            "waking and nobody looks for readiness"
        );
    }

    /// After a deadline has been served there is progress, not another one at the same moment.
    fn check_progress(&self, step: Step) {
        let again = self.lifecycle.deadline(&self.totals, self.now);
        let spins = step == Step::Deadline && again.is_some_and(|at| at <= self.now) && !self.exited;
        assert!(!spins, "a deadline that does not pass");
    }
}

fn walk(world: &World, path: &mut Vec<Step>, depth: usize, sequences: &mut u64) {
    for step in STEPS {
        let mut next = world.clone();
        path.push(step);
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let happened = next.take(step);
            if happened {
                next.check();
                next.check_progress(step);
            }
            happened
        }));
        match outcome {
            Ok(true) => {
                *sequences += 1;
                if depth > 1 && !next.exited {
                    walk(&next, path, depth - 1, sequences);
                }
            }
            Ok(false) => {}
            Err(_fault) => panic!("after {path:?}, in {:?}", world.lifecycle.state()),
        }
        path.pop();
    }
}

fn enumerate(rules: Rules, backend: BackendState) {
    let mut sequences = 0;
    walk(&World::new(rules, backend), &mut Vec::new(), 7, &mut sequences);
    println!("{sequences} sequences of up to 7 events");
    assert!(sequences > 10_000, "the world offers too little: {sequences}");
}

#[test]
fn every_short_sequence_keeps_the_promises_for_a_unit() {
    enumerate(rules(Ownership::Managed, IdlePolicy::Connections), BackendState::Down);
}

#[test]
fn every_short_sequence_keeps_the_promises_for_a_unit_that_runs_already() {
    enumerate(rules(Ownership::Managed, IdlePolicy::Traffic), BackendState::Up);
}

#[test]
fn every_short_sequence_keeps_the_promises_while_somebody_stops_the_unit() {
    enumerate(rules(Ownership::Managed, IdlePolicy::Connections), BackendState::GoingDown);
}

#[test]
fn every_short_sequence_keeps_the_promises_for_a_command() {
    enumerate(rules(Ownership::Own, IdlePolicy::Traffic), BackendState::Down);
}

#[test]
fn every_short_sequence_keeps_the_promises_for_a_plain_proxy() {
    enumerate(rules(Ownership::Foreign, IdlePolicy::Connections), BackendState::Up);
}

#[test]
fn every_short_sequence_keeps_the_promises_without_an_idle_time() {
    for (ownership, idle_policy) in
        [(Ownership::Managed, IdlePolicy::Traffic), (Ownership::Own, IdlePolicy::Connections)]
    {
        let rules = Rules { idle_time: Duration::ZERO, ..rules(ownership, idle_policy) };
        enumerate(rules, BackendState::Down);
    }
}

#[test]
fn every_short_sequence_keeps_the_promises_when_drowse_exits_for_want_of_work() {
    for (ownership, idle_action) in
        [(Ownership::Managed, IdleAction::None), (Ownership::Own, IdleAction::Stop)]
    {
        let exit_idle_time = MINUTE;
        let rules = Rules { exit_idle_time, idle_action, ..rules(ownership, IdlePolicy::Traffic) };
        enumerate(rules, BackendState::Down);
    }
}

/// A world in which a client was served and everything is quiet.
fn served(rules: Rules) -> World {
    let mut world = World::new(rules, BackendState::Down);
    let steps = [Step::ClientComes, Step::StartWorks, Step::Ready, Step::Pairs];
    for step in steps {
        assert!(world.take(step), "{step:?}");
    }
    world
}

#[test]
fn a_quiet_backend_is_looked_at_once_more_and_stopped() {
    let mut world = served(rules(Ownership::Managed, IdlePolicy::Connections));
    assert!(world.take(Step::FlowsEnd));
    assert!(world.take(Step::Deadline));
    assert!(world.looking && !world.stopping);
    assert!(world.take(Step::Quiet));
    assert!(world.stopping);
    assert!(world.take(Step::StopWorks));
    assert_eq!(world.lifecycle.state(), &State::Asleep);
}

#[test]
fn new_connections_are_handed_off_once_those_who_waited_are_connected() {
    let mut world = World::new(rules(Ownership::Managed, IdlePolicy::Connections), BackendState::Down);
    for step in [Step::ClientComes, Step::ClientComes, Step::StartWorks, Step::Ready] {
        assert!(world.take(step), "{step:?}");
        assert!(!world.lifecycle.hands_off(), "{step:?}");
    }
    assert!(world.take(Step::Pairs) && world.lifecycle.hands_off());
    assert!(
        world.take(Step::ClientComes) && world.lifecycle.hands_off(),
        "one more client is no reason to end it"
    );
    assert!(world.take(Step::Refused) && !world.lifecycle.hands_off());
}

#[test]
fn a_handed_off_flow_keeps_it_awake_and_its_end_is_seen_in_time() {
    let mut world = served(rules(Ownership::Managed, IdlePolicy::Connections));
    world.take(Step::FlowsEnd);
    assert!(world.take(Step::HandedOff));
    for _ in 0..3 {
        assert!(world.take(Step::Deadline) && !world.looking);
    }
    let closed = world.now;
    assert!(world.take(Step::HandedOffEnds));
    while !world.looking {
        assert!(world.take(Step::Deadline));
    }
    assert_eq!(world.now, closed + world.rules.idle_time, "neither early nor late");
    assert!(!world.lifecycle.hands_off());
    assert!(world.take(Step::Quiet) && world.stopping);
}

#[test]
fn a_handshake_that_ends_during_the_last_look_keeps_it_awake() {
    let mut world = served(rules(Ownership::Managed, IdlePolicy::Connections));
    for step in [Step::FlowsEnd, Step::Deadline, Step::HandedOff, Step::Quiet] {
        assert!(world.take(step), "{step:?}");
    }
    assert!(!world.stopping && world.lifecycle.hands_off());
}

#[test]
fn a_command_waits_for_handed_off_flows_at_the_exit_and_a_unit_does_not() {
    for (ownership, waits) in [(Ownership::Own, true), (Ownership::Managed, false)] {
        let mut world = served(rules(ownership, IdlePolicy::Connections));
        for step in [Step::FlowsEnd, Step::HandedOff, Step::Terminate] {
            assert!(world.take(step), "{step:?}");
        }
        assert_eq!((world.exited, world.stopping), (!waits, false));
        if waits {
            assert!(world.take(Step::HandedOffEnds) && world.take(Step::Deadline) && world.stopping);
        }
    }
}

#[test]
fn whoever_comes_while_it_settles_keeps_it_awake() {
    let mut world = served(rules(Ownership::Managed, IdlePolicy::Connections));
    world.take(Step::FlowsEnd);
    world.take(Step::Deadline);
    world.take(Step::ClientComes);
    assert_eq!(world.lifecycle.state(), &State::Awake);
    assert!(world.take(Step::Pairs));
}

#[test]
fn whoever_comes_while_it_stops_is_served_by_the_next_start() {
    let mut world = served(rules(Ownership::Managed, IdlePolicy::Connections));
    for step in [Step::FlowsEnd, Step::Deadline, Step::Quiet, Step::ClientComes] {
        assert!(world.take(step), "{step:?}");
    }
    assert!(world.stopping && !world.starting);
    world.take(Step::StopWorks);
    assert!(world.starting);
    for step in [Step::StartWorks, Step::Ready, Step::Pairs] {
        assert!(world.take(step), "{step:?}");
    }
    assert_eq!((world.paired, world.turned_away), (2, 0));
}

#[test]
fn a_stranger_is_served_while_it_is_awake_and_never_starts_it() {
    let mut world = served(rules(Ownership::Managed, IdlePolicy::Connections));
    for step in [Step::FlowsEnd, Step::Deadline, Step::StrangerComes] {
        assert!(world.take(step), "{step:?}");
    }
    assert_eq!(world.lifecycle.state(), &State::Awake, "whoever is served keeps it awake");
    for ends in [Step::DownCleanly, Step::Crash, Step::GoingDown] {
        let mut world = world.clone();
        assert!(world.take(ends) && !world.starting, "{ends:?}");
        assert_eq!(world.strangers, 0, "{ends:?}: reset");
    }
    assert!(world.take(Step::StrangersPair));
    assert_eq!((world.totals.flows_open, world.lifecycle.held()), (1, 0));
}

#[test]
fn a_veto_lasts_for_one_idle_time() {
    let mut world = served(rules(Ownership::Managed, IdlePolicy::Connections));
    world.take(Step::FlowsEnd);
    world.take(Step::Deadline);
    world.take(Step::Busy);
    assert_eq!(world.lifecycle.state(), &State::Awake);
    let next = world.lifecycle.deadline(&world.totals, world.now).unwrap();
    assert_eq!(next, world.now + 15 * MINUTE);
}

#[test]
fn silent_flows_are_closed_before_a_stop_under_traffic() {
    let mut world = served(rules(Ownership::Managed, IdlePolicy::Traffic));
    world.take(Step::Deadline);
    world.take(Step::Quiet);
    assert!(!world.stopping);
    world.take(Step::FlowsEnd);
    assert!(world.stopping);
}

#[test]
fn a_flow_that_cannot_be_closed_keeps_it_awake_under_traffic() {
    let mut world = served(rules(Ownership::Managed, IdlePolicy::Traffic));
    world.take(Step::Deadline);
    world.take(Step::Quiet);
    world.take(Step::Deadline);
    assert_eq!(world.lifecycle.state(), &State::Awake);
    assert!(!world.stopping);
}

#[test]
fn a_failed_start_turns_clients_away_and_the_back_off_grows_and_recovers() {
    let mut world = World::new(rules(Ownership::Managed, IdlePolicy::Connections), BackendState::Down);
    let mut pauses = Vec::new();
    for _ in 0..10 {
        world.take(Step::ClientComes);
        if !world.starting {
            let before = world.now;
            world.take(Step::Deadline);
            pauses.push(world.now - before);
        }
        assert!(world.starting);
        world.take(Step::StartFails);
        assert_eq!(world.held(), 0);
    }
    assert_eq!(pauses.first(), Some(&drowse::lifecycle::BACKOFF_MIN));
    assert_eq!(pauses.last(), Some(&drowse::lifecycle::BACKOFF_MAX));
    assert!(pauses.is_sorted());
    world.take(Step::ClientComes);
    for step in [Step::Deadline, Step::StartWorks, Step::Ready, Step::Pairs] {
        assert!(world.take(step), "{step:?}");
    }
    world.now += drowse::lifecycle::BACKOFF_MAX;
    world.take(Step::Crash);
    world.take(Step::ClientComes);
    let next = world.lifecycle.deadline(&world.totals, world.now).unwrap();
    assert_eq!(next - world.now, drowse::lifecycle::BACKOFF_MIN);
}

#[test]
fn a_start_that_takes_too_long_is_stopped_and_its_clients_turned_away() {
    let mut world = World::new(rules(Ownership::Managed, IdlePolicy::Connections), BackendState::Down);
    world.take(Step::ClientComes);
    world.take(Step::StartWorks);
    world.take(Step::Deadline);
    assert_eq!(world.turned_away, 1);
    assert!(world.stopping && !world.probing);
    world.take(Step::StopWorks);
    assert!(
        matches!(world.lifecycle.state(), State::Failed { failure, .. } if failure.result == "start-timeout")
    );
}

#[test]
fn drowse_exits_when_asleep_for_long_enough_and_only_then() {
    let rules = Rules { exit_idle_time: MINUTE, ..rules(Ownership::Managed, IdlePolicy::Connections) };
    let mut world = World::new(rules, BackendState::Down);
    assert!(world.take(Step::Deadline) && world.exited, "it exits even if nobody ever came");
    let mut world = served(rules);
    world.take(Step::FlowsEnd);
    for step in [Step::Deadline, Step::Quiet, Step::StopWorks] {
        assert!(world.take(step) && !world.exited, "{step:?}");
    }
    assert!(world.take(Step::Deadline) && world.exited);
}

#[test]
fn a_command_is_stopped_before_the_exit_and_a_unit_is_left_alone() {
    for (ownership, stopped) in [(Ownership::Own, true), (Ownership::Managed, false)] {
        let mut world = served(rules(ownership, IdlePolicy::Connections));
        world.take(Step::Terminate);
        assert!(!world.exited, "an open flow is waited for");
        world.take(Step::FlowsEnd);
        assert_eq!(world.stopping, stopped);
        assert_eq!(world.exited, !stopped);
        world.take(Step::StopWorks);
        assert!(world.exited);
    }
}

#[test]
fn the_drain_time_ends_all_waiting() {
    let mut world = served(rules(Ownership::Managed, IdlePolicy::Connections));
    world.take(Step::Terminate);
    world.take(Step::Deadline);
    assert!(world.exited);
    assert_eq!(world.flows_reset, 1);
}

#[test]
fn a_reload_forgives_a_failed_start() {
    let mut world = World::new(rules(Ownership::Managed, IdlePolicy::Connections), BackendState::Down);
    for _ in 0..5 {
        world.take(Step::ClientComes);
        if !world.starting {
            world.take(Step::Deadline);
        }
        world.take(Step::StartFails);
    }
    world.take(Step::ClientComes);
    assert!(!world.starting, "the back-off holds");
    world.take(Step::Forgive);
    assert!(world.starting, "and is over");
}

#[test]
fn no_limit_on_the_stop_is_no_overflow() {
    let rules = Rules { stop_timeout: Duration::MAX, ..rules(Ownership::Managed, IdlePolicy::Connections) };
    let world = World::new(rules, BackendState::GoingDown);
    assert_eq!(world.lifecycle.deadline(&world.totals, world.now), None);
    for mut world in [World::new(rules, BackendState::Down), World::new(rules, BackendState::Up)] {
        assert!(world.take(Step::GoingDown));
        assert_eq!(world.lifecycle.deadline(&world.totals, world.now), None);
    }
}

#[test]
fn a_command_that_was_given_up_is_stopped_before_the_exit_too() {
    let rules = Rules { idle_action: IdleAction::None, ..rules(Ownership::Own, IdlePolicy::Connections) };
    let mut world = World::new(rules, BackendState::Down);
    for step in [Step::ClientComes, Step::StartWorks, Step::Deadline] {
        assert!(world.take(step), "{step:?}");
    }
    assert!(matches!(world.lifecycle.state(), State::Failed { .. }) && !world.stopping);
    world.take(Step::Terminate);
    assert!(world.stopping && !world.exited);
    world.take(Step::StopWorks);
    assert!(world.exited);
}

#[test]
fn a_veto_or_a_stop_that_fails_is_not_asked_for_again_at_once_even_without_an_idle_time() {
    let rules = Rules { idle_time: Duration::ZERO, ..rules(Ownership::Managed, IdlePolicy::Connections) };
    for last in [&[Step::Busy][..], &[Step::Quiet, Step::StopFails]] {
        let mut world = served(rules);
        assert!(world.take(Step::FlowsEnd) && world.looking);
        for step in last {
            assert!(world.take(*step), "{step:?}");
        }
        assert_eq!(world.lifecycle.state(), &State::Awake, "{last:?}");
        let next = world.lifecycle.deadline(&world.totals, world.now).unwrap();
        assert_eq!(next, world.now + drowse::lifecycle::SETTLE_PAUSE_MIN);
    }
}
