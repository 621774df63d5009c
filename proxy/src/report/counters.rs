//! What is counted of one service beside what everybody wants to see: the numbers that only metrics show.
//!
//! PURE. Owns: their names in the JSON, and the words for failures. Must never: read a clock or a map by itself.

use std::collections::BTreeMap;
use std::time::Duration;

use drowse_ebpf::{Listens, Proxied, Service, Steered};
use serde::{Deserialize, Serialize};

use crate::activation::REASONS;
use crate::clock::Monotonic;

/// The word for a failure that is not one of [`REASONS`].
pub const OTHER: &str = "other";

/// What the programs in the kernel counted, at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KernelCounters {
    /// Flows that were handed off.
    pub service: Service,
    /// Packets by public address.
    pub public: Vec<(String, Steered)>,
    /// What the listen hook saw at the backend's port. None: there is no hook.
    pub listens: Option<Listens>,
    /// Flows of the proxy that the kernel moves. None: it moves none.
    pub proxied: Option<Proxied>,
}

/// See the module. All since the start of this drowse, unless said otherwise.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Counters {
    /// Starts of the backend for a client, also those that failed.
    pub wakes_total: u64,
    /// How often the backend was put to sleep.
    pub stops_total: u64,
    /// Failures by their reason, one of [`REASONS`] or [`OTHER`].
    pub failures: BTreeMap<String, u64>,
    /// When a flow last opened, closed or moved a byte, in seconds before this moment. `null`: never.
    pub last_activity_ago_s: Option<f64>,
    /// Of the bytes to the backend those that the kernel counted, of flows that were handed off.
    pub handed_off_bytes_to_backend: u64,
    /// Of the bytes to clients those that the kernel counted.
    pub handed_off_bytes_to_client: u64,
    /// When a flow that was handed off last opened, closed or was seen to have moved a byte, in seconds before this
    /// moment. `null`: never.
    pub handed_off_activity_ago_s: Option<f64>,
    /// Flows that were handed off and that there was no room for in the kernel's table.
    pub uncounted_total: u64,
    /// Packets by public address. Empty without hand-off.
    pub public: Vec<PublicCounters>,
    /// What the listen hook saw. `null`: there is none.
    pub listens: Option<ListenCounters>,
    /// Flows that come to drowse and that the kernel moves (sockmap). `null`: it moves none.
    #[serde(default)]
    pub redirected: Option<RedirectedCounters>,
}

/// Flows that come to drowse, and what the kernel does of them. They are part of the proxied flows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RedirectedCounters {
    /// Open flows that the kernel moves, or has moved.
    pub flows_open: u64,
    /// Since the start of this drowse, open ones included.
    pub flows_total: u64,
    /// Flows that were left to user space, because the kernel does not take their sockets or has no room.
    pub refused_total: u64,
    /// Bytes to the backend that the kernel moved.
    pub redirected_to_backend: u64,
    /// Bytes to clients that the kernel moved.
    pub redirected_to_client: u64,
    /// Bytes to the backend that it passed to drowse, because the backend did not keep up.
    pub passed_to_backend: u64,
    /// Bytes to clients that it passed to drowse, because the client did not keep up.
    pub passed_to_client: u64,
    /// Times that it began to pass and could not say so, because the ring buffer was full.
    pub events_lost_total: u64,
    /// Peers that were let send straight to the other side (sockmap-ends).
    pub peers_total: u64,
}

impl From<Proxied> for RedirectedCounters {
    fn from(proxied: Proxied) -> Self {
        Self {
            flows_open: proxied.flows_open,
            flows_total: proxied.flows_total,
            refused_total: proxied.refused_total,
            redirected_to_backend: proxied.redirected_to_backend,
            redirected_to_client: proxied.redirected_to_client,
            passed_to_backend: proxied.passed_to_backend,
            passed_to_client: proxied.passed_to_client,
            events_lost_total: proxied.events_lost_total,
            peers_total: proxied.peers_total,
        }
    }
}

/// What became of new connections to a public address while hand-off was on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PublicCounters {
    /// The address as packets have it.
    pub address: String,
    /// Packets that were given to the backend's listener.
    pub steered_total: u64,
    /// Those that were left to drowse.
    pub passed_total: u64,
}

/// What the listen hook saw at the backend's port.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ListenCounters {
    /// Sockets that began to listen there, in any network namespace.
    pub listens_total: u64,
    /// Of these, the ones that drowse was not told of, because the ring buffer was full.
    pub events_lost_total: u64,
    /// When the last one began, in seconds before this moment. `null`: none yet.
    pub last_ago_s: Option<f64>,
}

impl Counters {
    /// A failure with the manager's word for it.
    pub fn failed(&mut self, result: &str) {
        let reason = if REASONS.contains(&result) { result } else { OTHER };
        *self.failures.entry(reason.to_owned()).or_default() += 1;
    }

    /// These, with what the kernel counted and when flows were last used, at `now`.
    #[must_use]
    pub fn with(&self, kernel: &KernelCounters, last_activity: Monotonic, now: Monotonic) -> Self {
        let ago_s = |at: Monotonic| (!at.is_zero()).then(|| super::snapshot::seconds(now.saturating_sub(at)));
        let nanos_ago_s = |at_ns: u64| ago_s(Duration::from_nanos(at_ns));
        let KernelCounters { service, public, listens, proxied } = kernel;
        Self {
            last_activity_ago_s: ago_s(last_activity),
            handed_off_bytes_to_backend: service.bytes_to_backend,
            handed_off_bytes_to_client: service.bytes_to_client,
            handed_off_activity_ago_s: nanos_ago_s(service.last_activity_ns),
            uncounted_total: service.uncounted_total,
            public: public
                .iter()
                .map(|(address, steered)| PublicCounters {
                    address: address.clone(),
                    steered_total: steered.steered_total,
                    passed_total: steered.passed_total,
                })
                .collect(),
            listens: listens.map(|listens| ListenCounters {
                listens_total: listens.listens_total,
                events_lost_total: listens.events_lost_total,
                last_ago_s: nanos_ago_s(listens.last_listen_ns),
            }),
            redirected: proxied.map(RedirectedCounters::from),
            ..self.clone()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_that_nobody_knows_makes_no_new_word() {
        let mut counters = Counters::default();
        for result in ["exit-code", "org.example.Strange", "exit-code", "another"] {
            counters.failed(result);
        }
        let expected = [("exit-code".to_owned(), 2), (OTHER.to_owned(), 2)];
        assert_eq!(counters.failures, BTreeMap::from(expected));
    }

    #[test]
    fn what_never_happened_has_no_time() {
        let now = Duration::from_secs(100);
        let service = Service { last_activity_ns: 97_000_000_000, ..Service::default() };
        let kernel =
            KernelCounters { service, listens: Some(Listens::default()), ..KernelCounters::default() };
        let counters = Counters::default().with(&kernel, Duration::ZERO, now);
        assert_eq!((counters.last_activity_ago_s, counters.handed_off_activity_ago_s), (None, Some(3.0)));
        assert_eq!(counters.listens.unwrap().last_ago_s, None);
    }
}
