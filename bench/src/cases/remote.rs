//! Clients on another machine, as far as one machine can have them: `remote/request/64B/32` and `remote/bulk/down`,
//! as the cases of the same names, but over a pair of network devices instead of the loopback.
//!
//! Their packets have an Ethernet's size and go through the devices' queues, which is where the planes differ that
//! skip part of the network stack.

use crate::cases::{Case, Contestant, Sample, Setting, Work};
use crate::client::{self, Direction, RequestLoad};
use crate::peers::Peer;
use crate::report::Better;

const REQUEST_LEN: usize = 64;
const CONNECTIONS: usize = 32;
const MIB: f64 = 1_048_576.0;

/// All of them.
#[must_use]
pub fn cases(setting: &Setting) -> Vec<Case<'_>> {
    let contestants = |measure: fn(&Setting, &dyn Peer) -> anyhow::Result<Sample>| {
        setting
            .peers
            .iter()
            .map(|peer| Contestant {
                peer: peer.name(),
                measure: Box::new(move || measure(setting, peer.as_ref())),
            })
            .collect()
    };
    let requests = Case {
        name: format!("remote/request/{REQUEST_LEN}B/{CONNECTIONS}"),
        unit: "requests/s",
        better: Better::Higher,
        contestants: contestants(request),
    };
    let bulk = Case {
        name: "remote/bulk/down".to_owned(),
        unit: "MiB/s",
        better: Better::Higher,
        contestants: contestants(bulk),
    };
    vec![requests, bulk]
}

fn request(setting: &Setting, peer: &dyn Peer) -> anyhow::Result<Sample> {
    let (pattern, sizes) = (&setting.pattern, setting.sizes);
    let load = RequestLoad {
        connections: CONNECTIONS,
        request_len: REQUEST_LEN,
        warm_up_time: sizes.warm_up_time,
        measured_time: sizes.measured_time,
    };
    setting.with_remote_client(peer, CONNECTIONS, |started| {
        let rate = load.run(started.address, pattern)?;
        let work = Some(Work::Requests(rate.requests));
        Ok(Sample { value: rate.per_second, latency: Some(rate.latency), details: Vec::new(), work })
    })
}

fn bulk(setting: &Setting, peer: &dyn Peer) -> anyhow::Result<Sample> {
    let (pattern, bytes) = (&setting.pattern, setting.sizes.bulk_bytes);
    setting.with_remote_client(peer, 1, |started| {
        let bytes_per_second = client::bulk(started.address, pattern, Direction::Down, bytes)?;
        let work = Some(Work::Bytes(bytes));
        Ok(Sample { value: bytes_per_second / MIB, latency: None, details: Vec::new(), work })
    })
}
