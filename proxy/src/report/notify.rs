//! `sd_notify(3)`: what the service manager is told of us.
//!
//! Owns: the messages and their rate. Must never: fail; a manager that does not listen is no reason to stop.

use std::mem::{Discriminant, discriminant};
use std::time::Duration;

use sd_notify::NotifyState;

use crate::clock::Monotonic;
use crate::lifecycle::State;
use crate::report::status_line::changes_within;

/// The shortest time between two status messages while the state's words stay the same kind.
const STATUS_PAUSE: Duration = Duration::from_secs(1);

/// Tells the service manager how we are.
#[derive(Debug, Default)]
pub struct Notifier {
    told: Option<Told>,
}

#[derive(Debug)]
struct Told {
    line: String,
    state: Discriminant<State>,
    at: Monotonic,
}

impl Notifier {
    /// We serve: everything that had to be prepared is prepared.
    pub fn ready(&self) {
        send(&[NotifyState::Ready]);
    }

    /// We are on our way out.
    pub fn stopping(&self) {
        send(&[NotifyState::Stopping]);
    }

    /// We are alive.
    pub fn alive(&self) {
        send(&[NotifyState::Watchdog]);
    }

    /// Tells the status: at once when the state changed, else at most once a second. Returns when to come back.
    pub fn status(
        &mut self,
        state: &State,
        now: Monotonic,
        line: impl FnOnce() -> String,
    ) -> Option<Monotonic> {
        std::env::var_os("NOTIFY_SOCKET")?;
        let told = self.told.as_ref().filter(|told| told.state == discriminant(state));
        if let Some(told) = told
            && now < told.at + STATUS_PAUSE
        {
            return Some(told.at + STATUS_PAUSE);
        }
        let line = line();
        if told.is_none_or(|told| told.line != line) {
            send(&[NotifyState::Status(&line)]);
        }
        self.told = Some(Told { line, state: discriminant(state), at: now });
        changes_within(state).map(|time| now + time)
    }
}

/// How often `WATCHDOG=1` is due: half of what the manager asks for, as `sd_watchdog_enabled(3)` advises.
#[must_use]
pub fn watchdog_period() -> Option<Duration> {
    sd_notify::watchdog_enabled().map(|time| time / 2).filter(|time| !time.is_zero())
}

fn send(states: &[NotifyState]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::debug!(%error, "the service manager does not listen");
    }
}
