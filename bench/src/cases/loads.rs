//! Cases that are one load of one client: requests, requests at a fixed rate, new connections, messages of growing
//! size, and bulk transfers.
//!
//! Owns: what each of them asks of the client, and which part of the result is its figure. Must never: know where the
//! client stands; on the loopback it is this process.

use anyhow::Result;
use hdrhistogram::Histogram;

use crate::cases::{Case, Contestant, Sample, Setting, Sizes, Work};
use crate::client::bulk::{BulkLoad, Direction};
use crate::client::closed::RequestLoad;
use crate::client::fresh::FreshLoad;
use crate::client::load::{Load, LoadResult};
use crate::client::paced::PacedLoad;
use crate::peers::{Peer, Started};
use crate::report::{Better, Latency};

const MIB: f64 = 1_048_576.0;
/// Lengths as they stand in the names of cases.
const B64: (&str, u64) = ("64B", 64);
const KIB4: (&str, u64) = ("4KiB", 4 << 10);
const SIZES: [(&str, u64); 6] =
    [B64, ("1KiB", 1 << 10), KIB4, ("16KiB", 16 << 10), ("64KiB", 64 << 10), ("256KiB", 256 << 10)];
const SIZE_CONNECTIONS: usize = 8;
/// What is requested, over how many connections.
const REQUESTS: [((&str, u64), usize); 6] =
    [(B64, 1), (B64, 32), (B64, 256), (B64, 512), (KIB4, 1), (KIB4, 32)];
const PACED_CONNECTIONS: usize = 32;
const FRESH_AT_ONCE: usize = 8;

/// A load, and what its result means.
#[derive(Debug, Clone)]
pub struct LoadCase {
    /// The name of the case.
    pub name: String,
    /// What the client does.
    pub load: Load,
    unit: &'static str,
    better: Better,
    sample: fn(LoadResult) -> Sample,
}

impl LoadCase {
    /// The case with the client on the loopback.
    #[must_use]
    pub fn on_loopback(self, setting: &Setting) -> Case<'_> {
        self.at(setting, |peer, flows, measure| setting.with_peer(peer, flows, measure))
    }

    /// The case with the client on another machine, as far as one machine can have it: over a pair of network devices,
    /// whose packets have an Ethernet's size and go through queues. That is where planes differ that skip part of the
    /// network stack.
    #[must_use]
    pub fn from_another_machine(mut self, setting: &Setting) -> Case<'_> {
        self.name.insert_str(0, "remote/");
        self.at(setting, |peer, flows, measure| setting.with_remote_client(peer, flows, measure))
    }

    /// The case with the client wherever `place` has it measure: `place` starts the peer for so many flows, and calls
    /// what it is given.
    pub fn at<'a>(
        self,
        setting: &'a Setting,
        place: impl Fn(&dyn Peer, usize, &(dyn Fn(&Started) -> Result<Sample> + Sync)) -> Result<Sample>
        + Copy
        + 'a,
    ) -> Case<'a> {
        let (load, sample, pattern) = (self.load, self.sample, &setting.pattern);
        let measure = move |started: &Started| {
            let result = load.run(started.address, pattern)?;
            let work = Some(match load {
                Load::Bulk(_) => Work::Bytes(result.bytes),
                Load::Request(_) | Load::Paced(_) | Load::Fresh(_) => Work::Requests(result.requests),
            });
            Ok(Sample { work, ..sample(result) })
        };
        let contestant = |peer: &'a dyn Peer| Contestant {
            peer: peer.name(),
            measure: Box::new(move || place(peer, load.flows(), &measure)),
        };
        let contestants = setting.peers.iter().map(|peer| contestant(peer.as_ref())).collect();
        Case { name: self.name, unit: self.unit, better: self.better, contestants }
    }
}

/// All of them, in the order of measuring.
pub fn all(sizes: &Sizes) -> impl Iterator<Item = LoadCase> {
    let sizes = *sizes;
    let requests = REQUESTS.into_iter().map(move |(len, connections)| request(&sizes, len, connections));
    requests
        .chain([paced(&sizes), fresh(&sizes)])
        .chain(SIZES.into_iter().map(move |len| size(&sizes, len)))
        .chain([Direction::Up, Direction::Down, Direction::Both].map(move |way| bulk(&sizes, way)))
}

/// The cases that are also worth measuring with the client on another machine.
#[must_use]
pub fn remote(sizes: &Sizes) -> [LoadCase; 3] {
    [request(sizes, B64, PACED_CONNECTIONS), bulk(sizes, Direction::Down), fresh(sizes)]
}

/// Request and answer over connections that stay open: `request/LEN/CONNECTIONS`.
fn request(sizes: &Sizes, (name, request_len): (&str, u64), connections: usize) -> LoadCase {
    LoadCase {
        name: format!("request/{name}/{connections}"),
        load: Load::Request(RequestLoad {
            connections,
            request_len,
            warm_up_time: sizes.warm_up_time,
            measured_time: sizes.measured_time,
        }),
        unit: "requests/s",
        better: Better::Higher,
        sample: rate,
    }
}

/// Requests at a fixed rate: `latency/LEN/RATE`, the 99th percentile, with the rate that the peer could keep.
fn paced(sizes: &Sizes) -> LoadCase {
    LoadCase {
        name: "latency/64B/20k".to_owned(),
        load: Load::Paced(PacedLoad {
            connections: PACED_CONNECTIONS,
            request_len: B64.1,
            requests_per_second: 20_000,
            warm_up_time: sizes.warm_up_time,
            measured_time: sizes.paced_time,
        }),
        unit: "us (p99)",
        better: Better::Lower,
        sample: |result| Sample {
            value: us(result.latency.as_ref(), |all| all.p99_us),
            details: vec![
                ("achieved_per_second", result.per_second),
                ("client_late_p99_us", us(result.send_delay.as_ref(), |all| all.p99_us)),
                ("p50_us", us(result.latency.as_ref(), |all| all.p50_us)),
                ("since_sent_p50_us", us(result.latency_since_sent.as_ref(), |all| all.p50_us)),
                ("since_sent_p99_us", us(result.latency_since_sent.as_ref(), |all| all.p99_us)),
            ],
            latency: result.latency,
            work: None,
        },
    }
}

/// The rate, with the latencies beside it.
fn rate(result: LoadResult) -> Sample {
    Sample { value: result.per_second, latency: result.latency, details: Vec::new(), work: None }
}

fn us(all: Option<&Histogram<u64>>, pick: fn(&Latency) -> f64) -> f64 {
    all.map_or(0.0, |all| pick(&Latency::of(all)))
}

/// A new connection for each request: `connect/LEN`.
fn fresh(sizes: &Sizes) -> LoadCase {
    LoadCase {
        name: "connect/64B".to_owned(),
        load: Load::Fresh(FreshLoad {
            at_once: FRESH_AT_ONCE,
            request_len: 64,
            warm_up_time: sizes.warm_up_time,
            measured_time: sizes.measured_time,
        }),
        unit: "requests/s",
        better: Better::Higher,
        sample: rate,
    }
}

/// Messages of growing size, for the cost over the size: `size/LEN`, the time that each takes while there is always
/// another one to move.
fn size(sizes: &Sizes, (name, request_len): (&str, u64)) -> LoadCase {
    LoadCase {
        name: format!("size/{name}"),
        load: Load::Request(RequestLoad {
            connections: SIZE_CONNECTIONS,
            request_len,
            warm_up_time: sizes.warm_up_time,
            measured_time: sizes.measured_time / 2,
        }),
        unit: "us/request",
        better: Better::Lower,
        sample: |result| Sample {
            value: 1e6 / result.per_second,
            latency: result.latency,
            details: Vec::new(),
            work: None,
        },
    }
}

/// Many bytes over one connection: `bulk/WAY`, both ways added up.
fn bulk(sizes: &Sizes, direction: Direction) -> LoadCase {
    let way = match direction {
        Direction::Up => "up",
        Direction::Down => "down",
        Direction::Both => "both",
    };
    LoadCase {
        name: format!("bulk/{way}"),
        load: Load::Bulk(BulkLoad { direction, bytes: sizes.bulk_bytes }),
        unit: "MiB/s",
        better: Better::Higher,
        sample: |result| Sample {
            value: result.per_second / MIB,
            latency: None,
            details: Vec::new(),
            work: None,
        },
    }
}
