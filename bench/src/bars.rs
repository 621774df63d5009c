//! The bars that a run must reach: `bars.toml`.
//!
//! Owns: comparing a run with them. Must never: compare figures of two runs; a bar is a ratio within the run, or a
//! limit in the case's own unit.

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use crate::report::{Measurement, Report};
use crate::stats::{Summary, ratios};

/// Version of the file's format.
const SCHEMA: u32 = 1;

/// All bars.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Bars {
    schema: u32,
    #[serde(rename = "bar")]
    bars: Vec<Bar>,
}

/// One bar.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Bar {
    case: String,
    peer: String,
    /// The detail of the measurement to look at; without it, its main figure.
    detail: Option<String>,
    /// The peer whose figure is 1; without it the bar is in the case's unit.
    against: Option<String>,
    at_least: Option<f64>,
    at_most: Option<f64>,
}

impl Bars {
    /// Reads bars.
    ///
    /// # Errors
    /// When the text is not TOML of this format, or a bar has no limit.
    pub fn read(text: &str) -> Result<Self> {
        let bars: Self = toml::from_str(text).context("read the bars")?;
        ensure!(bars.schema == SCHEMA, "the bars have schema {}, this program knows {SCHEMA}", bars.schema);
        for bar in &bars.bars {
            let limits = usize::from(bar.at_least.is_some()) + usize::from(bar.at_most.is_some());
            ensure!(limits == 1, "the bar of {} in {} needs either at_least or at_most", bar.peer, bar.case);
        }
        Ok(bars)
    }

    /// The bars that `report` does not reach, one line each. A bar of a case that was measured, but not with the peer
    /// that it is about, is not reached either. Bars of cases that were not measured do not count.
    #[must_use]
    pub fn missed_by(&self, report: &Report) -> Vec<String> {
        let measured = |case: &str| report.measurements.iter().any(|measurement| measurement.case == case);
        self.bars.iter().filter(|bar| measured(&bar.case)).filter_map(|bar| bar.missed_by(report)).collect()
    }
}

impl Bar {
    fn missed_by(&self, report: &Report) -> Option<String> {
        let what = format!("{}: {}", self.case, self.peer);
        let Some(measurement) = report.find(&self.case, &self.peer).filter(|own| own.failure.is_none())
        else {
            return Some(format!("{what} was not measured"));
        };
        if let Some(reason) = &measurement.unavailable {
            return Some(format!("{what} was not available: {reason}"));
        }
        let Some(summary) = self.figure(report, measurement) else {
            let against =
                self.against.as_ref().map_or_else(String::new, |peer| format!(", or {peer} has none"));
            return Some(format!("{what} has no figure to compare with the bar{against}"));
        };
        let (limit, word, short) = match (self.at_least, self.at_most) {
            (Some(limit), _) => (limit, "at least", summary.median < limit),
            (None, Some(limit)) => (limit, "at most", summary.median > limit),
            (None, None) => return Some(format!("{what} has a bar without a limit")),
        };
        let unit = match (&self.against, &self.detail) {
            (Some(peer), None) => format!("times {peer}"),
            (Some(peer), Some(detail)) => format!("times {peer} ({detail})"),
            (None, Some(detail)) => detail.clone(),
            (None, None) => measurement.unit.clone(),
        };
        if short {
            return Some(format!("{what} has {:.2} {unit}, the bar is {word} {limit}", summary.median));
        }
        if summary.is_wide() && summary.straddles(limit) {
            return Some(format!("{what} is spread too wide to tell ({word} {limit} {unit}): run it again"));
        }
        None
    }

    fn figure(&self, report: &Report, own: &Measurement) -> Option<Summary> {
        let rounds = |of: &'_ Measurement| match &self.detail {
            Some(detail) => of.details.get(detail).cloned(),
            None => Some(of.rounds.clone()),
        };
        match &self.against {
            Some(peer) => {
                let reference = report.find(&self.case, peer).filter(|peer| peer.failure.is_none())?;
                Summary::of(&ratios(&rounds(own)?, &rounds(reference)?))
            }
            None => Summary::of(&rounds(own)?),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::Better;
    use crate::report::tests::{measurement, report};

    fn missed(bar: &str, peers: &[(&str, &[f64])]) -> Vec<String> {
        let measurements =
            peers.iter().map(|(peer, rounds)| measurement("c", peer, Better::Higher, rounds)).collect();
        Bars::read(&format!("schema = 1\n[[bar]]\ncase = \"c\"\npeer = \"a\"\n{bar}"))
            .unwrap()
            .missed_by(&report(measurements))
    }

    #[test]
    fn ratios_and_limits_are_judged_by_their_medians() {
        let peers: [(&str, &[f64]); 2] = [("a", &[13.0, 13.0, 13.0]), ("b", &[10.0, 10.0, 10.0])];
        assert!(missed("against = \"b\"\nat_least = 1.3", &peers).is_empty());
        assert_eq!(
            missed("against = \"b\"\nat_least = 1.4", &peers),
            ["c: a has 1.30 times b, the bar is at least 1.4"]
        );
        assert!(missed("at_most = 13.0", &peers).is_empty());
        assert_eq!(missed("at_most = 12.0", &peers), ["c: a has 13.00 1/s, the bar is at most 12"]);
        assert!(missed("detail = \"pss_mb\"\nat_most = 1.4", &peers).is_empty());
        assert_eq!(missed("detail = \"pss_mb\"\nat_most = 1.2", &peers).len(), 1);
        assert!(missed("detail = \"pss_mb\"\nagainst = \"b\"\nat_most = 1.3", &peers).is_empty());
        assert_eq!(
            missed("detail = \"pss_mb\"\nagainst = \"b\"\nat_most = 1.2", &peers),
            ["c: a has 1.30 times b (pss_mb), the bar is at most 1.2"]
        );
    }

    #[test]
    fn a_bar_is_missed_when_nothing_can_be_compared() {
        assert_eq!(missed("at_least = 1.0", &[("b", &[1.0])]), ["c: a was not measured"]);
        assert_eq!(missed("against = \"b\"\nat_least = 1.0", &[("a", &[1.0])]).len(), 1);
        let wide = missed("at_least = 10.0", &[("a", &[5.0, 11.0, 20.0])]);
        assert!(wide.len() == 1 && wide[0].contains("too wide"), "{wide:?}");
    }

    #[test]
    fn a_bar_of_a_case_that_was_not_asked_for_does_not_count() {
        let bars = Bars::read("schema = 1\n[[bar]]\ncase = \"other\"\npeer = \"a\"\nat_least = 1.0").unwrap();
        assert!(bars.missed_by(&report(vec![measurement("c", "a", Better::Higher, &[1.0])])).is_empty());
    }

    #[test]
    fn a_bar_needs_exactly_one_limit_and_known_fields() {
        for bar in ["", "at_least = 1.0\nat_most = 2.0", "at_least = 1.0\nat_last = 1.0"] {
            assert!(
                Bars::read(&format!("schema = 1\n[[bar]]\ncase = \"c\"\npeer = \"a\"\n{bar}")).is_err(),
                "{bar}"
            );
        }
        assert!(Bars::read("schema = 2\nbar = []").is_err());
    }

    #[test]
    fn the_projects_own_bars_are_readable() {
        assert!(!Bars::read(include_str!("../bars.toml")).unwrap().bars.is_empty());
    }
}
