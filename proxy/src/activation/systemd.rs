//! The driver for a unit of systemd.
//!
//! Owns: starting and stopping the unit through systemd's jobs, and telling what becomes of it. Must never: run
//! `systemctl`, or report an end of a job that systemd did not report.
//!
//! Rests on: a job's end is announced by `JobRemoved` with its result, possibly before `StartUnit` is answered, so
//! signals are read from before the call on; a job of mode `replace` takes the place of a contrary one, which then
//! ends as `canceled`; what `org.freedesktop.systemd1(5)` calls `ActiveState` is the unit's state.

mod link;
pub mod manager;
mod restrictions;
mod unit;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use tokio::sync::broadcast;
use tokio::task::JoinSet;
use zbus::connection;

use self::link::{Event, Shared};
use self::unit::{ActiveState, Unit};
use super::{BackendState, Change, Driver, DriverChange, DriverFuture, Failure, memory};

/// How long systemd may take to answer a call: as long as sd-bus waits by default.
pub const REPLY_TIMEOUT: Duration = Duration::from_secs(25);

/// Where systemd is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Bus {
    /// The system bus: `DBUS_SYSTEM_BUS_ADDRESS`, or `/run/dbus/system_bus_socket`.
    System,
    /// The user's bus: `DBUS_SESSION_BUS_ADDRESS`, or `bus` in `XDG_RUNTIME_DIR`.
    User,
    /// A bus at this D-Bus address, e.g. `unix:path=/run/bus`.
    Address(String),
}

impl Bus {
    fn builder(&self) -> connection::Builder<'_> {
        match self {
            Self::System => connection::Builder::system(),
            Self::User => connection::Builder::session(),
            Self::Address(address) => connection::Builder::address(address.as_str()),
        }
    }
}

impl fmt::Display for Bus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::System => f.write_str("the system bus"),
            Self::User => f.write_str("the user bus"),
            Self::Address(address) => write!(f, "the bus at {address}"),
        }
    }
}

/// Whether `name` can be that of a unit that sleeps and wakes.
///
/// # Errors
/// It cannot, with the next step (result `invalid-name`).
pub fn check_unit_name(name: &str) -> Result<(), Failure> {
    Unit::parse(name, &Bus::System).map(drop)
}

/// Starts and stops one unit of systemd. Its one task ends with it.
#[derive(Debug)]
pub struct SystemdDriver {
    shared: Arc<Shared>,
    events: broadcast::Receiver<Event>,
    /// The last state that `changed` knows.
    seen: ActiveState,
    /// The unit was seen down; the question whether it stays down, and why, is under way.
    asking: Option<Asking>,
    _watch: JoinSet<()>,
}

struct Asking(DriverFuture<Option<Change>>);

impl fmt::Debug for Asking {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Asking")
    }
}

impl SystemdDriver {
    /// Connects to systemd and subscribes to what happens to `unit`. Whether the unit can be started is the
    /// question of [`Driver::state`].
    ///
    /// # Errors
    /// `unit` cannot be the name of a backend (result `invalid-name`), or systemd cannot be reached (`bus`,
    /// `denied`).
    pub async fn connect(unit: &str, bus: Bus) -> Result<Self, Failure> {
        Self::connect_with(unit, bus, REPLY_TIMEOUT).await
    }

    /// The same with a limit of one's own for the time that systemd may take to answer one call, or to come back
    /// when it left the bus.
    ///
    /// # Errors
    /// See [`SystemdDriver::connect`].
    pub async fn connect_with(unit: &str, bus: Bus, reply_timeout: Duration) -> Result<Self, Failure> {
        let unit = Unit::parse(unit, &bus)?;
        let (shared, link) = Shared::connect(unit, bus, reply_timeout).await?;
        let events = shared.subscribe();
        let seen = link.active();
        let mut watch = JoinSet::new();
        watch.spawn(Arc::clone(&shared).watch(link));
        Ok(Self { shared, events, seen, asking: None, _watch: watch })
    }

    /// What a new state of the unit means to the event loop, if anything.
    fn note(&mut self, now: ActiveState) -> Option<Change> {
        let before = std::mem::replace(&mut self.seen, now);
        if now == before {
            return None;
        }
        match now {
            ActiveState::Active => Some(if self.shared.notifies() { Change::Ready } else { Change::Up }),
            // About to be up, perhaps by systemd's own restart of a unit that failed.
            ActiveState::Activating => None,
            ActiveState::Deactivating => Some(Change::GoingDown),
            ActiveState::Inactive | ActiveState::Failed => {
                let shared = Arc::clone(&self.shared);
                self.asking = Some(Asking(Box::pin(async move { confirm_down(&shared).await })));
                None
            }
        }
    }
}

impl Driver for SystemdDriver {
    fn name(&self) -> &str {
        &self.shared.unit.name
    }

    fn state(&mut self) -> DriverFuture<Result<BackendState, Failure>> {
        let shared = Arc::clone(&self.shared);
        Box::pin(async move { state(&shared).await })
    }

    fn start(&mut self) -> DriverFuture<Result<(), Failure>> {
        let shared = Arc::clone(&self.shared);
        Box::pin(async move { start(&shared).await })
    }

    fn stop(&mut self) -> DriverFuture<Result<(), Failure>> {
        let shared = Arc::clone(&self.shared);
        Box::pin(async move { stop(&shared).await })
    }

    fn is_socket_activated(&self) -> DriverFuture<bool> {
        let shared = Arc::clone(&self.shared);
        Box::pin(async move { matches!(shared.active_socket().await, Ok(Some(_))) })
    }

    fn handoff_obstacle(&self) -> DriverFuture<Option<String>> {
        let shared = Arc::clone(&self.shared);
        Box::pin(async move { handoff_obstacle(&shared).await })
    }

    fn memory(&self) -> Option<u64> {
        memory::of_cgroup(&self.shared.cgroup())
    }

    fn changed(&mut self) -> DriverChange<'_> {
        Box::pin(async move {
            loop {
                if let Some(Asking(answer)) = &mut self.asking {
                    let confirmed = answer.await;
                    self.asking = None;
                    if let Some(change) = confirmed {
                        return change;
                    }
                }
                match self.events.recv().await {
                    Ok(Event::Active(now)) => {
                        if let Some(change) = self.note(now) {
                            return change;
                        }
                    }
                    // What a late reader lost is older than what comes next; the last state is never lost.
                    Ok(Event::Job { .. } | Event::Lost | Event::Resync)
                    | Err(broadcast::error::RecvError::Lagged(_)) => {}
                    Err(broadcast::error::RecvError::Closed) => std::future::pending().await,
                }
            }
        })
    }
}

/// Whether the unit is down and stays so. A unit with `Restart=` that ends is announced as `failed` or `inactive` for
/// a moment before it is `activating` again (seen with systemd 252); clients need not hear of that.
async fn confirm_down(shared: &Shared) -> Option<Change> {
    match shared.facts().await.map(|facts| facts.active) {
        Ok(ActiveState::Failed) => Some(Change::Down(Some(shared.why_failed().await))),
        Ok(ActiveState::Inactive) => Some(Change::Down(None)),
        Ok(ActiveState::Active | ActiveState::Activating | ActiveState::Deactivating) => None,
        // Nobody can be asked: what was seen stands.
        Err(failure) => Some(Change::Down(Some(failure))),
    }
}

async fn state(shared: &Shared) -> Result<BackendState, Failure> {
    let facts = shared.facts().await?;
    if facts.load_state == "loaded" {
        return Ok(facts.active.backend_state());
    }
    let error = shared.load_error().await;
    Err(shared.unit.not_loaded(&facts.load_state, &error))
}

async fn start(shared: &Shared) -> Result<(), Failure> {
    let mut events = shared.subscribe();
    if shared.start_limit_hit.load(Relaxed) {
        // A unit that systemd unloaded meanwhile has no limit left to reset.
        match shared.manage("ResetFailedUnit", &(shared.unit.name.as_str(),)).await {
            Err(failure) if failure.result != "not-found" => return Err(failure),
            Ok(()) | Err(_) => shared.start_limit_hit.store(false, Relaxed),
        }
    }
    let job = shared.queue("start", "StartUnit", &mut events).await?;
    match shared.follow(&job, &mut events).await?.as_deref() {
        None | Some("done") => {}
        Some("failed") => return Err(shared.why_failed().await),
        Some(result) => return Err(shared.unit.start_job_failed(result)),
    }
    match shared.facts().await?.active {
        ActiveState::Active | ActiveState::Activating => Ok(()),
        ActiveState::Failed => Err(shared.why_failed().await),
        ActiveState::Inactive | ActiveState::Deactivating => {
            Err(shared.unit.ended_at_once(shared.condition_holds().await))
        }
    }
}

async fn stop(shared: &Shared) -> Result<(), Failure> {
    let mut events = shared.subscribe();
    let job = match shared.queue("stop", "StopUnit", &mut events).await {
        Ok(job) => job,
        // systemd unloads what is down and has nothing to say of it.
        Err(failure) if failure.result == "not-found" => return Ok(()),
        Err(failure) => return Err(failure),
    };
    let result = shared.follow(&job, &mut events).await?;
    loop {
        let active = shared.facts().await?.active;
        if active.is_down() {
            return Ok(());
        }
        if let Some(result) = result.as_deref().filter(|result| *result != "done") {
            return Err(shared.unit.stop_job_failed(result));
        }
        if active != ActiveState::Deactivating {
            // The job is done and the unit up: somebody started it since.
            return Err(shared.unit.stop_job_failed("canceled"));
        }
        shared.wait_for_event(&mut events).await;
    }
}

/// A socket unit that shares the backend's listener, a setting that would apply to the clients, or that nobody can say.
async fn handoff_obstacle(shared: &Shared) -> Option<String> {
    let name = &shared.unit.name;
    if !shared.unit.is_service {
        return Some(format!("{name} groups several units: what they restrict is unknown"));
    }
    // The cgroup comes with it: somebody else may have started the unit.
    let known = shared.facts().await;
    let obstacle = match known.and(shared.active_socket().await) {
        Ok(Some(socket)) => Ok(Some(format!(
            "{socket} holds the backend's listener, too: it would go on taking connections while the backend sleeps"
        ))),
        Ok(None) => shared.restriction().await,
        Err(failure) => Err(failure),
    };
    obstacle.unwrap_or_else(|failure| Some(format!("systemd could not be asked: {}", failure.message)))
}
