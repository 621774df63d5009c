//! The state in one line of plain words, as `systemctl status` shows it.
//!
//! PURE. Owns: the words.

use std::time::Duration;

use crate::accounting::Totals;
use crate::clock::Monotonic;
use crate::idle::Decision;
use crate::lifecycle::{Lifecycle, State, Stopping};

/// The state of `name` in plain words: `awake: 3 flows`, `waking dice.service (0.4 s), 2 clients wait`.
#[must_use]
pub fn status_line(lifecycle: &Lifecycle, name: &str, totals: &Totals, now: Monotonic) -> String {
    let for_so_long = now.saturating_sub(lifecycle.since());
    let waiting = match lifecycle.held() {
        0 => String::new(),
        1 => ", 1 client waits".to_owned(),
        held => format!(", {held} clients wait"),
    };
    let line = match lifecycle.state() {
        State::Asleep => format!("asleep: the next connection wakes {name}"),
        State::Waking { .. } => format!("waking {name} ({}){waiting}", precise(for_so_long)),
        State::Awake => format!("awake: {}{waiting}{}", flows(totals), idle(lifecycle, totals, now)),
        State::Settling(_) => format!("settling: {}, about to stop {name}", flows(totals)),
        State::Stopping(Stopping::Foreign(_)) => format!("stopping: somebody stops {name}{waiting}"),
        State::Stopping(Stopping::Ours | Stopping::Abandoned(_)) => format!("stopping {name}{waiting}"),
        State::Failed { until, failure } if *until > now => {
            format!("failed: {failure}; next try in {}{waiting}", precise(until.saturating_sub(now)))
        }
        State::Failed { failure, .. } => format!("failed: {failure}; the next connection tries again"),
    };
    if lifecycle.is_draining() { format!("{line}; exiting when all are served") } else { line }
}

/// How long until the line for this state is out of date, if time alone changes it.
#[must_use]
pub fn changes_within(state: &State, now: Monotonic) -> Option<Duration> {
    match state {
        State::Waking { .. } | State::Stopping(_) => Some(Duration::from_secs(1)),
        State::Awake => Some(Duration::from_secs(30)),
        State::Failed { until, .. } if *until > now => Some(until.saturating_sub(now)),
        State::Asleep | State::Settling(_) | State::Failed { .. } => None,
    }
}

fn flows(totals: &Totals) -> String {
    match totals.flows_open + totals.handed_off_open {
        0 => "no flow".to_owned(),
        1 => "1 flow".to_owned(),
        open => format!("{open} flows"),
    }
}

fn idle(lifecycle: &Lifecycle, totals: &Totals, now: Monotonic) -> String {
    match lifecycle.idle(totals, now) {
        Some(Decision::WaitUntil(Monotonic::MAX)) | None => ", never put to sleep".to_owned(),
        Some(Decision::WaitUntil(at)) => format!(", idle in {}", rough(at.saturating_sub(now))),
        Some(Decision::Busy | Decision::LookAt(_) | Decision::Settle) => String::new(),
    }
}

/// Seconds with one decimal.
fn precise(time: Duration) -> String {
    format!("{:.1} s", time.as_secs_f64())
}

/// The largest unit that fits, rounded up: `12 min`, `40 s`, `3 h`.
pub(super) fn rough(time: Duration) -> String {
    match time.as_secs() {
        seconds @ 0..120 => format!("{} s", seconds + u64::from(time.subsec_nanos() > 0)),
        seconds @ 120..7200 => format!("{} min", seconds.div_ceil(60)),
        seconds => format!("{} h", seconds.div_ceil(3600)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::activation::{BackendState, Failure};
    use crate::idle::IdlePolicy;
    use crate::lifecycle::{Event, IdleAction, Ownership, Rules};

    fn rules() -> Rules {
        Rules {
            ownership: Ownership::Managed,
            idle_time: Duration::from_mins(15),
            idle_policy: IdlePolicy::Connections,
            idle_action: IdleAction::Stop,
            exit_idle_time: Duration::MAX,
            start_timeout: Duration::from_secs(90),
            stop_timeout: Duration::from_secs(90),
            drain_time: Duration::from_secs(10),
        }
    }

    #[test]
    fn each_state_is_told_in_plain_words() {
        let (mut totals, second) = (Totals::default(), Duration::from_secs);
        let mut lifecycle = Lifecycle::new(rules(), BackendState::Down, second(0));
        let line =
            |lifecycle: &Lifecycle, totals: &Totals, now| status_line(lifecycle, "dice.service", totals, now);
        assert_eq!(line(&lifecycle, &totals, second(5)), "asleep: the next connection wakes dice.service");
        lifecycle.step(Event::ClientAccepted, &totals, second(10));
        let half = Duration::from_millis(10_400);
        assert_eq!(line(&lifecycle, &totals, half), "waking dice.service (0.4 s), 1 client waits");
        lifecycle.step(Event::Started(Ok(())), &totals, second(11));
        lifecycle.step(Event::BackendReady, &totals, second(11));
        totals.flows_open = 3;
        lifecycle.step(Event::ClientPaired, &totals, second(11));
        assert_eq!(line(&lifecycle, &totals, second(12)), "awake: 3 flows");
        totals.flows_open = 0;
        assert_eq!(line(&lifecycle, &totals, second(11 + 3 * 60)), "awake: no flow, idle in 12 min");
        lifecycle.step(Event::Tick, &totals, second(2000));
        assert_eq!(line(&lifecycle, &totals, second(2000)), "settling: no flow, about to stop dice.service");
        lifecycle.step(Event::Quiet, &totals, second(2000));
        assert_eq!(line(&lifecycle, &totals, second(2000)), "stopping dice.service");
    }

    #[test]
    fn a_failure_says_why_and_when_the_next_try_is() {
        let totals = Totals::default();
        let mut lifecycle = Lifecycle::new(rules(), BackendState::Down, Duration::ZERO);
        lifecycle.step(Event::ClientAccepted, &totals, Duration::ZERO);
        let failure = Failure::new("exit-code", "dice.service exited with status 3");
        lifecycle.step(Event::Started(Err(failure)), &totals, Duration::ZERO);
        let line = |now| status_line(&lifecycle, "dice.service", &totals, now);
        let why = "failed: dice.service exited with status 3 (result exit-code)";
        assert_eq!(line(Duration::ZERO), format!("{why}; next try in 0.2 s"));
        assert_eq!(line(Duration::from_secs(9)), format!("{why}; the next connection tries again"));
        let changes = |now| changes_within(lifecycle.state(), now);
        assert_eq!(changes(Duration::ZERO), Some(Duration::from_millis(250)));
        assert_eq!(changes(Duration::from_secs(9)), None);
    }
}
