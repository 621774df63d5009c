//! Open flows that move nothing: `idle-flows`, the proxy's memory in KiB per flow.
//!
//! A proxy that cannot hold all of them within the limit of open files holds as many as it can; the number stands
//! beside the figure. `kernel_kib_per_flow` is what the kernel's memory grew by while the flows were opened, those of
//! the client and of the backend included, which are the same for all peers. `idle_switches_per_s` counts how often the
//! proxy woke up while all flows were idle; nothing has to.

use std::net::TcpStream;

use anyhow::{Context, Result, ensure};

use crate::cases::{Case, Contestant, Sample, Setting};
use crate::client;
use crate::costs::{Counters, KernelMemory};
use crate::peers::Peer;
use crate::process::{Running, readable_within};
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
    setting.with_peer(peer, count, |started| {
        let process = started.process.as_ref().context("find the proxy's process")?;
        let kernel_before = KernelMemory::now()?;
        let flows = client::open_flows(started.address, &setting.pattern, count)?;
        let kernel_bytes = KernelMemory::now()?.growth_since(kernel_before);
        let memory = process.memory()?;
        let switches = switches_while_idle(setting, process, &flows)?;
        client::exchange_all(&flows, &setting.pattern, 1).context("use the flows after they were idle")?;
        let kib = |bytes: u64| u32::try_from(bytes / 1024).map(f64::from).context("read a size of memory");
        let (pss_kib, rss_kib) = (kib(memory.pss_bytes)?, kib(memory.rss_bytes)?);
        let flows = u32::try_from(count).map(f64::from).context("count the flows")?;
        let mb = |kib: f64| kib * 1024.0 / 1e6;
        let details = vec![
            ("flows", flows),
            ("pss_mb", mb(pss_kib)),
            ("rss_mb", mb(rss_kib)),
            ("kernel_kib_per_flow", kib(kernel_bytes)? / flows),
            ("idle_switches_per_s", switches / setting.sizes.idle_time.as_secs_f64()),
        ];
        Ok(Sample { value: pss_kib / flows, latency: None, details, work: None })
    })
}

/// How often the proxy waited anew while nothing moved: how often it had woken up.
fn switches_while_idle(setting: &Setting, process: &Running, flows: &[TcpStream]) -> Result<f64> {
    let before = Counters::now(Some(process), false)?;
    let flow = flows.first().context("find a flow")?;
    ensure!(!readable_within(flow, setting.sizes.idle_time)?, "an idle flow brought bytes, or ended");
    let switches = Counters::now(Some(process), false)?.switches_since(&before);
    let switches = switches.context("count the proxy's switches")?;
    u32::try_from(switches).map(f64::from).context("count the proxy's switches")
}
