//! The cases, and the order in which they are measured.
//!
//! Owns: what a case is, and the interleaving of its rounds (A B C A B C ...), so that a slow moment of the machine
//! hits all peers alike. Must never: repeat a failed measurement until it succeeds.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use hdrhistogram::Histogram;

use crate::carriers::wait_until_carried;
use crate::costs::Counters;
pub use crate::costs::Work;
use crate::cpus::{Layout, started_on};
use crate::isolation::Remote;
use crate::owners::{check_handed_off, wait_until_handed_off};
use crate::peers::{Peer, Plane, Started, Wanted};
use crate::process::{self, Running, readable_within};
use crate::report::{Better, Latency, Measurement};
use crate::stats::Summary;
use crate::wire::Pattern;

pub mod cold;
pub mod handoff_busy;
pub mod idle_flows;
pub mod loads;
pub mod slow_reader;
pub mod startup;

/// A backend that takes longer than this beyond its own delay has failed.
const LISTEN_WITHIN: Duration = Duration::from_secs(10);
/// Why this user has no peer with eBPF programs.
const NEEDS_ROOT: &str = "its eBPF programs need root";

/// How much is measured.
#[derive(Debug, Clone, Copy)]
pub struct Sizes {
    /// Before a load counts.
    pub warm_up_time: Duration,
    /// While a load counts.
    pub measured_time: Duration,
    /// While a load at a fixed rate counts: long enough that a few stalls of some milliseconds, which any other work on
    /// the machine makes, are less than one request in a hundred.
    pub paced_time: Duration,
    /// Bytes of a bulk transfer, in each direction.
    pub bulk_bytes: u64,
    /// Bytes that a client asks for and does not read for a while: more than the sockets on the way hold.
    pub slow_bytes: u64,
    /// Idle flows.
    pub idle_flows: usize,
    /// How long they are idle while the proxy's wake-ups are counted.
    pub idle_time: Duration,
    /// Flows that were handed off and are all busy.
    pub busy_flows: usize,
    /// How long they are, with one request each second.
    pub busy_time: Duration,
    /// Cold requests, and starts, of which a round is the median.
    pub starts_each: usize,
}

impl Sizes {
    /// For figures.
    pub const FULL: Self = Self {
        warm_up_time: Duration::from_millis(150),
        measured_time: Duration::from_millis(800),
        paced_time: Duration::from_secs(2),
        bulk_bytes: 1 << 30,
        slow_bytes: 64 << 20,
        idle_flows: 9_000,
        idle_time: Duration::from_secs(2),
        busy_flows: 10_000,
        busy_time: Duration::from_secs(10),
        starts_each: 5,
    };
    /// For a smoke test.
    pub const QUICK: Self = Self {
        warm_up_time: Duration::from_millis(20),
        measured_time: Duration::from_millis(100),
        paced_time: Duration::from_millis(100),
        bulk_bytes: 32 << 20,
        slow_bytes: 32 << 20,
        idle_flows: 300,
        idle_time: Duration::from_millis(200),
        busy_flows: 300,
        busy_time: Duration::from_secs(1),
        starts_each: 1,
    };
}

/// What every case is given.
pub struct Setting {
    /// How much is measured.
    pub sizes: Sizes,
    /// The processors of each part.
    pub layout: Layout,
    /// Files that each process may open.
    pub files_max: u64,
    /// Ways from the client to the backend.
    pub peers: Vec<Box<dyn Peer>>,
    /// The program under test, when it takes part.
    pub drowse: Option<PathBuf>,
    /// Whether this user may load eBPF programs.
    pub may_load_ebpf: bool,
    /// Where a client on another machine would be; none when it could not be made.
    pub remote: Option<Remote>,
    /// This program, which is also the backend.
    pub this_program: PathBuf,
    /// The bytes of all streams.
    pub pattern: Pattern,
}

/// What one round of one peer gave.
#[derive(Debug)]
pub struct Sample {
    /// The figure, in the case's unit.
    pub value: f64,
    /// Latencies, where the case has them, in nanoseconds.
    pub latency: Option<Histogram<u64>>,
    /// Figures beside the main one, by name with its unit.
    pub details: Vec<(&'static str, f64)>,
    /// What the round moved in all, for its costs; none when they mean nothing.
    pub work: Option<Work>,
}

/// Why a peer cannot take part here, through no fault of its own.
#[derive(Debug)]
pub struct Unavailable(pub &'static str);

impl std::fmt::Display for Unavailable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.0)
    }
}

impl std::error::Error for Unavailable {}

/// One peer in one case.
pub struct Contestant<'a> {
    /// The peer's name.
    pub peer: &'static str,
    /// Measures one round.
    pub measure: Box<dyn FnMut() -> Result<Sample> + 'a>,
}

/// A case with all of its peers.
pub struct Case<'a> {
    /// The name, parts divided by `/`.
    pub name: String,
    /// The unit of its figures.
    pub unit: &'static str,
    /// Which way is better.
    pub better: Better,
    /// Who takes part.
    pub contestants: Vec<Contestant<'a>>,
}

/// All cases that this setting allows.
#[must_use]
pub fn all(setting: &Setting) -> Vec<Case<'_>> {
    let loads = loads::all(&setting.sizes);
    let mut cases: Vec<Case<'_>> = loads.map(|load| load.on_loopback(setting)).collect();
    let remote = loads::remote(&setting.sizes);
    cases.extend(remote.into_iter().map(|load| load.from_another_machine(setting)));
    cases.push(slow_reader::case(setting));
    cases.push(idle_flows::case(setting));
    cases.extend(handoff_busy::case(setting));
    cases.extend(cold::cases(setting));
    cases.extend(startup::case(setting));
    cases
}

/// What the rounds of one contestant add up to.
#[derive(Default)]
struct Tally {
    rounds: Vec<f64>,
    details: BTreeMap<&'static str, Vec<f64>>,
    latency: Option<Histogram<u64>>,
    failure: Option<String>,
    unavailable: Option<String>,
}

impl Tally {
    fn add(&mut self, outcome: Result<Sample>) {
        let sample = match outcome {
            Ok(sample) => sample,
            Err(err) => {
                let place = if err.is::<Unavailable>() { &mut self.unavailable } else { &mut self.failure };
                *place = Some(format!("{err:#}"));
                return;
            }
        };
        self.rounds.push(sample.value);
        for (name, value) in sample.details {
            self.details.entry(name).or_default().push(value);
        }
        match (&mut self.latency, sample.latency) {
            // Both histograms were made with the same bounds, so this cannot fail.
            (Some(all), Some(more)) => all.add(more).unwrap_or_default(),
            (all, more) => *all = more.or(all.take()),
        }
    }
}

impl Case<'_> {
    /// Measures `rounds` rounds of every contestant, interleaved. A contestant that fails is left out of the
    /// remaining rounds, and its measurement says why.
    pub fn measure(mut self, rounds: usize, mut progress: impl FnMut(&str)) -> Vec<Measurement> {
        let mut tallies: Vec<Tally> = self.contestants.iter().map(|_| Tally::default()).collect();
        for round in 1..=rounds {
            for (contestant, tally) in self.contestants.iter_mut().zip(&mut tallies) {
                if tally.failure.is_none() && tally.unavailable.is_none() {
                    progress(&format!("{}: round {round} of {rounds}: {}", self.name, contestant.peer));
                    tally.add((contestant.measure)());
                }
            }
        }
        let contestants = self.contestants.iter().zip(tallies);
        contestants
            .map(|(contestant, tally)| Measurement {
                case: self.name.clone(),
                peer: contestant.peer.to_owned(),
                unit: self.unit.to_owned(),
                better: self.better,
                summary: Summary::of(&tally.rounds),
                rounds: tally.rounds,
                details: tally.details.into_iter().map(|(name, rounds)| (name.to_owned(), rounds)).collect(),
                latency: tally.latency.as_ref().map(Latency::of),
                failure: tally.failure,
                unavailable: tally.unavailable,
            })
            .collect()
    }
}

/// The backend as a process of its own.
#[derive(Debug)]
pub struct Backend {
    /// Where it listens.
    pub address: SocketAddr,
    /// When it began to listen: the monotonic time in nanoseconds.
    pub listened_at_ns: u64,
    process: Running,
}

impl Backend {
    /// Waits until `process`, started with [`Setting::backend_command`], listens.
    ///
    /// # Errors
    /// When it does not within the deadline.
    pub fn listening(mut process: Running, listen_delay: Duration) -> Result<Self> {
        let stdout = process.take_stdout().context("read the backend's stdout")?;
        let mut line = String::new();
        if readable_within(&stdout, listen_delay + LISTEN_WITHIN)? {
            BufReader::new(stdout).read_line(&mut line).context("read the backend's address")?;
        }
        let words = line.strip_prefix("listening ").and_then(|rest| rest.trim().split_once(' '));
        let (address, at) =
            words.with_context(|| format!("the backend does not listen: {}", process.last_words()))?;
        let address = address.parse().context("read the backend's address")?;
        let listened_at_ns = at.parse().context("read the backend's time")?;
        Ok(Self { address, listened_at_ns, process })
    }

    /// The backend's process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }
}

impl Setting {
    /// The arguments of the backend.
    #[must_use]
    pub fn backend_arguments(listen: SocketAddr, listen_delay: Duration) -> [String; 3] {
        let delay = humantime::format_duration(listen_delay);
        ["backend".to_owned(), format!("--listen={listen}"), format!("--listen-delay={delay}")]
    }

    /// Starts a backend on a free port and `peer` in front of it, shows that bytes pass, and has `measure` put a load
    /// on them. What the load cost is added to the sample's details, if that says how much work it was. A peer that
    /// hands off, or has a plane to use, is shown to do so before the load and after it.
    ///
    /// # Errors
    /// When one of them does not start, or `measure` fails. [`Unavailable`] when `peer` cannot hold `flows` flows.
    pub fn with_peer(
        &self,
        peer: &dyn Peer,
        flows: usize,
        measure: impl FnOnce(&Started) -> Result<Sample>,
    ) -> Result<Sample> {
        let (backend, mut started) = self.start(Ipv4Addr::LOCALHOST.into(), peer, flows)?;
        let way = self.way(peer, &backend);
        let outcome = way.load(&started, measure);
        started.explain(outcome)
    }

    /// As [`Setting::with_peer`], with `measure`, and so its client, on the other side of a pair of network devices.
    ///
    /// # Errors
    /// Those of [`Setting::with_peer`]; [`Unavailable`] when there is no other side.
    pub fn with_remote_client(
        &self,
        peer: &dyn Peer,
        flows: usize,
        measure: impl FnOnce(&Started) -> Result<Sample> + Send,
    ) -> Result<Sample> {
        let Some(remote) = &self.remote else {
            bail!(Unavailable("a second network namespace could not be made; the run has said why"));
        };
        let (backend, mut started) = self.start(Remote::PROXY.into(), peer, flows)?;
        let way = self.way(peer, &backend);
        let outcome = remote.run(|| way.load(&started, measure));
        started.explain(outcome)
    }

    fn way(&self, peer: &dyn Peer, backend: &Backend) -> Way<'_> {
        Way {
            pattern: &self.pattern,
            has_process_for_each_flow: peer.has_process_for_each_flow(),
            handed_off_to: peer.hands_off().then(|| backend.pid()),
            carried_by: peer.forwards_by(),
        }
    }

    /// Starts a backend and `peer` in front of it, both at `ip`.
    fn start(&self, ip: IpAddr, peer: &dyn Peer, flows: usize) -> Result<(Backend, Started)> {
        if peer.needs_ebpf() && !self.may_load_ebpf {
            bail!(Unavailable(NEEDS_ROOT));
        }
        if flows > peer.flows_max(self.files_max) {
            bail!(Unavailable(
                "it cannot hold so many flows with the files, or the processes, that it may have"
            ));
        }
        let mut command = process::command(&self.this_program);
        command.args(Self::backend_arguments(SocketAddr::new(ip, 0), Duration::ZERO));
        command.stdout(Stdio::piped());
        let process = started_on(&self.layout.backend, || Running::start("backend", command))?;
        let backend = Backend::listening(process, Duration::ZERO)?;
        let wanted = Wanted { backend: backend.address, listen: ip, flows, layout: &self.layout };
        let started = peer.start(&wanted)?;
        Ok((backend, started))
    }

    /// Starts a backend on `listen` as drowse would: nothing between this process and the backend's exec, and drowse's
    /// own processors. Returns the time from just before the start until it listened.
    ///
    /// # Errors
    /// When it does not listen.
    pub fn backend_alone(&self, listen: SocketAddr, listen_delay: Duration) -> Result<Duration> {
        let mut command = Command::new(&self.this_program);
        command.args(Self::backend_arguments(listen, listen_delay));
        process::plain(&mut command);
        command.stdout(Stdio::piped());
        started_on(&self.layout.proxy, || {
            let started_at = drowse::clock::now();
            let backend = Backend::listening(Running::start("backend", command)?, listen_delay)?;
            Ok(Duration::from_nanos(backend.listened_at_ns).saturating_sub(started_at))
        })
    }
}

/// How a peer that was started is measured.
#[derive(Clone, Copy)]
struct Way<'a> {
    pattern: &'a Pattern,
    has_process_for_each_flow: bool,
    /// The backend's process, when it must hold its clients' connections itself.
    handed_off_to: Option<u32>,
    /// The plane of drowse that must move the bytes.
    carried_by: Option<Plane>,
}

impl Way<'_> {
    /// Shows that bytes pass, runs `measure`, and adds what its load cost.
    fn load(&self, started: &Started, measure: impl FnOnce(&Started) -> Result<Sample>) -> Result<Sample> {
        let address = started.address;
        crate::client::warm_up(address, self.pattern)?;
        if let Some(backend) = self.handed_off_to {
            wait_until_handed_off(address, backend, self.pattern)?;
        }
        if let Some(plane) = self.carried_by {
            wait_until_carried(started, plane, self.pattern).context("before the load")?;
        }
        let counters = || Counters::now(started.process.as_ref(), self.has_process_for_each_flow);
        let before = counters()?;
        let mut sample = measure(started)?;
        if let Some(work) = sample.work {
            sample.details.extend(counters()?.costs_since(&before, work));
        }
        if let Some(backend) = self.handed_off_to {
            check_handed_off(address, backend, self.pattern)?;
        }
        if let Some(plane) = self.carried_by {
            wait_until_carried(started, plane, self.pattern).context("after the load")?;
        }
        Ok(sample)
    }
}

/// A loopback address that is free now, and another one. Nothing else binds ports in a namespace of our own.
///
/// # Errors
/// When no port is free.
pub fn free_addresses() -> Result<(SocketAddr, SocketAddr)> {
    let bind = || std::net::TcpListener::bind("127.0.0.1:0").context("find a free port");
    // Both are bound at once, or the kernel may name one port twice.
    let (one, other) = (bind()?, bind()?);
    let address = |listener: &std::net::TcpListener| listener.local_addr().context("read a free port");
    Ok((address(&one)?, address(&other)?))
}

/// `time` in milliseconds.
#[must_use]
pub fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1_000.0
}

#[cfg(test)]
mod tests {
    use anyhow::ensure;

    use super::*;

    #[test]
    fn rounds_are_interleaved_and_a_failed_peer_is_left_out_with_its_reason() {
        let order = std::cell::RefCell::new(String::new());
        let contestant = |peer: &'static str, fails_at: usize| Contestant {
            peer,
            measure: Box::new({
                let order = &order;
                let mut round = 0;
                move || {
                    round += 1;
                    order.borrow_mut().push_str(peer);
                    ensure!(round != fails_at, "broke");
                    Ok(Sample { value: 1.0, latency: None, details: vec![("bytes", 2.0)], work: None })
                }
            }),
        };
        let case = Case {
            name: "case".to_owned(),
            unit: "1",
            better: Better::Higher,
            contestants: vec![contestant("a", 0), contestant("b", 2)],
        };
        let measurements = case.measure(3, |_| {});
        assert_eq!(*order.borrow(), "ababa");
        assert_eq!(measurements[0].rounds, [1.0; 3]);
        assert_eq!(measurements[0].details["bytes"], [2.0; 3]);
        assert!(measurements[0].failure.is_none());
        assert_eq!(measurements[1].rounds, [1.0]);
        assert_eq!(measurements[1].failure.as_deref(), Some("broke"));
    }

    #[test]
    fn a_peer_that_is_not_available_has_not_failed() {
        let measure = || Err(anyhow::Error::new(Unavailable("not built")));
        let contestants = vec![Contestant { peer: "a", measure: Box::new(measure) }];
        let case = Case { name: "case".to_owned(), unit: "1", better: Better::Higher, contestants };
        let measurements = case.measure(2, |_| {});
        assert_eq!(measurements[0].unavailable.as_deref(), Some("not built"));
        assert!(measurements[0].failure.is_none() && measurements[0].rounds.is_empty());
    }
}
