//! The result of a run as Markdown tables, one for each case.
//!
//! Owns: how figures are shown. Must never: show a ratio across runs.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use crate::isolation::Network;
use crate::report::ranking::{Verdict, order, ties, verdict};
use crate::report::{Measurement, Report, title};
use crate::stats::{DIFFERENCE_MIN, Order, ROUNDS_MIN, SPREAD_MAX, Summary, median};

/// A machine that does nothing else has less than this.
const LOAD_AVERAGE_MAX: f64 = 0.5;

/// The whole report.
#[must_use]
pub fn render(report: &Report) -> String {
    let mut text = String::from("# drowse and its peers\n\n");
    // Writing to a string cannot fail.
    let _ = head(&mut text, report);
    for case in report.cases() {
        let _ = section(&mut text, case);
    }
    let _ = appendix(&mut text, report);
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
    writeln!(
        text,
        "- {} to {}, {} interleaved rounds: `cargo xtask bench {}`",
        report.started,
        report.ended,
        report.rounds,
        report.arguments.join(" ")
    )?;
    writeln!(
        text,
        "- kernel {}, {} ({} processors), {} MiB",
        machine.kernel, machine.processor, machine.processors, machine.memory_mib
    )?;
    writeln!(
        text,
        "- load average {} when it started, {} when it ended",
        machine.load_average_start, machine.load_average_end
    )?;
    if machine.load_average_start > LOAD_AVERAGE_MAX {
        writeln!(text, "- **other work kept the machine busy when it started**")?;
    }
    writeln!(text, "- {network}, congestion control {}", machine.congestion_control)?;
    let layout = &machine.layout;
    writeln!(
        text,
        "- processors: client {:?}, proxy {:?}, backend {:?}; {} files a process",
        layout.client, layout.proxy, layout.backend, machine.files_max
    )?;
    writeln!(text, "- load: {}; every answer and every byte is checked", report.load)?;
    rules(text)?;
    for peer in &report.peers {
        writeln!(text, "- {}: {}", peer.name, peer.version)?;
    }
    writeln!(text, "- command lines and configurations stand at the end")
}

fn rules(text: &mut String) -> std::fmt::Result {
    writeln!(
        text,
        "- a figure is the median of its rounds; its spread is the interquartile range over the median, and above \
         {:.0} % no winner is named; latencies are percentiles over all rounds",
        SPREAD_MAX * 100.0
    )?;
    writeln!(
        text,
        "- a ratio is the median of the ratios round by round; `~` before it: no difference seen, because the rounds \
         do not agree on the better one (sign test over at least {ROUNDS_MIN} rounds, 94 %), differ by less than \
         {:.0} %, or are spread too wide",
        DIFFERENCE_MIN * 100.0
    )
}

fn section(text: &mut String, case: &[Measurement]) -> std::fmt::Result {
    let Some(first) = case.first() else { return Ok(()) };
    writeln!(text, "\n## {}\n", first.case)?;
    let words = title(&first.case);
    if words != first.case {
        writeln!(text, "{}; {} is better.\n", words, first.better.word())?;
    }
    figures(text, first, case)?;
    costs(text, case)?;
    for measurement in case {
        if let Some(reason) = &measurement.unavailable {
            writeln!(text, "\n{} was not available: {reason}.", measurement.peer)?;
        }
    }
    conclusion(text, case)
}

fn figures(text: &mut String, first: &Measurement, case: &[Measurement]) -> std::fmt::Result {
    let references: Vec<&Measurement> =
        case.iter().filter(|measurement| is_reference(&measurement.peer)).collect();
    let has_latency = case.iter().any(|measurement| measurement.latency.is_some());
    let mut columns =
        vec!["peer".to_owned(), first.unit.clone(), "min - max".to_owned(), "spread".to_owned()];
    columns.extend(references.iter().map(|reference| format!("x {}", reference.peer)));
    if has_latency {
        columns.extend(["p50 us", "p99 us", "p99.9 us"].map(str::to_owned));
    }
    header(text, &columns)?;
    for measurement in case {
        let mut cells = own_cells(measurement);
        cells
            .extend(references.iter().map(|reference| ratio(measurement, reference).unwrap_or_else(nothing)));
        if has_latency {
            cells.extend(measurement.latency.as_ref().map_or_else(
                || vec![nothing(); 3],
                |latency| [latency.p50_us, latency.p99_us, latency.p999_us].map(figure).to_vec(),
            ));
        }
        writeln!(text, "| {} |", cells.join(" | "))?;
    }
    Ok(())
}

/// What stands beside the main figure: memory, processor time, switches.
fn costs(text: &mut String, case: &[Measurement]) -> std::fmt::Result {
    let details: BTreeSet<&str> =
        case.iter().flat_map(|measurement| measurement.details.keys()).map(String::as_str).collect();
    if details.is_empty() {
        return Ok(());
    }
    let columns: Vec<String> = ["peer"].iter().chain(&details).map(|name| words(name)).collect();
    writeln!(text)?;
    header(text, &columns)?;
    for measurement in case.iter().filter(|measurement| !measurement.details.is_empty()) {
        let cells = details.iter().map(|name| {
            let rounds = measurement.details.get(*name).map(Vec::as_slice).unwrap_or_default();
            median(rounds).map_or_else(nothing, figure)
        });
        let cells: Vec<String> = cells.collect();
        writeln!(text, "| {} | {} |", measurement.peer, cells.join(" | "))?;
    }
    Ok(())
}

fn conclusion(text: &mut String, case: &[Measurement]) -> std::fmt::Result {
    let verdict = verdict(case);
    match verdict {
        Verdict::Winner(peer) => writeln!(text, "\nBest proxy: {peer}.")?,
        Verdict::Tie(one, other) => {
            writeln!(text, "\nNo winner: no difference seen between {one} and {other}.")?;
        }
        Verdict::TooWide(peer, spread) => {
            writeln!(
                text,
                "\nNo winner: the rounds of {peer} are spread too wide ({:.0} %).",
                spread * 100.0
            )?;
        }
        Verdict::TooFewRounds => writeln!(text, "\nNo winner: fewer than {ROUNDS_MIN} rounds.")?,
        Verdict::Nothing => {}
    }
    let others: Vec<String> = ties(case)
        .into_iter()
        .filter(|(one, other)| verdict != Verdict::Tie(one, other))
        .map(|(one, other)| format!("{one} and {other}"))
        .collect();
    if !others.is_empty() {
        writeln!(text, "\nNo difference seen either between {}.", others.join(", "))?;
    }
    Ok(())
}

fn appendix(text: &mut String, report: &Report) -> std::fmt::Result {
    if report.peers.is_empty() {
        return Ok(());
    }
    writeln!(text, "\n## Command lines and configurations")?;
    for peer in report.peers.iter().filter(|peer| !peer.command_line.is_empty()) {
        writeln!(
            text,
            "\n### {} ({})\n\n```console\n{}\n```",
            peer.name,
            peer.version,
            peer.command_line.join(" ")
        )?;
        if let Some(configuration) = &peer.configuration {
            writeln!(text, "\n```text\n{}\n```", configuration.trim_end())?;
        }
    }
    Ok(())
}

/// The head of a table; figures are aligned to the right.
pub(super) fn header(text: &mut String, columns: &[String]) -> std::fmt::Result {
    writeln!(text, "| {} |", columns.join(" | "))?;
    writeln!(text, "|---|{}", "---:|".repeat(columns.len().saturating_sub(1)))
}

/// The ratio of two peers, marked unless a difference was seen.
pub(super) fn ratio(own: &Measurement, reference: &Measurement) -> Option<String> {
    if own.peer == reference.peer {
        return own.summary.map(|_| "1".to_owned());
    }
    let seen = matches!(order(own, reference)?, Order::Ahead | Order::Behind);
    let mark = if seen { "" } else { "~" };
    Some(format!("{mark}{:.2}", own.ratio_to(reference)?.median))
}

fn own_cells(measurement: &Measurement) -> Vec<String> {
    let mut cells = vec![measurement.peer.clone()];
    match (&measurement.summary, &measurement.failure) {
        (Some(summary), None) => {
            cells.push(figure(summary.median));
            cells.push(format!("{} - {}", figure(summary.min), figure(summary.max)));
            cells.push(spread(measurement, summary));
        }
        (_, Some(_)) => cells.extend(["failed".to_owned(), nothing(), nothing()]),
        (None, None) => cells.extend(["not available".to_owned(), nothing(), nothing()]),
    }
    cells
}

/// One round has no spread.
fn spread(measurement: &Measurement, summary: &Summary) -> String {
    if measurement.rounds.len() < 2 {
        return nothing();
    }
    format!("{:.0} %{}", summary.spread() * 100.0, if summary.is_wide() { " (wide)" } else { "" })
}

/// What others are compared with: the limit and the peers, not drowse's own variants.
fn is_reference(peer: &str) -> bool {
    !peer.starts_with("drowse")
}

/// The name of a detail in words: `pss_mb` as `PSS MB`.
pub(crate) fn words(detail: &str) -> String {
    let word = |word| match word {
        "mb" => "MB",
        "kib" => "KiB",
        "mib" => "MiB",
        "gib" => "GiB",
        "cpu" => "CPU",
        "pss" => "PSS",
        "rss" => "RSS",
        "1k" => "1,000",
        "100k" => "100,000",
        other => other,
    };
    detail.split('_').map(word).collect::<Vec<_>>().join(" ")
}

pub(super) fn nothing() -> String {
    "-".to_owned()
}

/// A figure with about three digits that count, thousands apart.
pub(crate) fn figure(value: f64) -> String {
    let decimals = match value.abs() {
        size if size >= 100.0 => 0,
        size if size >= 10.0 => 1,
        size if size >= 0.1 || size == 0.0 => 2,
        size if size >= 0.01 => 3,
        _ => 4,
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
    use crate::report::tests::{measurement, report};
    use crate::report::{Better, PeerFacts};

    #[test]
    fn figures_keep_about_three_digits() {
        for (value, text) in [
            (1_234_567.8, "1,234,568"),
            (999.4, "999"),
            (12.34, "12.3"),
            (0.456, "0.46"),
            (0.0456, "0.046"),
            (0.0, "0.00"),
            (-1234.0, "-1,234"),
        ] {
            assert_eq!(figure(value), text);
        }
    }

    #[test]
    fn a_table_shows_medians_ratios_costs_and_failures() {
        let mut broken = measurement("case", "drowse-copy", Better::Higher, &[1.0]);
        broken.failure = Some("wrong bytes".to_owned());
        let text = render(&report(vec![
            measurement("case", "direct", Better::Higher, &[200.0; 5]),
            measurement("case", "systemd-socket-proxyd", Better::Higher, &[50.0; 5]),
            measurement("case", "drowse-splice", Better::Higher, &[100.0; 5]),
            broken,
        ]));
        assert!(text.contains("| drowse-splice | 100 | 100 - 100 | 0 % | 0.50 | 2.00 |"), "{text}");
        assert!(text.contains("| peer | PSS MB |\n|---|---:|\n| direct | 20.0 |"), "{text}");
        assert!(text.contains("| drowse-copy | failed |"), "{text}");
        assert!(text.contains("Best proxy: drowse-splice."), "{text}");
        assert!(text.contains("- case: drowse-copy: wrong bytes"), "{text}");
    }

    #[test]
    fn what_cannot_be_told_apart_is_marked_and_named() {
        let text = render(&report(vec![
            measurement("case", "haproxy", Better::Higher, &[100.0; 5]),
            measurement("case", "drowse-splice", Better::Higher, &[101.0; 5]),
        ]));
        assert!(text.contains("| drowse-splice | 101 | 101 - 101 | 0 % | ~1.01 |"), "{text}");
        assert!(text.contains("No winner: no difference seen between drowse-splice and haproxy."), "{text}");
        let few = render(&report(vec![
            measurement("case", "haproxy", Better::Higher, &[100.0]),
            measurement("case", "drowse-splice", Better::Higher, &[200.0]),
        ]));
        assert!(
            few.contains("| 200 | 200 - 200 | - | ~2.00 |")
                && few.contains("No winner: fewer than 5 rounds."),
            "{few}"
        );
    }

    #[test]
    fn details_have_names_in_words() {
        assert_eq!(words("machine_cpu_s_per_100k"), "machine CPU s per 100,000");
        assert_eq!(words("kernel_kib_per_flow"), "kernel KiB per flow");
    }

    #[test]
    fn configurations_are_quoted() {
        let mut quoted = report(Vec::new());
        quoted.peers.push(PeerFacts {
            name: "haproxy".to_owned(),
            version: "2.6".to_owned(),
            command_line: vec!["haproxy".to_owned(), "-f".to_owned(), "haproxy.cfg".to_owned()],
            configuration: Some("defaults\n  option splice-auto\n".to_owned()),
        });
        let text = render(&quoted);
        assert!(text.contains("```console\nhaproxy -f haproxy.cfg\n```"), "{text}");
        assert!(text.contains("```text\ndefaults\n  option splice-auto\n```"), "{text}");
    }
}
