//! The result of a run: what is written to `latest.json`.
//!
//! Owns: the versioned schema. Must never: lose a round; every figure that a table shows can be worked out again.

use std::collections::BTreeMap;

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

use crate::cpus::Layout;
use crate::isolation::Network;
use crate::stats::{Summary, ratios};

pub mod markdown;

/// Version of the schema of [`Report`]; changes when a field changes its meaning or goes away.
pub const SCHEMA: u32 = 1;

/// A whole run.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Report {
    /// [`SCHEMA`] of the program that wrote it.
    pub schema: u32,
    /// When the run began, in UTC.
    pub started: String,
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
    /// The processors of each part.
    pub layout: Layout,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Where the traffic flowed.
    pub network: Network,
    /// TCP congestion control of all sockets.
    pub congestion_control: String,
    /// Load average of the last minute when the run began: other work on the machine spoils figures.
    pub load_average: f64,
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
}

/// Which way is better.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Better {
    /// More is better.
    Higher,
    /// Less is better.
    Lower,
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

/// Percentiles of a latency, in microseconds.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Latency {
    /// Half of the answers came within.
    pub p50_us: f64,
    /// 99 of 100.
    pub p99_us: f64,
    /// 999 of 1000.
    pub p999_us: f64,
    /// All of them.
    pub max_us: f64,
}

impl Latency {
    /// The percentiles of a histogram of nanoseconds.
    #[must_use]
    pub fn of(histogram: &Histogram<u64>) -> Self {
        let microseconds =
            |nanoseconds: u64| std::time::Duration::from_nanos(nanoseconds).as_secs_f64() * 1e6;
        Self {
            p50_us: microseconds(histogram.value_at_quantile(0.5)),
            p99_us: microseconds(histogram.value_at_quantile(0.99)),
            p999_us: microseconds(histogram.value_at_quantile(0.999)),
            max_us: microseconds(histogram.max()),
        }
    }
}

impl Report {
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

/// Who won a case.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Verdict<'a> {
    /// One proxy was better than every other, by more than the spread.
    Winner(&'a str),
    /// The two best differ by less than their spread.
    Tie(&'a str, &'a str),
    /// The rounds of this peer differ too much.
    TooWide(&'a str, f64),
    /// Fewer than two proxies, or too few rounds to know a spread.
    Nothing,
}

/// Ranks the proxies of one case; a direct connection is the limit, not a competitor.
#[must_use]
pub fn verdict(case: &[Measurement]) -> Verdict<'_> {
    let summed = |measurement: &'_ Measurement| measurement.summary;
    let mut ranked: Vec<(&str, Summary)> = case
        .iter()
        .filter(|measurement| measurement.peer != "direct" && measurement.rounds.len() >= 3)
        .filter_map(|measurement| Some((measurement.peer.as_str(), summed(measurement)?)))
        .collect();
    ranked.sort_by(|(_, left), (_, right)| left.median.total_cmp(&right.median));
    if case.first().is_some_and(|measurement| measurement.better == Better::Higher) {
        ranked.reverse();
    }
    if let Some((peer, summary)) = ranked.iter().find(|(_, summary)| summary.is_wide()) {
        return Verdict::TooWide(peer, summary.spread());
    }
    match ranked.as_slice() {
        [(best, first), (second, next), ..] if first.overlaps(next) => Verdict::Tie(best, second),
        [(best, _), _, ..] => Verdict::Winner(best),
        [] | [_] => Verdict::Nothing,
    }
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
            arguments: Vec::new(),
            quick: false,
            rounds: 5,
            load: "closed loop".to_owned(),
            machine: Machine {
                kernel: "6.18".to_owned(),
                processor: "one".to_owned(),
                layout: Layout { client: vec![0], proxy: vec![0, 1], backend: vec![1] },
                memory_mib: 1,
                network: Network::Namespace,
                congestion_control: "reno".to_owned(),
                load_average: 0.0,
                files_max: 1024,
            },
            peers: Vec::new(),
            measurements,
        }
    }

    #[test]
    fn the_better_end_of_the_ranking_wins_and_direct_does_not_compete() {
        let case = |better| {
            [
                measurement("c", "direct", better, &[500.0, 500.0, 500.0]),
                measurement("c", "a", better, &[100.0, 101.0, 102.0]),
                measurement("c", "b", better, &[200.0, 201.0, 202.0]),
            ]
        };
        assert_eq!(verdict(&case(Better::Higher)), Verdict::Winner("b"));
        assert_eq!(verdict(&case(Better::Lower)), Verdict::Winner("a"));
    }

    #[test]
    fn a_wide_spread_or_an_overlap_names_no_winner() {
        let steady = measurement("c", "a", Better::Higher, &[100.0, 101.0, 102.0]);
        let wide = measurement("c", "b", Better::Higher, &[100.0, 200.0, 300.0]);
        assert_eq!(verdict(&[steady.clone(), wide]), Verdict::TooWide("b", 0.5));
        let near = measurement("c", "b", Better::Higher, &[101.0, 102.0, 103.0]);
        assert_eq!(verdict(&[steady.clone(), near]), Verdict::Tie("b", "a"));
        let single = measurement("c", "b", Better::Higher, &[900.0]);
        assert_eq!(verdict(&[steady, single]), Verdict::Nothing);
    }

    #[test]
    fn the_report_survives_json() {
        let report = report(vec![measurement("c", "a", Better::Lower, &[1.5, 2.5])]);
        let text = serde_json::to_string(&report).unwrap();
        let back: Report = serde_json::from_str(&text).unwrap();
        assert_eq!(back.find("c", "a").unwrap().rounds, [1.5, 2.5]);
        assert_eq!(serde_json::to_string(&back).unwrap(), text);
    }
}
