//! One line for each peer over two axes, either of which may be logarithmic: the points are given in the axis' own
//! coordinates, and its ticks say what they mean.

use std::ops::Range;

use anyhow::Result;
use plotters::chart::ChartBuilder;
use plotters::coord::ranged1d::{KeyPointHint, NoDefaultFormatting, Ranged, ValueFormatter};
use plotters::element::{Circle, PathElement};
use plotters::series::{DashedLineSeries, LineSeries};
use plotters::style::text_anchor::HPos;
use plotters::style::{Color, IntoFont, ShapeStyle};

use super::{Area, DIRECT, GRID, INK, Setting, colour, page, pixels, write};

const SIZE: (u32, u32) = (1100, 600);
const MARGIN: f64 = 24.0;
/// Above the chart itself, with a legend of one row.
const TOP: u32 = 84;
const BOTTOM: u32 = 36;
/// The first row of a legend, and how far apart its rows are.
const LEGEND: f64 = 62.0;
const ROW: u32 = 22;
/// The mean width of a letter of a legend.
const LETTER: f64 = 7.4;

/// A place on an axis with its name.
#[derive(Debug, Clone, PartialEq)]
pub struct Tick {
    /// In the axis' own coordinates.
    pub at: f64,
    /// What stands there.
    pub label: String,
}

/// The line of one peer.
pub struct Line<'a> {
    /// Its name.
    pub peer: &'a str,
    /// In the axes' own coordinates; those that are not finite are left out.
    pub points: Vec<(f64, f64)>,
}

/// A whole chart.
pub struct Chart<'a> {
    /// Above it.
    pub title: String,
    /// Below the horizontal axis.
    pub x_label: &'static str,
    /// Beside the vertical axis.
    pub y_label: &'static str,
    /// The horizontal axis reaches from the first to the last.
    pub x_ticks: Vec<Tick>,
    /// The vertical axis reaches from the first to the last.
    pub y_ticks: Vec<Tick>,
    /// What is drawn.
    pub lines: Vec<Line<'a>>,
    /// Whether the points themselves are figures that were measured.
    pub has_markers: bool,
    /// Below it.
    pub footer: String,
}

impl Chart<'_> {
    /// Draws it as SVG.
    pub fn draw(&self) -> Result<String> {
        page(SIZE, |area| {
            write(area, &self.title, (MARGIN, 30.0), Setting::TITLE)?;
            let places = self.legend();
            for (line, place) in self.lines.iter().zip(&places) {
                entry(area, line.peer, *place)?;
            }
            write(area, &self.footer, (MARGIN, f64::from(SIZE.1) - 18.0), Setting::NOTE)?;
            let more_rows = places.last().map_or(0, |(_, row)| *row);
            self.plot(&area.margin(TOP + ROW * more_rows, BOTTOM, 16, 32))
        })
    }

    /// Where the legend's entry of each line begins, and in which row.
    fn legend(&self) -> Vec<(f64, u32)> {
        let (mut x, mut row) = (MARGIN, 0);
        let place = |line: &Line<'_>| {
            let width = words(line.peer).chars().fold(52.0, |width, _| width + LETTER);
            if x > MARGIN && x + width > f64::from(SIZE.0) {
                (x, row) = (MARGIN, row + 1);
            }
            let begin = x;
            x += width;
            (begin, row)
        };
        self.lines.iter().map(place).collect()
    }

    fn plot(&self, area: &Area<'_>) -> Result<()> {
        let mut chart = ChartBuilder::on(area)
            .x_label_area_size(52)
            .y_label_area_size(84)
            .build_cartesian_2d(Axis(self.x_ticks.clone()), Axis(self.y_ticks.clone()))?;
        let label = ("sans-serif", 16).into_font().color(&INK);
        chart
            .configure_mesh()
            .bold_line_style(GRID)
            .light_line_style(GRID)
            .axis_style(GRID)
            .label_style(label.clone())
            .axis_desc_style(label)
            .x_desc(self.x_label)
            .y_desc(self.y_label)
            .draw()?;
        // drowse first: its lines are thicker and show below those that they coincide with.
        let (own, others): (Vec<_>, Vec<_>) =
            self.lines.iter().partition(|line| line.peer.starts_with("drowse"));
        for line in own.into_iter().chain(others) {
            let points: Vec<(f64, f64)> =
                line.points.iter().copied().filter(|(x, y)| x.is_finite() && y.is_finite()).collect();
            if self.has_markers || points.len() == 1 {
                let dot = colour(line.peer).filled();
                chart.draw_series(points.iter().map(|point| Circle::new(*point, 4, dot)))?;
            }
            if line.peer == DIRECT {
                chart.draw_series(DashedLineSeries::new(points, 6, 4, stroke(line.peer)))?;
            } else {
                chart.draw_series(LineSeries::new(points, stroke(line.peer)))?;
            }
        }
        Ok(())
    }
}

fn words(peer: &str) -> &str {
    if peer == DIRECT { "direct (the limit)" } else { peer }
}

/// Draws one entry of the legend.
fn entry(area: &Area<'_>, peer: &str, (x, row): (f64, u32)) -> Result<()> {
    let y = LEGEND + f64::from(ROW * row);
    let setting = Setting { bold: peer.starts_with("drowse"), ..Setting::LABEL };
    area.draw(&PathElement::new([pixels((x, y)), pixels((x + 22.0, y))], stroke(peer)))?;
    write(area, words(peer), (x + 28.0, y), setting.aligned(HPos::Left))
}

fn stroke(peer: &str) -> ShapeStyle {
    colour(peer).stroke_width(if peer.starts_with("drowse") { 3 } else { 2 })
}

/// From the first tick to the last; an axis without two of them is one long.
struct Axis(Vec<Tick>);

impl Ranged for Axis {
    type FormatOption = NoDefaultFormatting;
    type ValueType = f64;

    fn range(&self) -> Range<f64> {
        match self.0.as_slice() {
            [first, .., last] if first.at < last.at => first.at..last.at,
            [only, ..] => only.at - 0.5..only.at + 0.5,
            [] => 0.0..1.0,
        }
    }

    fn map(&self, value: &f64, (begin, end): (i32, i32)) -> i32 {
        let range = self.range();
        let part = (value - range.start) / (range.end - range.start);
        let (begin, end) = (f64::from(begin), f64::from(end));
        pixels((begin + (end - begin) * part, 0.0)).0
    }

    fn key_points<Hint: KeyPointHint>(&self, _hint: Hint) -> Vec<f64> {
        self.0.iter().map(|tick| tick.at).collect()
    }
}

impl ValueFormatter<f64> for Axis {
    fn format_ext(&self, at: &f64) -> String {
        let found = self.0.iter().find(|tick| (tick.at - at).abs() < 1e-9);
        found.map(|tick| tick.label.clone()).unwrap_or_default()
    }
}

/// Ticks at 1, 2 and 5 of each decade that enclose the heights of all lines, which are decimal logarithms.
pub fn log_ticks(lines: &[Line<'_>], label: fn(f64) -> String) -> Vec<Tick> {
    let heights = lines.iter().flat_map(|line| &line.points).map(|(_, y)| *y).filter(|y| y.is_finite());
    let (low, high) =
        heights.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), y| (low.min(y), high.max(y)));
    if low > high {
        return Vec::new();
    }
    let all: Vec<f64> =
        (-9..=12).flat_map(|decade| [1.0, 2.0, 5.0].map(|digit| digit * 10.0_f64.powi(decade))).collect();
    let below = all.iter().rposition(|value| value.log10() <= low).unwrap_or(0);
    let above = all.iter().position(|value| value.log10() >= high).unwrap_or(all.len());
    let above = above.max(below + 1);
    let ticks = all.iter().take(above + 1).skip(below);
    ticks.map(|value| Tick { at: value.log10(), label: label(*value) }).collect()
}

/// Ticks from zero to beyond the greatest of `values`.
pub fn linear_ticks(values: impl Iterator<Item = f64>) -> Vec<Tick> {
    let end = values.filter(|value| value.is_finite()).fold(0.0, f64::max);
    let steps = (-3..=12).flat_map(|decade| [1.0, 2.0, 5.0].map(|digit| digit * 10.0_f64.powi(decade)));
    let step = { steps }.find(|step| step * 8.0 >= end).unwrap_or(1.0);
    let mut ticks = Vec::new();
    for count in 0_u32..=9 {
        let at = step * f64::from(count);
        let label = super::figure(at);
        let label = label.strip_suffix(".00").or(label.strip_suffix(".0")).unwrap_or(&label).to_owned();
        ticks.push(Tick { at, label });
        if at >= end && count > 0 {
            break;
        }
    }
    ticks
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(heights: &[f64]) -> Vec<Line<'static>> {
        vec![Line { peer: "a", points: heights.iter().map(|y| (0.0, *y)).collect() }]
    }

    fn labels(ticks: &[Tick]) -> String {
        ticks.iter().map(|tick| tick.label.clone()).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn logarithmic_ticks_enclose_all_points() {
        let label = |value: f64| format!("{value:.0}");
        assert_eq!(labels(&log_ticks(&lines(&[1.1, 2.2]), label)), "10 20 50 100 200");
        assert_eq!(labels(&log_ticks(&lines(&[2.0]), label)), "100 200");
        assert_eq!(log_ticks(&lines(&[f64::NEG_INFINITY]), label), []);
        assert_eq!(log_ticks(&[], label), []);
    }

    #[test]
    fn linear_ticks_begin_at_zero_and_end_beyond_the_greatest() {
        assert_eq!(labels(&linear_ticks([3_000.0, 9_000.0].into_iter())), "0 2,000 4,000 6,000 8,000 10,000");
        assert_eq!(linear_ticks([0.0].into_iter()).len(), 2);
        assert_eq!(linear_ticks([f64::NAN].into_iter()).len(), 2);
        assert!(linear_ticks(std::iter::empty()).len() >= 2);
    }

    #[test]
    fn a_legend_too_long_for_one_row_goes_on_in_the_next() {
        let named = |peer| Line { peer, points: Vec::new() };
        let mut chart = Chart {
            title: String::new(),
            x_label: "",
            y_label: "",
            x_ticks: Vec::new(),
            y_ticks: Vec::new(),
            lines: (0..8).map(|_| named("systemd-socket-proxyd")).collect(),
            has_markers: false,
            footer: String::new(),
        };
        let places = chart.legend();
        assert_eq!(places.iter().map(|(_, row)| *row).collect::<Vec<_>>(), [0, 0, 0, 0, 0, 1, 1, 1]);
        assert!(places.iter().all(|(x, _)| (MARGIN..900.0).contains(x)), "{places:?}");
        chart.lines.truncate(5);
        assert_eq!(chart.legend(), places[..5]);
    }

    #[test]
    fn a_chart_without_ticks_or_points_is_drawn_all_the_same() {
        let chart = Chart {
            title: "title".to_owned(),
            x_label: "across",
            y_label: "up",
            x_ticks: Vec::new(),
            y_ticks: Vec::new(),
            lines: lines(&[f64::NAN]),
            has_markers: true,
            footer: "origin".to_owned(),
        };
        let svg = chart.draw().unwrap();
        for text in ["title", "across", "up", "origin"] {
            assert!(svg.contains(text), "{text}: {svg}");
        }
    }
}
