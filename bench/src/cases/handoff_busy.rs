//! Flows that were handed off and are all busy: `handoff-busy`, the processor time of drowse in per cent of one core.
//!
//! Every flow has a request each second; what it costs drowse is counted from the first request until the last answer,
//! with all flows open. What the kernel does for drowse while it works for client and backend is not drowse's own time:
//! it is in `machine_cpu_s_per_100k`, which the request cases compare with a direct connection.

use std::net::Ipv4Addr;

use anyhow::{Context, Result, ensure};

use crate::cases::{Backend, Case, Contestant, Sample, Setting, Work};
use crate::client;
use crate::client::echo::EchoFlows;
use crate::client::paced::PacedLoad;
use crate::costs::Counters;
use crate::owners::{clients, wait_until_handed_off};
use crate::peers::{Peer, Started};
use crate::report::Better;

const REQUEST_LEN: u64 = 64;

/// The peers that hand off; nothing when there is none.
#[must_use]
pub fn case(setting: &Setting) -> Option<Case<'_>> {
    let contestants: Vec<Contestant<'_>> = setting
        .peers
        .iter()
        .filter(|peer| peer.hands_off())
        .map(|peer| Contestant { peer: peer.name(), measure: Box::new(|| measure(setting, peer.as_ref())) })
        .collect();
    let name = "handoff-busy".to_owned();
    let case = Case { name, unit: "% of a core", better: Better::Lower, contestants };
    (!case.contestants.is_empty()).then_some(case)
}

fn measure(setting: &Setting, peer: &dyn Peer) -> Result<Sample> {
    let count = setting.sizes.busy_flows.min(peer.flows_max(setting.files_max));
    let (backend, mut started) = setting.start(Ipv4Addr::LOCALHOST.into(), peer, count)?;
    let outcome = busy(setting, &backend, &started, count);
    started.explain(outcome)
}

fn busy(setting: &Setting, backend: &Backend, started: &Started, count: usize) -> Result<Sample> {
    let (address, pattern) = (started.address, &setting.pattern);
    client::warm_up(address, pattern)?;
    wait_until_handed_off(address, backend.pid(), pattern)?;
    let mut flows = EchoFlows::open(address, pattern, count)?;
    let handed_off = clients(backend.pid(), address)?.values().filter(|is_held| **is_held).count();
    ensure!(handed_off >= count, "{handed_off} of {count} flows were handed off");
    let flows_open = u32::try_from(handed_off).context("count the flows")?;
    let load = PacedLoad {
        connections: count,
        request_len: REQUEST_LEN,
        requests_per_second: u32::try_from(count).context("set a rate")?,
        warm_up_time: std::time::Duration::ZERO,
        measured_time: setting.sizes.busy_time,
    };
    let counters = || Counters::now(started.process.as_ref(), false);
    let (before, started_at) = (counters()?, drowse::clock::now());
    let result = load.run_over(&mut flows)?;
    let (after, time) = (counters()?, drowse::clock::now().saturating_sub(started_at));
    let cpu_s = after.proxy_cpu_s_since(&before).context("find the proxy's processor time")?;
    let mut details = vec![("flows", f64::from(flows_open)), ("achieved_per_second", result.per_second)];
    details.extend(after.costs_since(&before, Work::Requests(result.requests)));
    Ok(Sample { value: 100.0 * cpu_s / time.as_secs_f64(), latency: result.latency, details, work: None })
}
