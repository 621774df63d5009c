//! The main table, for the README: the cases that decide between proxies, one row each.
//!
//! Owns: which cases those are. Must never: show a figure that is not in the run.

use std::fmt::Write as _;

use crate::report::markdown::{figure, header, nothing};
use crate::report::ranking::DIRECT;
use crate::report::{Measurement, Report, names, title};
use crate::stats::{self, Better, Order, median, ratios};

/// What the others are compared with: what systemd has for the job.
const REFERENCE: &str = "systemd-socket-proxyd";

/// The rows: a case, and, where the row is not about its main figure, the name and unit of the detail.
const ROWS: [(&str, Option<(&str, &str)>); 24] = [
    ("request/64B/1", None),
    ("request/64B/32", None),
    ("request/64B/256", None),
    ("request/64B/512", None),
    ("request/4KiB/32", None),
    ("connect/64B", None),
    ("latency/64B/20k", None),
    ("latency/64B/20k", Some(("since_sent_p50_us", "us (p50 since it was sent)"))),
    ("latency/64B/20k", Some(("since_sent_p99_us", "us (p99 since it was sent)"))),
    ("bulk/up", None),
    ("bulk/down", None),
    ("bulk/both", None),
    ("request/64B/32", Some(("machine_cpu_s_per_100k", "CPU s of the machine per 100,000"))),
    ("latency/64B/20k", Some(("machine_cpu_s_per_100k", "CPU s of the machine per 100,000"))),
    ("bulk/down", Some(("machine_cpu_s_per_gib", "CPU s of the machine per GiB"))),
    ("idle-flows", None),
    ("idle-flows", Some(("kernel_kib_per_flow", "KiB/flow of the kernel"))),
    ("handoff-busy", None),
    ("slow-reader", None),
    ("remote/request/64B/32", None),
    ("remote/bulk/down", None),
    ("cold/instant", None),
    ("cold/300ms", None),
    ("startup", None),
];

/// One row: the rounds of each peer that has any.
struct Row<'a> {
    title: String,
    better: Better,
    cells: Vec<(&'a str, &'a [f64])>,
}

impl<'a> Row<'a> {
    fn find(report: &'a Report, case: &str, detail: Option<(&str, &str)>) -> Option<Self> {
        let measured: Vec<&Measurement> = report
            .measurements
            .iter()
            .filter(|measurement| measurement.case == case && measurement.failure.is_none())
            .collect();
        let first = measured.first()?;
        let (unit, better) =
            detail.map_or((first.unit.as_str(), first.better), |(_, unit)| (unit, Better::Lower));
        let cells: Vec<_> = measured
            .iter()
            .filter_map(|own| {
                Some((
                    own.peer.as_str(),
                    detail.map_or(Some(&own.rounds), |(name, _)| own.details.get(name))?.as_slice(),
                ))
            })
            .filter(|(_, rounds)| !rounds.is_empty())
            .collect();
        let title = format!(
            "{} ({unit}{})",
            title(case),
            if better == Better::Lower { ", less is better" } else { "" }
        );
        (!cells.is_empty()).then_some(Self { title, better, cells })
    }

    fn of(&self, peer: &str) -> Option<&'a [f64]> {
        self.cells.iter().find(|(name, _)| *name == peer).map(|(_, rounds)| *rounds)
    }

    /// The median, with the ratio to the reference where there is one.
    fn cell(&self, peer: &str) -> Option<String> {
        let own = self.of(peer)?;
        let median_text = figure(median(own)?);
        let comparable = |rounds: &&[f64]| peer != REFERENCE && rounds.iter().all(|round| *round != 0.0);
        let Some(reference) = self.of(REFERENCE).filter(comparable) else {
            return Some(median_text);
        };
        let seen = matches!(stats::order(own, reference, self.better), Order::Ahead | Order::Behind);
        let ratio = median(&ratios(own, reference))?;
        Some(format!("{median_text} ({}{ratio:.2}x)", if seen { "" } else { "~" }))
    }
}

/// The main table, with what a reader needs to repeat it.
#[must_use]
pub fn render(report: &Report) -> String {
    let rows: Vec<Row<'_>> =
        ROWS.iter().filter_map(|(case, detail)| Row::find(report, case, *detail)).collect();
    let (compared, others): (Vec<&Row<'_>>, Vec<&Row<'_>>) =
        rows.iter().partition(|row| row.of(REFERENCE).is_some());
    let mut text = String::new();
    // Writing to a string cannot fail.
    let _ = head(&mut text, report);
    for rows in [compared, others] {
        let _ = table(&mut text, report, &rows);
    }
    text
}

fn head(text: &mut String, report: &Report) -> std::fmt::Result {
    let machine = &report.machine;
    if report.quick {
        writeln!(text, "**A smoke test: too short for its figures to mean anything.**\n")?;
    }
    let date = report.started.split('T').next().unwrap_or_default();
    let command = ["cargo xtask bench"].into_iter().chain(report.arguments.iter().map(String::as_str));
    writeln!(
        text,
        "Measured on {date} with `{}`: kernel {}, {} ({} processors), {} interleaved rounds, TCP {}. Medians; in \
         brackets how many times {REFERENCE}'s, `~` where no difference was seen or the spread is too wide to tell.",
        command.collect::<Vec<_>>().join(" "),
        machine.kernel,
        machine.processor,
        machine.processors,
        report.rounds,
        machine.congestion_control
    )
}

fn table(text: &mut String, report: &Report, rows: &[&Row<'_>]) -> std::fmt::Result {
    let columns = columns(report, rows);
    if columns.is_empty() {
        return Ok(());
    }
    writeln!(text)?;
    let named: Vec<String> = [""].iter().chain(&columns).map(|name| (*name).to_owned()).collect();
    header(text, &named)?;
    for row in rows {
        let cells: Vec<String> = columns.iter().map(|peer| row.cell(peer).unwrap_or_else(nothing)).collect();
        writeln!(text, "| {} | {} |", row.title, cells.join(" | "))?;
    }
    Ok(())
}

/// drowse first, then its peers, then the limit.
fn columns<'a>(report: &'a Report, rows: &[&Row<'_>]) -> Vec<&'a str> {
    let mut columns = names(&report.measurements);
    columns.retain(|peer| rows.iter().any(|row| row.of(peer).is_some()));
    columns.sort_by_key(|peer| (*peer == DIRECT, !peer.starts_with("drowse")));
    columns
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::tests::{measurement, report};

    #[test]
    fn a_row_shows_medians_and_ratios_to_the_reference() {
        let mut cpu = measurement("bulk/down", "drowse-splice", Better::Higher, &[300.0; 5]);
        cpu.details.insert("machine_cpu_s_per_gib".to_owned(), vec![0.5; 5]);
        let text = render(&report(vec![
            measurement("request/64B/32", "direct", Better::Higher, &[900.0; 5]),
            measurement("request/64B/32", REFERENCE, Better::Higher, &[100.0; 5]),
            measurement("request/64B/32", "drowse-splice", Better::Higher, &[250.0; 5]),
            measurement("request/64B/32", "drowse-copy", Better::Higher, &[101.0; 5]),
            cpu,
            measurement("cold/instant", "drowse-ebpf", Better::Lower, &[1.5; 5]),
        ]));
        assert!(
            text.contains("|  | drowse-splice | drowse-copy | systemd-socket-proxyd | direct |"),
            "{text}"
        );
        let row = "| 64 B requests, 32 connections (1/s) | 250 (2.50x) | 101 (~1.01x) | 100 | 900 (9.00x) |";
        assert!(text.contains(row), "{text}");
        assert!(text.contains("(CPU s of the machine per GiB, less is better) | 0.50 |"), "{text}");
        assert!(text.contains("| cold start, instant backend (1/s, less is better) |"), "{text}");
        assert!(text.contains("Measured on 2026-01-01 with `cargo xtask bench`: kernel 6.18"), "{text}");
    }

    #[test]
    fn nothing_is_a_multiple_of_zero() {
        let text = render(&report(vec![
            measurement("bulk/up", REFERENCE, Better::Higher, &[0.0; 5]),
            measurement("bulk/up", "drowse-splice", Better::Higher, &[250.0; 5]),
        ]));
        assert!(text.contains("| 250 | 0.00 |"), "{text}");
    }

    #[test]
    fn a_run_without_any_of_the_rows_has_no_table() {
        assert!(!render(&report(Vec::new())).contains('|'));
        let mut failed = measurement("bulk/up", "drowse-splice", Better::Higher, &[1.0]);
        failed.failure = Some("broke".to_owned());
        assert!(!render(&report(vec![failed])).contains('|'));
    }
}
