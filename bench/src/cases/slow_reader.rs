//! A client that stops reading, among others that do not: `slow-reader`, the request rate of the others beside it as
//! a part of their rate without it.
//!
//! What the proxy takes from the backend and keeps for the one that does not read stands beside the figure. In the
//! end that client reads on, and must get every byte.

use anyhow::{Context, Result};

use crate::cases::{Case, Contestant, Sample, Setting};
use crate::client::closed::RequestLoad;
use crate::client::slow::SlowReader;
use crate::peers::Started;
use crate::report::Better;

const FAST_CONNECTIONS: usize = 8;
const REQUEST_LEN: u64 = 4 << 10;

/// The case with all peers.
#[must_use]
pub fn case(setting: &Setting) -> Case<'_> {
    let contestants = setting
        .peers
        .iter()
        .map(|peer| Contestant {
            peer: peer.name(),
            measure: Box::new(|| {
                setting.with_peer(peer.as_ref(), FAST_CONNECTIONS + 1, |started| measure(setting, started))
            }),
        })
        .collect();
    Case { name: "slow-reader".to_owned(), unit: "x alone", better: Better::Higher, contestants }
}

fn measure(setting: &Setting, started: &Started) -> Result<Sample> {
    let sizes = &setting.sizes;
    let fast = RequestLoad {
        connections: FAST_CONNECTIONS,
        request_len: REQUEST_LEN,
        warm_up_time: sizes.warm_up_time,
        measured_time: sizes.measured_time / 2,
    };
    let pss_kib = || {
        let memory = started.process.as_ref().map(crate::process::Running::memory).transpose()?;
        let kib = memory.map(|memory| u32::try_from(memory.pss_bytes / 1024).map(f64::from));
        kib.transpose().context("read the proxy's memory")
    };
    let alone = fast.run(started.address, &setting.pattern).context("without the slow reader")?;
    let before = pss_kib()?;
    let slow = SlowReader::stall(started.address, sizes.slow_bytes)?;
    let beside = fast.run(started.address, &setting.pattern).context("beside the slow reader")?;
    let growth = before.zip(pss_kib()?).map(|(before, after)| ("pss_growth_kib", after - before));
    slow.finish(&setting.pattern)?;
    let mut details = vec![("beside_per_second", beside.per_second)];
    details.extend(growth);
    Ok(Sample { value: beside.per_second / alone.per_second, latency: beside.latency, details, work: None })
}
