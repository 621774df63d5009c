//! Many bytes over one connection: `bulk/up`, `bulk/down` and `bulk/both`, in MiB per second (both ways added up).

use crate::cases::{Case, Contestant, Sample, Setting, Work};
use crate::client::{self, Direction};
use crate::peers::Peer;
use crate::report::Better;

const MIB: f64 = 1_048_576.0;

/// One case for each direction.
#[must_use]
pub fn cases(setting: &Setting) -> Vec<Case<'_>> {
    [("up", Direction::Up), ("down", Direction::Down), ("both", Direction::Both)]
        .into_iter()
        .map(|(name, direction)| Case {
            name: format!("bulk/{name}"),
            unit: "MiB/s",
            better: Better::Higher,
            contestants: setting
                .peers
                .iter()
                .map(|peer| contestant(setting, peer.as_ref(), direction))
                .collect(),
        })
        .collect()
}

fn contestant<'a>(setting: &'a Setting, peer: &'a dyn Peer, direction: Direction) -> Contestant<'a> {
    let measure = move || {
        setting.with_peer(peer, 1, |started| {
            let bytes = setting.sizes.bulk_bytes;
            let bytes_per_second = client::bulk(started.address, &setting.pattern, direction, bytes)?;
            let work = Some(Work::Bytes(if direction == Direction::Both { 2 * bytes } else { bytes }));
            Ok(Sample { value: bytes_per_second / MIB, latency: None, details: Vec::new(), work })
        })
    };
    Contestant { peer: peer.name(), measure: Box::new(measure) }
}
