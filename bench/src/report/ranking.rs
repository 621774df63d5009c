//! Who is ahead of whom in a case.
//!
//! Owns: the one rule by which a table, a comparison of runs and a reader may call a peer better: [`stats::order`].
//! Must never: name a winner that a second run need not confirm.

use crate::report::Measurement;
use crate::stats::{self, Better, Order, SPREAD_MAX, Summary};

/// The limit, not a competitor.
pub const DIRECT: &str = "direct";

/// Who won a case.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Verdict<'a> {
    /// One proxy was ahead of every other.
    Winner(&'a str),
    /// No difference was seen between the best and this one.
    Tie(&'a str, &'a str),
    /// The rounds of this peer differ too much; its spread.
    TooWide(&'a str, f64),
    /// Too few rounds to tell a difference from chance.
    TooFewRounds,
    /// Fewer than two proxies.
    Nothing,
}

/// The order of two peers of one case; none when one of them has no rounds to compare.
#[must_use]
pub fn order(own: &Measurement, reference: &Measurement) -> Option<Order> {
    let compared = [own, reference].iter().all(|peer| peer.failure.is_none() && !peer.rounds.is_empty());
    compared.then(|| stats::order(&own.rounds, &reference.rounds, own.better))
}

/// Ranks the proxies of one case; a direct connection is the limit, not a competitor.
#[must_use]
pub fn verdict(case: &[Measurement]) -> Verdict<'_> {
    let ranked = ranked(case);
    let [(best, _), others @ ..] = ranked.as_slice() else { return Verdict::Nothing };
    if others.is_empty() {
        return Verdict::Nothing;
    }
    let widest = ranked.iter().max_by(|left, right| left.1.spread().total_cmp(&right.1.spread()));
    if let Some((peer, summary)) = widest.filter(|(_, summary)| summary.spread() > SPREAD_MAX) {
        return Verdict::TooWide(&peer.peer, summary.spread());
    }
    for (other, _) in others {
        match order(best, other) {
            Some(Order::Ahead) => {}
            Some(Order::TooFewRounds) => return Verdict::TooFewRounds,
            _ => return Verdict::Tie(&best.peer, &other.peer),
        }
    }
    Verdict::Winner(&best.peer)
}

/// The pairs of proxies between which no difference was seen although both were steady.
#[must_use]
pub fn ties(case: &[Measurement]) -> Vec<(&str, &str)> {
    let ranked = ranked(case);
    let mut ties = Vec::new();
    for (index, (own, _)) in ranked.iter().enumerate() {
        for (other, _) in ranked.iter().skip(index + 1) {
            if order(own, other) == Some(Order::NoDifference) {
                ties.push((own.peer.as_str(), other.peer.as_str()));
            }
        }
    }
    ties
}

/// The proxies with figures, the best median first.
fn ranked(case: &[Measurement]) -> Vec<(&Measurement, Summary)> {
    let mut ranked: Vec<(&Measurement, Summary)> = case
        .iter()
        .filter(|measurement| measurement.peer != DIRECT && measurement.failure.is_none())
        .filter_map(|measurement| Some((measurement, measurement.summary?)))
        .collect();
    ranked.sort_by(|(_, left), (_, right)| left.median.total_cmp(&right.median));
    if case.first().is_some_and(|measurement| measurement.better == Better::Higher) {
        ranked.reverse();
    }
    ranked
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::tests::measurement;

    #[test]
    fn the_better_end_of_the_ranking_wins_and_direct_does_not_compete() {
        let case = |better| {
            [
                measurement("c", "direct", better, &[500.0; 5]),
                measurement("c", "a", better, &[100.0, 101.0, 102.0, 100.0, 99.0]),
                measurement("c", "b", better, &[200.0, 201.0, 202.0, 200.0, 199.0]),
            ]
        };
        assert_eq!(verdict(&case(Better::Higher)), Verdict::Winner("b"));
        assert_eq!(verdict(&case(Better::Lower)), Verdict::Winner("a"));
        assert!(ties(&case(Better::Lower)).is_empty());
    }

    #[test]
    fn a_wide_spread_or_a_round_that_disagrees_names_no_winner() {
        let steady = measurement("c", "a", Better::Higher, &[100.0, 101.0, 102.0, 101.0, 100.0]);
        let wide = measurement("c", "b", Better::Higher, &[100.0, 200.0, 300.0, 400.0, 500.0]);
        assert!(matches!(verdict(&[steady.clone(), wide]), Verdict::TooWide("b", spread) if spread > 0.5));
        let near = measurement("c", "b", Better::Higher, &[108.0, 107.0, 108.0, 100.0, 108.0]);
        let case = [steady.clone(), near];
        assert_eq!(verdict(&case), Verdict::Tie("b", "a"));
        assert_eq!(ties(&case), [("b", "a")]);
        let single = measurement("c", "b", Better::Higher, &[900.0]);
        assert_eq!(verdict(&[steady.clone(), single]), Verdict::TooFewRounds);
        assert_eq!(verdict(&[steady]), Verdict::Nothing);
        assert_eq!(verdict(&[]), Verdict::Nothing);
    }

    #[test]
    fn a_peer_that_failed_does_not_compete() {
        let steady = measurement("c", "a", Better::Higher, &[100.0; 5]);
        let mut broken = measurement("c", "b", Better::Higher, &[900.0; 5]);
        broken.failure = Some("wrong bytes".to_owned());
        assert_eq!(order(&steady, &broken), None);
        assert_eq!(verdict(&[steady, broken]), Verdict::Nothing);
    }
}
