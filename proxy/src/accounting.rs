//! Counters of one service: what the idle decision, the status and the metrics read.
//!
//! Owns: the numbers. Must never: decide anything, or be a lock on the path of a byte. Each forwarding worker
//! writes a cache line of its own; readers add the lines up.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use tokio::sync::Notify;

use crate::clock::{Monotonic, as_nanos};

/// The counters of one worker. Only that worker writes; anybody reads.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct Counters {
    flows_opened: AtomicU64,
    flows_closed: AtomicU64,
    bytes_to_backend: AtomicU64,
    bytes_to_client: AtomicU64,
    last_activity_ns: AtomicU64,
}

impl Counters {
    /// A flow was taken over by this worker at `now`.
    pub fn opened(&self, now: Monotonic) {
        self.flows_opened.fetch_add(1, Relaxed);
        self.touch(now);
    }

    /// A flow of this worker ended at `now`.
    pub fn closed(&self, now: Monotonic) {
        self.flows_closed.fetch_add(1, Relaxed);
        self.touch(now);
    }

    /// `bytes` were delivered to the backend at `now`.
    pub fn to_backend(&self, bytes: usize, now: Monotonic) {
        self.bytes_to_backend.fetch_add(bytes as u64, Relaxed);
        self.touch(now);
    }

    /// `bytes` were delivered to the client at `now`.
    pub fn to_client(&self, bytes: usize, now: Monotonic) {
        self.bytes_to_client.fetch_add(bytes as u64, Relaxed);
        self.touch(now);
    }

    fn touch(&self, now: Monotonic) {
        self.last_activity_ns.store(as_nanos(now), Relaxed);
    }
}

/// All counters of one service.
#[derive(Debug)]
pub struct Accounting {
    workers: Vec<Counters>,
    /// Wakes the event loop after one or more flows closed.
    pub flows_closed: Notify,
}

/// The counters of a service, added up at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Flows since the start.
    pub flows_total: u64,
    /// Flows that are open now.
    pub flows_open: u64,
    /// Bytes from clients that reached the backend's socket.
    pub bytes_to_backend: u64,
    /// Bytes from the backend that reached the clients' sockets.
    pub bytes_to_client: u64,
    /// The last time a flow opened, closed or moved a byte. Zero if none ever did.
    pub last_activity: Monotonic,
}

impl Accounting {
    /// Counters for `workers` forwarding workers.
    #[must_use]
    pub fn new(workers: usize) -> Arc<Self> {
        let workers = std::iter::repeat_with(Counters::default).take(workers.max(1)).collect();
        Arc::new(Self { workers, flows_closed: Notify::new() })
    }

    /// The counters of worker `index`, if there is such a worker.
    #[must_use]
    pub fn worker(&self, index: usize) -> Option<&Counters> {
        self.workers.get(index)
    }

    /// All workers' counters, added up. Closed flows are read first, so that an open flow is never missed.
    #[must_use]
    pub fn totals(&self) -> Totals {
        let sum = |field: fn(&Counters) -> &AtomicU64| -> u64 {
            self.workers.iter().map(|counters| field(counters).load(Relaxed)).sum()
        };
        let closed = sum(|counters| &counters.flows_closed);
        let flows_total = sum(|counters| &counters.flows_opened);
        let last = self.workers.iter().map(|counters| counters.last_activity_ns.load(Relaxed)).max();
        Totals {
            flows_total,
            flows_open: flows_total.saturating_sub(closed),
            bytes_to_backend: sum(|counters| &counters.bytes_to_backend),
            bytes_to_client: sum(|counters| &counters.bytes_to_client),
            last_activity: Duration::from_nanos(last.unwrap_or(0)),
        }
    }
}
