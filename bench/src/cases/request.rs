//! Request and answer over connections that stay open: `request/LEN/CONNECTIONS`, in requests per second.

use crate::cases::{Case, Contestant, Sample, Setting, Work};
use crate::client::RequestLoad;
use crate::report::Better;

const REQUEST_LEN: usize = 64;
const CONNECTIONS: [usize; 2] = [1, 32];

/// One case for each number of connections.
#[must_use]
pub fn cases(setting: &Setting) -> Vec<Case<'_>> {
    CONNECTIONS.iter().map(|connections| case(setting, *connections)).collect()
}

fn case(setting: &Setting, connections: usize) -> Case<'_> {
    let load = RequestLoad {
        connections,
        request_len: REQUEST_LEN,
        warm_up_time: setting.sizes.warm_up_time,
        measured_time: setting.sizes.measured_time,
    };
    let contestant = |peer| Contestant {
        peer: crate::peers::Peer::name(peer),
        measure: Box::new(move || {
            setting.with_peer(peer, connections, |started| {
                let rate = load.run(started.address, &setting.pattern)?;
                let work = Some(Work::Requests(rate.requests));
                let latency = Some(rate.latency);
                Ok(Sample { value: rate.per_second, latency, details: Vec::new(), work })
            })
        }),
    };
    Case {
        name: format!("request/{REQUEST_LEN}B/{connections}"),
        unit: "requests/s",
        better: Better::Higher,
        contestants: setting.peers.iter().map(|peer| contestant(peer.as_ref())).collect(),
    }
}
