//! Idle: counters and the time in, a decision out.
//!
//! PURE. Owns: what "nobody uses it" means. Must never: read a clock or a counter by itself.

use std::time::Duration;

use crate::accounting::Totals;
use crate::clock::Monotonic;

/// What keeps a backend awake.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum IdlePolicy {
    /// An open flow, silent or not.
    Connections,
    /// A byte that moved on any flow; silent flows are closed when the backend is stopped.
    Traffic,
}

/// The shortest time between two looks at the counters of flows that were handed off.
pub const LOOK_PAUSE_MIN: Duration = Duration::from_millis(10);

/// What the idle decision looks at.
#[derive(Clone, Copy, Debug)]
pub struct Observed {
    /// Clients that are accepted and not yet paired.
    pub held: u64,
    /// The service's counters.
    pub totals: Totals,
    /// Nothing before this moment counts: the backend woke, or somebody vetoed.
    pub quiet_from: Monotonic,
}

/// What follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// In use; ask again when something changes.
    Busy,
    /// In use by flows that were handed off, which nobody tells us of: look at the counters again at this moment.
    LookAt(Monotonic),
    /// Nobody uses it; settle at this moment unless something changes.
    WaitUntil(Monotonic),
    /// Nobody has used it for the idle time.
    Settle,
}

/// Decides whether the backend may be put to sleep at `now`.
#[must_use]
pub fn decide(policy: IdlePolicy, idle_time: Duration, seen: &Observed, now: Monotonic) -> Decision {
    let in_use = match policy {
        IdlePolicy::Connections => seen.held + seen.totals.flows_open > 0,
        IdlePolicy::Traffic => seen.held > 0,
    };
    if in_use {
        return Decision::Busy;
    }
    if seen.totals.handed_off_open > 0 && policy == IdlePolicy::Connections {
        // Whoever closes before that keeps the backend awake for longer.
        return Decision::LookAt(now.saturating_add(idle_time.max(LOOK_PAUSE_MIN)));
    }
    let settle_at = seen.quiet_from.max(seen.totals.last_activity).saturating_add(idle_time);
    if settle_at <= now { Decision::Settle } else { Decision::WaitUntil(settle_at) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn seen(held: u64, flows_open: u64, last_activity: u64, quiet_from: u64) -> Observed {
        let totals = Totals { flows_open, last_activity: s(last_activity), ..Totals::default() };
        Observed { held, totals, quiet_from: s(quiet_from) }
    }

    #[test]
    fn an_open_flow_is_use_under_connections_only() {
        let silent = seen(0, 1, 5, 0);
        assert_eq!(decide(IdlePolicy::Connections, s(10), &silent, s(100)), Decision::Busy);
        assert_eq!(decide(IdlePolicy::Traffic, s(10), &silent, s(100)), Decision::Settle);
    }

    #[test]
    fn a_handed_off_flow_is_looked_at_within_the_idle_time() {
        let totals = Totals { handed_off_open: 1, last_activity: s(5), ..Totals::default() };
        let seen = Observed { held: 0, totals, quiet_from: s(0) };
        assert_eq!(decide(IdlePolicy::Connections, s(10), &seen, s(100)), Decision::LookAt(s(110)));
        assert_eq!(decide(IdlePolicy::Traffic, s(10), &seen, s(100)), Decision::Settle);
        let soon = decide(IdlePolicy::Connections, s(0), &seen, s(100));
        assert_eq!(soon, Decision::LookAt(s(100) + LOOK_PAUSE_MIN));
    }

    #[test]
    fn a_held_client_is_use_under_both() {
        for policy in [IdlePolicy::Connections, IdlePolicy::Traffic] {
            assert_eq!(decide(policy, s(10), &seen(1, 0, 5, 0), s(100)), Decision::Busy);
        }
    }

    #[test]
    fn the_idle_time_runs_from_the_latest_of_activity_wake_up_and_veto() {
        for policy in [IdlePolicy::Connections, IdlePolicy::Traffic] {
            assert_eq!(decide(policy, s(10), &seen(0, 0, 5, 0), s(14)), Decision::WaitUntil(s(15)));
            assert_eq!(decide(policy, s(10), &seen(0, 0, 5, 7), s(14)), Decision::WaitUntil(s(17)));
            assert_eq!(decide(policy, s(10), &seen(0, 0, 5, 0), s(15)), Decision::Settle);
        }
    }

    #[test]
    fn an_infinite_idle_time_never_settles() {
        let decision = decide(IdlePolicy::Connections, Duration::MAX, &seen(0, 0, 5, 0), s(1 << 40));
        assert_eq!(decision, Decision::WaitUntil(Duration::MAX));
    }
}
