//! Counters of one service: what the idle decision, the status and the metrics read.
//!
//! Owns: the numbers. Must never: decide anything, or be a lock on the path of a byte. Each forwarding worker
//! writes a cache line of its own; readers add the lines up.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed, Ordering::SeqCst};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use drowse_ebpf::{Proxied, Service};
use tokio::sync::Notify;

use crate::clock::{Monotonic, as_nanos};
use crate::plane::sockmap;

/// The counters of one worker, which alone writes them, but for `flows_opened`; anybody reads.
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
        self.flows_opened.fetch_add(1, SeqCst);
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
    /// The event loop is woken when a flow closes and at most so many are left. Waking it for each costs a switch of
    /// threads per connection.
    wake_at: AtomicU64,
    flows_closed: Notify,
    /// What the kernel moves of the proxied flows, if it does.
    redirected: OnceLock<Arc<sockmap::Counters>>,
}

/// The counters of a service, added up at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Flows through the proxy since the start.
    pub flows_total: u64,
    /// Flows through the proxy that are open now.
    pub flows_open: u64,
    /// Flows that were handed off, ever.
    pub handed_off_total: u64,
    /// Flows that were handed off and are open now.
    pub handed_off_open: u64,
    /// Bytes from clients that reached the backend's socket.
    pub bytes_to_backend: u64,
    /// Bytes from the backend that reached the clients' sockets.
    pub bytes_to_client: u64,
    /// The last time a flow opened, closed or moved a byte. Zero if none ever did.
    pub last_activity: Monotonic,
    /// The same of the flows that were handed off, as far as the kernel has looked.
    pub handed_off_activity: Monotonic,
}

impl Totals {
    /// With the flows that the kernel counted.
    #[must_use]
    pub fn with_handed_off(self, service: &Service) -> Self {
        let handed_off_activity = Duration::from_nanos(service.last_activity_ns);
        Self {
            handed_off_total: service.flows_total,
            handed_off_open: service.flows_open,
            bytes_to_backend: self.bytes_to_backend + service.bytes_to_backend,
            bytes_to_client: self.bytes_to_client + service.bytes_to_client,
            last_activity: self.last_activity.max(handed_off_activity),
            handed_off_activity,
            ..self
        }
    }
}

struct Flows {
    opened: u64,
    closed: u64,
}

impl Flows {
    fn open(&self) -> u64 {
        self.opened.saturating_sub(self.closed)
    }
}

impl Accounting {
    /// Counters for `workers` forwarding workers.
    #[must_use]
    pub fn new(workers: usize) -> Arc<Self> {
        let workers = std::iter::repeat_with(Counters::default).take(workers.max(1)).collect();
        Arc::new(Self {
            workers,
            wake_at: AtomicU64::new(0),
            flows_closed: Notify::new(),
            redirected: OnceLock::new(),
        })
    }

    /// The counters of worker `index`, if there is such a worker.
    #[must_use]
    pub fn worker(&self, index: usize) -> Option<&Counters> {
        self.workers.get(index)
    }

    /// From now on what the kernel moves counts, too.
    pub fn count_redirected(&self, counters: Arc<sockmap::Counters>) {
        self.redirected.get_or_init(|| counters);
    }

    /// Whether the kernel moves proxied flows.
    #[must_use]
    pub fn counts_redirected(&self) -> bool {
        self.redirected.get().is_some()
    }

    /// What the kernel moved of the proxied flows. All zero if it moves none.
    #[must_use]
    pub fn redirected(&self) -> Proxied {
        self.redirected.get().map(|counters| counters.read()).unwrap_or_default()
    }

    /// A flow of worker `index` ended at `now`.
    pub fn closed(&self, index: usize, now: Monotonic) {
        if let Some(counters) = self.worker(index) {
            counters.touch(now);
            counters.flows_closed.fetch_add(1, SeqCst);
        }
        if self.flows().open() <= self.wake_at.load(SeqCst) {
            self.flows_closed.notify_one();
        }
    }

    /// From now on [`Accounting::few_open`] wakes when at most `flows` are left open. Counters that are read after
    /// this call and show more will be followed by a wake-up.
    pub fn wake_at(&self, flows: u64) {
        self.wake_at.store(flows, SeqCst);
    }

    /// Waits for a flow to close that leaves at most so many open as [`Accounting::wake_at`] says.
    pub async fn few_open(&self) {
        self.flows_closed.notified().await;
    }

    /// Closed flows are read first, so that an open flow is never missed. All in one order with `wake_at`: of two
    /// workers that close the last two flows at once, one sees that none is left.
    fn flows(&self) -> Flows {
        let sum = |field: fn(&Counters) -> &AtomicU64| -> u64 {
            self.workers.iter().map(|counters| field(counters).load(SeqCst)).sum()
        };
        let closed = sum(|counters| &counters.flows_closed);
        Flows { opened: sum(|counters| &counters.flows_opened), closed }
    }

    /// All workers' counters, added up: the flows through the proxy.
    #[must_use]
    pub fn totals(&self) -> Totals {
        let sum = |field: fn(&Counters) -> &AtomicU64| -> u64 {
            self.workers.iter().map(|counters| field(counters).load(Relaxed)).sum()
        };
        let flows = self.flows();
        let redirected = self.redirected();
        let last = self.workers.iter().map(|counters| counters.last_activity_ns.load(Relaxed)).max();
        Totals {
            flows_total: flows.opened,
            flows_open: flows.open(),
            bytes_to_backend: sum(|counters| &counters.bytes_to_backend) + redirected.redirected_to_backend,
            bytes_to_client: sum(|counters| &counters.bytes_to_client) + redirected.redirected_to_client,
            last_activity: Duration::from_nanos(last.unwrap_or(0).max(redirected.last_activity_ns)),
            ..Totals::default()
        }
    }
}
