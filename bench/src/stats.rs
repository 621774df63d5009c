//! What a handful of rounds says.
//!
//! Owns: median, spread, the rule for when a spread is too wide, and the rule by which one peer is ahead of another.
//! Pure.
//!
//! Rounds are few and not normally distributed, so both rules rest on order statistics alone: the interquartile range
//! for the spread, and for a pair of peers the sign test's interval of the median of the differences round by round
//! (Conover, Practical Nonparametric Statistics, section 3.2).

use serde::{Deserialize, Serialize};

/// A spread (interquartile range over median) above this is too wide to name a winner.
pub const SPREAD_MAX: f64 = 0.15;

/// Fewer rounds than this cannot tell chance from a difference: even if all of four point the same way, one of eight
/// such runs does so by chance.
pub const ROUNDS_MIN: usize = 5;

/// A smaller part than this may be due to the run itself (the layout of memory, the placement of threads), however
/// steady its rounds are.
pub const DIFFERENCE_MIN: f64 = 0.02;

/// The part of runs of equal peers in which the interval of the median lies on one side of zero, at each end: five
/// rounds that all point the same way.
const CHANCE_MAX: f64 = 1.0 / 32.0;

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

/// Which way is better.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Better {
    /// More is better.
    Higher,
    /// Less is better.
    Lower,
}

impl Better {
    /// In words.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Higher => "more",
            Self::Lower => "less",
        }
    }
}

/// What the rounds of two peers say about their order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// The first is better.
    Ahead,
    /// The first is worse.
    Behind,
    /// The rounds do not agree which is better, or the difference is too small.
    NoDifference,
    /// The rounds of one of the two are spread too wide.
    TooWide,
    /// Fewer than [`ROUNDS_MIN`] rounds.
    TooFewRounds,
}

/// The order of two peers whose rounds were interleaved: `own` is ahead or behind only if the interval of the median
/// of the differences lies beyond [`DIFFERENCE_MIN`].
#[must_use]
pub fn order(own: &[f64], reference: &[f64], better: Better) -> Order {
    let mut differences: Vec<f64> =
        own.iter().zip(reference).map(|(own, reference)| difference(*own, *reference)).collect();
    if differences.len() < ROUNDS_MIN {
        return Order::TooFewRounds;
    }
    if [own, reference].into_iter().filter_map(Summary::of).any(|summary| summary.is_wide()) {
        return Order::TooWide;
    }
    differences.sort_by(f64::total_cmp);
    let cut = cut_at_each_end(differences.len());
    let (Some(low), Some(high)) = (differences.get(cut), differences.iter().rev().nth(cut)) else {
        return Order::NoDifference;
    };
    match better {
        Better::Higher if *low > DIFFERENCE_MIN => Order::Ahead,
        Better::Lower if *high < -DIFFERENCE_MIN => Order::Ahead,
        Better::Higher if *high < -DIFFERENCE_MIN => Order::Behind,
        Better::Lower if *low > DIFFERENCE_MIN => Order::Behind,
        Better::Higher | Better::Lower => Order::NoDifference,
    }
}

/// The difference as a part of the mean of both sizes: between -2 and 2, and, unlike a ratio, of use for figures that
/// are zero or negative.
fn difference(own: f64, reference: f64) -> f64 {
    let mean = f64::midpoint(own.abs(), reference.abs());
    if mean > 0.0 { (own - reference) / mean } else { 0.0 }
}

/// How many of `count` sorted values the interval of their median leaves out at each end.
fn cut_at_each_end(count: usize) -> usize {
    let Ok(exponent) = i32::try_from(count) else { return 0 };
    let all = f64::from(exponent);
    // The chance that exactly `cut` of `count` fair coins fall on one side, and that at most so many do.
    let (mut exactly, mut at_most, mut cut, mut fallen) = (0.5_f64.powi(exponent), 0.0, 0, 0.0);
    while cut < count {
        at_most += exactly;
        if at_most > CHANCE_MAX {
            break;
        }
        exactly *= (all - fallen) / (fallen + 1.0);
        fallen += 1.0;
        cut += 1;
    }
    cut.saturating_sub(1)
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

    #[test]
    fn five_rounds_that_agree_make_an_order_and_one_that_does_not_unmakes_it() {
        let steady = [100.0, 101.0, 99.0, 100.0, 102.0];
        let above = steady.map(|round| round * 1.05);
        assert_eq!(order(&above, &steady, Better::Higher), Order::Ahead);
        assert_eq!(order(&steady, &above, Better::Higher), Order::Behind);
        assert_eq!(order(&above, &steady, Better::Lower), Order::Behind);
        assert_eq!(order(&steady, &above, Better::Lower), Order::Ahead);
        let mut one_below = above;
        one_below[2] = 98.0;
        assert_eq!(order(&one_below, &steady, Better::Higher), Order::NoDifference);
        assert_eq!(order(&steady.map(|round| round * 1.01), &steady, Better::Higher), Order::NoDifference);
    }

    #[test]
    fn rounds_are_compared_in_pairs() {
        // The machine slows down from round to round; in each round the first is 10 % ahead.
        let falling = [110.0, 108.0, 106.0, 104.0, 102.0];
        assert_eq!(order(&falling.map(|round| round * 1.1), &falling, Better::Higher), Order::Ahead);
    }

    #[test]
    fn no_order_without_enough_steady_rounds() {
        let (low, high) = ([1.0; 4], [2.0; 4]);
        assert_eq!(order(&high, &low, Better::Higher), Order::TooFewRounds);
        assert_eq!(order(&[], &[], Better::Higher), Order::TooFewRounds);
        let wide = [200.0, 300.0, 400.0, 500.0, 600.0];
        assert_eq!(order(&wide, &[1.0; 5], Better::Higher), Order::TooWide);
        assert_eq!(order(&[1.0; 5], &wide, Better::Higher), Order::TooWide);
    }

    #[test]
    fn zero_and_negative_figures_have_an_order_too() {
        assert_eq!(order(&[0.0; 5], &[0.0; 5], Better::Lower), Order::NoDifference);
        assert_eq!(order(&[0.0; 5], &[1.0; 5], Better::Lower), Order::Ahead);
        assert_eq!(order(&[-1.0; 5], &[1.0; 5], Better::Lower), Order::Ahead);
    }

    #[test]
    fn more_rounds_allow_outliers() {
        let cuts: Vec<usize> = [0, 1, 5, 8, 9, 20, 1000].map(cut_at_each_end).to_vec();
        // 2 * P(at most k of n) <= 1/16: one of nine (20/512), five of twenty, ...
        assert_eq!(cuts, [0, 0, 0, 0, 1, 5, 470]);
    }
}
