//! A systemd that does what a test tells it, on a message bus of its own.
//!
//! Owns: a private `dbus-daemon`, and the name `org.freedesktop.systemd1` on it with as much of the interface as the
//! driver uses. Must never: touch the system's bus, or be kinder than systemd: like it, it sends signals only after
//! `Subscribe`.
//!
//! A program reaches it with `DBUS_SYSTEM_BUS_ADDRESS=` [`PrivateBus::address`] in its environment.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use futures_util::StreamExt;
use tempfile::TempDir;
use tokio::sync::{mpsc, watch};
use zbus::message::Header;
use zbus::wire::{OwnedObjectPath, Variant};
use zbus::{Connection, Message, MessageStream, connection};

const SYSTEMD: &str = "org.freedesktop.systemd1";
const SYSTEMD_PATH: &str = "/org/freedesktop/systemd1";
const MANAGER: &str = "org.freedesktop.systemd1.Manager";
const UNIT: &str = "org.freedesktop.systemd1.Unit";
const SERVICE: &str = "org.freedesktop.systemd1.Service";
const SLICE: &str = "org.freedesktop.systemd1.Slice";

/// How long anything may take before a test fails.
pub const DEADLINE: Duration = Duration::from_secs(10);

/// A `dbus-daemon` for one test, killed when dropped.
#[derive(Debug)]
pub struct PrivateBus {
    dir: TempDir,
    daemon: Option<Child>,
}

impl PrivateBus {
    /// Starts the bus.
    ///
    /// # Errors
    /// There is no `dbus-daemon`, or it does not start.
    pub fn start() -> Result<Self> {
        let dir = TempDir::new().context("make directory for bus")?;
        let config = format!(
            "<busconfig><type>custom</type><listen>{}</listen><auth>EXTERNAL</auth><policy context=\"default\">\
             <allow user=\"*\"/><allow own=\"*\"/><allow send_destination=\"*\" eavesdrop=\"true\"/>\
             <allow eavesdrop=\"true\"/></policy></busconfig>",
            address_in(&dir)
        );
        std::fs::write(dir.path().join("bus.conf"), config).context("write bus configuration")?;
        let mut bus = Self { dir, daemon: None };
        bus.revive()?;
        Ok(bus)
    }

    /// The bus's address, the same before and after [`PrivateBus::kill`] and [`PrivateBus::revive`].
    #[must_use]
    pub fn address(&self) -> String {
        address_in(&self.dir)
    }

    /// Kills the daemon: every connection breaks.
    pub fn kill(&mut self) {
        if let Some(mut daemon) = self.daemon.take() {
            // Fails only when it is dead already.
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
    }

    /// Starts the daemon again, at the same address.
    ///
    /// # Errors
    /// There is no `dbus-daemon`, or it does not start.
    pub fn revive(&mut self) -> Result<()> {
        self.kill();
        // The socket of a killed daemon is left behind.
        let _ = std::fs::remove_file(self.dir.path().join("bus"));
        let config = self.dir.path().join("bus.conf");
        let mut daemon = Command::new("dbus-daemon")
            .arg("--config-file")
            .arg(&config)
            .args(["--nofork", "--nopidfile", "--nosyslog", "--print-address=1"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context("start dbus-daemon")?;
        let stdout = daemon.stdout.take();
        self.daemon = Some(daemon);
        let mut line = String::new();
        // It prints its address once it listens, and ends the pipe if it cannot.
        BufReader::new(stdout.context("read from dbus-daemon")?)
            .read_line(&mut line)
            .context("read bus address")?;
        ensure!(!line.is_empty(), "dbus-daemon did not start");
        Ok(())
    }
}

impl Drop for PrivateBus {
    fn drop(&mut self) {
        self.kill();
    }
}

fn address_in(dir: &TempDir) -> String {
    format!("unix:path={}", dir.path().join("bus").display())
}

/// What happens after `StartUnit` or `StopUnit`.
#[derive(Clone, Debug)]
pub enum Answer {
    /// The job is answered for, then ends with `result`, and the unit is in the state `then`.
    Ends {
        /// The job's result.
        result: &'static str,
        /// The unit's `ActiveState` afterwards.
        then: &'static str,
    },
    /// The same, but `JobRemoved` is sent before the call is answered.
    EndsEarly {
        /// The job's result.
        result: &'static str,
        /// The unit's `ActiveState` afterwards.
        then: &'static str,
    },
    /// The job is queued and runs until [`FakeSystemd::end_job`].
    Runs,
    /// The call fails.
    Error(&'static str, &'static str),
    /// The call is never answered.
    Silence,
}

/// A unit, with the answers to come. When these run out, jobs end well.
#[derive(Clone, Debug)]
pub struct FakeUnit {
    /// The unit's own name, where the key is an alias.
    pub id: Option<&'static str>,
    /// `LoadState`.
    pub load_state: &'static str,
    /// The text of `LoadError`.
    pub load_error: &'static str,
    /// `ActiveState`.
    pub active: &'static str,
    /// The service's `Type`.
    pub kind: &'static str,
    /// The service's `Result`.
    pub result: &'static str,
    /// The service's `ExecMainCode`.
    pub main_code: i32,
    /// The service's `ExecMainStatus`.
    pub main_status: i32,
    /// `ConditionResult`.
    pub condition: bool,
    /// `TriggeredBy`.
    pub triggered_by: Vec<&'static str>,
    /// The service's `Slice`.
    pub slice: &'static str,
    /// Settings of the service or slice, by the names of their properties.
    pub settings: Vec<(&'static str, Variant<'static>)>,
    /// What the next calls of `StartUnit` lead to.
    pub starts: VecDeque<Answer>,
    /// What the next calls of `StopUnit` lead to.
    pub stops: VecDeque<Answer>,
    /// The job that runs.
    pub job: Option<u32>,
}

impl Default for FakeUnit {
    fn default() -> Self {
        Self {
            id: None,
            load_state: "loaded",
            load_error: "",
            active: "inactive",
            kind: "simple",
            result: "success",
            main_code: 0,
            main_status: 0,
            condition: true,
            triggered_by: Vec::new(),
            slice: "system.slice",
            settings: Vec::new(),
            starts: VecDeque::new(),
            stops: VecDeque::new(),
            job: None,
        }
    }
}

#[derive(Clone, Debug, Default)]
struct State {
    units: BTreeMap<String, FakeUnit>,
    /// The unique name of the client that called `Subscribe`.
    subscriber: Option<String>,
    last_job: u32,
    /// How long a `daemon-reload` takes; nothing else is answered meanwhile.
    reload_time: Duration,
}

enum Order {
    Signals(Vec<Signal>),
    LeaveBus,
    ComeBack,
}

enum Signal {
    JobRemoved { id: u32, unit: String, result: &'static str },
    Active { unit: String, state: &'static str },
    Reloaded,
}

/// A scripted `org.freedesktop.systemd1`. Its thread ends when it is dropped.
#[derive(Debug)]
pub struct FakeSystemd {
    address: String,
    state: Arc<Mutex<State>>,
    calls: watch::Receiver<Vec<String>>,
    on_bus: watch::Receiver<bool>,
    orders: Option<mpsc::UnboundedSender<Order>>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl FakeSystemd {
    /// Takes systemd's name on `bus`, with one unit.
    ///
    /// # Errors
    /// The thread or its runtime cannot be made.
    pub async fn start(bus: &PrivateBus, name: &str, unit: FakeUnit) -> Result<Self> {
        let state = Arc::new(Mutex::new(State::default()));
        for slice in ["-.slice", "system.slice"] {
            lock(&state).units.insert(slice.to_owned(), FakeUnit { active: "active", ..FakeUnit::default() });
        }
        lock(&state).units.insert(name.to_owned(), unit);
        let (calls_sender, calls) = watch::channel(Vec::new());
        let (on_bus_sender, on_bus) = watch::channel(false);
        let (orders, received) = mpsc::unbounded_channel();
        let service = Service {
            address: bus.address(),
            state: Arc::clone(&state),
            calls: calls_sender,
            on_bus: on_bus_sender,
            orders: received,
        };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let thread = std::thread::spawn(move || runtime.block_on(service.run()));
        let mut fake =
            Self { address: bus.address(), state, calls, on_bus, orders: Some(orders), thread: Some(thread) };
        fake.wait_on_bus(true).await?;
        Ok(fake)
    }

    /// Adds or replaces a unit, without a signal.
    pub fn set_unit(&self, name: &str, unit: FakeUnit) {
        lock(&self.state).units.insert(name.to_owned(), unit);
    }

    /// Changes a unit, without a signal.
    pub fn change_unit(&self, name: &str, change: impl FnOnce(&mut FakeUnit)) {
        if let Some(unit) = lock(&self.state).units.get_mut(name) {
            change(unit);
        }
    }

    /// Somebody else brought the unit into `state`; says so on the bus.
    pub fn set_active(&self, name: &str, state: &'static str) {
        self.change_unit(name, |unit| unit.active = state);
        self.order(Order::Signals(vec![Signal::Active { unit: name.to_owned(), state }]));
    }

    /// Ends the job that an [`Answer::Runs`] left running.
    pub fn end_job(&self, name: &str, result: &'static str, then: &'static str) {
        let mut job = None;
        self.change_unit(name, |unit| {
            unit.active = then;
            job = unit.job.take();
        });
        let mut signals = vec![Signal::Active { unit: name.to_owned(), state: then }];
        signals.extend(job.map(|id| Signal::JobRemoved { id, unit: name.to_owned(), result }));
        self.order(Order::Signals(signals));
    }

    /// Ends the job and changes the state, but tells nobody.
    pub fn end_job_unheard(&self, name: &str, then: &'static str) {
        self.change_unit(name, |unit| {
            unit.active = then;
            unit.job = None;
        });
    }

    /// Somebody who is not systemd sends the driver the end of every job so far.
    ///
    /// # Errors
    /// The bus does not take it.
    pub async fn forge_job_removed(&self, result: &str) -> Result<()> {
        let (last_job, subscriber) = {
            let state = lock(&self.state);
            (state.last_job, state.subscriber.clone())
        };
        let stranger = connection::Builder::address(self.address.as_str()).build().await?;
        let subscriber = subscriber.context("nobody has subscribed")?;
        for id in 1..=last_job {
            let body = (id, OwnedObjectPath::try_from(job_path(id))?, "dice.service", result);
            let to = Some(subscriber.as_str());
            stranger.emit_signal(to, SYSTEMD_PATH, MANAGER, "JobRemoved", &body).await?;
        }
        // The bus has passed the signals on by the time it answers this.
        let bus = Some("org.freedesktop.DBus");
        stranger.call_method(bus, "/org/freedesktop/DBus", bus, "GetId", &()).await?;
        Ok(())
    }

    /// How long a `daemon-reload` takes; nothing else is answered meanwhile.
    pub fn set_reload_time(&self, time: Duration) {
        lock(&self.state).reload_time = time;
    }

    /// A `daemon-reload` ended.
    pub fn reloaded(&self) {
        self.order(Order::Signals(vec![Signal::Reloaded]));
    }

    /// Gives the name up as systemd does in the middle of `daemon-reexec`, and forgets its subscribers.
    ///
    /// # Errors
    /// It did not happen within the deadline.
    pub async fn leave_bus(&mut self) -> Result<()> {
        self.order(Order::LeaveBus);
        self.wait_on_bus(false).await
    }

    /// Takes the name again.
    ///
    /// # Errors
    /// It did not happen within the deadline.
    pub async fn come_back(&mut self) -> Result<()> {
        self.order(Order::ComeBack);
        self.wait_on_bus(true).await
    }

    /// The calls so far, as `StartUnit dice.service replace`; properties are not listed.
    #[must_use]
    pub fn calls(&self) -> Vec<String> {
        self.calls.borrow().clone()
    }

    /// Waits until `call` was made `times` times.
    ///
    /// # Errors
    /// It was not made within the deadline.
    pub async fn wait_for_calls(&mut self, call: &str, times: usize) -> Result<()> {
        let made = |calls: &Vec<String>| calls.iter().filter(|made| made.starts_with(call)).count() >= times;
        let made = tokio::time::timeout(DEADLINE, self.calls.wait_for(made)).await;
        made.with_context(|| format!("wait for {times} of {call}"))?.context("fake systemd is gone")?;
        Ok(())
    }

    /// Waits until the name is taken (or free).
    ///
    /// # Errors
    /// It did not happen within the deadline.
    pub async fn wait_on_bus(&mut self, there: bool) -> Result<()> {
        let wait = self.on_bus.wait_for(|now| *now == there);
        let waited = tokio::time::timeout(DEADLINE, wait).await.context("wait for fake systemd")?;
        waited.context("fake systemd is gone")?;
        Ok(())
    }

    fn order(&self, order: Order) {
        if let Some(orders) = &self.orders {
            // Fails only when the thread has ended, which every wait reports.
            let _ = orders.send(order);
        }
    }
}

impl Drop for FakeSystemd {
    fn drop(&mut self) {
        self.orders = None;
        if let Some(thread) = self.thread.take() {
            let ended = thread.join();
            assert!(
                matches!(ended, Ok(Ok(()))) || std::thread::panicking(),
                "fake systemd failed: {ended:?}"
            );
        }
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Service {
    address: String,
    state: Arc<Mutex<State>>,
    calls: watch::Sender<Vec<String>>,
    on_bus: watch::Sender<bool>,
    orders: mpsc::UnboundedReceiver<Order>,
}

enum End {
    Dropped,
    BusDied,
}

impl Service {
    async fn run(mut self) -> Result<()> {
        loop {
            let Some(conn) = self.connect().await? else { return Ok(()) };
            // Whatever fails because the bus died is no failure of the fixture.
            let end = match self.serve(&conn).await {
                Err(_) if conn.is_closed() => End::BusDied,
                end => end?,
            };
            self.on_bus.send_replace(false);
            lock(&self.state).subscriber = None;
            if matches!(end, End::Dropped) {
                return Ok(());
            }
        }
    }

    /// Connects as soon as there is a bus. Nothing, when the fixture was dropped meanwhile.
    async fn connect(&mut self) -> Result<Option<Connection>> {
        let mut tick = tokio::time::interval(Duration::from_millis(2));
        loop {
            tokio::select! {
                order = self.orders.recv() => if order.is_none() { return Ok(None) },
                _ = tick.tick() => {}
            }
            let connect = connection::Builder::address(self.address.as_str()).build();
            if let Ok(Ok(conn)) = tokio::time::timeout(DEADLINE, connect).await {
                return Ok(Some(conn));
            }
        }
    }

    async fn serve(&mut self, conn: &Connection) -> Result<End> {
        let mut messages = MessageStream::from(conn);
        conn.request_name(SYSTEMD).await.context("take systemd's name")?;
        self.on_bus.send_replace(true);
        loop {
            tokio::select! {
                message = messages.next() => {
                    let Some(Ok(message)) = message else { return Ok(End::BusDied) };
                    // A call that cannot be answered because its bus died is no failure of the fixture.
                    if let Err(error) = self.answer(conn, &message).await && !conn.is_closed() {
                        return Err(error);
                    }
                }
                order = self.orders.recv() => match order {
                    None => return Ok(End::Dropped),
                    Some(Order::Signals(signals)) => self.send(conn, signals).await?,
                    Some(Order::LeaveBus) => {
                        conn.release_name(SYSTEMD).await.context("give systemd's name up")?;
                        lock(&self.state).subscriber = None;
                        self.on_bus.send_replace(false);
                    }
                    Some(Order::ComeBack) => {
                        conn.request_name(SYSTEMD).await.context("take systemd's name")?;
                        self.on_bus.send_replace(true);
                    }
                }
            }
        }
    }

    async fn answer(&mut self, conn: &Connection, message: &Message) -> Result<()> {
        let header = message.header();
        if message.message_type() != zbus::message::Type::MethodCall {
            return Ok(());
        }
        let member = header.member().map(ToString::to_string).unwrap_or_default();
        let body = message.body();
        match member.as_str() {
            "Subscribe" => {
                self.record(member);
                lock(&self.state).subscriber = header.sender().map(ToString::to_string);
                conn.reply(&header, &()).await?;
            }
            "ListUnitsByNames" => {
                let (names,): (Vec<String>,) = body.deserialize()?;
                let units: Vec<_> = names.iter().map(|name| listed(&lock(&self.state), name)).collect();
                conn.reply(&header, &(units,)).await?;
            }
            "ListUnitsByPatterns" => {
                let (_, patterns): (Vec<String>, Vec<String>) = body.deserialize()?;
                let state = lock(&self.state).clone();
                let names = state.units.keys().filter(|name| patterns.iter().any(|one| matches(one, name)));
                let units: Vec<_> = names.map(|name| listed(&state, name)).collect();
                conn.reply(&header, &(units,)).await?;
            }
            "Get" => {
                let (interface, property): (String, String) = body.deserialize()?;
                let path = header.path().map(ToString::to_string).unwrap_or_default();
                let value = properties_of(&lock(&self.state), &path, &interface)
                    .and_then(|mut properties| properties.remove(property.as_str()));
                match value {
                    Some(value) => conn.reply(&header, &value).await?,
                    None => {
                        conn.reply_error(&header, "org.freedesktop.DBus.Error.UnknownProperty", &property)
                            .await?;
                    }
                }
            }
            "GetAll" => {
                let (interface,): (String,) = body.deserialize()?;
                let path = header.path().map(ToString::to_string).unwrap_or_default();
                let properties = properties_of(&lock(&self.state), &path, &interface);
                match properties {
                    Some(properties) => conn.reply(&header, &properties).await?,
                    None => {
                        conn.reply_error(&header, "org.freedesktop.DBus.Error.UnknownObject", &path).await?;
                    }
                }
            }
            "ResetFailedUnit" => {
                let (name,): (String,) = body.deserialize()?;
                self.record(format!("{member} {name}"));
                conn.reply(&header, &()).await?;
            }
            "Reload" => {
                self.record(member);
                let time = lock(&self.state).reload_time;
                tokio::time::sleep(time).await;
                conn.reply(&header, &()).await?;
            }
            "StartUnit" | "StopUnit" => {
                let (name, mode): (String, String) = body.deserialize()?;
                self.record(format!("{member} {name} {mode}"));
                self.queue(conn, &header, &name, member == "StartUnit").await?;
            }
            _ => conn.reply_error(&header, "org.freedesktop.DBus.Error.UnknownMethod", &member).await?,
        }
        Ok(())
    }

    async fn queue(&self, conn: &Connection, header: &Header<'_>, name: &str, start: bool) -> Result<()> {
        let (id, answer) = next_answer(&mut lock(&self.state), name, start);
        let job = OwnedObjectPath::try_from(job_path(id))?;
        let (early, result, then) = match answer {
            Answer::Error(error, text) => return Ok(conn.reply_error(header, error, &text).await?),
            Answer::Silence => return Ok(()),
            Answer::Runs => return Ok(conn.reply(header, &(job,)).await?),
            Answer::Ends { result, then } => (false, result, then),
            Answer::EndsEarly { result, then } => (true, result, then),
        };
        if let Some(unit) = lock(&self.state).units.get_mut(name) {
            (unit.active, unit.job) = (then, None);
        }
        let unit = name.to_owned();
        let signals =
            vec![Signal::Active { unit: unit.clone(), state: then }, Signal::JobRemoved { id, unit, result }];
        if early {
            self.send(conn, signals).await?;
            conn.reply(header, &(job,)).await?;
        } else {
            conn.reply(header, &(job,)).await?;
            self.send(conn, signals).await?;
        }
        Ok(())
    }

    async fn send(&self, conn: &Connection, signals: Vec<Signal>) -> Result<()> {
        if lock(&self.state).subscriber.is_none() {
            return Ok(());
        }
        for signal in signals {
            match signal {
                Signal::JobRemoved { id, unit, result } => {
                    let body = (id, OwnedObjectPath::try_from(job_path(id))?, self.id_of(&unit), result);
                    conn.emit_signal(None::<&str>, SYSTEMD_PATH, MANAGER, "JobRemoved", &body).await?;
                }
                Signal::Active { unit, state } => {
                    let changed = HashMap::from([("ActiveState", Variant::from(state))]);
                    let body = (UNIT, changed, Vec::<&str>::new());
                    let properties = "org.freedesktop.DBus.Properties";
                    let path = unit_path(&self.id_of(&unit));
                    conn.emit_signal(None::<&str>, path, properties, "PropertiesChanged", &body).await?;
                }
                Signal::Reloaded => {
                    conn.emit_signal(None::<&str>, SYSTEMD_PATH, MANAGER, "Reloading", &(false,)).await?;
                }
            }
        }
        Ok(())
    }

    fn id_of(&self, name: &str) -> String {
        let state = lock(&self.state);
        state.units.get(name).and_then(|unit| unit.id).unwrap_or(name).to_owned()
    }

    fn record(&self, call: String) {
        self.calls.send_modify(|calls| calls.push(call));
    }
}

fn next_answer(state: &mut State, name: &str, start: bool) -> (u32, Answer) {
    state.last_job += 1;
    let id = state.last_job;
    let Some(unit) = state.units.get_mut(name) else {
        return (id, Answer::Error("org.freedesktop.systemd1.NoSuchUnit", "no such unit"));
    };
    let answers = if start { &mut unit.starts } else { &mut unit.stops };
    let then = if start { "active" } else { "inactive" };
    let answer = answers.pop_front().unwrap_or(Answer::Ends { result: "done", then });
    if matches!(answer, Answer::Runs) {
        unit.job = Some(id);
    }
    (id, answer)
}

/// As glob(7), for patterns with one `*` or none.
fn matches(pattern: &str, name: &str) -> bool {
    match pattern.split_once('*') {
        Some((begin, end)) => name.starts_with(begin) && name.ends_with(end),
        None => pattern == name,
    }
}

type Listed = (String, String, String, String, String, String, OwnedObjectPath, u32, String, OwnedObjectPath);

fn listed(state: &State, name: &str) -> Listed {
    let missing = FakeUnit { load_state: "not-found", ..FakeUnit::default() };
    let unit = state.units.get(name).unwrap_or(&missing);
    let id = unit.id.unwrap_or(name);
    let path = |path: String| OwnedObjectPath::try_from(path).unwrap_or_default();
    let job = unit.job.map_or_else(|| "/".to_owned(), job_path);
    let [description, sub, following, job_kind] = ["a unit", "running", "", ""].map(str::to_owned);
    let (load_state, active) = (unit.load_state.to_owned(), unit.active.to_owned());
    let job_id = unit.job.unwrap_or(0);
    (
        id.to_owned(),
        description,
        load_state,
        active,
        sub,
        following,
        path(unit_path(id)),
        job_id,
        job_kind,
        path(job),
    )
}

/// The properties of one interface of the unit at `path`.
fn properties_of(
    state: &State,
    path: &str,
    interface: &str,
) -> Option<HashMap<&'static str, Variant<'static>>> {
    let (_, unit) = state.units.iter().find(|(name, _)| unit_path(name) == path)?;
    let restrictions = || unrestricted().into_iter().chain(unit.settings.iter().cloned());
    let load_error = ("org.freedesktop.systemd1.LoadFailed", unit.load_error);
    Some(match interface {
        UNIT => HashMap::from([
            ("ActiveState", unit.active.into()),
            ("ConditionTimestampMonotonic", 1_u64.into()),
            ("ConditionResult", unit.condition.into()),
            ("LoadError", load_error.into()),
            ("TriggeredBy", unit.triggered_by.clone().into()),
        ]),
        SERVICE => {
            let own: [(&str, Variant<'static>); 5] = [
                ("Type", unit.kind.into()),
                ("Result", unit.result.into()),
                ("ExecMainCode", unit.main_code.into()),
                ("ExecMainStatus", unit.main_status.into()),
                ("Slice", unit.slice.into()),
            ];
            own.into_iter().chain(restrictions()).collect()
        }
        SLICE => restrictions().collect(),
        _ => HashMap::new(),
    })
}

/// What systemd 252 says of a service or slice that looks at nobody's packets.
fn unrestricted() -> [(&'static str, Variant<'static>); 6] {
    let addresses = || Variant::from(Vec::<(i32, Vec<u8>, u32)>::new());
    let paths = || Variant::from(Vec::<&str>::new());
    [
        ("IPAddressAllow", addresses()),
        ("IPAddressDeny", addresses()),
        ("IPIngressFilterPath", paths()),
        ("IPEgressFilterPath", paths()),
        ("BPFProgram", Vec::<(&str, &str)>::new().into()),
        ("RestrictNetworkInterfaces", (false, Vec::<&str>::new()).into()),
    ]
}

fn job_path(id: u32) -> String {
    format!("{SYSTEMD_PATH}/job/{id}")
}

/// Enough of systemd's escapes for the names that tests use.
fn unit_path(name: &str) -> String {
    format!("{SYSTEMD_PATH}/unit/{}", name.replace('.', "_2e").replace('-', "_2d").replace('@', "_40"))
}
