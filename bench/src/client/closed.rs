//! A closed loop of requests: each connection sends its next request when the answer to the last one has arrived, so
//! latencies are those of an unhurried client, not those of a fixed arrival rate ([`crate::client::paced`]).

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use crate::client::echo::EchoFlows;
use crate::client::load::LoadResult;
use crate::client::{ANSWER_WITHIN, histogram, per_second};
use crate::wire::Pattern;

/// A closed loop of requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RequestLoad {
    /// Connections, each with one request on its way at a time.
    pub connections: usize,
    /// Bytes of a request and of its answer.
    pub request_len: u64,
    /// Time before anything counts.
    pub warm_up_time: Duration,
    /// Time that counts: no request is sent after it, and the answers still on their way then count, too.
    pub measured_time: Duration,
}

impl RequestLoad {
    /// Runs the load against `address`. The rate is from the end of the warm-up until the last answer; a latency is
    /// from sending a request until its whole answer was there.
    ///
    /// # Errors
    /// When a connection fails, stalls, or brings a wrong answer.
    pub fn run(&self, address: SocketAddr, pattern: &Pattern) -> Result<LoadResult> {
        ensure!(self.request_len > 0 && self.connections > 0, "a load has connections and bytes");
        let mut flows = EchoFlows::open(address, pattern, self.connections)?;
        let mut latency = histogram()?;
        let mut requests = 0;
        let counts_from = drowse::clock::now() + self.warm_up_time;
        let ends_at = counts_from + self.measured_time;
        let mut sent_at = Vec::with_capacity(self.connections);
        for index in 0..self.connections {
            sent_at.push(Some(drowse::clock::now()));
            flows.ask(index, self.request_len)?;
        }
        let mut on_their_way = self.connections;
        let mut last_answer_at = counts_from;
        while on_their_way > 0 {
            let changed = flows.turn(ANSWER_WITHIN, |index, flow| {
                let on_its_way = sent_at.get_mut(index).context("index a connection")?;
                let Some(sent_at) = on_its_way.take_if(|_| flow.is_answered()) else { return Ok(()) };
                requests += 1;
                let now = drowse::clock::now();
                last_answer_at = now;
                if now >= counts_from {
                    latency.saturating_record(drowse::clock::as_nanos(now.saturating_sub(sent_at)));
                }
                if now >= ends_at {
                    on_their_way -= 1;
                    return Ok(());
                }
                *on_its_way = Some(now);
                flow.ask(pattern, self.request_len)
            })?;
            ensure!(changed > 0, "no answer for {ANSWER_WITHIN:?} on any of {on_their_way} connections");
        }
        ensure!(!latency.is_empty(), "no answer arrived in the measured time");
        Ok(LoadResult {
            per_second: per_second(latency.len(), last_answer_at.saturating_sub(counts_from)),
            requests,
            bytes: 2 * requests * self.request_len,
            latency: Some(latency),
            latency_since_sent: None,
            send_delay: None,
        })
    }
}
