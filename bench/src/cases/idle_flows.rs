//! Open flows that move nothing: `idle-flows`, the proxy's memory in KiB per flow.
//!
//! A proxy that cannot hold all of them within the limit of open files holds as many as it can; the number stands
//! beside the figure.

use anyhow::{Context, Result};

use crate::cases::{Case, Contestant, Sample, Setting};
use crate::client;
use crate::peers::Peer;
use crate::report::Better;

/// The memory of each peer that has a process.
#[must_use]
pub fn case(setting: &Setting) -> Case<'_> {
    let proxies = setting.peers.iter().filter(|peer| peer.name() != "direct");
    Case {
        name: "idle-flows".to_owned(),
        unit: "KiB/flow",
        better: Better::Lower,
        contestants: proxies
            .map(|peer| Contestant {
                peer: peer.name(),
                measure: Box::new(|| measure(setting, peer.as_ref())),
            })
            .collect(),
    }
}

fn measure(setting: &Setting, peer: &dyn Peer) -> Result<Sample> {
    let count = setting.sizes.idle_flows.min(peer.flows_max(setting.files_max));
    let memory = setting.with_peer(peer, count, |started| {
        let flows = client::open_flows(started.address, &setting.pattern, count)?;
        let memory = started.process.as_ref().context("find the proxy's process")?.memory()?;
        client::exchange_all(&flows, &setting.pattern, 1).context("use the flows after they were idle")?;
        Ok(memory)
    })?;
    let float = |bytes: u64| u32::try_from(bytes / 1024).map(f64::from).context("read the proxy's memory");
    let (pss_kib, rss_kib) = (float(memory.pss_bytes)?, float(memory.rss_bytes)?);
    let flows = u32::try_from(count).map(f64::from).context("count the flows")?;
    let mb = |kib: f64| kib * 1024.0 / 1e6;
    let details = vec![("flows", flows), ("pss_mb", mb(pss_kib)), ("rss_mb", mb(rss_kib))];
    Ok(Sample { value: pss_kib / flows, latency: None, details })
}
