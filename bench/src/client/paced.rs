//! An open loop of requests: each is sent when it is due, whatever is still on its way, and its latency counts from
//! the moment at which it was due. A peer that stalls shows in every request that was due meanwhile, which a closed
//! loop would leave out ("coordinated omission"). Counted from the moment at which a request was really sent, it still does;
//! only the client's own lateness is not in it, whoever kept the client from its processor.

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
    /// When each request was given to its socket, whether that had room or not.
    sent_at: Vec<Duration>,
    /// Of each connection.
    answered_each: Vec<u64>,
    answered: u64,
    last_answer_at: Duration,
    latency: Histogram<u64>,
    latency_since_sent: Histogram<u64>,
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
            latency_since_sent: Some(progress.latency_since_sent),
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
            sent_at: Vec::with_capacity(usize::try_from(end).context("number the requests")?),
            answered_each: vec![0; self.connections],
            answered: 0,
            last_answer_at: starts_at,
            latency: histogram()?,
            latency_since_sent: histogram()?,
            send_delay: histogram()?,
        })
    }
}

impl Progress {
    fn sent(&self) -> u64 {
        self.sent_at.len() as u64
    }

    /// Until when to wait for answers; an error when none may be hoped for.
    fn wait_until(&self, now: Duration) -> Result<Duration> {
        let sent = self.sent();
        let on_their_way = sent - self.answered;
        let last_due_at = self.schedule.due_at(sent.saturating_sub(1));
        let answer_until = self.last_answer_at.max(self.schedule.starts_at) + ANSWER_WITHIN;
        ensure!(
            on_their_way == 0 || now < answer_until,
            "no answer for {ANSWER_WITHIN:?} to any of {on_their_way} requests"
        );
        if sent < self.end {
            return Ok(self.schedule.due_at(sent));
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
            let (now, request) = (drowse::clock::now(), self.sent());
            let due_at = self.schedule.due_at(request);
            if request >= self.end || now < due_at {
                break;
            }
            let connection = request % self.answered_each.len() as u64;
            ask(usize::try_from(connection).context("number a connection")?)?;
            if request >= self.first_counted {
                self.send_delay.saturating_record(drowse::clock::as_nanos(now.saturating_sub(due_at)));
            }
            self.sent_at.push(now);
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
                let sent_at = self.sent_at.get(usize::try_from(request).context("number a request")?);
                let since = |at| drowse::clock::as_nanos(self.last_answer_at.saturating_sub(at));
                self.latency.saturating_record(since(self.schedule.due_at(request)));
                self.latency_since_sent.saturating_record(since(*sent_at.context("find a request")?));
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
    fn a_client_that_is_late_itself_is_in_one_latency_and_not_in_the_other() {
        let late = Duration::from_secs(3);
        let load = PacedLoad {
            connections: 2,
            request_len: 1,
            requests_per_second: 10,
            warm_up_time: Duration::ZERO,
            measured_time: Duration::from_millis(200),
        };
        let mut progress = load.start().unwrap();
        progress.schedule.starts_at = progress.schedule.starts_at.checked_sub(late).unwrap();
        let mut asked = Vec::new();
        let mut ask = |connection| {
            asked.push(connection);
            Ok(())
        };
        progress.send_due(&mut ask).unwrap();
        assert_eq!((asked, progress.sent()), (vec![0, 1], 2));
        for connection in [1, 0] {
            progress.answers(connection, 1).unwrap();
        }
        let late_ns = u64::try_from(late.as_nanos()).unwrap();
        // The second one is due a tenth of a second later.
        for histogram in [&progress.latency, &progress.send_delay] {
            assert!(histogram.len() == 2 && histogram.min() > late_ns * 9 / 10, "{}", histogram.min());
        }
        let since_sent = &progress.latency_since_sent;
        assert!(since_sent.len() == 2 && since_sent.max() < late_ns / 2, "{}", since_sent.max());
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
