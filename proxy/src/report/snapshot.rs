//! The state of one service as scripts read it: the JSON that the status socket answers with.
//!
//! PURE. Owns: the names and the meaning of every field, and the words that say why a backend is awake. Must never:
//! read a clock or a counter by itself. Within one [`SCHEMA`] fields are only added, so a reader ignores what it does
//! not know.

use std::time::Duration;

use prometheus_client::metrics::histogram::Histogram;
use serde::{Deserialize, Serialize};

use crate::accounting::Totals;
use crate::activation::Failure;
use crate::clock::{Monotonic, Wall};
use crate::config::RunArgs;
use crate::idle::{Decision, IdlePolicy};
use crate::lifecycle::{IdleAction, Lifecycle, Ownership, State, Stopping};
use crate::report::counters::{Counters, KernelCounters};
use crate::report::metrics::activation_histogram;
use crate::report::remembered::{PastActivation, Remembered, Today};
use crate::report::status_line::{rough, status_line};
use crate::report::text::elapsed;

/// The version of the JSON; it grows when a field goes or changes its meaning.
pub const SCHEMA: u32 = 1;

/// One service at one moment.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Snapshot {
    /// The version of this structure, [`SCHEMA`].
    pub schema: u32,
    /// The service's name: `--name`, else the unit, the command, or the backend's address.
    pub name: String,
    /// The systemd unit that is the backend, if it is one.
    pub unit: Option<String>,
    /// Where the backend accepts connections, as it was given.
    pub backend: String,
    /// The process id of this drowse, in its own PID namespace; 0 if it does not run.
    pub pid: u32,
    /// Who says all this.
    #[serde(default)]
    pub source: Source,
    /// The state of the backend.
    pub state: StateName,
    /// How long it has been in this state, in seconds. A settling that leads back to awake does not count as a change.
    /// `null`: unknown, of what systemd says.
    pub since_s: Option<f64>,
    /// The state in one line of plain words, as `systemctl status` shows it.
    pub line: String,
    /// Clients that are accepted and wait for the backend.
    pub held: u64,
    /// Clients that were reset when they came, since the start of this drowse.
    #[serde(default)]
    pub refused: Refused,
    /// How many flows and held clients there may be; more wait in the listeners' backlogs.
    pub connections_max: u64,
    /// Connections between a client and the backend.
    pub flows: Flows,
    /// Bytes from clients that reached the backend's socket, since the start of this drowse.
    pub bytes_to_backend: u64,
    /// Bytes from the backend that reached the clients' sockets, since the start of this drowse.
    pub bytes_to_client: u64,
    /// What keeps the backend awake, and for how long.
    pub idle: Idle,
    /// The memory that the backend uses, in bytes: systemd's `MemoryCurrent`, or without the memory controller and for a
    /// COMMAND the resident sets of its processes. `null`: it does not run, or that is unknown.
    #[serde(default)]
    pub memory_bytes: Option<u64>,
    /// The memory that the backend used right before it was put to sleep, in bytes. `null`: it is not asleep, somebody
    /// else stopped it, or that is unknown.
    #[serde(default)]
    pub memory_saved_bytes: Option<u64>,
    /// The last wake-up that succeeded. `null`: none is known of; of a unit of systemd's they are known since the
    /// machine was started, of others since the start of this drowse.
    pub last_activation: Option<Activation>,
    /// The wake-ups of today. `null`: nobody has counted.
    #[serde(default)]
    pub today: Option<Today>,
    /// Wake-ups that succeeded since the start of this drowse.
    pub activations_total: u64,
    /// Starts that failed, crashes, and stops that failed, since the start of this drowse.
    pub failures_total: u64,
    /// The last of them. `null`: there was none.
    pub last_failure: Option<LastFailure>,
    /// How bytes travel.
    pub plane: PlaneView,
    /// What else is counted.
    #[serde(default)]
    pub counters: Counters,
}

/// Who says what is in a [`Snapshot`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Source {
    /// drowse itself.
    #[default]
    Drowse,
    /// systemd, because drowse does not run or may not be asked; `line` says which. `held`, `connections_max`, the
    /// counters and `plane` tell nothing then.
    Systemd,
}

/// The state of a backend, `lifecycle::State` without its details.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum StateName {
    /// Not running; the next client starts it.
    Asleep,
    /// Starting, or running but not accepting connections.
    Waking,
    /// Accepting connections.
    Awake,
    /// Idle for long enough: looked at once more, before it is stopped.
    Settling,
    /// On its way down.
    Stopping,
    /// The last start failed or the backend crashed.
    Failed,
}

impl StateName {
    /// Each of them.
    pub const ALL: [Self; 6] =
        [Self::Asleep, Self::Waking, Self::Awake, Self::Settling, Self::Stopping, Self::Failed];

    /// The word for it, the same as in JSON.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Asleep => "asleep",
            Self::Waking => "waking",
            Self::Awake => "awake",
            Self::Settling => "settling",
            Self::Stopping => "stopping",
            Self::Failed => "failed",
        }
    }
}

impl From<&State> for StateName {
    fn from(state: &State) -> Self {
        match state {
            State::Asleep => Self::Asleep,
            State::Waking { .. } => Self::Waking,
            State::Awake => Self::Awake,
            State::Settling(_) => Self::Settling,
            State::Stopping(_) => Self::Stopping,
            State::Failed { .. } => Self::Failed,
        }
    }
}

/// Flows by who moves their bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Flows {
    /// Flows whose bytes drowse moves.
    pub proxied: FlowCount,
    /// Flows that the kernel gave to the backend itself.
    pub handed_off: FlowCount,
}

/// A number of flows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FlowCount {
    /// Open now.
    pub open: u64,
    /// Since the start of this drowse, open ones included; those that were handed off also since that of the one whose
    /// open flows it took over.
    pub total: u64,
}

/// Clients that were reset when they came, by reason.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refused {
    /// They may not wake the backend (`--allow`), and it was not awake.
    pub may_not_wake: u64,
    /// Their source had as many connections as one may have (`--max-per-source`).
    pub too_many_of_source: u64,
}

/// The answer to "why is it awake?".
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Idle {
    /// In how many seconds the backend will be put to sleep if nothing happens until then. `null`: it is not awake,
    /// it is in use, or it is never put to sleep.
    pub sleeps_in_s: Option<f64>,
    /// What keeps it awake, in plain words, what weighs most first. Empty unless it is awake or settling.
    pub reasons: Vec<String>,
}

/// A wake-up that succeeded.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Activation {
    /// From the start of the backend to the first connection that it accepts, in seconds.
    pub took_s: f64,
    /// How long ago it was over, in seconds.
    pub ago_s: f64,
}

impl Activation {
    /// One that was remembered.
    #[must_use]
    pub fn past(past: PastActivation, wall: Wall) -> Self {
        let ago = Duration::from_secs(wall.unix_s.saturating_sub(past.at_s).try_into().unwrap_or(0));
        let took = Duration::try_from_secs_f64(past.took_s).unwrap_or_default();
        Self { took_s: seconds(took), ago_s: seconds(ago) }
    }
}

/// A failure of the backend.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LastFailure {
    /// The manager's own word (systemd: `Result=` or the job's result), or drowse's: `address-in-use`, ...
    pub result: String,
    /// What happened and what to do, in one line.
    pub message: String,
    /// How long ago it was, in seconds.
    pub ago_s: f64,
}

/// How bytes travel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlaneView {
    /// The plane of flows that come to drowse: `sockmap`, `sockmap-ends`, `splice` or `copy`.
    pub forward: String,
    /// Why it is not the one that was asked for, or the best, in one line. `null`: it is.
    #[serde(default)]
    pub reason: Option<String>,
    /// Whether new connections go to the backend without drowse.
    pub handoff: HandoffView,
}

/// The hand-off of new connections, as people see it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HandoffView {
    /// Whether it is on.
    pub state: HandoffState,
    /// Every public listener, in the order in which they were opened.
    pub listeners: Vec<ListenerView>,
    /// Why there is no hand-off at all, in one line. `null`: there is one, or each listener has its own reason.
    pub reason: Option<String>,
}

/// Whether connections are handed off.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HandoffState {
    /// New connections go straight to the backend, at the listeners that say so.
    On,
    /// It is possible here, and begins when the backend is awake.
    Ready,
    /// drowse takes every connection itself.
    #[default]
    Off,
}

/// A public listener.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListenerView {
    /// Its address, with systemd's name for it.
    pub address: String,
    /// Whether its connections go straight to the backend while hand-off is on.
    pub handed_off: bool,
    /// Why not, in one line, if that is so for this listener alone; of one that is handed off: which part of its
    /// connections is not, and why.
    pub reason: Option<String>,
}

#[cfg(test)]
impl HandoffView {
    /// No hand-off at any of `listeners`, for this reason.
    pub fn off<'a>(listeners: impl Iterator<Item = &'a str>, reason: Option<String>) -> Self {
        let proxied =
            |address: &str| ListenerView { address: address.to_owned(), handed_off: false, reason: None };
        Self { state: HandoffState::Off, listeners: listeners.map(proxied).collect(), reason }
    }
}

impl PlaneView {
    /// The plane that carries a new connection at `listener`, or will when the backend is awake.
    #[must_use]
    pub fn of<'a>(&'a self, listener: &ListenerView) -> &'a str {
        let off = self.handoff.state == HandoffState::Off;
        if listener.handed_off && !off { "handoff" } else { &self.forward }
    }

    /// Why the connections of `listener`, or a part of them, are not handed off, if somebody knows.
    #[must_use]
    pub fn why_not<'a>(&'a self, listener: &'a ListenerView) -> Option<&'a str> {
        let common = self.handoff.reason.as_deref().filter(|_| self.of(listener) == self.forward);
        listener.reason.as_deref().or(common)
    }
}

/// What happened so far, as far as people ask for it.
#[derive(Clone, Debug)]
pub struct History {
    counters: Counters,
    activations_total: u64,
    /// How long they took, in seconds.
    activations: Histogram,
    last_activation: Option<(Duration, Monotonic)>,
    failures_total: u64,
    last_failure: Option<(Failure, Monotonic)>,
    /// The busy command said busy and was not asked again since.
    vetoed_at: Option<Monotonic>,
    /// What outlives this drowse.
    remembered: Remembered,
    /// The memory that the backend used when it was about to be put to sleep.
    memory_before: Option<u64>,
}

impl Default for History {
    fn default() -> Self {
        Self {
            counters: Counters::default(),
            activations_total: 0,
            activations: activation_histogram(),
            last_activation: None,
            failures_total: 0,
            last_failure: None,
            vetoed_at: None,
            remembered: Remembered::default(),
            memory_before: None,
        }
    }
}

impl History {
    /// How long the wake-ups that succeeded took, in seconds.
    #[must_use]
    pub fn activations(&self) -> &Histogram {
        &self.activations
    }

    /// The state is `after` at `now`; it was `before` for `lasted`.
    pub fn changed(&mut self, before: &State, after: &State, lasted: Duration, now: Monotonic) {
        let awake = matches!(after, State::Awake | State::Settling(_));
        if awake && matches!(before, State::Waking { started_by_us: true, .. }) {
            self.activations_total += 1;
            self.activations.observe(lasted.as_secs_f64());
            self.last_activation = Some((lasted, now));
        }
        let is_wake = |state: &State| matches!(state, State::Waking { started_by_us: true, .. });
        if is_wake(after) && !is_wake(before) {
            self.counters.wakes_total += 1;
        }
        // Somebody may be held: then the next start has begun already.
        if matches!(before, State::Stopping(Stopping::Ours))
            && matches!(after, State::Asleep | State::Waking { .. })
        {
            self.counters.stops_total += 1;
        }
        if !awake {
            self.vetoed_at = None;
        }
    }

    /// What an earlier drowse knew, or nothing yet.
    #[must_use]
    pub fn remembering(remembered: Remembered) -> Self {
        Self { remembered, ..Self::default() }
    }

    /// What outlives this drowse.
    #[must_use]
    pub fn remembered(&self) -> &Remembered {
        &self.remembered
    }

    /// The state is `after`; it was `before` for `lasted`. Asks for the memory that the backend uses and for the time if
    /// need be. Returns whether there is something to remember.
    pub fn remember(
        &mut self,
        before: &State,
        after: &State,
        lasted: Duration,
        memory: impl FnOnce() -> Option<u64>,
        wall: impl FnOnce() -> Wall,
    ) -> bool {
        if std::mem::discriminant(before) == std::mem::discriminant(after) {
            return false;
        }
        if after == &State::Awake {
            self.memory_before = None;
        }
        match (before, after) {
            (State::Settling(_), State::Stopping(_)) => self.memory_before = memory(),
            (State::Waking { started_by_us: true, .. }, State::Awake) => {
                self.remembered.woke();
                self.remembered.activated(lasted, wall());
                return true;
            }
            (
                State::Waking { .. } | State::Asleep | State::Failed { .. } | State::Stopping(_),
                State::Awake,
            ) => {
                self.remembered.woke();
                return true;
            }
            (_, State::Asleep | State::Failed { .. }) => {
                self.remembered.slept(self.memory_before.take(), wall());
                return true;
            }
            (_, State::Waking { .. } | State::Awake | State::Settling(_) | State::Stopping(_)) => {}
        }
        false
    }

    /// The backend failed at `now`.
    pub fn failed(&mut self, failure: &Failure, now: Monotonic) {
        self.failures_total += 1;
        self.counters.failed(&failure.result);
        self.last_failure = Some((failure.clone(), now));
    }

    /// The busy command answered at `now`.
    pub fn looked(&mut self, busy: bool, now: Monotonic) {
        self.vetoed_at = busy.then_some(now);
    }
}

/// What a snapshot is made from.
#[derive(Clone, Copy, Debug)]
pub struct Sources<'a> {
    /// The command line.
    pub run: &'a RunArgs,
    /// The backend as people call it in log lines: `dice.service`.
    pub backend_name: &'a str,
    /// How many flows and held clients there may be.
    pub connections_max: u64,
    /// The state.
    pub lifecycle: &'a Lifecycle,
    /// The counters.
    pub totals: &'a Totals,
    /// What happened so far.
    pub history: &'a History,
    /// Who was refused.
    pub refused: Refused,
    /// The plane of flows that drowse moves.
    pub forward: &'a str,
    /// Why it is not another.
    pub forward_obstacle: Option<&'a str>,
    /// The hand-off.
    pub handoff: &'a HandoffView,
    /// What the kernel counted; its flows are in `totals`, too.
    pub kernel: &'a KernelCounters,
    /// The memory that the backend uses.
    pub memory: Option<u64>,
    /// The time, for people.
    pub wall: Wall,
}

impl Snapshot {
    /// The service at `now`.
    #[must_use]
    pub fn new(from: &Sources<'_>, now: Monotonic) -> Self {
        let Sources { run, lifecycle, totals, history, .. } = *from;
        let ago_s = |at: Monotonic| seconds(now.saturating_sub(at));
        Self {
            schema: SCHEMA,
            name: run.service_name(),
            unit: run.unit.clone(),
            backend: run.backend.to_string(),
            pid: std::process::id(),
            source: Source::Drowse,
            state: lifecycle.state().into(),
            since_s: Some(ago_s(lifecycle.since())),
            line: status_line(lifecycle, from.backend_name, totals, now),
            held: lifecycle.held(),
            refused: from.refused,
            connections_max: from.connections_max,
            flows: Flows {
                proxied: FlowCount { open: totals.flows_open, total: totals.flows_total },
                handed_off: FlowCount { open: totals.handed_off_open, total: totals.handed_off_total },
            },
            bytes_to_backend: totals.bytes_to_backend,
            bytes_to_client: totals.bytes_to_client,
            idle: Idle {
                sleeps_in_s: sleeps_at(from, now).map(|at| seconds(at.saturating_sub(now))),
                reasons: reasons(from, now),
            },
            memory_bytes: from.memory.filter(|_| lifecycle.is_awake()),
            memory_saved_bytes: history
                .remembered
                .saved_bytes
                .filter(|_| lifecycle.state() == &State::Asleep),
            last_activation: history
                .last_activation
                .map(|(took, at)| Activation { took_s: seconds(took), ago_s: ago_s(at) })
                .or_else(|| Some(Activation::past(history.remembered.last_activation?, from.wall))),
            today: Some(history.remembered.today(from.wall)),
            activations_total: history.activations_total,
            failures_total: history.failures_total,
            last_failure: history.last_failure.as_ref().map(|(failure, at)| LastFailure {
                result: failure.result.clone(),
                message: failure.message.clone(),
                ago_s: ago_s(*at),
            }),
            plane: PlaneView {
                forward: from.forward.to_owned(),
                reason: from.forward_obstacle.map(str::to_owned),
                handoff: from.handoff.clone(),
            },
            counters: history.counters.with(from.kernel, totals.last_activity, now),
        }
    }
}

/// When the backend goes to sleep if nothing happens before.
fn sleeps_at(from: &Sources<'_>, now: Monotonic) -> Option<Monotonic> {
    match from.lifecycle.idle(from.totals, now)? {
        Decision::WaitUntil(Monotonic::MAX) | Decision::LookAt(_) | Decision::Busy => None,
        Decision::WaitUntil(at) => Some(at),
        Decision::Settle => Some(now),
    }
}

/// What keeps the backend awake, in plain words.
fn reasons(from: &Sources<'_>, now: Monotonic) -> Vec<String> {
    let Sources { run, lifecycle, totals, history, .. } = *from;
    if !lifecycle.is_awake() {
        return Vec::new();
    }
    let waiting = match lifecycle.held() {
        0 => None,
        1 => Some("1 client waits for its connection to the backend".to_owned()),
        held => Some(format!("{held} clients wait for their connections to the backend")),
    };
    let veto = history
        .vetoed_at
        .filter(|at| *at >= totals.last_activity)
        .map(|at| format!("busy command vetoed: it said busy {} ago", elapsed(now.saturating_sub(at))));
    let exiting = lifecycle.is_draining().then(|| "drowse exits when all clients are served".to_owned());
    let all = [waiting, open_flows(from, now), veto, never(run).or_else(|| sleep(from, now)), exiting];
    all.into_iter().flatten().collect()
}

fn open_flows(from: &Sources<'_>, now: Monotonic) -> Option<String> {
    let handed_off = from.totals.handed_off_open;
    let open = from.totals.flows_open + handed_off;
    let flows = match open {
        0 => return None,
        1 => "1 open flow".to_owned(),
        open => format!("{open} open flows"),
    };
    let part = if handed_off > 0 { format!(" ({handed_off} handed off)") } else { String::new() };
    let silent = elapsed(now.saturating_sub(from.totals.last_activity));
    Some(format!("{flows}{part}, last used {silent} ago"))
}

/// Why the backend is never put to sleep, if that is so.
fn never(run: &RunArgs) -> Option<String> {
    let rules = run.rules();
    let cause = if rules.ownership == Ownership::Foreign {
        "there is neither --unit nor a COMMAND, the backend looks after itself"
    } else if rules.idle_action == IdleAction::None {
        "--idle-action none"
    } else if rules.idle_time == Duration::MAX {
        "--idle-time infinity"
    } else {
        return None;
    };
    Some(format!("never put to sleep: {cause}"))
}

/// When the backend goes to sleep, if nobody uses it.
fn sleep(from: &Sources<'_>, now: Monotonic) -> Option<String> {
    if from.lifecycle.state() != &State::Awake {
        return Some("idle for long enough: looked at once more before it is stopped".to_owned());
    }
    let time = rough(sleeps_at(from, now)?.saturating_sub(now));
    let policy = from.run.idle_policy;
    Some(if policy == IdlePolicy::Traffic && from.totals.flows_open + from.totals.handed_off_open > 0 {
        format!("idle policy: idle in {time} if no byte moves; silent flows are closed then")
    } else {
        format!("idle policy: idle in {time}")
    })
}

/// Seconds, to the millisecond.
pub(super) fn seconds(time: Duration) -> f64 {
    let whole = Duration::from_secs(time.as_secs());
    (whole + Duration::from_millis(u64::from(time.subsec_millis()))).as_secs_f64()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::activation::BackendState;
    use crate::config::{Action, Cli};
    use crate::lifecycle::Event;
    use clap::Parser as _;

    const fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn args(options: &[&str]) -> RunArgs {
        let line = ["drowse", "run", "--backend", "127.0.0.1:9"].iter().chain(options);
        let Action::Run(run) = Cli::try_parse_from(line).unwrap().action else { panic!("not run") };
        *run
    }

    struct Service {
        run: RunArgs,
        lifecycle: Lifecycle,
        totals: Totals,
        history: History,
        handoff: HandoffView,
    }

    impl Service {
        fn awake(options: &[&str]) -> Self {
            let run = args(options);
            Self {
                lifecycle: Lifecycle::new(run.rules(), BackendState::Up, s(100)),
                run,
                totals: Totals::default(),
                history: History::default(),
                handoff: HandoffView::default(),
            }
        }

        fn at(&self, now: Monotonic) -> Snapshot {
            let from = Sources {
                run: &self.run,
                backend_name: "dice.service",
                connections_max: 10,
                lifecycle: &self.lifecycle,
                totals: &self.totals,
                history: &self.history,
                refused: Refused { may_not_wake: 3, too_many_of_source: 0 },
                forward: "splice",
                forward_obstacle: Some("no sockmap: no BTF"),
                handoff: &self.handoff,
                kernel: &KernelCounters::default(),
                memory: Some(7 << 20),
                wall: Wall { unix_s: 1000, midnight_s: 900 },
            };
            Snapshot::new(&from, now)
        }

        fn reasons(&self, now: Monotonic) -> Vec<String> {
            self.at(now).idle.reasons
        }
    }

    #[test]
    fn nobody_uses_it() {
        let service = Service::awake(&["--unit", "dice.service"]);
        let snapshot = service.at(s(280));
        assert_eq!(snapshot.idle.reasons, ["idle policy: idle in 12 min"]);
        assert_eq!(snapshot.idle.sleeps_in_s, Some(720.0));
        assert_eq!(snapshot.since_s, Some(180.0));
        assert_eq!(
            (snapshot.state, snapshot.line.as_str()),
            (StateName::Awake, "awake: no flow, idle in 12 min")
        );
    }

    #[test]
    fn flows_and_held_clients_keep_it_awake() {
        let mut service = Service::awake(&["--unit", "dice.service"]);
        service.totals = Totals { flows_open: 1, flows_total: 4, last_activity: s(110), ..Totals::default() };
        assert_eq!(service.reasons(s(113)), ["1 open flow, last used 3 s ago"]);
        (service.totals.handed_off_open, service.totals.handed_off_total) = (2, 5);
        service.lifecycle.step(Event::ClientAccepted, &service.totals, s(113));
        let expected = [
            "1 client waits for its connection to the backend",
            "3 open flows (2 handed off), last used 3 s ago",
        ];
        assert_eq!(service.reasons(s(113)), expected);
        assert_eq!(service.at(s(113)).idle.sleeps_in_s, None);
    }

    #[test]
    fn silent_flows_do_not_keep_it_awake_under_traffic() {
        let mut service =
            Service::awake(&["--unit", "dice.service", "--idle-policy", "traffic", "--idle-time", "60"]);
        service.totals = Totals { flows_open: 2, last_activity: s(110), ..Totals::default() };
        let expected = [
            "2 open flows, last used 10 s ago",
            "idle policy: idle in 50 s if no byte moves; silent flows are closed then",
        ];
        assert_eq!(service.reasons(s(120)), expected);
    }

    #[test]
    fn a_veto_is_told_until_somebody_uses_it() {
        let mut service = Service::awake(&["--unit", "dice.service"]);
        service.history.looked(true, s(200));
        let expected = ["busy command vetoed: it said busy 5 s ago", "idle policy: idle in 14 min"];
        assert_eq!(service.reasons(s(205)), expected);
        service.totals.last_activity = s(206);
        assert_eq!(service.reasons(s(206)), ["idle policy: idle in 15 min"]);
    }

    #[test]
    fn what_never_sleeps_says_why() {
        let cases = [
            (
                &[][..],
                "never put to sleep: there is neither --unit nor a COMMAND, the backend looks after itself",
            ),
            (&["--unit", "a.service", "--idle-action", "none"], "never put to sleep: --idle-action none"),
            (&["--unit", "a.service", "--idle-time", "infinity"], "never put to sleep: --idle-time infinity"),
        ];
        for (options, reason) in cases {
            let service = Service::awake(options);
            assert_eq!(service.reasons(s(1000)), [reason]);
            assert_eq!(service.at(s(1000)).idle.sleeps_in_s, None);
        }
    }

    #[test]
    fn settling_is_told_and_asleep_has_no_reasons() {
        let mut service = Service::awake(&["--unit", "dice.service"]);
        service.lifecycle.step(Event::Tick, &service.totals, s(5000));
        assert_eq!(
            service.reasons(s(5000)),
            ["idle for long enough: looked at once more before it is stopped"]
        );
        service.lifecycle.step(Event::Quiet, &service.totals, s(5000));
        service.lifecycle.step(Event::Stopped(Ok(())), &service.totals, s(5001));
        let snapshot = service.at(s(5002));
        assert_eq!((snapshot.state, snapshot.idle), (StateName::Asleep, Idle::default()));
    }

    #[test]
    fn activations_and_failures_are_counted() {
        let mut service = Service::awake(&["--unit", "dice.service"]);
        let waking = State::Waking { deadline: s(9), started_by_us: true };
        service.history.changed(&waking, &State::Awake, Duration::from_millis(1250), s(300));
        service.history.changed(&State::Awake, &State::Asleep, s(1), s(301));
        let again = State::Waking { deadline: s(9), started_by_us: false };
        service.history.changed(&again, &State::Awake, s(1), s(301));
        service.history.failed(&Failure::new("exit-code", "it exited with status 3"), s(302));
        let snapshot = service.at(s(310));
        assert_eq!((snapshot.activations_total, snapshot.failures_total), (1, 1));
        assert_eq!(snapshot.counters.failures, [("exit-code".to_owned(), 1)].into());
        assert_eq!(snapshot.last_activation, Some(Activation { took_s: 1.25, ago_s: 10.0 }));
        let failure = snapshot.last_failure.unwrap();
        assert_eq!(
            (failure.result.as_str(), failure.message.as_str()),
            ("exit-code", "it exited with status 3")
        );
        assert!((failure.ago_s - 8.0).abs() < 1e-9);
    }

    #[test]
    fn what_was_remembered_is_told_until_something_newer_happens() {
        let mut known =
            Remembered { day_s: 900, counted_since_s: 950, activations: 3, ..Remembered::default() };
        known.last_activation = Some(PastActivation { took_s: 0.5, at_s: 960 });
        let mut service = Service::awake(&["--unit", "dice.service"]);
        service.history = History::remembering(known);
        let snapshot = service.at(s(101));
        assert_eq!(snapshot.last_activation, Some(Activation { took_s: 0.5, ago_s: 40.0 }));
        assert_eq!(snapshot.today, Some(Today { activations: 3, since_s: 950, whole_day: false }));
        assert_eq!((snapshot.memory_bytes, snapshot.memory_saved_bytes), (Some(7 << 20), None));
        assert_eq!(snapshot.activations_total, 0, "this drowse has woken nobody");
    }

    #[test]
    fn memory_is_taken_right_before_the_stop() {
        let wall = || Wall { unix_s: 1000, midnight_s: 900 };
        let mut service = Service::awake(&["--unit", "dice.service"]);
        let step = |service: &mut Service, event: Event, at: Monotonic| {
            let before = service.lifecycle.state().clone();
            service.lifecycle.step(event, &service.totals, at);
            service.history.remember(&before, service.lifecycle.state(), s(1), || Some(312 << 20), wall)
        };
        assert!(!step(&mut service, Event::Tick, s(5000)), "settling is nothing to remember");
        assert!(!step(&mut service, Event::Quiet, s(5000)));
        assert!(step(&mut service, Event::Stopped(Ok(())), s(5001)));
        let asleep = service.at(s(5002));
        assert_eq!((asleep.memory_bytes, asleep.memory_saved_bytes), (None, Some(312 << 20)));
        // Somebody else starts and stops it: what it used then is unknown.
        step(&mut service, Event::BackendUp, s(5003));
        step(&mut service, Event::BackendReady, s(5003));
        assert_eq!(service.at(s(5003)).memory_saved_bytes, None);
        step(&mut service, Event::BackendDown(None), s(5004));
        let asleep = service.at(s(5005));
        assert_eq!((asleep.state, asleep.memory_saved_bytes), (StateName::Asleep, None));
    }

    #[test]
    fn the_json_reads_back_and_unknown_fields_are_no_harm() {
        let service = Service::awake(&["--unit", "dice.service"]);
        let snapshot = service.at(s(101));
        let mut json = serde_json::to_value(&snapshot).unwrap();
        assert_eq!(json["state"], "awake");
        assert_eq!(json["plane"]["handoff"]["state"], "off");
        assert_eq!(json["plane"]["reason"], "no sockmap: no BTF");
        assert_eq!(json["refused"]["may_not_wake"], 3);
        json["later"] = 1.into();
        assert_eq!(serde_json::from_value::<Snapshot>(json.clone()).unwrap(), snapshot);
        json.as_object_mut().unwrap().remove("refused");
        let earlier = serde_json::from_value::<Snapshot>(json).unwrap();
        assert_eq!(earlier, Snapshot { refused: Refused::default(), ..snapshot });
    }

    #[test]
    fn a_listener_has_its_own_reason_before_the_common_one() {
        let mut handoff = HandoffView::off(["127.0.0.1:80", "[::1]:80"].into_iter(), Some("no bpffs".into()));
        let view = |handoff: &HandoffView| {
            let plane = PlaneView { forward: "splice".into(), reason: None, handoff: handoff.clone() };
            let of = |listener| (plane.of(listener).to_owned(), plane.why_not(listener).map(str::to_owned));
            handoff.listeners.iter().map(of).collect::<Vec<_>>()
        };
        assert_eq!(view(&handoff), vec![("splice".to_owned(), Some("no bpffs".to_owned())); 2]);
        handoff = HandoffView { state: HandoffState::Ready, reason: None, ..handoff };
        handoff.listeners[0].handed_off = true;
        handoff.listeners[1].reason = Some("the backend listens on IPv4 only".into());
        assert_eq!(view(&handoff)[0], ("handoff".to_owned(), None));
        handoff.listeners[0].reason = Some("IPv6 is proxied".into());
        let expected = [
            ("handoff".to_owned(), Some("IPv6 is proxied".to_owned())),
            ("splice".to_owned(), Some("the backend listens on IPv4 only".to_owned())),
        ];
        assert_eq!(view(&handoff), expected);
    }
}
