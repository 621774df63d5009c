//! The event loop: the one place where the stages meet.
//!
//! Owns: every task and handle of one service. Turns what happens into `lifecycle` events and carries out the
//! commands that come back. Must never: decide; and nothing in it may block.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use rustix::net::getpeername;
use rustix::process::Rlimit;
use socket2::Socket;
use tokio::net::UnixStream;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::{Interval, MissedTickBehavior};
use tracing::{debug, error, info, warn};

use crate::accounting::{Accounting, Totals};
use crate::activation::exec::ExecDriver;
use crate::activation::systemd::{Bus, SystemdDriver};
use crate::activation::{BackendState, Change, Driver, Failure};
use crate::address;
use crate::admission::{Admission, Refusals, Seat, Standing};
use crate::busy;
use crate::clock::{self, Monotonic};
use crate::config::{PlaneChoice, ReadyProbe, RunArgs};
use crate::idle::IdlePolicy;
use crate::kernel::{self, Kernel, LOOK_PAUSE};
use crate::lifecycle::{Command, Event, Lifecycle, Ownership, State};
use crate::listener::{Accepted, Listeners, Passed, SEAL_TIME};
use crate::pairing::{self, Gate, Outcome};
use crate::plane::Plane;
use crate::plane::choose::Redirection;
use crate::plane::forward::{Forward, Mode};
use crate::plane::handoff::Inspect;
use crate::privileges::{self, Loader};
use crate::readiness::{self, Hints};
use crate::report::control::{self, Control};
use crate::report::counters::KernelCounters;
use crate::report::metrics;
use crate::report::notify::{self, Notifier};
use crate::report::remembered::Remembered;
use crate::report::scrape::{Endpoint, Question};
use crate::report::snapshot::{History, Snapshot, Sources};
use crate::report::status_line::status_line;
use crate::report::tell;

/// What the service manager's own stop timeout may take beyond ours.
const STOP_MARGIN: Duration = Duration::from_secs(15);

/// How many of those who wait in a backlog are refused in one go: as many as one holds by default
/// (`net.core.somaxconn`).
const REFUSED_AT_ONCE_MAX: usize = 4096;

type Task<T> = Option<Pin<Box<dyn Future<Output = T>>>>;
/// The wait of a held client.
type Held = Pin<Box<dyn Future<Output = (Standing, Outcome)>>>;

/// One service: its listeners, its backend and everything in between.
pub struct EventLoop {
    run: Arc<RunArgs>,
    name: String,
    connections_max: u64,
    lifecycle: Lifecycle,
    accounting: Arc<Accounting>,
    plane: Forward,
    /// `None` once no further client is accepted.
    listeners: Option<Listeners>,
    driver: Option<Box<dyn Driver>>,
    gate: Arc<Gate>,
    /// The gate of those who may not wake the backend.
    strangers_gate: Arc<Gate>,
    clients: FuturesUnordered<Held>,
    admission: Admission,
    refusals: Refusals,
    hints: Arc<Hints>,
    /// The look at the backend's address before a start job.
    check: Task<Result<(), Failure>>,
    start: Task<Result<(), Failure>>,
    stop: Task<Result<(), Failure>>,
    probe: Task<Option<Socket>>,
    /// The question how the backend is, asked again at a reload.
    resync: Task<Result<BackendState, Failure>>,
    /// The last look before a stop.
    look: Task<Look>,
    /// The question what the backend has against a hand-off.
    ask: Task<Option<String>>,
    kernel: Kernel,
    notifier: Notifier,
    control: Control,
    /// `None` without `--metrics`.
    metrics: Option<Endpoint>,
    history: History,
    status_due: Option<Monotonic>,
    watchdog: Option<Interval>,
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
    /// Our own listeners let nobody new in; until then somebody may be half in.
    sealed_until: Option<Monotonic>,
    /// Accepting failed and was reported; not again before it works.
    accept_failing: bool,
    /// The memory that the backend used, and when that was looked at.
    memory: Option<(Monotonic, Option<u64>)>,
    /// The command to exit came while it was carried out.
    exit_again: Option<bool>,
    exit: bool,
}

/// What the last look before a stop found.
#[derive(Clone, Copy, Debug)]
struct Look {
    /// The busy command says busy.
    vetoed: bool,
    /// Somebody is on the way to the backend, or nobody knows yet.
    arriving: bool,
}

/// What the loop woke up for.
enum Woken {
    Accepted(std::io::Result<Accepted>),
    Client(Standing, Outcome),
    Checked(Result<(), Failure>),
    Started(Result<(), Failure>),
    Stopped(Result<(), Failure>),
    Ready(Option<Socket>),
    Looked(Look),
    Changed(Change),
    Asked(Option<String>),
    Kernel(kernel::News),
    FewFlowsOpen,
    Deadline,
    /// Somebody is at the status socket.
    StatusAsked(UnixStream),
    /// Somebody wants the metrics.
    Scraped(Question),
    WatchdogDue,
    ReloadAsked,
    Resynced(Result<BackendState, Failure>),
    Terminated(&'static str),
}

/// Runs one service until it is asked to stop or has nothing to do for `--exit-idle-time`.
///
/// # Errors
/// It cannot begin: no listener, no such unit, no service manager. The message says what to do.
pub async fn run(
    run: RunArgs,
    passed: Vec<Passed>,
    connections_max: u64,
    open_files: Rlimit,
) -> anyhow::Result<()> {
    let is_service = !passed.is_empty();
    let loader = Loader::start(privileges::needed(&run, !is_service));
    let listeners = Listeners::open(passed, &run.listen).await?;
    // A name is not looked up here: that may take seconds, and what it means may change.
    let backend = if run.backend.is_name() { Vec::new() } else { run.backend.resolve().await? };
    if let Some(own) = backend.iter().find(|one| listeners.is_at(one)) {
        bail!(
            "the backend's address {} is where drowse itself listens; they must differ",
            address::display(own)
        );
    }
    let metrics = match &run.metrics {
        Some(address) => match Endpoint::open(address, &listeners).await {
            Ok(endpoint) => Some(endpoint),
            // Clients of a service wait at systemd's socket until it runs: it is not to fail for this.
            Err(error) if is_service => {
                error!("there are no metrics: {error:#}");
                None
            }
            Err(error) => return Err(error),
        },
        None => None,
    };
    let mut service =
        EventLoop::prepare(run, listeners, loader, metrics, connections_max, open_files).await?;
    service.serve().await;
    Ok(())
}

impl EventLoop {
    async fn prepare(
        run: RunArgs,
        listeners: Listeners,
        loader: Loader,
        metrics: Option<Endpoint>,
        connections_max: u64,
        open_files: Rlimit,
    ) -> anyhow::Result<Self> {
        let mut driver = driver(&run, open_files).await?;
        let backend = match &mut driver {
            Some(driver) => driver.state().await?,
            None => BackendState::Up,
        };
        let workers = run.workers();
        let accounting = Accounting::new(workers);
        let mode = if run.plane == PlaneChoice::Copy { Mode::Copy } else { Mode::Splice };
        let plane =
            Forward::new(mode, workers, Arc::clone(&accounting)).context("start the forwarding workers")?;
        let name = driver.as_ref().map_or_else(|| run.backend.to_string(), |driver| driver.name().to_owned());
        let watchdog = notify::watchdog_period().map(|period| {
            let mut interval = tokio::time::interval(period);
            interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
            interval
        });
        let facts = listeners.facts().context("look at the listeners")?;
        let control = status_socket(&run);
        let remembered = control.remembered().unwrap_or_else(|| Remembered::since(clock::wall()));
        let service = Self {
            kernel: Kernel::new(
                &run,
                &facts,
                connections_max,
                run.rules().ownership != Ownership::Own,
                loader,
            ),
            name,
            connections_max,
            lifecycle: Lifecycle::new(run.rules(), backend, clock::now()),
            accounting,
            plane,
            control,
            metrics,
            history: History::remembering(remembered),
            listeners: Some(listeners),
            driver,
            gate: Arc::default(),
            strangers_gate: Arc::default(),
            clients: FuturesUnordered::new(),
            admission: Admission::new(run.allow.clone(), run.max_per_source),
            refusals: Refusals::default(),
            hints: Arc::default(),
            check: None,
            start: None,
            stop: None,
            probe: None,
            resync: None,
            look: None,
            ask: None,
            notifier: Notifier::from_environment(),
            status_due: None,
            watchdog,
            terminate: signal(SignalKind::terminate()).context("watch for SIGTERM")?,
            interrupt: signal(SignalKind::interrupt()).context("watch for SIGINT")?,
            hangup: signal(SignalKind::hangup()).context("watch for SIGHUP")?,
            sealed_until: None,
            accept_failing: false,
            memory: None,
            exit_again: None,
            exit: false,
            run: Arc::new(run),
        };
        service.set_gates();
        Ok(service)
    }

    async fn serve(&mut self) {
        let listeners: Vec<&str> = self.listeners.iter().flat_map(Listeners::names).collect();
        let possible = [
            self.kernel.obstacle().is_none().then_some("handoff"),
            self.kernel.redirection().map(Redirection::word),
        ];
        let possible = possible.into_iter().flatten().map(|plane| format!("{plane} where possible, else "));
        info!(
            "{} in front of {} ({}), plane {}{}, at most {} connections",
            listeners.join(", "),
            self.run.backend,
            status_line(&self.lifecycle, &self.name, &Totals::default(), clock::now()),
            possible.collect::<String>(),
            self.plane.name(),
            self.connections_max,
        );
        self.kernel.tell_contradiction();
        self.notifier.ready();
        self.tell_status();
        if self.lifecycle.is_awake() {
            self.kernel.load(true, self.listeners.as_ref());
            self.ask_backend();
        }
        while !self.exit {
            let woken = self.next().await;
            for event in self.translate(woken) {
                self.handle(event);
            }
            self.close_sealed();
            if let Some(line) = self.refusals.tell(&self.name, clock::now()) {
                info!("{line}");
            }
            self.tell_status();
        }
        self.notifier.stopping();
    }

    /// Waits for whatever happens first. The order matters under load: what is rare and due goes before clients, and
    /// clients' own progress before new clients.
    async fn next(&mut self) -> Woken {
        let now = clock::now();
        // The end of the last flow is always news; at the limit the end of any that makes room.
        let held = self.lifecycle.held();
        let at_limit = held + self.accounting.totals().flows_open >= self.connections_max;
        self.accounting.wake_at(if at_limit { self.connections_max.saturating_sub(held + 1) } else { 0 });
        let totals = self.totals();
        // An exit that waits for the seal is due already, and asking again before helps nobody.
        let sealed = self.sealed_until.unwrap_or_default();
        let decision = self.lifecycle.deadline(&totals, now).map(|at| at.max(sealed));
        let deadlines = [decision, self.sealed_until, self.status_due, self.refusals.due()];
        let deadline = deadlines.into_iter().flatten().min();
        let has_room = self.has_room(&totals);
        tokio::select! {
            biased;
            name = asked_to_stop(&mut self.terminate, &mut self.interrupt) => Woken::Terminated(name),
            Some(()) = self.hangup.recv() => Woken::ReloadAsked,
            state = finished(&mut self.resync) => Woken::Resynced(state),
            change = changed(self.driver.as_mut()) => Woken::Changed(change),
            result = finished(&mut self.check) => Woken::Checked(result),
            result = finished(&mut self.start) => Woken::Started(result),
            result = finished(&mut self.stop) => Woken::Stopped(result),
            scout = finished(&mut self.probe) => Woken::Ready(scout),
            look = finished(&mut self.look) => Woken::Looked(look),
            () = due(self.watchdog.as_mut()) => Woken::WatchdogDue,
            () = sleep_until(deadline, now) => Woken::Deadline,
            obstacle = finished(&mut self.ask) => Woken::Asked(obstacle),
            news = self.kernel.next() => Woken::Kernel(news),
            Some((standing, outcome)) = self.clients.next(), if !self.clients.is_empty() => {
                Woken::Client(standing, outcome)
            }
            () = self.accounting.few_open() => Woken::FewFlowsOpen,
            peer = self.control.asked() => Woken::StatusAsked(peer),
            question = scraped(self.metrics.as_mut()) => Woken::Scraped(question),
            client = accepted(self.listeners.as_mut()), if has_room => Woken::Accepted(client),
        }
    }

    /// Does what needs no decision, and says what it means for the lifecycle.
    fn translate(&mut self, woken: Woken) -> Vec<Event> {
        match woken {
            Woken::Accepted(Ok(client)) => {
                self.accept_failing = false;
                self.take_in(client);
                vec![]
            }
            Woken::Accepted(Err(error)) => {
                if !std::mem::replace(&mut self.accept_failing, true) {
                    warn!("cannot accept clients for now, they wait in the backlog: {error}");
                }
                vec![]
            }
            Woken::Client(standing, outcome) => self.settle_client(standing, outcome),
            Woken::Checked(result) => {
                self.check = None;
                self.begin_start(result)
            }
            Woken::Started(result) => {
                self.start = None;
                self.hints.nudge();
                self.ask_backend();
                vec![Event::Started(result)]
            }
            Woken::Stopped(result) => {
                self.stop = None;
                vec![Event::Stopped(result)]
            }
            Woken::Ready(scout) => {
                self.probe = None;
                self.gate.offer_scout(scout.filter(|_| self.lifecycle.held() > 0));
                vec![Event::BackendReady]
            }
            Woken::Looked(look) => {
                self.look = None;
                self.last_look(look)
            }
            Woken::Changed(change) => self.translate_change(change),
            Woken::Asked(obstacle) => {
                self.ask = None;
                self.kernel.set_backend_obstacle(obstacle);
                self.tick()
            }
            Woken::Kernel(news) => {
                self.hear(news);
                self.use_sockmap();
                self.tick()
            }
            Woken::FewFlowsOpen | Woken::Deadline => self.tick(),
            Woken::StatusAsked(peer) => self.answer_status(peer),
            Woken::Scraped(question) => self.answer_scrape(question),
            Woken::WatchdogDue => {
                self.notifier.alive();
                vec![]
            }
            Woken::ReloadAsked => {
                self.reload();
                vec![]
            }
            Woken::Resynced(state) => {
                self.resync = None;
                self.notifier.ready();
                self.resynced(state)
            }
            Woken::Terminated(signal) => {
                info!("{signal}: letting open connections end");
                vec![Event::Terminate]
            }
        }
    }

    /// What the kernel tells is a hint for who waits for the backend.
    fn hear(&self, news: kernel::News) {
        match news {
            kernel::News::Loaded if self.kernel.is_hooked() => self.hints.set_hooked(),
            kernel::News::Loaded => {}
            kernel::News::Listened => self.hints.nudge(),
        }
    }

    /// Gives the plane its way into the kernel, once it is known whether there is one.
    fn use_sockmap(&mut self) {
        let Some(sockmap) = self.kernel.take_sockmap() else { return };
        let used = sockmap.and_then(|(sockmap, announcements)| {
            let used = self.plane.use_sockmap(sockmap, announcements);
            used.map_err(|error| format!("cannot start the thread that listens to the kernel: {error}"))
        });
        self.kernel.redirects(used.map(|()| self.plane.name()));
    }

    fn translate_change(&self, change: Change) -> Vec<Event> {
        debug!("the backend changed: {change:?}");
        self.hints.nudge();
        match change {
            Change::Up => vec![Event::BackendUp],
            Change::Ready => {
                self.hints.set_said_ready();
                vec![Event::BackendUp]
            }
            Change::GoingDown => vec![Event::BackendGoingDown],
            Change::Down(failure) => vec![Event::BackendDown(failure)],
        }
    }

    /// Asks how the backend is; the answer ends the reload.
    fn reload(&mut self) {
        info!("SIGHUP: asking how {} is, and forgiving earlier failures", self.name);
        self.notifier.reloading();
        self.ask_backend();
        let state = self.driver.as_mut().map(|driver| driver.state());
        self.resync = Some(Box::pin(async move {
            match state {
                Some(state) => state.await,
                None => Ok(BackendState::Up),
            }
        }));
    }

    /// What a reload found out: the backend's state, whatever was missed of it, and a fresh start.
    fn resynced(&self, state: Result<BackendState, Failure>) -> Vec<Event> {
        let found = match state {
            Ok(BackendState::Up) => Event::BackendUp,
            Ok(BackendState::GoingDown) => Event::BackendGoingDown,
            Ok(BackendState::Down) => Event::BackendDown(None),
            Err(failure) => {
                warn!("{}: {failure}", self.name);
                return vec![Event::Forgive];
            }
        };
        vec![found, Event::Forgive]
    }

    fn settle_client(&mut self, standing: Standing, outcome: Outcome) -> Vec<Event> {
        let is_stranger = standing == Standing::Stranger;
        match outcome {
            Outcome::Paired(flow) => {
                let peer = getpeername(&flow.backend).ok().filter(|_| self.run.backend.is_name());
                self.kernel.was_bypassed(peer.flatten().and_then(|peer| peer.try_into().ok()));
                tell::flow_opened(&flow.client, self.plane.name());
                self.plane.open(flow);
                vec![if is_stranger { Event::StrangerEnded } else { Event::ClientPaired }]
            }
            Outcome::Refused(client, _, error) if is_stranger => {
                debug!("the backend took no connection, the client may not wait for it: {error}");
                pairing::reset(client);
                vec![Event::StrangerEnded]
            }
            Outcome::Refused(client, seat, error) => {
                debug!("the backend took no connection, the client is held: {error}");
                self.gate.set_open(false);
                self.hold(client, seat, standing);
                vec![Event::ClientRefused]
            }
            Outcome::Left if is_stranger => vec![Event::StrangerEnded],
            Outcome::Left => {
                // A backend that takes one connection at a time must not wait for a client that went.
                self.gate.offer_scout(None);
                vec![Event::ClientLeft]
            }
            Outcome::TurnedAway => vec![],
        }
    }

    fn hold(&mut self, client: Socket, seat: Seat, standing: Standing) {
        let gate = match standing {
            Standing::MayWake => &self.gate,
            Standing::Stranger => &self.strangers_gate,
        };
        let held = pairing::hold(client, seat, Arc::clone(gate), Arc::clone(&self.run));
        self.clients.push(Box::pin(async move { (standing, held.await) }));
    }

    fn set_gates(&self) {
        for gate in [&self.gate, &self.strangers_gate] {
            gate.set_open(self.lifecycle.is_awake());
        }
    }

    /// Whether one more client may come in; else it waits in the backlog.
    fn has_room(&self, totals: &Totals) -> bool {
        let held = self.lifecycle.held();
        held + totals.flows_open < self.connections_max && self.run.held_max.is_none_or(|max| held < max)
    }

    /// The end of the last look: the accept queues are looked at after the busy command has had its say.
    fn last_look(&mut self, look: Look) -> Vec<Event> {
        self.history.looked(look.vetoed, clock::now());
        let is_known = self.inspect();
        let totals = self.totals();
        if self.has_room(&totals) && self.take_in_waiting() {
            return vec![];
        }
        vec![match look {
            Look { vetoed: true, .. } => Event::Busy,
            Look { arriving, .. } if arriving || !is_known => Event::Arriving,
            Look { .. } => Event::Quiet,
        }]
    }

    fn handle(&mut self, event: Event) {
        let (before, since) = (self.lifecycle.state().clone(), self.lifecycle.since());
        let now = clock::now();
        let totals = self.totals();
        tracing::trace!("{event:?} in {before:?}, {} clients held", self.lifecycle.held());
        let was_awake = self.lifecycle.is_awake();
        let commands = self.lifecycle.step(event, &totals, now);
        self.set_gates();
        if self.lifecycle.is_awake() && !was_awake {
            // Perhaps somebody else started it.
            self.kernel.load(true, self.listeners.as_ref());
            self.ask_backend();
        }
        self.kernel.hand_off(self.lifecycle.hands_off());
        self.history.changed(&before, self.lifecycle.state(), now.saturating_sub(since), now);
        tell::change(&self.run, &self.name, &self.lifecycle, &before, now.saturating_sub(since), now);
        self.remember(&before, now.saturating_sub(since));
        if !commands.contains(&Command::Exit) {
            self.stay();
        }
        for command in commands {
            self.carry_out(command);
        }
    }

    fn carry_out(&mut self, command: Command) {
        debug!("carry out {command:?}");
        match command {
            Command::StartBackend => self.start_backend(),
            Command::StopBackend => self.stop_backend(),
            Command::Probe => self.begin_probe(),
            Command::StopProbing => self.probe = None,
            Command::ResetHeld => self.gate.turn_away(),
            Command::ResetStrangers => self.strangers_gate.turn_away(),
            Command::ResetFlows => self.plane.reset_all(),
            Command::BackendGone => self.plane.backend_gone(),
            Command::CloseSilent => self.plane.close_silent(self.run.idle_time),
            Command::LookAgain => self.look_again(),
            Command::Report(failure) => {
                self.history.failed(&failure, clock::now());
                self.report(&failure);
            }
            Command::StopAccepting => self.stop_accepting(),
            Command::Exit => self.leave(),
        }
    }

    /// Looks whether a stranger sits on the backend's address; the start job and the probe follow.
    fn start_backend(&mut self) {
        self.hints.clear();
        // Beside the start, so that it never delays a client.
        self.kernel.load(false, self.listeners.as_ref());
        let Some(driver) = &mut self.driver else { return };
        let (run, activated, state) = (Arc::clone(&self.run), driver.is_socket_activated(), driver.state());
        self.check = Some(Box::pin(async move {
            let Some(address) = readiness::occupied(&run.backend).await else { return Ok(()) };
            // The backend may run already: one that was given up and not stopped listens late.
            if activated.await || matches!(state.await, Ok(BackendState::Up)) {
                return Ok(());
            }
            Err(occupied_failure(&address))
        }));
    }

    fn begin_start(&mut self, checked: Result<(), Failure>) -> Vec<Event> {
        if let Err(failure) = checked {
            return vec![Event::Started(Err(failure))];
        }
        self.start =
            self.driver.as_mut().map(|driver| -> Pin<Box<dyn Future<Output = _>>> { driver.start() });
        self.begin_probe();
        vec![]
    }

    fn stop_backend(&mut self) {
        self.check = None;
        self.start = None;
        let Some(driver) = &mut self.driver else { return };
        let (stop, name) = (driver.stop(), self.name.clone());
        let patience = self.run.stop_timeout.saturating_add(STOP_MARGIN);
        self.stop = Some(Box::pin(async move {
            let late = || Failure::new("stop-timeout", format!("{name} did not stop within {patience:?}"));
            tokio::time::timeout(patience, stop).await.unwrap_or_else(|_elapsed| Err(late()))
        }));
    }

    /// Probes for readiness; while the address is being looked at, the start that follows does it.
    fn begin_probe(&mut self) {
        if self.check.is_some() {
            return;
        }
        let (run, hints) = (Arc::clone(&self.run), Arc::clone(&self.hints));
        self.probe = Some(Box::pin(async move { readiness::wait(&run, &hints).await }));
    }

    /// Asks what the backend has against a hand-off; once it runs, because some settings come with its start.
    fn ask_backend(&mut self) {
        let asked: Pin<Box<dyn Future<Output = _>>> = match &self.driver {
            Some(driver) => driver.handoff_obstacle(),
            None => Box::pin(std::future::ready(None)),
        };
        self.ask = Some(asked);
    }

    /// All counters, of flows through the proxy and of those that were handed off.
    fn totals(&self) -> Totals {
        totals(&self.accounting, &self.kernel)
    }

    /// The counters are to be looked at.
    fn tick(&self) -> Vec<Event> {
        self.inspect();
        vec![Event::Tick]
    }

    /// Brings the activity of handed-off flows up to date, where a decision depends on it. Returns whether it is.
    fn inspect(&self) -> bool {
        let matters = self.run.idle_policy == IdlePolicy::Traffic && self.totals().handed_off_open > 0;
        !matters || self.kernel.inspect(Inspect::UntilOneMoved)
    }

    /// The busy command has its say first, because it may take its time.
    fn look_again(&mut self) {
        let open_counts = self.run.idle_policy == IdlePolicy::Connections;
        let (command, look) = (self.run.busy_command.clone(), self.kernel.last_look(open_counts));
        // Flows of an earlier drowse may be open that nobody has counted yet.
        let unknown = self.kernel.may_have_flows();
        self.look = Some(Box::pin(async move {
            let vetoed = busy::is_busy(command).await;
            Look { vetoed, arriving: !vetoed && (unknown || look.await) }
        }));
    }

    fn report(&self, failure: &Failure) {
        let last = self.hints.last_error();
        let says_more = failure.result == "start-timeout" && !last.is_empty();
        tell::failure(&self.name, failure, says_more.then_some(&*last));
    }

    /// Keeps what the next drowse, or `drowse status` without one, should know. A COMMAND ends with its drowse.
    fn remember(&mut self, before: &State, lasted: Duration) {
        let driver = self.driver.as_ref();
        let memory = || driver.and_then(|driver| driver.memory());
        let news = self.history.remember(before, self.lifecycle.state(), lasted, memory, clock::wall);
        if news && self.run.unit.is_some() {
            self.control.remember(self.history.remembered());
        }
    }

    fn tell_status(&mut self) {
        let now = clock::now();
        let state = self.lifecycle.state();
        self.status_due = self.notifier.status(state, now, || {
            let totals = totals(&self.accounting, &self.kernel);
            status_line(&self.lifecycle, &self.name, &totals, now)
        });
    }

    fn answer_status(&mut self, peer: UnixStream) -> Vec<Event> {
        self.kernel.inspect_to_show();
        let memory = self.memory();
        let snapshot = self.snapshot(memory);
        self.control.answer(peer, &snapshot);
        vec![]
    }

    fn answer_scrape(&mut self, question: Question) -> Vec<Event> {
        self.kernel.inspect_to_show();
        let text =
            metrics::encode(self.snapshot(None), self.history.activations().clone(), clock::unix_time());
        let _peer_left = question.send(text);
        vec![]
    }

    /// What the backend uses while it is awake. To look may be a walk through all processes, so that is not done for
    /// each who asks.
    fn memory(&mut self) -> Option<u64> {
        let driver = self.driver.as_ref().filter(|_| self.lifecycle.is_awake())?;
        let now = clock::now();
        if self.memory.is_none_or(|(at, _)| now.saturating_sub(at) >= LOOK_PAUSE) {
            self.memory = Some((now, driver.memory()));
        }
        self.memory.and_then(|(_, bytes)| bytes)
    }

    /// This moment, for whoever asks. `memory`: what the backend uses, if that is of interest.
    fn snapshot(&self, memory: Option<u64>) -> Snapshot {
        let proxied = self.accounting.counts_redirected().then(|| self.accounting.redirected());
        let kernel = KernelCounters { proxied, ..self.kernel.counters(self.kernel.service()) };
        let forward_obstacle = self.kernel.forward_obstacle();
        let sources = Sources {
            run: &self.run,
            backend_name: &self.name,
            connections_max: self.connections_max,
            lifecycle: &self.lifecycle,
            totals: &self.accounting.totals().with_handed_off(&kernel.service),
            history: &self.history,
            refused: self.refusals.total(),
            forward: self.plane.name(),
            forward_obstacle: forward_obstacle.as_deref(),
            handoff: &self.kernel.view(),
            kernel: &kernel,
            memory,
            wall: clock::wall(),
        };
        Snapshot::new(&sources, clock::now())
    }

    /// Nobody new gets in; whoever is half in is still taken in. Those who wait at a listener of systemd's wake the
    /// next drowse.
    fn stop_accepting(&mut self) {
        let Some(listeners) = &mut self.listeners else { return };
        listeners.release_passed();
        if listeners.seal() {
            self.sealed_until = Some(clock::now() + SEAL_TIME);
        } else {
            self.listeners = None;
        }
    }

    /// Exits, unless somebody comes at the last moment: our own listeners are sealed first, and looked at until all
    /// handshakes are over.
    fn leave(&mut self) {
        let Some(listeners) = &mut self.listeners else {
            self.exit = true;
            return;
        };
        if self.sealed_until.is_none() && listeners.seal() {
            self.sealed_until = Some(clock::now() + SEAL_TIME);
            return;
        }
        if self.sealed_until.is_some_and(|until| clock::now() < until) {
            return;
        }
        // A client that is taken in now may be turned away at once, with the next command to exit.
        if let Some(again) = &mut self.exit_again {
            *again = true;
            return;
        }
        loop {
            self.exit_again = Some(false);
            self.exit = !self.take_in_waiting();
            if self.exit_again.take() != Some(true) || self.exit {
                return;
            }
        }
    }

    /// Undoes the seal when there is something to do after all; a stop request stands.
    fn stay(&mut self) {
        if self.sealed_until.is_some() && !self.lifecycle.is_draining() {
            self.sealed_until = None;
            self.listeners.iter_mut().for_each(Listeners::unseal);
        }
    }

    /// Holds a client that was just accepted, or refuses it. Returns whether it is in.
    fn take_in(&mut self, client: Accepted) -> bool {
        let (seat, standing) = match self.admission.admit(client.from, self.lifecycle.is_awake()) {
            Ok(admitted) => admitted,
            Err(refusal) => {
                debug!(?refusal, from = ?client.from, "a client is refused");
                self.refusals.add(refusal, client.from);
                pairing::reset(client.socket);
                return false;
            }
        };
        self.hold(client.socket, seat, standing);
        self.handle(match standing {
            Standing::MayWake => Event::ClientAccepted,
            Standing::Stranger => Event::StrangerAccepted,
        });
        true
    }

    /// Takes in a client that waits in a backlog right now, past those who are refused. Returns whether there was one.
    fn take_in_waiting(&mut self) -> bool {
        for _ in 0..REFUSED_AT_ONCE_MAX {
            let Some(client) = self.listeners.as_ref().and_then(Listeners::try_accept) else { return false };
            if self.take_in(client) {
                return true;
            }
        }
        false
    }

    /// Closes listeners of our own once nobody can be half in any more.
    fn close_sealed(&mut self) {
        if self.lifecycle.is_draining() && self.sealed_until.is_some_and(|until| clock::now() >= until) {
            while self.take_in_waiting() {}
            self.listeners = None;
            self.sealed_until = None;
        }
    }
}

fn totals(accounting: &Accounting, kernel: &Kernel) -> Totals {
    accounting.totals().with_handed_off(&kernel.service())
}

async fn driver(run: &RunArgs, open_files: Rlimit) -> anyhow::Result<Option<Box<dyn Driver>>> {
    if let Some(unit) = &run.unit {
        let bus = if run.user { Bus::User } else { Bus::System };
        return Ok(Some(Box::new(SystemdDriver::connect(unit, bus).await?)));
    }
    if run.rules().ownership == Ownership::Foreign {
        return Ok(None);
    }
    let listens_for_ready = run.ready_probe == ReadyProbe::Notify;
    let driver = ExecDriver::new(run.command.clone(), run.stop_timeout, open_files, listens_for_ready);
    Ok(Some(Box::new(driver)))
}

/// The status socket; a service without one serves as well.
fn status_socket(run: &RunArgs) -> Control {
    let directory = control::own_directory(run.runtime_dir.as_deref(), run.user);
    Control::open(directory.as_deref(), &run.service_name()).unwrap_or_else(|error| {
        info!("no status socket: {error:#}");
        Control::default()
    })
}

fn occupied_failure(address: &str) -> Failure {
    let port = address.rsplit(':').next().unwrap_or(address);
    Failure::new(
        "address-in-use",
        format!(
            "another process already listens on the backend's address {address}; find it with: ss -ltnp sport = :{port}"
        ),
    )
}

async fn asked_to_stop(terminate: &mut Signal, interrupt: &mut Signal) -> &'static str {
    tokio::select! {
        _ = terminate.recv() => "SIGTERM",
        _ = interrupt.recv() => "SIGINT",
    }
}

async fn changed(driver: Option<&mut Box<dyn Driver>>) -> Change {
    match driver {
        Some(driver) => driver.changed().await,
        None => std::future::pending().await,
    }
}

async fn scraped(metrics: Option<&mut Endpoint>) -> Question {
    match metrics {
        Some(metrics) => metrics.asked().await,
        None => std::future::pending().await,
    }
}

async fn accepted(listeners: Option<&mut Listeners>) -> std::io::Result<Accepted> {
    match listeners {
        Some(listeners) => listeners.accept().await,
        None => std::future::pending().await,
    }
}

/// The end of a task, if there is one; the caller clears it.
async fn finished<T>(task: &mut Task<T>) -> T {
    match task {
        Some(task) => task.await,
        None => std::future::pending().await,
    }
}

async fn sleep_until(deadline: Option<Monotonic>, now: Monotonic) {
    match deadline {
        Some(at) => tokio::time::sleep(at.saturating_sub(now)).await,
        None => std::future::pending().await,
    }
}

async fn due(watchdog: Option<&mut Interval>) {
    match watchdog {
        Some(interval) => {
            interval.tick().await;
        }
        None => std::future::pending().await,
    }
}
