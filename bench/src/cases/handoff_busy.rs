//! Flows that were handed off and are all busy: `handoff-busy`, the processor time of drowse in per cent of one core.
//!
//! Every flow has a request each second; what it costs drowse is counted from the first request until the last answer,
//! with all flows open. A plain proxy never stops its backend and so never decides whether it is idle;
//! `drowse-handoff-deciding` does, each [`IDLE_TIME`], by the traffic of its flows. What the kernel does for drowse while
//! it works for client and backend is not drowse's own time: it is in `machine_cpu_s_per_100k`, which the request cases
//! compare with a direct connection.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::cases::cold::{self, AwakeBackend};
use crate::cases::{Case, Contestant, NEEDS_ROOT, Sample, Setting, Unavailable, Work, free_addresses};
use crate::client;
use crate::client::echo::EchoFlows;
use crate::client::paced::PacedLoad;
use crate::costs::Counters;
use crate::owners::{clients, wait_until_handed_off};
use crate::peers::{Direct, Peer};
use crate::process::Running;
use crate::report::Better;

const REQUEST_LEN: u64 = 64;

/// drowse with a backend that it stops when no byte has moved for [`IDLE_TIME`].
const DECIDING: &str = "drowse-handoff-deciding";
/// Far shorter than anyone's, so that it looks at its flows several times in a round.
const IDLE_TIME: &str = "2s";

/// The peers that hand off; nothing when there is none.
#[must_use]
pub fn case(setting: &Setting) -> Option<Case<'_>> {
    let mut contestants: Vec<Contestant<'_>> = setting
        .peers
        .iter()
        .filter(|peer| peer.hands_off())
        .map(|peer| Contestant { peer: peer.name(), measure: Box::new(|| measure(setting, peer.as_ref())) })
        .collect();
    if contestants.is_empty() {
        return None;
    }
    contestants.extend(setting.drowse.as_deref().map(|drowse| Contestant {
        peer: DECIDING,
        measure: Box::new(move || measure_deciding(setting, drowse)),
    }));
    let name = "handoff-busy".to_owned();
    Some(Case { name, unit: "% of a core", better: Better::Lower, contestants })
}

fn measure(setting: &Setting, peer: &dyn Peer) -> Result<Sample> {
    let count = setting.sizes.busy_flows.min(peer.flows_max(setting.files_max));
    let (backend, mut started) = setting.start(Ipv4Addr::LOCALHOST.into(), peer, count)?;
    let process = started.process.as_ref().context("find the proxy's process")?;
    let outcome = busy(setting, backend.pid(), started.address, process, count);
    started.explain(outcome)
}

/// drowse that starts the backend itself, looks at its flows, and stops it in the end: it must not while they are busy.
fn measure_deciding(setting: &Setting, drowse: &Path) -> Result<Sample> {
    if !setting.may_load_ebpf {
        bail!(Unavailable(NEEDS_ROOT));
    }
    let (listen, backend) = free_addresses()?;
    let name = format!("--name=drowse-bench-{}-{}", std::process::id(), backend.port());
    let idle_time = format!("--idle-time={IDLE_TIME}");
    let options = ["--plane=handoff", "--idle-policy=traffic", &idle_time, &name];
    let mut proxy = cold::start(setting, drowse, &options, Duration::ZERO, (listen, backend))?;
    let outcome = busy_then_stopped(setting, listen, &proxy);
    outcome.with_context(|| proxy.last_words())
}

fn busy_then_stopped(setting: &Setting, address: SocketAddr, proxy: &Running) -> Result<Sample> {
    let (stamp, flow) = client::stamp(address)?;
    let backend = AwakeBackend::of(stamp)?;
    drop(flow);
    let pid = u32::try_from(stamp.pid).context("read the backend's process id")?;
    let count = setting.sizes.busy_flows.min(Direct.flows_max(setting.files_max));
    let sample = busy(setting, pid, address, proxy, count)?;
    backend.wait_until_stopped()?;
    Ok(sample)
}

fn busy(
    setting: &Setting,
    backend: u32,
    address: SocketAddr,
    proxy: &Running,
    count: usize,
) -> Result<Sample> {
    let pattern = &setting.pattern;
    client::warm_up(address, pattern)?;
    wait_until_handed_off(address, backend, pattern)?;
    let mut flows = EchoFlows::open(address, pattern, count)?;
    let handed_off = clients(backend, address)?.values().filter(|is_held| **is_held).count();
    ensure!(handed_off >= count, "{handed_off} of {count} flows were handed off");
    let flows_open = u32::try_from(handed_off).context("count the flows")?;
    let load = PacedLoad {
        connections: count,
        request_len: REQUEST_LEN,
        requests_per_second: u32::try_from(count).context("set a rate")?,
        warm_up_time: Duration::ZERO,
        measured_time: setting.sizes.busy_time,
    };
    let counters = || Counters::without_backend(proxy, backend);
    let (before, started_at) = (counters()?, drowse::clock::now());
    let result = load.run_over(&mut flows)?;
    let (after, time) = (counters()?, drowse::clock::now().saturating_sub(started_at));
    let cpu_s = after.proxy_cpu_s_since(&before).context("find the proxy's processor time")?;
    let mut details = vec![("flows", f64::from(flows_open)), ("achieved_per_second", result.per_second)];
    details.extend(after.costs_since(&before, Work::Requests(result.requests)));
    Ok(Sample { value: 100.0 * cpu_s / time.as_secs_f64(), latency: result.latency, details, work: None })
}
