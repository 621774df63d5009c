//! An open loop of requests: each is sent when it is due, whatever is still on its way, and its latency counts from
//! the moment at which it was due. A peer that stalls shows in every request that was due meanwhile, which a closed
//! loop would leave out ("coordinated omission").

use std::net::SocketAddr;
use std::num::NonZeroU64;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use hdrhistogram::Histogram;
use rustix::thread::set_current_timer_slack;
use serde::{Deserialize, Serialize};

use crate::client::echo::EchoFlows;
use crate::client::load::LoadResult;
use crate::client::{ANSWER_WITHIN, histogram, per_second};
use crate::process::readable_within;
use crate::wire::Pattern;

/// Requests that are sent without a look at the answers, after this process itself came late.
const BURST_MAX: usize = 64;
/// How long after the last request a slow peer may still answer.
const DRAINED_WITHIN: Duration = Duration::from_secs(30);

/// Requests at a fixed rate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PacedLoad {
    /// Connections, which take turns.
    pub connections: usize,
    /// Bytes of a request and of its answer.
    pub request_len: u64,
    /// Requests due in each second, over all connections.
    pub requests_per_second: u32,
    /// Time before anything counts.
    pub warm_up_time: Duration,
    /// Requests due in this time count.
    pub measured_time: Duration,
}

/// When each request is due.
#[derive(Debug, Clone, Copy)]
struct Schedule {
    starts_at: Duration,
    requests_per_second: u32,
}

impl Schedule {
    fn due_at(&self, request: u64) -> Duration {
        let rate = u64::from(self.requests_per_second);
        let part = Duration::from_nanos(request % rate * 1_000_000_000 / rate);
        self.starts_at + Duration::from_secs(request / rate) + part
    }

    /// How many are due within `time`.
    fn within(&self, time: Duration) -> u64 {
        u64::try_from(time.as_nanos() * u128::from(self.requests_per_second) / 1_000_000_000)
            .unwrap_or(u64::MAX)
    }
}

/// A load on its way.
struct Progress {
    schedule: Schedule,
    /// The first request that counts, and the one after the last.
    first_counted: u64,
    end: u64,
    sent: u64,
    /// Of each connection.
    answered_each: Vec<u64>,
    answered: u64,
    last_answer_at: Duration,
    latency: Histogram<u64>,
    send_delay: Histogram<u64>,
}

impl PacedLoad {
    /// Runs the load against `address`. The rate is that of the answers that count, until the last of them: it falls
    /// short of the wanted one when the peer cannot keep up.
    ///
    /// # Errors
    /// When a connection fails, stalls, or brings a wrong answer.
    pub fn run(&self, address: SocketAddr, pattern: &Pattern) -> Result<LoadResult> {
        self.run_over(&mut EchoFlows::open(address, pattern, self.connections)?)
    }

    /// As [`PacedLoad::run`], over connections that are open already, as many as the load asks for.
    ///
    /// # Errors
    /// When a connection stalls, or brings a wrong answer.
    pub fn run_over(&self, flows: &mut EchoFlows<'_>) -> Result<LoadResult> {
        // The kernel wakes a thread up to 50 microseconds late unless told that this matters (PR_SET_TIMERSLACK).
        set_current_timer_slack(Some(NonZeroU64::MIN)).context("ask for exact timers")?;
        let outcome = self.send_and_receive(flows);
        set_current_timer_slack(None).context("go back to usual timers")?;
        outcome
    }

    fn send_and_receive(&self, flows: &mut EchoFlows<'_>) -> Result<LoadResult> {
        let mut progress = self.start()?;
        while progress.answered < progress.end {
            let now = drowse::clock::now();
            let wait_until = progress.wait_until(now)?;
            if readable_within(&*flows, wait_until.saturating_sub(now))? {
                flows.turn(Duration::ZERO, |index, flow| {
                    progress.answers(index, flow.received() / self.request_len)
                })?;
            }
            progress.send_due(|connection| flows.ask(connection, self.request_len))?;
        }
        let counts_from = progress.schedule.due_at(progress.first_counted);
        let time = progress.last_answer_at.saturating_sub(counts_from).max(self.measured_time);
        Ok(LoadResult {
            per_second: per_second(progress.latency.len(), time),
            requests: progress.end,
            bytes: 2 * progress.end * self.request_len,
            latency: Some(progress.latency),
            send_delay: Some(progress.send_delay),
        })
    }

    fn start(&self) -> Result<Progress> {
        ensure!(
            self.request_len > 0 && self.connections > 0 && self.requests_per_second > 0,
            "a load has connections, bytes and a rate"
        );
        let starts_at = drowse::clock::now();
        let schedule = Schedule { starts_at, requests_per_second: self.requests_per_second };
        let end = schedule.within(self.warm_up_time + self.measured_time);
        let first_counted = schedule.within(self.warm_up_time);
        ensure!(first_counted < end, "no request is due in the measured time");
        Ok(Progress {
            schedule,
            first_counted,
            end,
            sent: 0,
            answered_each: vec![0; self.connections],
            answered: 0,
            last_answer_at: starts_at,
            latency: histogram()?,
            send_delay: histogram()?,
        })
    }
}

impl Progress {
    /// Until when to wait for answers; an error when none may be hoped for.
    fn wait_until(&self, now: Duration) -> Result<Duration> {
        let on_their_way = self.sent - self.answered;
        let last_due_at = self.schedule.due_at(self.sent.saturating_sub(1));
        let answer_until = self.last_answer_at.max(self.schedule.starts_at) + ANSWER_WITHIN;
        ensure!(
            on_their_way == 0 || now < answer_until,
            "no answer for {ANSWER_WITHIN:?} to any of {on_their_way} requests"
        );
        if self.sent < self.end {
            return Ok(self.schedule.due_at(self.sent));
        }
        ensure!(
            now < last_due_at + DRAINED_WITHIN,
            "{on_their_way} requests had no answer {DRAINED_WITHIN:?} after the last one"
        );
        Ok(answer_until)
    }

    /// Sends what is due.
    fn send_due(&mut self, mut ask: impl FnMut(usize) -> Result<()>) -> Result<()> {
        for _ in 0..BURST_MAX {
            let now = drowse::clock::now();
            let due_at = self.schedule.due_at(self.sent);
            if self.sent >= self.end || now < due_at {
                break;
            }
            let connection = self.sent % self.answered_each.len() as u64;
            ask(usize::try_from(connection).context("number a connection")?)?;
            if self.sent >= self.first_counted {
                self.send_delay.saturating_record(drowse::clock::as_nanos(now.saturating_sub(due_at)));
            }
            self.sent += 1;
        }
        Ok(())
    }

    /// Takes note that `answered` requests of a connection have their answers.
    fn answers(&mut self, connection: usize, answered: u64) -> Result<()> {
        let connections = self.answered_each.len() as u64;
        let before = self.answered_each.get_mut(connection).context("index a connection")?;
        let new = *before..answered;
        *before = answered;
        if new.is_empty() {
            return Ok(());
        }
        self.last_answer_at = drowse::clock::now();
        self.answered += new.end - new.start;
        for turn in new {
            let request = turn * connections + connection as u64;
            if request >= self.first_counted {
                let latency = self.last_answer_at.saturating_sub(self.schedule.due_at(request));
                self.latency.saturating_record(drowse::clock::as_nanos(latency));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_due_at_even_distances_for_hours() {
        let schedule = Schedule { starts_at: Duration::from_secs(5), requests_per_second: 20_000 };
        assert_eq!(schedule.due_at(0), Duration::from_secs(5));
        assert_eq!(schedule.due_at(1), Duration::from_secs(5) + Duration::from_micros(50));
        assert_eq!(schedule.due_at(20_000 * 3600 + 1), Duration::from_secs(3605) + Duration::from_micros(50));
        assert_eq!(schedule.within(Duration::from_millis(800)), 16_000);
    }

    #[test]
    fn a_load_without_a_counted_request_is_refused() {
        let load = PacedLoad {
            connections: 1,
            request_len: 1,
            requests_per_second: 10,
            warm_up_time: Duration::ZERO,
            measured_time: Duration::from_millis(99),
        };
        assert!(load.start().is_err());
        assert_eq!(PacedLoad { measured_time: Duration::from_millis(100), ..load }.start().unwrap().end, 1);
    }
}
