//! The connection to systemd: subscribed, watched, and made again when it breaks.
//!
//! Owns: the D-Bus connection, the task that reads its signals, and the calls. Must never: decide what a job's
//! result means, or leave a call without a limit in time.
//!
//! Rests on: systemd sends `JobRemoved` and `PropertiesChanged` only to clients that called `Manager.Subscribe()`;
//! a bus handles one client's messages in order, so match rules that are sent before a call are in place before
//! its effects; `ListUnitsByNames` loads a unit that is not in memory and resolves an alias. zbus stops reading
//! replies while a signal stream is full, so one task does nothing but empty it.

use std::collections::HashMap;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::future::{OptionFuture, try_join_all};
use tokio::sync::{Notify, broadcast, watch};
use zbus::export::serde::Serialize;
use zbus::wire::{OwnedObjectPath, OwnedVariant};
use zbus::{Connection, DBusError, DynamicType, Message, MessageStream};

use super::unit::{ActiveState, End, Unit, object_path};
use super::{Bus, restrictions};
use crate::activation::Failure;

pub(super) const SYSTEMD: &str = "org.freedesktop.systemd1";
pub(super) const SYSTEMD_PATH: &str = "/org/freedesktop/systemd1";
pub(super) const MANAGER: &str = "org.freedesktop.systemd1.Manager";
const UNIT: &str = "org.freedesktop.systemd1.Unit";
const SERVICE: &str = "org.freedesktop.systemd1.Service";
const SLICE: &str = "org.freedesktop.systemd1.Slice";
const SOCKET: &str = "org.freedesktop.systemd1.Socket";
pub(super) const DBUS: &str = "org.freedesktop.DBus";
pub(super) const PROPERTIES: &str = "org.freedesktop.DBus.Properties";

/// How long a broken connection rests before it is made again; doubles up to the second figure.
const RECONNECT: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(5));
/// Events that a slow reader may lag behind before it loses the oldest ones.
const EVENTS_MAX: usize = 64;
/// Times that a call is repeated because systemd left the bus before it answered.
const CALLS_MAX: usize = 3;

/// What the signals of the bus say.
#[derive(Clone, Debug)]
pub(super) enum Event {
    /// The unit's `ActiveState`.
    Active(ActiveState),
    /// A job of the unit ended.
    Job { path: String, result: String },
    /// Nobody tells us of changes until the next `Resync`.
    Lost,
    /// Signals may have been missed before this point; the state follows as `Active`.
    Resync,
}

/// What `ListUnitsByNames` says of the unit, and its service type.
#[derive(Clone, Debug)]
pub(super) struct Facts {
    /// The unit's own name where ours is an alias.
    id: String,
    pub(super) load_state: String,
    pub(super) active: ActiveState,
    /// The object path of the unit's job; `/` when it has none.
    job: String,
    /// The service tells systemd itself when it is ready.
    notify: bool,
    /// The cgroup of its processes, from the root of the hierarchy; empty if it has none.
    cgroup: String,
}

/// The reply of `ListUnitsByNames`: name, description, load state, active state, sub state, followed unit, object
/// path, job id, job type, job path.
pub(super) type ListedUnit =
    (String, String, String, String, String, String, OwnedObjectPath, u32, String, OwnedObjectPath);

/// A subscribed connection and its signals, not read yet.
pub(super) struct Link {
    conn: Connection,
    signals: MessageStream,
    /// systemd's unique name: who may send us signals of systemd. Empty while it is not on the bus.
    systemd: String,
    facts: Facts,
}

impl Link {
    /// The unit's state at the time of the subscription.
    pub(super) fn active(&self) -> ActiveState {
        self.facts.active
    }
}

/// The unit's state, being asked while signals are read.
type Asking<'a> = Pin<Box<dyn Future<Output = zbus::Result<(String, Facts)>> + Send + 'a>>;

enum Signal {
    Event(Event),
    SystemdLeft,
    SystemdCame(String),
    Reloaded,
}

/// The connection with all that the driver's futures share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) unit: Unit,
    bus: Bus,
    reply_timeout: Duration,
    link: watch::Sender<Result<Connection, Failure>>,
    reconnect_now: Notify,
    events: broadcast::Sender<Event>,
    notify: AtomicBool,
    cgroup: Mutex<String>,
    /// The unit hit its start limit, which must be reset before the next start.
    pub(super) start_limit_hit: AtomicBool,
}

impl Shared {
    pub(super) async fn connect(
        unit: Unit,
        bus: Bus,
        reply_timeout: Duration,
    ) -> Result<(Arc<Self>, Link), Failure> {
        let nobody = Failure::new("bus", "not connected to systemd");
        let shared = Self {
            unit,
            bus,
            reply_timeout,
            link: watch::Sender::new(Err(nobody)),
            reconnect_now: Notify::new(),
            events: broadcast::Sender::new(EVENTS_MAX),
            notify: AtomicBool::new(false),
            cgroup: Mutex::default(),
            start_limit_hit: AtomicBool::new(false),
        };
        let link = shared.open().await?;
        shared.publish(&link);
        Ok((Arc::new(shared), link))
    }

    pub(super) fn subscribe(&self) -> broadcast::Receiver<Event> {
        self.events.subscribe()
    }

    /// Whether the unit itself tells systemd when it is ready.
    pub(super) fn notifies(&self) -> bool {
        self.notify.load(Relaxed)
    }

    /// Reads signals for ever, and makes the connection again when it breaks.
    pub(super) async fn watch(self: Arc<Self>, mut link: Link) {
        loop {
            self.read_signals(link).await;
            self.announce(Event::Lost);
            tracing::warn!("lost the connection to systemd over {}; reconnecting", self.bus);
            link = self.reopen().await;
            tracing::info!("connected to systemd again");
            self.publish(&link);
            self.settle(&link.facts);
        }
    }

    async fn reopen(&self) -> Link {
        let (mut pause, pause_max) = RECONNECT;
        loop {
            match self.open().await {
                Ok(link) => return link,
                Err(failure) => drop(self.link.send_replace(Err(failure))),
            }
            // Ends early when somebody wants to start the backend now.
            let _ = tokio::time::timeout(pause, self.reconnect_now.notified()).await;
            pause = (pause * 2).min(pause_max);
        }
    }

    /// Makes a connection and subscribes, in as few round trips as there can be.
    async fn open(&self) -> Result<Link, Failure> {
        let conn = self.limited(self.bus.builder().build()).await.map_err(|error| self.no_bus(&error))?;
        let signals = MessageStream::from(&conn);
        let subscribed = async {
            let rules =
                [match_systemd(), match_reload(), match_jobs(&self.unit.name), match_unit(&self.unit.name)];
            let matches = try_join_all(rules.iter().map(|rule| self.add_match(&conn, rule)));
            let (_, subscribed) = tokio::try_join!(matches, self.subscribe_and_ask(&conn))?;
            let (_, facts) = &subscribed;
            if facts.id != self.unit.name {
                let rules = [match_jobs(&facts.id), match_unit(&facts.id)];
                try_join_all(rules.iter().map(|rule| self.add_match(&conn, rule))).await?;
                // What happened before the rules were in place.
                return self.subscribe_and_ask(&conn).await;
            }
            Ok(subscribed)
        };
        let (systemd, facts) = subscribed.await.map_err(|error| self.refused("watch", &error))?;
        Ok(Link { conn, signals, systemd, facts })
    }

    async fn add_match(&self, conn: &Connection, rule: &str) -> zbus::Result<()> {
        let call = conn.call_method(Some(DBUS), "/org/freedesktop/DBus", Some(DBUS), "AddMatch", &rule);
        self.limited(call).await.map(drop)
    }

    /// Subscribes to systemd's signals and asks for the unit's state. Gives systemd's unique name, too.
    async fn subscribe_and_ask(&self, conn: &Connection) -> zbus::Result<(String, Facts)> {
        let subscribe = async {
            match self.call(conn, SYSTEMD_PATH, MANAGER, "Subscribe", &()).await {
                Err(error) if is_named(&error, "org.freedesktop.systemd1.AlreadySubscribed") => {
                    if let zbus::Error::MethodError(_, _, reply) = error {
                        Ok(reply)
                    } else {
                        Err(error)
                    }
                }
                reply => reply,
            }
        };
        let (reply, facts) = tokio::try_join!(subscribe, self.ask(conn))?;
        let systemd = reply.header().sender().map(ToString::to_string).unwrap_or_default();
        Ok((systemd, facts))
    }

    /// The unit's state.
    async fn ask(&self, conn: &Connection) -> zbus::Result<Facts> {
        let name = self.unit.name.as_str();
        let path = object_path(name);
        let names = (vec![name],);
        let listed = self.call(conn, SYSTEMD_PATH, MANAGER, "ListUnitsByNames", &names);
        let of_service = async |property| {
            if self.unit.is_service {
                self.get::<String>(conn, &path, SERVICE, property).await
            } else {
                Ok(String::new())
            }
        };
        // A unit that cannot be loaded may have no type.
        let (listed, kind, cgroup) = tokio::join!(listed, of_service("Type"), of_service("ControlGroup"));
        let units: Vec<ListedUnit> = listed?.body().deserialize()?;
        let Some((id, _, load_state, active, _, _, _, _, _, job)) = units.into_iter().next() else {
            return Err(zbus::Error::Failure(format!("systemd does not list {name}")));
        };
        Ok(Facts {
            id,
            load_state,
            active: ActiveState::parse(&active),
            job: job.to_string(),
            notify: matches!(kind.as_deref(), Ok("notify" | "notify-reload")),
            cgroup: cgroup.unwrap_or_default(),
        })
    }

    fn publish(&self, link: &Link) {
        self.note(&link.facts);
        drop(self.link.send_replace(Ok(link.conn.clone())));
    }

    /// Keeps what is asked for without waiting.
    fn note(&self, facts: &Facts) {
        self.notify.store(facts.notify, Relaxed);
        self.cgroup.lock().unwrap_or_else(PoisonError::into_inner).clone_from(&facts.cgroup);
    }

    /// The cgroup of the unit's processes when it was last asked for; empty if it had none.
    pub(super) fn cgroup(&self) -> String {
        self.cgroup.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn settle(&self, facts: &Facts) {
        self.note(facts);
        self.announce(Event::Resync);
        self.announce(Event::Active(facts.active));
    }

    fn announce(&self, event: Event) {
        // Fails only when nobody listens.
        let _ = self.events.send(event);
    }

    /// Reads signals until the connection breaks.
    async fn read_signals(&self, link: Link) {
        let Link { conn, mut signals, mut systemd, facts } = link;
        let paths = [object_path(&self.unit.name), object_path(&facts.id)];
        let mut asking: Option<Asking<'_>> = None;
        loop {
            tokio::select! {
                message = signals.next() => {
                    let Some(Ok(message)) = message else { return };
                    match interpret(&message, &systemd, &paths) {
                        None => {}
                        Some(Signal::Event(event)) => self.announce(event),
                        Some(Signal::SystemdLeft) => {
                            systemd.clear();
                            asking = None;
                            self.announce(Event::Lost);
                        }
                        Some(Signal::SystemdCame(name)) => {
                            systemd = name;
                            asking = Some(Box::pin(self.subscribe_and_ask(&conn)));
                        }
                        Some(Signal::Reloaded) => asking = Some(Box::pin(self.subscribe_and_ask(&conn))),
                    }
                }
                Some(answer) = OptionFuture::from(asking.as_mut()), if asking.is_some() => {
                    asking = None;
                    match answer {
                        // An alias may point elsewhere after a reload: other match rules are needed then.
                        Ok((_, now)) if now.id == facts.id => self.settle(&now),
                        Ok(_) | Err(_) => return,
                    }
                }
            }
        }
    }

    /// A live connection: the one there is, or the next one.
    pub(super) async fn connection(&self) -> Result<Connection, Failure> {
        let mut link = self.link.subscribe();
        let now = link.borrow_and_update().clone();
        if let Ok(conn) = now
            && !conn.is_closed()
        {
            return Ok(conn);
        }
        self.reconnect_now.notify_one();
        // The task that watches may need a whole attempt, and another one when this one was under way.
        let outcome = tokio::time::timeout(self.reply_timeout * 2, link.changed()).await;
        let now = link.borrow_and_update().clone();
        match (outcome, now) {
            (Ok(Ok(())), now) => now,
            (_, Err(failure)) => Err(failure),
            (_, Ok(_)) => Err(Failure::new("bus", format!("lost {}", self.bus))),
        }
    }

    /// The unit's state, asked now.
    pub(super) async fn facts(&self) -> Result<Facts, Failure> {
        let conn = self.connection().await?;
        let facts = self.ask(&conn).await.map_err(|error| self.refused("watch", &error))?;
        self.note(&facts);
        Ok(facts)
    }

    /// Calls a method of systemd's manager.
    pub(super) async fn manage<B: Serialize + DynamicType>(
        &self,
        method: &str,
        body: &B,
    ) -> Result<(), Failure> {
        let conn = self.connection().await?;
        let reply = self.call(&conn, SYSTEMD_PATH, MANAGER, method, body).await;
        reply.map(drop).map_err(|error| self.refused("start", &error))
    }

    /// Queues a job for the unit; gives the job's path. Asks again when systemd leaves the bus before it answers:
    /// a job for the same end merges with the one there may be.
    pub(super) async fn queue(
        &self,
        verb: &str,
        method: &str,
        events: &mut broadcast::Receiver<Event>,
    ) -> Result<String, Failure> {
        let mut calls = 0;
        loop {
            let conn = self.connection().await?;
            let body = (self.unit.name.as_str(), "replace");
            let error = match self.call(&conn, SYSTEMD_PATH, MANAGER, method, &body).await {
                Ok(reply) => match reply.body().deserialize::<OwnedObjectPath>() {
                    Ok(job) => return Ok(job.to_string()),
                    Err(error) => error,
                },
                Err(error) => error,
            };
            calls += 1;
            if calls == CALLS_MAX || !systemd_vanished(&error) {
                return Err(self.refused(verb, &error));
            }
            self.wait_for_systemd(events).await?;
        }
    }

    /// Waits for the end of a job; gives its result, or nothing when we were not told and the job is gone.
    pub(super) async fn follow(
        &self,
        job: &str,
        events: &mut broadcast::Receiver<Event>,
    ) -> Result<Option<String>, Failure> {
        loop {
            match events.recv().await {
                Ok(Event::Job { path, result }) if path == job => return Ok(Some(result)),
                Ok(Event::Job { .. } | Event::Active(_)) => continue,
                Ok(Event::Lost) => self.wait_for_systemd(events).await?,
                Ok(Event::Resync) | Err(broadcast::error::RecvError::Lagged(_)) => {}
                Err(broadcast::error::RecvError::Closed) => return Ok(None),
            }
            if self.facts().await?.job != job {
                return Ok(None);
            }
        }
    }

    /// Waits for the next event that may change the unit's state, for at most the time that a reply may take.
    pub(super) async fn wait_for_event(&self, events: &mut broadcast::Receiver<Event>) {
        let _ = tokio::time::timeout(self.reply_timeout, events.recv()).await;
    }

    async fn wait_for_systemd(&self, events: &mut broadcast::Receiver<Event>) -> Result<(), Failure> {
        let resync = async {
            loop {
                match events.recv().await {
                    Ok(Event::Resync) | Err(_) => return,
                    Ok(Event::Active(_) | Event::Job { .. } | Event::Lost) => {}
                }
            }
        };
        let lost = |_| Failure::new("bus", format!("lost {} and it did not come back", self.bus));
        tokio::time::timeout(self.reply_timeout, resync).await.map_err(lost)
    }

    /// How the unit came to be `failed`. Remembers when its start limit is to blame.
    pub(super) async fn why_failed(&self) -> Failure {
        let end = async {
            let conn = self.connection().await.ok()?;
            let path = object_path(&self.unit.name);
            let (result, main_code, main_status) = tokio::try_join!(
                self.get::<String>(&conn, &path, SERVICE, "Result"),
                self.get::<i32>(&conn, &path, SERVICE, "ExecMainCode"),
                self.get::<i32>(&conn, &path, SERVICE, "ExecMainStatus"),
            )
            .ok()?;
            Some(End { result, main_code, main_status })
        };
        // Without an answer the failure is still one, only without its cause.
        let end = if self.unit.is_service { end.await.unwrap_or_default() } else { End::default() };
        if end.result == "start-limit-hit" {
            self.start_limit_hit.store(true, Relaxed);
        }
        self.unit.failed(&end)
    }

    /// Why the unit is not loaded, in systemd's words; empty when there is nothing to say.
    pub(super) async fn load_error(&self) -> String {
        let Ok(conn) = self.connection().await else { return String::new() };
        let path = object_path(&self.unit.name);
        let Ok(error) = self.get::<OwnedVariant>(&conn, &path, UNIT, "LoadError").await else {
            return String::new();
        };
        let fields = zbus::wire::Structure::try_from(error).map(zbus::wire::Structure::into_fields);
        let message = fields.ok().and_then(|fields| fields.into_iter().nth(1));
        message.and_then(|message| String::try_from(message).ok()).unwrap_or_default()
    }

    /// Whether the unit's conditions held when it was last started. Yes when systemd has not checked them since it
    /// loaded the unit: it may have unloaded the unit after the start.
    pub(super) async fn condition_holds(&self) -> bool {
        let Ok(conn) = self.connection().await else { return true };
        let path = object_path(&self.unit.name);
        let checked = self.get::<u64>(&conn, &path, UNIT, "ConditionTimestampMonotonic");
        let holds = self.get::<bool>(&conn, &path, UNIT, "ConditionResult");
        !matches!(tokio::try_join!(checked, holds), Ok((1.., false)))
    }

    /// The first active one of the socket units that start the unit.
    pub(super) async fn active_socket(&self) -> Result<Option<String>, Failure> {
        let conn = self.connection().await?;
        let failed = |error| self.refused("watch", &error);
        let path = object_path(&self.unit.name);
        let mut triggers: Vec<String> = self.get(&conn, &path, UNIT, "TriggeredBy").await.map_err(failed)?;
        triggers.retain(|name| name.rsplit_once('.').is_some_and(|(_, kind)| kind == "socket"));
        let states = triggers
            .iter()
            .map(async |name| self.get::<String>(&conn, &object_path(name), UNIT, "ActiveState").await);
        let states = try_join_all(states).await.map_err(failed)?;
        let mut sockets = triggers.into_iter().zip(states);
        Ok(sockets
            .find_map(|(name, state)| (ActiveState::parse(&state) == ActiveState::Active).then_some(name)))
    }

    /// The first setting of the service, or of a slice that it is in, that applies to the peers of its connections;
    /// as a line for people.
    pub(super) async fn restriction(&self) -> Result<Option<String>, Failure> {
        let conn = self.connection().await?;
        let failed = |error| self.refused("watch", &error);
        let name = self.unit.name.as_str();
        let settings = self.all(&conn, name, SERVICE).await.map_err(failed)?;
        let Some(slice) = settings.get("Slice").and_then(|slice| <&str>::try_from(slice).ok()) else {
            return Err(Failure::new("bus", format!("systemd does not say in which slice {name} is")));
        };
        let slices = restrictions::slices(slice);
        let of_slices = slices.iter().map(|slice| self.all(&conn, slice, SLICE));
        let of_slices = try_join_all(of_slices).await.map_err(failed)?;
        let units =
            std::iter::once((name, &settings)).chain(slices.iter().map(String::as_str).zip(&of_slices));
        let of_backend = units.into_iter().find_map(|(unit, settings)| restrictions::find(unit, settings));
        if of_backend.is_some() {
            return Ok(of_backend);
        }
        self.own_restriction(&conn).await.map_err(failed)
    }

    /// Why clients that pass drowse by would escape what their administrator set for drowse's socket units or the slices
    /// of these: a socket that systemd passed on belongs to its socket unit, not to the service. Nothing, if drowse is
    /// no unit of this manager.
    async fn own_restriction(&self, conn: &Connection) -> zbus::Result<Option<String>> {
        let own_pid = (std::process::id(),);
        let Ok(reply) = self.call(conn, SYSTEMD_PATH, MANAGER, "GetUnitByPID", &own_pid).await else {
            return Ok(None);
        };
        let path = reply.body().deserialize::<OwnedObjectPath>()?.to_string();
        let triggers: Vec<String> = self.get(conn, &path, UNIT, "TriggeredBy").await.unwrap_or_default();
        let mut slices: Vec<String> = Vec::new();
        for unit in triggers.iter().filter(|name| name.ends_with(".socket")) {
            let settings = self.all(conn, unit, SOCKET).await?;
            if let Some(found) = restrictions::find_own(unit, &settings) {
                return Ok(Some(found));
            }
            let slice = settings.get("Slice").and_then(|slice| <&str>::try_from(slice).ok());
            slices.extend(slice.map(restrictions::slices).unwrap_or_default());
        }
        slices.sort();
        slices.dedup();
        for slice in &slices {
            if let Some(found) = restrictions::find_own(slice, &self.all(conn, slice, SLICE).await?) {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }

    /// All properties of a unit that its type has, by name.
    async fn all(
        &self,
        conn: &Connection,
        unit: &str,
        interface: &str,
    ) -> zbus::Result<HashMap<String, OwnedVariant>> {
        let reply = self.call(conn, &object_path(unit), PROPERTIES, "GetAll", &(interface,)).await?;
        reply.body().deserialize()
    }

    async fn get<T>(&self, conn: &Connection, path: &str, interface: &str, name: &str) -> zbus::Result<T>
    where
        T: TryFrom<OwnedVariant>,
        T::Error: Into<zbus::Error>,
    {
        let reply = self.call(conn, path, PROPERTIES, "Get", &(interface, name)).await?;
        let value: OwnedVariant = reply.body().deserialize()?;
        T::try_from(value).map_err(Into::into)
    }

    async fn call<B: Serialize + DynamicType>(
        &self,
        conn: &Connection,
        path: &str,
        interface: &str,
        method: &str,
        body: &B,
    ) -> zbus::Result<Message> {
        self.limited(conn.call_method(Some(SYSTEMD), path, Some(interface), method, body)).await
    }

    async fn limited<T>(&self, call: impl Future<Output = zbus::Result<T>>) -> zbus::Result<T> {
        let late = |_| zbus::Error::from(io::Error::from(io::ErrorKind::TimedOut));
        tokio::time::timeout(self.reply_timeout, call).await.map_err(late)?
    }

    fn no_bus(&self, error: &zbus::Error) -> Failure {
        let message = format!(
            "cannot reach systemd over {} ({error}): is dbus running? in a container use --listen with -- COMMAND",
            self.bus
        );
        Failure::new("bus", message)
    }

    /// The failure for a call that was not answered as hoped; `verb` is what it was to do to the unit.
    fn refused(&self, verb: &str, error: &zbus::Error) -> Failure {
        let name = &self.unit.name;
        if let zbus::Error::InputOutput(io) = error
            && io.kind() == io::ErrorKind::TimedOut
        {
            let limit = self.reply_timeout;
            return Failure::new(
                "bus",
                format!("cannot {verb} {name}: systemd did not answer within {limit:?}"),
            );
        }
        let Some((error_name, text)) = method_error(error) else {
            return self.no_bus(error);
        };
        let last = error_name.rsplit('.').next().unwrap_or(&error_name);
        match last {
            "AccessDenied" | "InteractiveAuthorizationRequired" | "AuthFailed" => {
                self.unit.denied(verb, &text)
            }
            "NoSuchUnit" => self.unit.not_loaded("not-found", &text),
            "UnitMasked" => self.unit.not_loaded("masked", &text),
            "BadUnitSetting" => self.unit.not_loaded("bad-setting", &text),
            "LoadFailed" => self.unit.not_loaded("error", &text),
            _ if systemd_vanished(error) => self.no_bus(error),
            _ => Failure::new(
                last,
                format!("systemd refused to {verb} {name}: {}", text.trim_end_matches('.')),
            ),
        }
    }
}

/// The name and the text of an error that the other side sent.
pub(super) fn method_error(error: &zbus::Error) -> Option<(String, String)> {
    if let zbus::Error::MethodError(name, text, _) = error {
        return Some((name.to_string(), text.clone().unwrap_or_default()));
    }
    if let zbus::Error::FDO(error) = error {
        return Some((error.name().to_string(), error.description().unwrap_or_default().to_owned()));
    }
    None
}

pub(super) fn is_named(error: &zbus::Error, name: &str) -> bool {
    method_error(error).is_some_and(|(error, _)| error == name)
}

/// The call failed because systemd or the bus went away, not because of what was asked.
fn systemd_vanished(error: &zbus::Error) -> bool {
    if let zbus::Error::InputOutput(io) = error {
        return io.kind() != io::ErrorKind::TimedOut;
    }
    let Some((name, _)) = method_error(error) else { return false };
    let Some(name) = name.strip_prefix("org.freedesktop.DBus.Error.") else { return false };
    matches!(name, "NoReply" | "ServiceUnknown" | "NameHasNoOwner" | "Disconnected" | "NoServer")
        || name.starts_with("Spawn.")
}

fn match_systemd() -> String {
    format!("type='signal',sender='{DBUS}',member='NameOwnerChanged',arg0='{SYSTEMD}'")
}

fn match_reload() -> String {
    format!("type='signal',sender='{SYSTEMD}',interface='{MANAGER}',member='Reloading'")
}

fn match_jobs(unit: &str) -> String {
    format!("type='signal',sender='{SYSTEMD}',interface='{MANAGER}',member='JobRemoved',arg2='{unit}'")
}

fn match_unit(unit: &str) -> String {
    let path = object_path(unit);
    format!("type='signal',sender='{SYSTEMD}',path='{path}',interface='{PROPERTIES}',arg0='{UNIT}'")
}

/// What a message tells us, if it is a signal and comes from whom it should: a bus passes on a signal that any
/// client sends to us directly.
fn interpret(message: &Message, systemd: &str, paths: &[String; 2]) -> Option<Signal> {
    let header = message.header();
    let sender = header.sender()?.as_str();
    let (interface, member) = (header.interface()?.as_str(), header.member()?.as_str());
    let body = message.body();
    match (interface, member) {
        (DBUS, "NameOwnerChanged") if sender == DBUS => {
            let (_, _, owner): (String, String, String) = body.deserialize().ok()?;
            Some(if owner.is_empty() { Signal::SystemdLeft } else { Signal::SystemdCame(owner) })
        }
        (MANAGER, "Reloading") if sender == systemd => {
            let begins: bool = body.deserialize().ok()?;
            (!begins).then_some(Signal::Reloaded)
        }
        (MANAGER, "JobRemoved") if sender == systemd => {
            let (_, path, _, result): (u32, OwnedObjectPath, String, String) = body.deserialize().ok()?;
            Some(Signal::Event(Event::Job { path: path.to_string(), result }))
        }
        (PROPERTIES, "PropertiesChanged") if sender == systemd => {
            let path = header.path()?.as_str();
            let (_, changed, _): (String, HashMap<String, OwnedVariant>, Vec<String>) =
                body.deserialize().ok()?;
            let state: &str = changed.get("ActiveState")?.try_into().ok()?;
            paths
                .iter()
                .any(|ours| ours == path)
                .then(|| Signal::Event(Event::Active(ActiveState::parse(state))))
        }
        _ => None,
    }
}
