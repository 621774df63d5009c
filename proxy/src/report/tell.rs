//! The lines of log that everybody reads: one for each activation, one for each stop, one for each failure.
//!
//! Owns: their words and their fields, which `docs/reference/logs.md` explains. Must never: decide anything.

use std::os::fd::AsFd;
use std::time::Duration;

use rustix::net::sockopt::socket_cookie;
use tracing::{debug, error, info};

use crate::activation::Failure;
use crate::clock::Monotonic;
use crate::config::RunArgs;
use crate::idle::IdlePolicy;
use crate::lifecycle::{Lifecycle, State, Stopping};
use crate::report::text::{elapsed, precise};

/// The state changed from `before`, which lasted for `lasted`, to what it is at `now`. `name`: the backend.
pub fn change(
    run: &RunArgs,
    name: &str,
    lifecycle: &Lifecycle,
    before: &State,
    lasted: Duration,
    now: Monotonic,
) {
    let after = lifecycle.state();
    if std::mem::discriminant(before) == std::mem::discriminant(after) {
        return;
    }
    let latency_usec = u64::try_from(lasted.as_micros()).unwrap_or(u64::MAX);
    if is_over(before, after) {
        let (reason, why) = why_asleep(run, lifecycle, before);
        info!(
            event = "asleep",
            reason,
            latency_usec,
            "{name} is asleep: {why}; stopping took {}",
            precise(lasted)
        );
    }
    match (before, after) {
        (State::Settling(_), State::Awake) => debug!("{name} is in use after all"),
        (_, State::Settling(_)) => debug!("{name} is idle: looking once more"),
        (State::Waking { started_by_us: false, .. }, State::Awake) => {
            debug!("{name} accepts connections again");
        }
        (State::Waking { .. }, State::Awake) => {
            let waiting = waited(lifecycle.held());
            info!(event = "awake", latency_usec, "{name} is awake after {}: {waiting}", precise(lasted));
        }
        (State::Stopping(Stopping::Ours), State::Awake) => debug!("{name} still runs: the stop failed"),
        (_, State::Awake) => info!(event = "awake", "{name} is awake: it was started without a client"),
        (_, State::Waking { started_by_us: true, .. }) => debug!(event = "waking", "waking {name}"),
        (_, State::Waking { .. }) => debug!("{name} accepts no connection: waiting for it"),
        (State::Settling(_) | State::Awake, State::Stopping(_)) => {
            debug!(event = "stopping", "stopping {name}: it was awake for {}", elapsed(lasted));
        }
        (_, State::Stopping(_)) => debug!(event = "stopping", "stopping {name}"),
        (State::Stopping(_), State::Asleep) => {}
        (_, State::Asleep) => {
            info!(event = "asleep", reason = "ended", "{name} is asleep: it ended by itself");
        }
        (_, State::Failed { until, .. }) => {
            let pause = precise(until.saturating_sub(now));
            info!(event = "pause", "next start of {name} not before {pause} have passed");
        }
    }
}

/// A start, a run or a stop of the backend failed. `last`: the last error of a connect to it, if that says more.
pub fn failure(name: &str, failure: &Failure, last: Option<&str>) {
    let reason = &*failure.result;
    if let Some(last) = last {
        error!(event = "failed", reason, "{name}: {failure}; the last try: {last}");
    } else {
        error!(event = "failed", reason, "{name}: {failure}");
    }
}

/// A client was connected to the backend; its bytes travel by `plane`.
pub fn flow_opened(client: impl AsFd, plane: &str) {
    debug!(event = "flow", flow = cookie(client), plane, "a client is connected to the backend");
}

/// The flow of this client is over.
pub fn flow_ended(client: impl AsFd) {
    debug!(event = "flow_end", flow = cookie(client), "a flow is over");
}

/// The kernel's number of a socket, the same as in `ss --extended` (socket(7), `SO_COOKIE`, Linux 4.12).
fn cookie(socket: impl AsFd) -> Option<u64> {
    socket_cookie(socket).ok()
}

/// A stop that is done, also if somebody was held meanwhile and the next start has begun.
fn is_over(before: &State, after: &State) -> bool {
    matches!((before, after), (State::Stopping(_), State::Asleep | State::Waking { .. }))
}

fn why_asleep(run: &RunArgs, lifecycle: &Lifecycle, before: &State) -> (&'static str, String) {
    if matches!(before, State::Stopping(Stopping::Foreign(_))) {
        return ("foreign", "somebody else stopped it".to_owned());
    }
    if run.unit.is_none() && lifecycle.is_exiting() {
        return ("exit", "drowse exits".to_owned());
    }
    let idle_time = precise(run.idle_time);
    match run.idle_policy {
        IdlePolicy::Connections => ("idle", format!("nobody used it for {idle_time}")),
        IdlePolicy::Traffic => ("idle", format!("no byte moved for {idle_time}")),
    }
}

fn waited(clients: u64) -> String {
    match clients {
        0 => "nobody waits any more".to_owned(),
        1 => "1 client waited".to_owned(),
        clients => format!("{clients} clients waited"),
    }
}
