//! The result of a run as Markdown tables, one for each case.
//!
//! Owns: how figures are shown. Must never: show a ratio across runs.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use crate::isolation::Network;
use crate::report::{Measurement, Report, Verdict, verdict};
use crate::stats::{SPREAD_MAX, median};

/// A machine that does nothing else has less than this.
const LOAD_AVERAGE_MAX: f64 = 0.5;

/// The whole report.
#[must_use]
pub fn render(report: &Report) -> String {
    let mut text = String::from("# drowse and its peers\n\n");
    // Writing to a string cannot fail.
    let _ = head(&mut text, report);
    for case in report.cases() {
        let _ = table(&mut text, case);
    }
    let failures = report.failures();
    if !failures.is_empty() {
        text.push_str("\n## Failures\n\n");
        for failure in failures {
            let _ = writeln!(text, "- {failure}");
        }
    }
    text
}

fn head(text: &mut String, report: &Report) -> std::fmt::Result {
    let machine = &report.machine;
    let network = match machine.network {
        Network::Namespace => "loopback of a network namespace of its own",
        Network::UserNamespace => "loopback of a network namespace of its own, without root",
        Network::Host => "the host's loopback (no namespace allowed)",
    };
    if report.quick {
        writeln!(text, "**A smoke test: too short for its figures to mean anything.**\n")?;
    }
    writeln!(text, "- started {}, {} interleaved rounds", report.started, report.rounds)?;
    writeln!(text, "- kernel {}, {}, {} MiB", machine.kernel, machine.processor, machine.memory_mib)?;
    if machine.load_average > LOAD_AVERAGE_MAX {
        writeln!(
            text,
            "- **other work kept the machine busy when it started (load average {})**",
            machine.load_average
        )?;
    }
    writeln!(text, "- {network}, congestion control {}", machine.congestion_control)?;
    let layout = &machine.layout;
    writeln!(
        text,
        "- processors: client {:?}, proxy {:?}, backend {:?}; {} files a process",
        layout.client, layout.proxy, layout.backend, machine.files_max
    )?;
    writeln!(text, "- load: {}; every answer and every byte is checked", report.load)?;
    writeln!(
        text,
        "- median, spread (interquartile range over median; above {:.0} % no winner is named), and the median of the \
         ratios round by round",
        SPREAD_MAX * 100.0
    )?;
    for peer in &report.peers {
        let line = peer.command_line.join(" ");
        let line = if line.is_empty() { line } else { format!(": `{line}`") };
        writeln!(text, "- {} ({}){line}", peer.name, peer.version)?;
    }
    Ok(())
}

fn table(text: &mut String, case: &[Measurement]) -> std::fmt::Result {
    let Some(first) = case.first() else { return Ok(()) };
    let references: Vec<&Measurement> =
        case.iter().filter(|measurement| is_reference(&measurement.peer)).collect();
    let details: BTreeSet<&str> =
        case.iter().flat_map(|measurement| measurement.details.keys()).map(String::as_str).collect();
    let has_latency = case.iter().any(|measurement| measurement.latency.is_some());

    let mut columns =
        vec!["peer".to_owned(), first.unit.clone(), "min - max".to_owned(), "spread".to_owned()];
    columns.extend(references.iter().map(|reference| format!("x {}", reference.peer)));
    columns.extend(details.iter().map(|name| (*name).to_owned()));
    if has_latency {
        columns.extend(["p50 us", "p99 us", "p99.9 us"].map(str::to_owned));
    }
    writeln!(text, "\n## {}\n", first.case)?;
    writeln!(text, "| {} |", columns.join(" | "))?;
    writeln!(text, "|{}", "---|".repeat(columns.len()))?;
    for measurement in case {
        let mut cells = own_cells(measurement);
        cells.extend(references.iter().map(|reference| {
            measurement.ratio_to(reference).map_or_else(nothing, |ratio| format!("{:.2}", ratio.median))
        }));
        cells.extend(details.iter().map(|name| {
            let rounds = measurement.details.get(*name).map(Vec::as_slice).unwrap_or_default();
            median(rounds).map_or_else(nothing, figure)
        }));
        if has_latency {
            cells.extend(measurement.latency.map_or_else(
                || vec![nothing(); 3],
                |latency| [latency.p50_us, latency.p99_us, latency.p999_us].map(figure).to_vec(),
            ));
        }
        writeln!(text, "| {} |", cells.join(" | "))?;
    }
    for measurement in case {
        if let Some(reason) = &measurement.unavailable {
            writeln!(text, "\n{} was not available: {reason}.", measurement.peer)?;
        }
    }
    match verdict(case) {
        Verdict::Winner(peer) => writeln!(text, "\nBest proxy: {peer}."),
        Verdict::Tie(one, other) => {
            writeln!(text, "\nNo winner: {one} and {other} differ by less than their spread.")
        }
        Verdict::TooWide(peer, spread) => {
            writeln!(text, "\nNo winner: the rounds of {peer} are spread too wide ({:.0} %).", spread * 100.0)
        }
        Verdict::Nothing => Ok(()),
    }
}

fn own_cells(measurement: &Measurement) -> Vec<String> {
    let mut cells = vec![measurement.peer.clone()];
    match (&measurement.summary, &measurement.failure) {
        (Some(summary), None) => {
            cells.push(figure(summary.median));
            cells.push(format!("{} - {}", figure(summary.min), figure(summary.max)));
            cells.push(format!(
                "{:.0} %{}",
                summary.spread() * 100.0,
                if summary.is_wide() { " (wide)" } else { "" }
            ));
        }
        (_, Some(_)) => cells.extend(["failed".to_owned(), nothing(), nothing()]),
        (None, None) => cells.extend(["not available".to_owned(), nothing(), nothing()]),
    }
    cells
}

/// What others are compared with: the limit and the peers, not drowse's own variants.
fn is_reference(peer: &str) -> bool {
    !peer.starts_with("drowse")
}

fn nothing() -> String {
    "-".to_owned()
}

/// A figure with about three digits that count, thousands apart.
fn figure(value: f64) -> String {
    let decimals = match value.abs() {
        size if size >= 100.0 => 0,
        size if size >= 10.0 => 1,
        _ => 2,
    };
    let plain = format!("{value:.decimals$}");
    let (sign, digits) = plain.strip_prefix('-').map_or(("", plain.as_str()), |digits| ("-", digits));
    let (whole, fraction) =
        digits.split_once('.').map_or((digits, ""), |(whole, fraction)| (whole, fraction));
    let mut grouped = String::new();
    for (index, digit) in whole.chars().enumerate() {
        if index > 0 && (whole.len() - index) % 3 == 0 {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    if fraction.is_empty() { format!("{sign}{grouped}") } else { format!("{sign}{grouped}.{fraction}") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::Better;
    use crate::report::tests::{measurement, report};

    #[test]
    fn figures_keep_about_three_digits() {
        for (value, text) in [
            (1_234_567.8, "1,234,568"),
            (999.4, "999"),
            (12.34, "12.3"),
            (0.456, "0.46"),
            (-1234.0, "-1,234"),
        ] {
            assert_eq!(figure(value), text);
        }
    }

    #[test]
    fn a_table_shows_medians_ratios_and_failures() {
        let mut broken = measurement("case", "drowse-copy", Better::Higher, &[1.0]);
        broken.failure = Some("wrong bytes".to_owned());
        let text = render(&report(vec![
            measurement("case", "direct", Better::Higher, &[200.0, 200.0, 200.0]),
            measurement("case", "systemd-socket-proxyd", Better::Higher, &[50.0, 50.0, 50.0]),
            measurement("case", "drowse-splice", Better::Higher, &[100.0, 100.0, 100.0]),
            broken,
        ]));
        assert!(text.contains("| drowse-splice | 100 | 100 - 100 | 0 % | 0.50 | 2.00 | 10.0 |"), "{text}");
        assert!(text.contains("| drowse-copy | failed |"), "{text}");
        assert!(text.contains("Best proxy: drowse-splice."), "{text}");
        assert!(text.contains("- case: drowse-copy: wrong bytes"), "{text}");
    }
}
