//! The result of a run as pictures.
//!
//! Owns: which pictures there are, and one colour for each peer in all of them. Must never: draw a figure that is not
//! in the run.

use std::collections::BTreeMap;

use anyhow::Result;
use plotters::backend::SVGBackend;
use plotters::coord::Shift;
use plotters::drawing::{DrawingArea, IntoDrawingArea};
use plotters::element::Text;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use plotters::style::{FontStyle, IntoFont, RGBColor, TextStyle, WHITE};

use crate::report::markdown::figure;
use crate::report::ranking::DIRECT;
use crate::report::{Measurement, Report, title};
use crate::stats::median;

mod lines;
mod panels;

use lines::{Chart, Line, Tick};
use panels::Panel;

/// The files of [`all`].
pub const NAMES: [&str; 4] = ["throughput.svg", "latency.svg", "memory.svg", "cost.svg"];

const INK: RGBColor = RGBColor(31, 41, 55);
const GREY: RGBColor = RGBColor(107, 114, 128);
const GRID: RGBColor = RGBColor(229, 231, 235);

/// Colours that can be told apart also by most colour-blind readers, by the beginning of a peer's name; drowse is red.
const COLOURS: [(&str, RGBColor); 12] = [
    (DIRECT, RGBColor(156, 163, 175)),
    ("systemd-socket-proxyd", RGBColor(217, 119, 6)),
    ("haproxy", RGBColor(37, 99, 235)),
    ("nginx", RGBColor(22, 163, 74)),
    ("socat", RGBColor(124, 58, 237)),
    ("drowse-splice", RGBColor(190, 18, 60)),
    ("drowse-copy", RGBColor(251, 113, 133)),
    ("drowse-sockmap-ends", RGBColor(217, 70, 239)),
    ("drowse-sockmap", RGBColor(112, 26, 117)),
    ("drowse-ebpf", RGBColor(190, 18, 60)),
    ("drowse-no-ebpf", RGBColor(251, 113, 133)),
    ("drowse", RGBColor(131, 24, 67)),
];

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// All pictures for which the run has figures, by file name.
///
/// # Errors
/// When one cannot be drawn.
pub fn all(report: &Report) -> Result<Vec<(&'static str, String)>> {
    let plots = [throughput(report)?, latency(report)?, memory(report)?, cost(report)?];
    Ok(NAMES.into_iter().zip(plots).filter_map(|(name, plot)| Some((name, plot?))).collect())
}

/// Requests and bytes per second, a panel for each case.
fn throughput(report: &Report) -> Result<Option<String>> {
    let wanted = |case: &str| ["request/", "connect/", "bulk/"].iter().any(|begin| case.starts_with(begin));
    let panels: Vec<Panel<'_>> = report
        .cases()
        .filter(|case| case.first().is_some_and(|first| wanted(&first.case)))
        .filter_map(|case| Panel::of(case, None))
        .collect();
    let footer = format!("{} Dashed: a direct connection, the limit.", origin(report));
    panels::draw("Throughput: longer is better", &panels, &footer)
}

/// The distribution of latencies in the case that is about them, or in the busiest that has any.
fn latency(report: &Report) -> Result<Option<String>> {
    let begins = ["latency/", "request/64B/32", ""];
    let with_curves = |begin: &str| {
        let mut cases = report.cases().filter(|case| {
            let named = case.first().is_some_and(|first| first.case.starts_with(begin));
            named && case.iter().any(|peer| peer.latency.as_ref().is_some_and(|all| !all.curve.is_empty()))
        });
        cases.next()
    };
    let Some(case) = begins.into_iter().find_map(with_curves) else { return Ok(None) };
    let lines: Vec<Line<'_>> = case
        .iter()
        .filter_map(|peer| {
            let curve = &peer.latency.as_ref()?.curve;
            let points =
                curve.iter().map(|point| (f64::from(point.one_in).log10(), point.us.log10())).collect();
            Some(Line { peer: &peer.peer, points })
        })
        .collect();
    let heading = case.first().map(|first| title(&first.case)).unwrap_or_default();
    let end = lines.iter().flat_map(|line| &line.points).fold(1.0_f64, |end, (x, _)| end.max(*x));
    let percentiles = ["0", "90 %", "99 %", "99.9 %", "99.99 %", "99.999 %", "99.9999 %"];
    let decades = (0_u32..).zip(percentiles).filter(|(decade, _)| f64::from(*decade) < end - 0.1);
    let x_ticks = decades.map(|(decade, label)| Tick { at: f64::from(decade), label: label.to_owned() });
    // The axis ends where the answers do, which has no round name.
    let x_ticks = x_ticks.chain([Tick { at: end, label: String::new() }]);
    let chart = Chart {
        title: format!("Latency, {heading}: lower is better"),
        x_label: "answers that came within this time",
        y_label: "time until the answer",
        x_ticks: x_ticks.collect(),
        y_ticks: lines::log_ticks(&lines, microseconds),
        lines,
        has_markers: false,
        footer: origin(report),
    };
    chart.draw().map(Some)
}

/// Memory of open flows: over their number when there are several, else in panels.
fn memory(report: &Report) -> Result<Option<String>> {
    let idle: Vec<&[Measurement]> = report.cases().filter(|case| is_idle(case)).collect();
    let mut points: BTreeMap<&str, Vec<(f64, f64)>> = BTreeMap::new();
    for peer in idle.iter().copied().flatten().filter(|peer| peer.failure.is_none()) {
        let detail = |name: &str| median(peer.details.get(name)?);
        if let (Some(flows), Some(pss_mb)) = (detail("flows"), detail("pss_mb")) {
            points.entry(&peer.peer).or_default().push((flows, pss_mb));
        }
    }
    if points.values().all(|points| points.len() < 2) {
        let panels: Vec<Panel<'_>> = idle.iter().flat_map(|case| memory_panels(case)).collect();
        return panels::draw("Open idle flows: shorter is better", &panels, &origin(report));
    }
    let order = report.peer_names();
    let mut lines: Vec<Line<'_>> = points.into_iter().map(|(peer, points)| Line { peer, points }).collect();
    lines.sort_by_key(|line| order.iter().position(|peer| *peer == line.peer));
    for line in &mut lines {
        line.points.sort_by(|left, right| left.0.total_cmp(&right.0));
    }
    let chart = Chart {
        title: "Memory of a proxy over open idle flows: lower is better".to_owned(),
        x_label: "open flows",
        y_label: "PSS in MB",
        x_ticks: lines::linear_ticks(lines.iter().flat_map(|line| &line.points).map(|point| point.0)),
        y_ticks: lines::linear_ticks(lines.iter().flat_map(|line| &line.points).map(|point| point.1)),
        lines,
        has_markers: true,
        footer: origin(report),
    };
    chart.draw().map(Some)
}

fn is_idle(case: &[Measurement]) -> bool {
    case.first().is_some_and(|first| first.case == "idle-flows" || first.case.starts_with("idle-flows/"))
}

/// The main figure, then every detail that does not depend on how many flows a peer could hold.
fn memory_panels(case: &[Measurement]) -> Vec<Panel<'_>> {
    let mut details: Vec<&str> =
        case.iter().flat_map(|peer| peer.details.keys()).map(String::as_str).collect();
    details.sort_unstable();
    details.dedup();
    let costs = details.into_iter().filter(|name| !matches!(*name, "flows" | "pss_mb" | "rss_mb"));
    [None].into_iter().chain(costs.map(Some)).filter_map(|detail| Panel::of(case, detail)).collect()
}

/// Processor time of the whole machine over the size of a message.
fn cost(report: &Report) -> Result<Option<String>> {
    let ways = [
        ("machine_cpu_s_per_100k", "CPU seconds per 100,000 requests"),
        ("machine_cpu_s_per_gib", "CPU seconds per GiB"),
    ];
    let lines_of = |detail: &str| {
        let mut lines: Vec<Line<'_>> =
            report.peer_names().into_iter().map(|peer| Line { peer, points: Vec::new() }).collect();
        for own in &report.measurements {
            let len = own.case.strip_prefix("size/").and_then(bytes);
            let cost = own.details.get(detail).and_then(|rounds| median(rounds));
            let line = lines.iter_mut().find(|line| line.peer == own.peer);
            if let (Some(len), Some(cost), Some(line)) = (len, cost, line) {
                line.points.push((len.log2(), cost.log10()));
            }
        }
        lines.retain(|line| !line.points.is_empty());
        lines
    };
    let found = ways.into_iter().map(|(detail, label)| (label, lines_of(detail)));
    let Some((label, lines)) = found.into_iter().find(|(_, lines)| !lines.is_empty()) else {
        return Ok(None);
    };
    let mut sizes: Vec<f64> = lines.iter().flat_map(|line| &line.points).map(|point| point.0).collect();
    sizes.sort_by(f64::total_cmp);
    sizes.dedup();
    let chart = Chart {
        title: "Processor time of the whole machine over message size: lower is better".to_owned(),
        x_label: "size of a message",
        y_label: label,
        x_ticks: sizes.into_iter().map(|at| Tick { at, label: size_label(at) }).collect(),
        y_ticks: lines::log_ticks(&lines, |seconds| seconds.to_string()),
        lines,
        has_markers: true,
        footer: origin(report),
    };
    chart.draw().map(Some)
}

/// `4KiB` as 4096.
fn bytes(len: &str) -> Option<f64> {
    let digits = len.trim_end_matches(|letter: char| !letter.is_ascii_digit());
    let number: u32 = digits.parse().ok().filter(|number| *number > 0)?;
    let unit = match len.strip_prefix(digits)? {
        "" | "B" => 1.0,
        "KiB" => 1024.0,
        "MiB" => 1_048_576.0,
        _ => return None,
    };
    Some(f64::from(number) * unit)
}

fn size_label(log2: f64) -> String {
    let bytes = log2.exp2();
    match bytes {
        bytes if bytes < 1023.5 => format!("{bytes:.0} B"),
        bytes if bytes < 1_048_575.5 => format!("{:.0} KiB", bytes / 1024.0),
        bytes => format!("{:.0} MiB", bytes / 1_048_576.0),
    }
}

fn microseconds(us: f64) -> String {
    match us {
        us if us < 1e3 => format!("{us} us"),
        us if us < 1e6 => format!("{} ms", us / 1e3),
        us => format!("{} s", us / 1e6),
    }
}

/// Where the figures come from, for below a picture.
fn origin(report: &Report) -> String {
    let machine = &report.machine;
    let date = report.started.split('T').next().unwrap_or_default();
    let rounds = if report.quick {
        "a smoke test, not a measurement".to_owned()
    } else {
        format!("{} interleaved rounds", report.rounds)
    };
    format!(
        "{date}, kernel {}, {} ({} processors), {rounds}.",
        machine.kernel, machine.processor, machine.processors
    )
}

fn colour(peer: &str) -> RGBColor {
    COLOURS.iter().find(|(begin, _)| peer.starts_with(begin)).map_or(GREY, |(_, colour)| *colour)
}

/// Draws on a white page.
fn page(size: (u32, u32), draw: impl FnOnce(&Area<'_>) -> Result<()>) -> Result<String> {
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        area.fill(&WHITE)?;
        draw(&area)?;
        area.present()?;
    }
    Ok(svg)
}

/// How a text is set: size in pixels, colour, alignment.
#[derive(Clone, Copy)]
struct Setting {
    size: f64,
    colour: RGBColor,
    align: HPos,
    bold: bool,
}

impl Setting {
    const TITLE: Self = Self { size: 20.0, colour: INK, align: HPos::Left, bold: true };
    const HEADING: Self = Self { size: 14.0, ..Self::TITLE };
    const LABEL: Self = Self { size: 13.0, bold: false, ..Self::TITLE };
    const NOTE: Self = Self { size: 12.0, colour: GREY, bold: false, ..Self::TITLE };

    /// The drawing library divides sizes by this before they reach the file.
    const LIBRARY_SCALE: f64 = 1.24;

    fn aligned(self, align: HPos) -> Self {
        Self { align, ..self }
    }

    fn style(self) -> TextStyle<'static> {
        let weight = if self.bold { FontStyle::Bold } else { FontStyle::Normal };
        let font = ("sans-serif", self.size * Self::LIBRARY_SCALE, weight).into_font();
        font.color(&self.colour).pos(Pos::new(self.align, VPos::Center))
    }
}

fn write(area: &Area<'_>, text: &str, at: (f64, f64), setting: Setting) -> Result<()> {
    area.draw(&Text::new(text.to_owned(), pixels(at), setting.style()))?;
    Ok(())
}

/// The nearest pixel.
#[expect(clippy::cast_possible_truncation, reason = "a page is far smaller than the bounds")]
fn pixels((x, y): (f64, f64)) -> (i32, i32) {
    let whole = |value: f64| value.round().clamp(-1e6, 1e6) as i32;
    (whole(x), whole(y))
}

#[cfg(test)]
mod tests {
    use hdrhistogram::Histogram;

    use super::*;
    use crate::report::Latency;
    use crate::report::tests::{measurement, report};
    use crate::stats::Better;

    const PEERS: [&str; 3] = ["drowse-splice", "somebody", DIRECT];

    /// A run of every case that has a picture, with one figure each.
    fn run(figure: f64, answers: u64) -> Report {
        let mut histogram = Histogram::new(3).unwrap();
        (1..=answers).for_each(|us| histogram.record(us * 1000).unwrap());
        let cases = ["request/64B/32", "bulk/up", "latency/64B/20k", "idle-flows", "size/64B", "size/1MiB"];
        let measured = |(case, peer): (&str, &str)| {
            let mut own = measurement(case, peer, Better::Higher, &[figure; 5]);
            own.latency = Some(Latency::of(&histogram));
            for detail in ["flows", "machine_cpu_s_per_100k"] {
                own.details.insert(detail.to_owned(), vec![figure; 5]);
            }
            own
        };
        let all = cases.iter().flat_map(|case| PEERS.map(|peer| (*case, peer)));
        report(all.map(measured).collect())
    }

    #[test]
    fn every_picture_names_every_peer() {
        let plots = all(&run(100.0, 1000)).unwrap();
        assert_eq!(plots.iter().map(|(name, _)| *name).collect::<Vec<_>>(), NAMES);
        for (name, svg) in &plots {
            for peer in PEERS {
                assert!(svg.contains(peer), "{name} does not name {peer}");
            }
            assert!(svg.starts_with("<svg") && svg.contains("kernel 6.18"), "{name}: {svg}");
        }
    }

    #[test]
    fn figures_of_no_size_or_sense_are_drawn() {
        for figure in [0.0, -1.0, f64::NAN, f64::INFINITY, 1e-12, 1e15] {
            for (name, svg) in all(&run(figure, 1)).unwrap() {
                assert!(PEERS.iter().all(|peer| svg.contains(peer)), "{name} of {figure}");
            }
        }
    }

    #[test]
    fn a_run_without_figures_has_no_pictures() {
        assert!(all(&report(Vec::new())).unwrap().is_empty());
        let mut unavailable = measurement("bulk/up", "a", Better::Higher, &[]);
        unavailable.details.clear();
        unavailable.unavailable = Some("not built".to_owned());
        assert!(all(&report(vec![unavailable])).unwrap().is_empty());
    }

    #[test]
    fn several_numbers_of_flows_make_a_line_and_one_makes_bars() {
        let idle = |case: &str, flows: f64| {
            let mut own = measurement(case, "a", Better::Lower, &[10.0; 5]);
            own.details.insert("flows".to_owned(), vec![flows; 5]);
            own.details.insert("kernel_kib_per_flow".to_owned(), vec![13.0; 5]);
            own
        };
        let one = memory(&report(vec![idle("idle-flows", 9000.0)])).unwrap().unwrap();
        assert!(one.contains("Open idle flows") && one.contains("kernel KiB per flow"), "{one}");
        let several = vec![idle("idle-flows/1000", 1000.0), idle("idle-flows/9000", 9000.0)];
        let line = memory(&report(several)).unwrap().unwrap();
        assert!(line.contains("over open idle flows") && line.contains("PSS in MB"), "{line}");
    }

    #[test]
    fn lengths_are_read_and_written_alike() {
        for (len, label) in [("64B", "64 B"), ("4KiB", "4 KiB"), ("1MiB", "1 MiB"), ("100", "100 B")] {
            assert_eq!(size_label(bytes(len).unwrap().log2()), label);
        }
        for nonsense in ["", "0B", "B", "4kb", "-1B"] {
            assert_eq!(bytes(nonsense), None, "{nonsense}");
        }
    }
}
