//! The driver: how the backend is started and stopped, and how we hear what becomes of it.
//!
//! Owns: the trait and the failure type. Must never: decide when to start or stop; `lifecycle` does.

use std::fmt;
use std::future::Future;
use std::pin::Pin;

pub mod exec;
pub mod memory;
pub mod systemd;

/// A future that a driver returns: it owns what it needs and may run beside any other.
pub type DriverFuture<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// Starts and stops one backend.
///
/// At most one `start` or `stop` runs at a time; the event loop sees to it.
pub trait Driver: Send {
    /// What is started, as people call it: `dice.service`, `python3`.
    fn name(&self) -> &str;

    /// The backend's state when the proxy starts.
    ///
    /// # Errors
    /// The backend can never be started (no such unit, masked, no such program), or nobody can be asked.
    fn state(&mut self) -> DriverFuture<Result<BackendState, Failure>>;

    /// Starts the backend; one that runs already is left as it is. Ends when the start job is done (systemd: the job's result; exec: the child runs),
    /// which does not mean that the backend accepts connections. The future may be dropped: a `stop` follows.
    ///
    /// # Errors
    /// The job failed, with the manager's own result.
    fn start(&mut self) -> DriverFuture<Result<(), Failure>>;

    /// Stops the backend. Ends when it is really gone: the job done and the unit inactive, or the process group
    /// empty. Stopping a backend that is not running succeeds.
    ///
    /// # Errors
    /// It could not be stopped; it may still run.
    fn stop(&mut self) -> DriverFuture<Result<(), Failure>>;

    /// Whether a socket unit of the backend's own listens for it while it is not running, so that somebody at its
    /// address is no stranger.
    fn is_socket_activated(&self) -> DriverFuture<bool>;

    /// Why the clients must not be handed to the backend itself: a reason in one line for people, or nothing that
    /// would be against it. Asked while the backend is up: its start may bring a socket unit of its own with it.
    fn handoff_obstacle(&self) -> DriverFuture<Option<String>>;

    /// How much memory the backend uses now, in bytes; nothing if that is unknown. Cheap, and known once it is up and
    /// [`Driver::state`], [`Driver::start`] or [`Driver::handoff_obstacle`] has been answered since.
    fn memory(&self) -> Option<u64>;

    /// The next change that the backend made by itself or that somebody else made. Pending for ever when there
    /// is none. Cancel safe. A change that our own `start` or `stop` made may be reported too.
    fn changed(&mut self) -> DriverChange<'_>;
}

/// The future of [`Driver::changed`].
pub type DriverChange<'a> = Pin<Box<dyn Future<Output = Change> + Send + 'a>>;

/// What the manager says of the backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BackendState {
    /// Not running. systemd: `inactive`, `failed`.
    Down,
    /// Running or about to. systemd: `active`, `reloading`, `activating`.
    Up,
    /// On its way down. systemd: `deactivating`.
    GoingDown,
}

/// The backend's state changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// The backend runs (systemd: `ActiveState=active`).
    Up,
    /// The backend itself said `READY=1` (systemd: a `Type=notify` unit became active).
    Ready,
    /// The backend is being stopped by somebody.
    GoingDown,
    /// The backend is gone; with the reason when it was no clean end.
    Down(Option<Failure>),
}

/// The words of [`Failure::result`] that metrics tell apart: systemd's results of services and jobs (systemd.service(5),
/// org.freedesktop.systemd1(5)), load states, and ours. Whatever a later systemd adds counts as another.
pub const REASONS: [&str; 35] = [
    "address-in-use",
    "assert",
    "bad-setting",
    "bus",
    "canceled",
    "collected",
    "condition",
    "core-dump",
    "denied",
    "dependency",
    "ended",
    "error",
    "exec",
    "exec-condition",
    "exit-code",
    "failed",
    "frozen",
    "invalid",
    "invalid-name",
    "masked",
    "not-found",
    "once",
    "oom-kill",
    "protocol",
    "resources",
    "signal",
    "skipped",
    "start-limit-hit",
    "start-timeout",
    "stop-timeout",
    "success",
    "timeout",
    "unsupported",
    "wait",
    "watchdog",
];

/// Why a start or a stop failed, for branching and for one line of log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// The manager's own word: systemd's `Result=` (`exit-code`, `timeout`, `start-limit-hit`, ...) or job result
    /// (`dependency`, `canceled`, ...), or ours (`not-found`, `masked`, `denied`, `bus`, `address-in-use`,
    /// `start-timeout`).
    pub result: String,
    /// What happened and what to do, in one line.
    pub message: String,
}

impl Failure {
    /// A failure with the manager's word for it and a line for people.
    pub fn new(result: impl Into<String>, message: impl Into<String>) -> Self {
        Self { result: result.into(), message: message.into() }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (result {})", self.message, self.result)
    }
}

impl std::error::Error for Failure {}
