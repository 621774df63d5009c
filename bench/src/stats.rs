//! What a handful of rounds says.
//!
//! Owns: median, spread and the rule for when a spread is too wide. Pure.

use serde::{Deserialize, Serialize};

/// A spread (interquartile range over median) above this is too wide to name a winner.
pub const SPREAD_MAX: f64 = 0.15;

/// A summary of the rounds of one peer in one case.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// The middle round.
    pub median: f64,
    /// The lowest round.
    pub min: f64,
    /// The highest round.
    pub max: f64,
    /// First quartile.
    pub lower_quartile: f64,
    /// Third quartile.
    pub upper_quartile: f64,
}

impl Summary {
    /// Summarises `rounds`; none when there is no round.
    #[must_use]
    pub fn of(rounds: &[f64]) -> Option<Self> {
        let mut sorted = rounds.to_vec();
        sorted.sort_by(f64::total_cmp);
        Some(Self {
            median: quantile(&sorted, 2)?,
            min: *sorted.first()?,
            max: *sorted.last()?,
            lower_quartile: quantile(&sorted, 1)?,
            upper_quartile: quantile(&sorted, 3)?,
        })
    }

    /// The interquartile range as a part of the median.
    #[must_use]
    pub fn spread(&self) -> f64 {
        (self.upper_quartile - self.lower_quartile) / self.median.abs().max(f64::EPSILON)
    }

    /// Whether the rounds differ too much for a ranking.
    #[must_use]
    pub fn is_wide(&self) -> bool {
        self.spread() > SPREAD_MAX
    }

    /// Whether the middle halves of both share a value.
    #[must_use]
    pub fn overlaps(&self, other: &Self) -> bool {
        self.lower_quartile <= other.upper_quartile && other.lower_quartile <= self.upper_quartile
    }

    /// Whether `value` lies between the quartiles.
    #[must_use]
    pub fn straddles(&self, value: f64) -> bool {
        self.lower_quartile < value && value < self.upper_quartile
    }
}

/// The median of `values`; none when there is none.
#[must_use]
pub fn median(values: &[f64]) -> Option<f64> {
    Summary::of(values).map(|summary| summary.median)
}

/// `own` over `reference` round by round: interleaved rounds share the machine's mood, so their ratio is steadier
/// than the ratio of the medians.
#[must_use]
pub fn ratios(own: &[f64], reference: &[f64]) -> Vec<f64> {
    own.iter().zip(reference).map(|(own, reference)| own / reference.abs().max(f64::EPSILON)).collect()
}

/// The value at `quarter` quarters of `sorted`, interpolated.
fn quantile(sorted: &[f64], quarter: usize) -> Option<f64> {
    let quarters = sorted.len().checked_sub(1)? * quarter;
    let below = *sorted.get(quarters / 4)?;
    let above = sorted.get(quarters / 4 + 1).copied().unwrap_or(below);
    let part = [0.0, 0.25, 0.5, 0.75].get(quarters % 4)?;
    Some(below + (above - below) * part)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(left: f64, right: f64) -> bool {
        (left - right).abs() < 1e-9
    }

    #[test]
    fn quartiles_are_interpolated() {
        let summary = Summary::of(&[4.0, 1.0, 3.0, 2.0]).unwrap();
        assert!(close(summary.median, 2.5), "{summary:?}");
        assert!(close(summary.lower_quartile, 1.75) && close(summary.upper_quartile, 3.25), "{summary:?}");
        assert!(close(summary.min, 1.0) && close(summary.max, 4.0), "{summary:?}");
        assert!(close(median(&[7.0]).unwrap(), 7.0));
        assert!(median(&[]).is_none());
    }

    #[test]
    fn one_outlier_of_five_does_not_make_a_wide_spread_but_two_do() {
        assert!(!Summary::of(&[100.0, 101.0, 99.0, 100.0, 40.0]).unwrap().is_wide());
        assert!(Summary::of(&[100.0, 101.0, 60.0, 100.0, 40.0]).unwrap().is_wide());
    }

    #[test]
    fn ratios_go_by_round() {
        assert_eq!(ratios(&[2.0, 6.0], &[1.0, 2.0]), [2.0, 3.0]);
    }
}
