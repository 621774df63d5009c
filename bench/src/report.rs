//! The result of a run: what is written to `latest.json`.
//!
//! Owns: the versioned schema. Must never: lose a round; every figure that a table shows can be worked out again.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

use crate::cpus::Layout;
use crate::isolation::Network;
use crate::stats::{Summary, ratios};

pub use crate::stats::Better;

pub mod compare;
pub mod markdown;
pub mod ranking;
pub mod readme;

/// Version of the schema of [`Report`]; changes when a field changes its meaning or goes away.
pub const SCHEMA: u32 = 2;

/// A whole run.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Report {
    /// [`SCHEMA`] of the program that wrote it.
    pub schema: u32,
    /// When the run began, in UTC (RFC 3339).
    pub started: String,
    /// When its last round ended, in UTC (RFC 3339).
    pub ended: String,
    /// The arguments of the run.
    pub arguments: Vec<String>,
    /// A smoke test: its figures are not to be compared.
    pub quick: bool,
    /// Rounds asked for.
    pub rounds: usize,
    /// How requests are sent: `closed loop` waits for each answer before the next request.
    pub load: String,
    /// Where it ran.
    pub machine: Machine,
    /// What took part.
    pub peers: Vec<PeerFacts>,
    /// Each case with each peer, in the order of measuring.
    pub measurements: Vec<Measurement>,
}

/// The machine of a run.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Machine {
    /// Release of the kernel.
    pub kernel: String,
    /// The processor's own name.
    pub processor: String,
    /// Processors that this run could use.
    pub processors: usize,
    /// The processors of each part.
    pub layout: Layout,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Where the traffic flowed.
    pub network: Network,
    /// TCP congestion control of all sockets.
    pub congestion_control: String,
    /// Load average of the last minute when the run began: other work on the machine spoils figures.
    pub load_average_start: f64,
    /// The same when it had ended; most of it is the run's own work.
    pub load_average_end: f64,
    /// Files that each process could open.
    pub files_max: u64,
}

/// A peer that took part.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PeerFacts {
    /// The name in [`Measurement::peer`].
    pub name: String,
    /// As the program itself tells it.
    pub version: String,
    /// How it was started for one flow; empty for a direct connection.
    pub command_line: Vec<String>,
    /// Its configuration file, for one flow; none where the command line says all.
    pub configuration: Option<String>,
}

/// One peer in one case.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Measurement {
    /// The case's name.
    pub case: String,
    /// The peer's name.
    pub peer: String,
    /// Unit of the rounds.
    pub unit: String,
    /// Which way is better.
    pub better: Better,
    /// The figure of each round, in order.
    pub rounds: Vec<f64>,
    /// What the rounds say; none when there is none.
    pub summary: Option<Summary>,
    /// Figures beside the main one, round by round, by name with its unit.
    pub details: BTreeMap<String, Vec<f64>>,
    /// Latencies of all rounds together, where the case has them.
    pub latency: Option<Latency>,
    /// Why the peer did not finish its rounds.
    pub failure: Option<String>,
    /// Why the peer could not take part here.
    pub unavailable: Option<String>,
}

impl Measurement {
    /// This peer's figure over that of `reference`, which is of the same case, round by round.
    #[must_use]
    pub fn ratio_to(&self, reference: &Self) -> Option<Summary> {
        Summary::of(&ratios(&self.rounds, &reference.rounds))
    }
}

/// Percentiles of a latency over all rounds, in microseconds.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Latency {
    /// Answers counted.
    pub count: u64,
    /// Half of the answers came within.
    pub p50_us: f64,
    /// 99 of 100.
    pub p99_us: f64,
    /// 999 of 1000.
    pub p999_us: f64,
    /// All of them.
    pub max_us: f64,
    /// The whole distribution, as far as there were answers enough to know it.
    pub curve: Vec<LatencyPoint>,
}

/// One point of a distribution.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct LatencyPoint {
    /// One answer of this many was slower: 100 is the 99th percentile.
    pub one_in: u32,
    /// All others came within this time.
    pub us: f64,
}

impl Latency {
    /// The percentiles of a histogram of nanoseconds.
    #[must_use]
    pub fn of(histogram: &Histogram<u64>) -> Self {
        let microseconds =
            |nanoseconds: u64| std::time::Duration::from_nanos(nanoseconds).as_secs_f64() * 1e6;
        let within = |part: f64| microseconds(histogram.value_at_quantile(part));
        let curve = (0..=6).flat_map(|decade| [1, 2, 5].map(|digit| digit * 10_u32.pow(decade)));
        Self {
            count: histogram.len(),
            p50_us: within(0.5),
            p99_us: within(0.99),
            p999_us: within(0.999),
            max_us: microseconds(histogram.max()),
            curve: curve
                .filter(|one_in| u64::from(*one_in) <= histogram.len())
                .map(|one_in| LatencyPoint { one_in, us: within(1.0 - 1.0 / f64::from(one_in)) })
                .collect(),
        }
    }
}

impl Report {
    /// Reads what an earlier run wrote.
    ///
    /// # Errors
    /// When the file cannot be read, or was written with another schema.
    pub fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
        Self::parse(&text).with_context(|| format!("read the run in {}", path.display()))
    }

    /// Reads the text of a `latest.json`.
    ///
    /// # Errors
    /// When it is not JSON of this schema.
    pub fn parse(text: &str) -> Result<Self> {
        /// Of all schemas.
        #[derive(Deserialize)]
        struct Version {
            schema: u32,
        }
        let Version { schema } = serde_json::from_str(text).context("find its schema")?;
        ensure!(
            schema == SCHEMA,
            "it has schema {schema} and this program knows {SCHEMA}: measure again with `cargo xtask bench`"
        );
        serde_json::from_str(text).context("read it as JSON of this schema")
    }

    /// The text of `latest.json`.
    ///
    /// # Errors
    /// When a figure cannot be written as JSON.
    pub fn to_json(&self) -> Result<String> {
        let mut json = serde_json::to_string_pretty(self).context("write the report as JSON")?;
        json.push('\n');
        Ok(json)
    }

    /// The names of all that was measured, in the order of measuring.
    #[must_use]
    pub fn peer_names(&self) -> Vec<&str> {
        names(&self.measurements)
    }

    /// The measurements in groups of one case each, in order.
    pub fn cases(&self) -> impl Iterator<Item = &[Measurement]> {
        self.measurements.chunk_by(|one, next| one.case == next.case)
    }

    /// The measurement of `peer` in `case`.
    #[must_use]
    pub fn find(&self, case: &str, peer: &str) -> Option<&Measurement> {
        self.measurements.iter().find(|measurement| measurement.case == case && measurement.peer == peer)
    }

    /// What did not work, one line each.
    #[must_use]
    pub fn failures(&self) -> Vec<String> {
        let line = |measurement: &Measurement| {
            let failure = measurement.failure.as_ref()?;
            Some(format!("{}: {}: {failure}", measurement.case, measurement.peer))
        };
        self.measurements.iter().filter_map(line).collect()
    }
}

/// The peers of `measurements`, each once, in order.
pub(crate) fn names(measurements: &[Measurement]) -> Vec<&str> {
    let mut names: Vec<&str> = Vec::new();
    for measurement in measurements {
        if !names.contains(&measurement.peer.as_str()) {
            names.push(&measurement.peer);
        }
    }
    names
}

/// A case's name in words.
#[must_use]
pub fn title(case: &str) -> String {
    let parts: Vec<&str> = case.split('/').collect();
    match parts.as_slice() {
        ["remote", ..] => {
            format!("remote client: {}", title(case.strip_prefix("remote/").unwrap_or_default()))
        }
        ["request", len, "1"] => format!("{} requests, 1 connection", length(len)),
        ["request", len, connections] => format!("{} requests, {connections} connections", length(len)),
        ["latency", len, rate] => format!("{} requests at {rate}/s", length(len)),
        ["connect", len] => format!("a connection for each {} request", length(len)),
        ["bulk", "up"] => "bulk, client to backend".to_owned(),
        ["bulk", "down"] => "bulk, backend to client".to_owned(),
        ["bulk", "both"] => "bulk, both ways at once".to_owned(),
        ["size", len] => format!("{} messages", length(len)),
        ["slow-reader"] => "fast readers beside a slow one".to_owned(),
        ["idle-flows", rest @ ..] => {
            ["open idle flows"].iter().chain(rest).copied().collect::<Vec<_>>().join(", ")
        }
        ["handoff-busy"] => "drowse while all flows that it handed off are busy".to_owned(),
        ["cold", "instant"] => "cold start, instant backend".to_owned(),
        ["cold", delay] => format!("cold start, backend listens after {delay}"),
        ["startup"] => "start until ready".to_owned(),
        _ => case.to_owned(),
    }
}

/// `64B` as `64 B`.
fn length(len: &str) -> String {
    let digits = len.trim_end_matches(|letter: char| !letter.is_ascii_digit());
    let unit = len.strip_prefix(digits).unwrap_or_default();
    format!("{digits} {unit}")
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn measurement(case: &str, peer: &str, better: Better, rounds: &[f64]) -> Measurement {
        Measurement {
            case: case.to_owned(),
            peer: peer.to_owned(),
            unit: "1/s".to_owned(),
            better,
            rounds: rounds.to_vec(),
            summary: Summary::of(rounds),
            details: BTreeMap::from([(
                "pss_mb".to_owned(),
                rounds.iter().map(|value| value / 10.0).collect(),
            )]),
            latency: None,
            failure: None,
            unavailable: None,
        }
    }

    pub(crate) fn report(measurements: Vec<Measurement>) -> Report {
        Report {
            schema: SCHEMA,
            started: "2026-01-01T00:00:00Z".to_owned(),
            ended: "2026-01-01T01:00:00Z".to_owned(),
            arguments: Vec::new(),
            quick: false,
            rounds: 5,
            load: "closed loop".to_owned(),
            machine: Machine {
                kernel: "6.18".to_owned(),
                processor: "one".to_owned(),
                processors: 2,
                layout: Layout { client: vec![0], proxy: vec![0, 1], backend: vec![1] },
                memory_mib: 1,
                network: Network::Namespace,
                congestion_control: "reno".to_owned(),
                load_average_start: 0.0,
                load_average_end: 1.0,
                files_max: 1024,
            },
            peers: Vec::new(),
            measurements,
        }
    }

    #[test]
    fn the_report_survives_json() {
        let mut report = report(vec![measurement("c", "a", Better::Lower, &[1.5, 2.5])]);
        let mut histogram = Histogram::new(3).unwrap();
        (1..=1000_u64).for_each(|us| histogram.record(us * 1000).unwrap());
        report.measurements[0].latency = Some(Latency::of(&histogram));
        report.peers.push(PeerFacts {
            name: "a".to_owned(),
            version: "1".to_owned(),
            command_line: vec!["a".to_owned(), "b c".to_owned()],
            configuration: Some("line\nline \"quoted\"\n".to_owned()),
        });
        let text = report.to_json().unwrap();
        let back = Report::parse(&text).unwrap();
        assert_eq!(back.find("c", "a").unwrap().rounds, [1.5, 2.5]);
        assert_eq!(back.peers[0].configuration, report.peers[0].configuration);
        assert_eq!(back.to_json().unwrap(), text);
    }

    #[test]
    fn another_schema_is_refused_with_what_to_do() {
        let mut old = report(Vec::new());
        old.schema = SCHEMA - 1;
        let refusal = format!("{:#}", Report::parse(&old.to_json().unwrap()).unwrap_err());
        assert!(refusal.contains("measure again"), "{refusal}");
        assert!(Report::parse("{}").is_err());
    }

    #[test]
    fn a_distribution_ends_where_its_answers_do() {
        let mut histogram = Histogram::new(3).unwrap();
        assert!(Latency::of(&histogram).curve.is_empty());
        (1..=100_u64).for_each(|us| histogram.record(us * 1000).unwrap());
        let latency = Latency::of(&histogram);
        assert_eq!(latency.count, 100);
        let ends: Vec<u32> = latency.curve.iter().map(|point| point.one_in).collect();
        assert_eq!(ends, [1, 2, 5, 10, 20, 50, 100]);
        let at = |one_in| latency.curve.iter().find(|point| point.one_in == one_in).unwrap().us;
        assert!((at(2) - 50.0).abs() < 0.1 && (at(100) - 99.0).abs() < 0.1, "{latency:?}");
        assert!((latency.max_us - 100.0).abs() < 0.1 && (latency.p99_us - 99.0).abs() < 0.1, "{latency:?}");
    }

    #[test]
    fn cases_have_titles_in_words() {
        for (case, words) in [
            ("request/4KiB/32", "4 KiB requests, 32 connections"),
            ("request/64B/1", "64 B requests, 1 connection"),
            ("remote/bulk/up", "remote client: bulk, client to backend"),
            ("idle-flows", "open idle flows"),
            ("something/else", "something/else"),
        ] {
            assert_eq!(title(case), words);
        }
    }
}
