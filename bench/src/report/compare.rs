//! Two runs beside each other: do they put the peers in the same order?
//!
//! Owns: what `--compare` checks. Must never: compare the figures of two runs; only the order of peers within each.

use std::collections::BTreeMap;

use crate::report::{Measurement, Report, ranking};
use crate::stats::Order;

/// What two runs say of the pairs that both measured.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Comparison {
    /// Pairs that both put in the same order.
    pub agreed: usize,
    /// Pairs of which at least one run says that it sees no difference, or cannot tell.
    pub flagged: usize,
    /// Pairs that one run puts the other way round than the other, one line each.
    pub contradictions: Vec<String>,
}

impl Comparison {
    /// Whether the two runs have any pair in common.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// Compares the order of every pair of peers in every case that both runs measured.
#[must_use]
pub fn compare(this: &Report, other: &Report) -> Comparison {
    let mut comparison = Comparison::default();
    let others: BTreeMap<(&str, &str), &Measurement> =
        other.measurements.iter().map(|peer| ((peer.case.as_str(), peer.peer.as_str()), peer)).collect();
    let find = |peer: &Measurement| others.get(&(peer.case.as_str(), peer.peer.as_str())).copied();
    for case in this.cases() {
        for (index, first) in case.iter().enumerate() {
            for second in case.iter().skip(index + 1) {
                let (Some(here), Some(there)) = (
                    ranking::order(first, second),
                    find(first).zip(find(second)).and_then(|(first, second)| ranking::order(first, second)),
                ) else {
                    continue;
                };
                match (here, there) {
                    (Order::Ahead, Order::Ahead) | (Order::Behind, Order::Behind) => comparison.agreed += 1,
                    (Order::Ahead, Order::Behind) => comparison.contradictions.push(line(first, second)),
                    (Order::Behind, Order::Ahead) => comparison.contradictions.push(line(second, first)),
                    _ => comparison.flagged += 1,
                }
            }
        }
    }
    comparison
}

fn line(ahead: &Measurement, behind: &Measurement) -> String {
    format!(
        "{}: {} is ahead of {} in this run and behind it in the other",
        ahead.case, ahead.peer, behind.peer
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::tests::{measurement, report};
    use crate::stats::Better;

    fn run(peers: &[(&str, [f64; 5])]) -> Report {
        report(peers.iter().map(|(peer, rounds)| measurement("c", peer, Better::Higher, rounds)).collect())
    }

    #[test]
    fn the_same_order_agrees_whatever_the_figures() {
        let slow = run(&[("a", [1.0; 5]), ("b", [2.0; 5]), ("d", [3.0; 5])]);
        let fast = run(&[("b", [20.0; 5]), ("d", [21.0; 5]), ("a", [10.0; 5])]);
        let comparison = compare(&slow, &fast);
        assert_eq!(comparison, Comparison { agreed: 3, flagged: 0, contradictions: Vec::new() });
    }

    #[test]
    fn the_other_order_is_a_contradiction_that_names_case_and_peers() {
        let one = run(&[("a", [1.0; 5]), ("b", [2.0; 5])]);
        let other = run(&[("a", [2.0; 5]), ("b", [1.0; 5])]);
        let said = compare(&one, &other).contradictions;
        assert_eq!(said, ["c: b is ahead of a in this run and behind it in the other"]);
        let said = compare(&other, &one).contradictions;
        assert_eq!(said, ["c: a is ahead of b in this run and behind it in the other"]);
    }

    #[test]
    fn what_either_run_flags_cannot_contradict() {
        let steady = run(&[("a", [1.0; 5]), ("b", [2.0; 5])]);
        for flagged in [
            run(&[("a", [2.0; 5]), ("b", [1.0, 2.0, 3.0, 4.0, 5.0])]),
            run(&[("a", [2.0, 2.0, 2.0, 2.0, 1.9]), ("b", [1.9, 1.9, 1.9, 1.9, 2.0])]),
        ] {
            let comparison = compare(&steady, &flagged);
            assert_eq!(comparison, Comparison { agreed: 0, flagged: 1, contradictions: Vec::new() });
        }
    }

    #[test]
    fn runs_without_a_pair_in_common_say_nothing() {
        let one = run(&[("a", [1.0; 5]), ("b", [2.0; 5])]);
        let other = run(&[("a", [1.0; 5]), ("d", [2.0; 5])]);
        assert!(compare(&one, &other).is_empty());
        assert!(!compare(&one, &one).is_empty());
    }
}
