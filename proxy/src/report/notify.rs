//! `sd_notify(3)`: what the service manager is told of us.
//!
//! Owns: the messages and their rate. Must never: fail or block; a manager that does not listen is no reason to stop.
//! The socket is our own because libraries for it block when the manager's queue is full (ten messages by default,
//! `net.unix.max_dgram_qlen`) and do not know abstract addresses.

use std::mem::{Discriminant, discriminant};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

use crate::clock::{self, Monotonic};
use crate::lifecycle::State;
use crate::report::status_line::changes_within;

/// The shortest time between two status messages while the state's words stay the same kind.
const STATUS_PAUSE: Duration = Duration::from_secs(1);
/// How soon a `READY=1` that was not taken is said again.
const READY_PAUSE: Duration = Duration::from_millis(50);

/// Tells the service manager how we are.
#[derive(Debug)]
pub struct Notifier {
    /// `None` without a service manager that wants to know.
    socket: Option<UnixDatagram>,
    /// `READY=1` must not be missed, and was not taken yet.
    ready_is_due: bool,
    told: Option<Told>,
}

#[derive(Debug)]
struct Told {
    line: String,
    state: Discriminant<State>,
    at: Monotonic,
}

impl Notifier {
    /// A notifier for the manager that `NOTIFY_SOCKET` names.
    #[must_use]
    pub fn from_environment() -> Self {
        let socket = std::env::var("NOTIFY_SOCKET").ok().and_then(|address| match connect(&address) {
            Ok(socket) => Some(socket),
            Err(error) => {
                tracing::warn!("the service manager cannot be notified at {address}: {error}");
                None
            }
        });
        Self { socket, ready_is_due: false, told: None }
    }

    /// We serve: everything that had to be prepared is prepared. What the manager does not take now is said again
    /// with the status.
    pub fn ready(&mut self) {
        self.ready_is_due = !self.send("READY=1");
    }

    /// We look around anew; [`Notifier::ready`] follows. systemd 253 and later wants to know since when.
    pub fn reloading(&self) {
        let now_us = clock::now().as_micros();
        self.send(&format!("RELOADING=1\nMONOTONIC_USEC={now_us}"));
    }

    /// We are on our way out.
    pub fn stopping(&self) {
        self.send("STOPPING=1");
    }

    /// We are alive.
    pub fn alive(&self) {
        self.send("WATCHDOG=1");
    }

    /// Tells the status: at once when the state changed, else at most once a second. Returns when to come back.
    pub fn status(
        &mut self,
        state: &State,
        now: Monotonic,
        line: impl FnOnce() -> String,
    ) -> Option<Monotonic> {
        self.socket.as_ref()?;
        if self.ready_is_due {
            self.ready();
            if self.ready_is_due {
                return Some(now + READY_PAUSE);
            }
        }
        let told = self.told.as_ref().filter(|told| told.state == discriminant(state));
        if let Some(told) = told
            && now < told.at + STATUS_PAUSE
        {
            return Some(told.at + STATUS_PAUSE);
        }
        let line = line();
        let is_news = told.is_none_or(|told| told.line != line);
        if is_news && !self.send(&format!("STATUS={line}")) {
            return Some(now + STATUS_PAUSE);
        }
        self.told = Some(Told { line, state: discriminant(state), at: now });
        changes_within(state, now).map(|time| now + time)
    }

    /// Sends what the manager can miss. Returns whether it was taken.
    fn send(&self, message: &str) -> bool {
        let Some(socket) = &self.socket else { return false };
        match socket.send(message.as_bytes()) {
            Ok(_) => true,
            Err(error) => {
                tracing::debug!("the service manager does not take {message:?}: {error}");
                false
            }
        }
    }
}

/// How often `WATCHDOG=1` is due: half of what the manager asks for, as `sd_watchdog_enabled(3)` advises.
#[must_use]
pub fn watchdog_period() -> Option<Duration> {
    sd_notify::watchdog_enabled().map(|time| time / 2).filter(|time| !time.is_zero())
}

/// A socket to the manager; a leading `@` is an abstract name.
fn connect(address: &str) -> std::io::Result<UnixDatagram> {
    let socket = UnixDatagram::unbound()?;
    match address.strip_prefix('@') {
        Some(name) => socket.connect_addr(&SocketAddr::from_abstract_name(name)?)?,
        None => socket.connect(address)?,
    }
    socket.set_nonblocking(true)?;
    Ok(socket)
}
