//! systemd for a command that asks it a few things, has it do some, and ends.
//!
//! Owns: one D-Bus connection for as long as the command runs. Must never: connect again, or leave a call without a
//! limit in time.
//!
//! Rests on: `org.freedesktop.systemd1(5)`; a call about a unit that is not in memory loads it; `Reload` is answered
//! when the reload is over; `JobRemoved` is sent only to clients that called `Subscribe`, possibly before the call that
//! made the job is answered.

use std::collections::HashMap;
use std::path::PathBuf;
use std::time::Duration;

use futures_util::StreamExt as _;
use zbus::export::serde::Serialize;
use zbus::export::serde::de::DeserializeOwned;
use zbus::wire::{OwnedObjectPath, OwnedVariant, Structure, Variant};
use zbus::{Connection, DynamicType, Message, MessageStream};

use super::Bus;
use super::link::{DBUS, ListedUnit, MANAGER, PROPERTIES, SYSTEMD, SYSTEMD_PATH, is_named, method_error};
use super::unit::{ActiveState, object_path};
use crate::activation::Failure;

/// How long a job or a reload may take: the time that systemd gives a start or a stop by default, twice.
const JOB_TIMEOUT: Duration = Duration::from_mins(3);

/// A unit in one line, as `systemctl list-units` has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// The unit's own name where it was asked for by an alias.
    pub id: String,
    /// `loaded`, `not-found`, `masked`, `bad-setting`, ...
    pub load_state: String,
    /// `active`, `inactive`, `failed`, ...
    pub active_state: String,
    /// `running`, `listening`, `auto-restart`, ...
    pub sub_state: String,
}

impl Listed {
    /// Whether the unit runs or is about to.
    #[must_use]
    pub fn is_up(&self) -> bool {
        matches!(ActiveState::parse(&self.active_state), ActiveState::Active | ActiveState::Activating)
    }
}

/// What is done to a unit by a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Job {
    /// Starts it, unless it runs.
    Start,
    /// Stops it, and what requires it.
    Stop,
    /// Stops and starts it, and what requires it.
    Restart,
}

impl Job {
    /// The word for it.
    #[must_use]
    pub fn verb(self) -> &'static str {
        match self {
            Self::Start => "start",
            Self::Stop => "stop",
            Self::Restart => "restart",
        }
    }

    fn method(self) -> &'static str {
        match self {
            Self::Start => "StartUnit",
            Self::Stop => "StopUnit",
            Self::Restart => "RestartUnit",
        }
    }
}

/// Properties of a unit, by name.
#[derive(Debug, Default)]
pub struct Properties(HashMap<String, OwnedVariant>);

impl Properties {
    /// A string; empty if there is none.
    #[must_use]
    pub fn text(&self, name: &str) -> String {
        self.get(name).unwrap_or_default()
    }

    /// A list of strings; empty if there is none.
    #[must_use]
    pub fn list(&self, name: &str) -> Vec<String> {
        self.get(name).unwrap_or_default()
    }

    /// A number.
    #[must_use]
    pub fn number(&self, name: &str) -> Option<u64> {
        self.get(name)
    }

    /// The strings of a list of structures, in their order: `[("Stream", "[::]:80")]` of a socket's `Listen`.
    #[must_use]
    pub fn rows(&self, name: &str) -> Vec<Vec<String>> {
        let Some(Variant::Array(rows)) = self.0.get(name).map(|value| &**value) else { return Vec::new() };
        let strings = |row: &Variant<'_>| {
            if let Variant::Structure(row) = row { texts(row) } else { Vec::new() }
        };
        rows.iter().map(strings).collect()
    }

    fn get<T: TryFrom<OwnedVariant>>(&self, name: &str) -> Option<T> {
        T::try_from(self.0.get(name)?.try_clone().ok()?).ok()
    }
}

fn texts(row: &Structure<'_>) -> Vec<String> {
    let text = |field: &Variant<'_>| <&str>::try_from(field).ok().map(str::to_owned);
    row.fields().iter().filter_map(text).collect()
}

/// A connection to systemd.
#[derive(Debug)]
pub struct Manager {
    conn: Connection,
    bus: Bus,
    reply_timeout: Duration,
    subscribed: bool,
}

impl Manager {
    /// Connects; no call will take longer than `reply_timeout`, but for jobs and [`Self::reload`].
    ///
    /// # Errors
    /// There is no bus, or it does not let us in (result `bus`).
    pub async fn connect(bus: Bus, reply_timeout: Duration) -> Result<Self, Failure> {
        let connecting = bus.builder().build();
        let connected = tokio::time::timeout(reply_timeout, connecting).await;
        let conn = match connected {
            Ok(Ok(conn)) => conn,
            Ok(Err(error)) => return Err(no_bus(&bus, &error)),
            Err(_elapsed) => {
                return Err(Failure::new("bus", format!("{bus} did not answer within {reply_timeout:?}")));
            }
        };
        Ok(Self { conn, bus, reply_timeout, subscribed: false })
    }

    /// Which of systemd's managers it is.
    #[must_use]
    pub fn bus(&self) -> &Bus {
        &self.bus
    }

    /// The units in memory whose names match one of `patterns`, as `glob(7)` has them.
    ///
    /// # Errors
    /// systemd cannot be asked.
    pub async fn matching<S: AsRef<str>>(&self, patterns: &[S]) -> Result<Vec<Listed>, Failure> {
        let no_states: &[&str] = &[];
        let patterns: Vec<&str> = patterns.iter().map(AsRef::as_ref).collect();
        let units: Vec<ListedUnit> = self.ask("ListUnitsByPatterns", &(no_states, patterns)).await?;
        Ok(units.into_iter().map(listed).collect())
    }

    /// The units of these names, in this order.
    ///
    /// # Errors
    /// systemd cannot be asked, or a name is no unit's.
    pub async fn units(&self, names: &[String]) -> Result<Vec<Listed>, Failure> {
        let units: Vec<ListedUnit> = self.ask("ListUnitsByNames", &(names,)).await?;
        Ok(units.into_iter().map(listed).collect())
    }

    /// All properties of `unit` that all units have, and those of its type.
    ///
    /// # Errors
    /// systemd cannot be asked.
    pub async fn properties(&self, unit: &str) -> Result<Properties, Failure> {
        let path = object_path(unit);
        let interface = match unit.rsplit_once('.') {
            Some((_, "socket")) => "org.freedesktop.systemd1.Socket",
            _ => "org.freedesktop.systemd1.Service",
        };
        let common = self.call(&path, PROPERTIES, "GetAll", &("org.freedesktop.systemd1.Unit",));
        let interface = (interface,);
        let own = self.call(&path, PROPERTIES, "GetAll", &interface);
        let (common, own) = tokio::try_join!(common, own)?;
        let mut properties: HashMap<String, OwnedVariant> = self.read(&common)?;
        properties.extend(self.read::<HashMap<String, OwnedVariant>>(&own)?);
        Ok(Properties(properties))
    }

    /// A time of the unit on [`crate::clock`]: one of the properties `...TimestampMonotonic`. None: it never happened.
    ///
    /// # Errors
    /// systemd cannot be asked.
    pub async fn time(&self, unit: &str, property: &str) -> Result<Option<Duration>, Failure> {
        let body = ("org.freedesktop.systemd1.Unit", property);
        let reply = self.call(&object_path(unit), PROPERTIES, "Get", &body).await?;
        let value: OwnedVariant = self.read(&reply)?;
        Ok(u64::try_from(value).ok().filter(|micros| *micros > 0).map(Duration::from_micros))
    }

    /// Puts the links of `[Install]` of `unit` in their places.
    ///
    /// # Errors
    /// systemd refuses.
    pub async fn enable(&self, unit: &str) -> Result<(), Failure> {
        let body = (vec![unit], false, false);
        let _changes: (bool, Vec<LinkChange>) = self.ask("EnableUnitFiles", &body).await?;
        Ok(())
    }

    /// Removes all links to `unit`, those of `/run` if it is so `at_runtime`; says which.
    ///
    /// # Errors
    /// systemd refuses.
    pub async fn disable(&self, unit: &str, at_runtime: bool) -> Result<Vec<PathBuf>, Failure> {
        let body = (vec![unit], at_runtime);
        let changes: Vec<LinkChange> = self.ask("DisableUnitFiles", &body).await?;
        let removed = |(kind, path, _): LinkChange| (kind == "unlink").then(|| path.into());
        Ok(changes.into_iter().filter_map(removed).collect())
    }

    /// Reads all unit files again. It may take as long as a job: systemd gives its generators 90 s.
    ///
    /// # Errors
    /// systemd refuses.
    pub async fn reload(&self) -> Result<(), Failure> {
        let call = self.conn.call_method(Some(SYSTEMD), SYSTEMD_PATH, Some(MANAGER), "Reload", &());
        self.limited(JOB_TIMEOUT, call).await.map(drop)
    }

    /// Forgets that a unit failed.
    ///
    /// # Errors
    /// systemd refuses; not for a unit that is not in memory.
    pub async fn reset_failed(&self, unit: &str) -> Result<(), Failure> {
        match self.call(SYSTEMD_PATH, MANAGER, "ResetFailedUnit", &(unit,)).await {
            Err(failure) if failure.result != "NoSuchUnit" => Err(failure),
            Ok(_) | Err(_) => Ok(()),
        }
    }

    /// Does `job` to `unit` and waits until it is done.
    ///
    /// # Errors
    /// systemd refuses, the job ends with another result than `done` or `skipped`, or takes longer than three minutes.
    pub async fn job(&mut self, job: Job, unit: &str) -> Result<(), Failure> {
        if !self.subscribed {
            let rule = format!("type='signal',sender='{SYSTEMD}',interface='{MANAGER}',member='JobRemoved'");
            let matched =
                self.conn.call_method(Some(DBUS), "/org/freedesktop/DBus", Some(DBUS), "AddMatch", &rule);
            self.limited(self.reply_timeout, matched).await?;
            self.call(SYSTEMD_PATH, MANAGER, "Subscribe", &()).await?;
            self.subscribed = true;
        }
        let verb = job.verb();
        let late = || Failure::new("timeout", format!("cannot {verb} {unit}: no end within {JOB_TIMEOUT:?}"));
        let result =
            tokio::time::timeout(JOB_TIMEOUT, self.follow(job, unit)).await.map_err(|_| late())??;
        match result.as_str() {
            "done" | "skipped" => Ok(()),
            other => Err(Failure::new(other, format!("cannot {verb} {unit}: the job ended as {other}"))),
        }
    }

    async fn follow(&self, job: Job, unit: &str) -> Result<String, Failure> {
        let mut signals = MessageStream::from(&self.conn);
        let body = (unit, "replace");
        let mut call = std::pin::pin!(self.ask::<_, OwnedObjectPath>(job.method(), &body));
        let mut ours: Option<String> = None;
        let mut ended = HashMap::new();
        loop {
            tokio::select! {
                path = &mut call, if ours.is_none() => ours = Some(path?.to_string()),
                message = signals.next() => {
                    let lost = || Failure::new("bus", format!("lost {}", self.bus));
                    let message = message.ok_or_else(lost)?.map_err(|_| lost())?;
                    ended.extend(job_end(&message));
                }
            }
            if let Some(result) = ours.as_ref().and_then(|path| ended.remove(path)) {
                return Ok(result);
            }
        }
    }

    async fn ask<B: Serialize + DynamicType, R: DeserializeOwned + zbus::Type>(
        &self,
        method: &str,
        body: &B,
    ) -> Result<R, Failure> {
        self.read(&self.call(SYSTEMD_PATH, MANAGER, method, body).await?)
    }

    fn read<R: DeserializeOwned + zbus::Type>(&self, reply: &Message) -> Result<R, Failure> {
        let odd = |error| Failure::new("bus", format!("systemd's answer over {} is odd: {error}", self.bus));
        reply.body().deserialize().map_err(odd)
    }

    async fn call<B: Serialize + DynamicType>(
        &self,
        path: &str,
        interface: &str,
        method: &str,
        body: &B,
    ) -> Result<Message, Failure> {
        let call = self.conn.call_method(Some(SYSTEMD), path, Some(interface), method, body);
        self.limited(self.reply_timeout, call).await
    }

    async fn limited(
        &self,
        limit: Duration,
        call: impl Future<Output = zbus::Result<Message>>,
    ) -> Result<Message, Failure> {
        match tokio::time::timeout(limit, call).await {
            Ok(answer) => answer.map_err(|error| self.refused(&error)),
            Err(_elapsed) => {
                Err(Failure::new("bus", format!("systemd did not answer over {} within {limit:?}", self.bus)))
            }
        }
    }

    fn refused(&self, error: &zbus::Error) -> Failure {
        let Some((name, text)) = method_error(error) else { return no_bus(&self.bus, error) };
        let last = name.rsplit('.').next().unwrap_or(&name);
        let text = text.trim_end_matches('.');
        if is_named(error, "org.freedesktop.DBus.Error.ServiceUnknown") {
            return Failure::new("bus", format!("systemd is not on {}: {text}", self.bus));
        }
        Failure::new(last, format!("systemd refuses: {text}"))
    }
}

fn no_bus(bus: &Bus, error: &zbus::Error) -> Failure {
    Failure::new("bus", format!("cannot reach systemd over {bus}: {error}"))
}

/// A change of a link: its kind, its path, where it points.
type LinkChange = (String, String, String);

fn listed(unit: ListedUnit) -> Listed {
    let (id, _, load_state, active_state, sub_state, ..) = unit;
    Listed { id, load_state, active_state, sub_state }
}

/// The path and the result of a job that ended, if that is what the message tells.
fn job_end(message: &Message) -> Option<(String, String)> {
    if message.header().member()?.as_str() != "JobRemoved" {
        return None;
    }
    let (_, path, _, result): (u32, OwnedObjectPath, String, String) = message.body().deserialize().ok()?;
    Some((path.to_string(), result))
}
