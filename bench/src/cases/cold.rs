//! The first request of a sleeping backend: `cold/DELAY`, what drowse adds, in milliseconds.
//!
//! The figure is the time from the client's connect until the answer, less the time that the same backend takes alone
//! from its start until it listens, both as medians of starts that alternate. The details divide the cold request at
//! the moment at which the backend listened.

use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::cases::{Case, Contestant, Sample, Setting, Unavailable, free_addresses, milliseconds};
use crate::client;
use crate::cpus::started_on;
use crate::process::{self, Running, readable_within};
use crate::report::Better;
use crate::stats::median;
use crate::wire::Stamp;

const LISTEN_DELAYS: [(&str, Duration); 2] =
    [("instant", Duration::ZERO), ("300ms", Duration::from_millis(300))];
/// After which time without a flow the backend is stopped.
const IDLE_TIME: &str = "50ms";
/// How long the backend may take to be stopped after its last flow.
const ASLEEP_WITHIN: Duration = Duration::from_secs(10);

/// drowse with and without its eBPF programs; nothing when it does not take part.
#[must_use]
pub fn cases(setting: &Setting) -> Vec<Case<'_>> {
    let Some(drowse) = &setting.drowse else { return Vec::new() };
    let case = |(name, delay)| Case {
        name: format!("cold/{name}"),
        unit: "ms",
        better: Better::Lower,
        contestants: Ebpf::both(setting)
            .map(|ebpf| Contestant {
                peer: ebpf.peer(),
                measure: Box::new(move || measure(setting, drowse, ebpf, delay)),
            })
            .collect(),
    };
    LISTEN_DELAYS.into_iter().map(case).collect()
}

/// Whether drowse may load its eBPF programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ebpf {
    /// It must.
    Loaded,
    /// It must not.
    Off,
}

impl Ebpf {
    /// What this user can measure.
    pub fn both(setting: &Setting) -> impl Iterator<Item = Self> {
        setting.may_load_ebpf.then_some(Self::Loaded).into_iter().chain([Self::Off])
    }

    /// The name in reports.
    #[must_use]
    pub fn peer(self) -> &'static str {
        match self {
            Self::Loaded => "drowse-ebpf",
            Self::Off => "drowse-no-ebpf",
        }
    }

    /// The option of drowse.
    #[must_use]
    pub fn option(self) -> &'static str {
        match self {
            Self::Loaded => "--ebpf=auto",
            Self::Off => "--ebpf=off",
        }
    }
}

/// A backend that drowse started.
#[derive(Debug)]
pub struct AwakeBackend {
    exit: OwnedFd,
}

impl AwakeBackend {
    /// Watches the process that `stamp` names.
    ///
    /// # Errors
    /// When it is gone.
    pub fn of(stamp: Stamp) -> Result<Self> {
        let pid =
            i32::try_from(stamp.pid).ok().and_then(Pid::from_raw).context("read the backend's process id")?;
        Ok(Self { exit: pidfd_open(pid, PidfdFlags::empty()).context("watch the backend")? })
    }

    /// Waits until drowse has stopped it.
    ///
    /// # Errors
    /// When it does not in time.
    pub fn wait_until_stopped(&self) -> Result<()> {
        let is_stopped = readable_within(&self.exit, ASLEEP_WITHIN)?;
        ensure!(is_stopped, "the backend was not stopped within {ASLEEP_WITHIN:?}");
        Ok(())
    }
}

/// One cold request, divided.
#[derive(Debug, Clone, Copy)]
struct ColdRequest {
    whole: Duration,
    until_listening: Duration,
    after_listening: Duration,
}

fn measure(setting: &Setting, drowse: &Path, ebpf: Ebpf, delay: Duration) -> Result<Sample> {
    let (listen, backend) = free_addresses()?;
    let options = [ebpf.option(), &format!("--idle-time={IDLE_TIME}")];
    let mut proxy = start(setting, drowse, &options, delay, (listen, backend))?;
    let mut alone = Vec::new();
    let mut cold = Vec::new();
    for _ in 0..setting.sizes.starts_each {
        alone.push(milliseconds(setting.backend_alone(free_addresses()?.0, delay)?));
        let outcome = cold_request(listen);
        cold.push(outcome.with_context(|| proxy.last_words())?);
    }
    let loaded = proxy.has_ebpf()?;
    ensure!(!loaded || ebpf == Ebpf::Loaded, "drowse has eBPF programs loaded that it was told not to load");
    if !loaded && ebpf == Ebpf::Loaded {
        bail!(Unavailable("drowse loaded no eBPF programs: run `cargo xtask build-ebpf`, or see its log"));
    }
    let part = |pick: fn(&ColdRequest) -> Duration| {
        let times: Vec<f64> = cold.iter().map(|request| milliseconds(pick(request))).collect();
        median(&times).context("no cold request was made")
    };
    let alone = median(&alone).context("no backend was started")?;
    Ok(Sample {
        value: part(|request| request.whole)? - alone,
        latency: None,
        details: vec![
            ("backend_alone_ms", alone),
            ("connect_to_listen_ms", part(|request| request.until_listening)?),
            ("listen_to_answer_ms", part(|request| request.after_listening)?),
        ],
        work: None,
    })
}

/// Starts drowse with `options` in front of a sleeping backend, which is a command of its own, and waits until it says
/// that it is ready.
///
/// # Errors
/// When it does not.
pub fn start(
    setting: &Setting,
    drowse: &Path,
    options: &[&str],
    delay: Duration,
    (listen, backend): (SocketAddr, SocketAddr),
) -> Result<Running> {
    let ready = super::startup::ReadySocket::open()?;
    let mut command = process::command(drowse);
    command.arg("run").args(options);
    command.args([format!("--listen={listen}"), format!("--backend={backend}"), "--".to_owned()]);
    command.arg(&setting.this_program).args(Setting::backend_arguments(backend, delay));
    ready.announce_to(&mut command);
    let mut proxy = started_on(&setting.layout.proxy, || Running::start("drowse", command))?;
    ready.wait().with_context(|| proxy.last_words())?;
    Ok(proxy)
}

/// Makes one request of a sleeping backend, and waits until it sleeps again: until its process is gone.
fn cold_request(listen: SocketAddr) -> Result<ColdRequest> {
    let started_at = drowse::clock::now();
    let (stamp, flow) = client::stamp(listen)?;
    let answered_at = drowse::clock::now();
    let listened_at = Duration::from_nanos(stamp.listened_at_ns);
    ensure!(listened_at > started_at, "the backend was awake before the cold request");
    let backend = AwakeBackend::of(stamp)?;
    drop(flow);
    backend.wait_until_stopped()?;
    Ok(ColdRequest {
        whole: answered_at.saturating_sub(started_at),
        until_listening: listened_at.saturating_sub(started_at),
        after_listening: answered_at.saturating_sub(listened_at),
    })
}
