//! Small bar charts side by side: one panel for each case, one row for each peer, each panel with a scale of its own.

use anyhow::Result;
use plotters::element::Rectangle;
use plotters::style::text_anchor::HPos;
use plotters::style::{Color, WHITE};

use super::{Area, DIRECT, GRID, INK, Setting, colour, page, pixels, write};
use crate::report::markdown::{figure, words};
use crate::report::{Measurement, title};
use crate::stats::Summary;

const COLUMNS: usize = 3;
const MARGIN: f64 = 24.0;
const NAMES_WIDTH: f64 = 165.0;
const PANEL_WIDTH: f64 = 335.0;
const BAR_WIDTH: f64 = 215.0;
const TOP: f64 = 62.0;
const BOTTOM: f64 = 40.0;
const HEAD: f64 = 48.0;
const ROW: f64 = 23.0;
const BAR: f64 = 15.0;
const GAP: f64 = 26.0;
const DASH: f64 = 4.0;
/// The width of a digit of a figure, at most.
const LETTER: f64 = 9.0;

/// One case.
pub struct Panel<'a> {
    title: String,
    unit: String,
    bars: Vec<Bar<'a>>,
}

/// One peer in a case.
pub struct Bar<'a> {
    peer: &'a str,
    summary: Summary,
}

impl<'a> Panel<'a> {
    /// The figures of a case, or one of its details; none when nobody has any.
    pub fn of(case: &'a [Measurement], detail: Option<&str>) -> Option<Self> {
        let first = case.first()?;
        let summary = |own: &Measurement| match detail {
            Some(name) => Summary::of(own.details.get(name)?),
            None => own.summary,
        };
        let bars: Vec<Bar<'a>> = case
            .iter()
            .filter(|own| own.failure.is_none())
            .filter_map(|own| Some(Bar { peer: &own.peer, summary: summary(own)? }))
            .collect();
        let unit = detail.map_or_else(|| first.unit.clone(), words);
        (!bars.is_empty()).then(|| Self { title: title(&first.case), unit, bars })
    }

    /// What fills the whole width.
    fn end(&self) -> f64 {
        let values = self.bars.iter().map(|bar| bar.summary.upper_quartile).filter(|value| value.is_finite());
        let end = values.fold(0.0, f64::max);
        if end > 0.0 { end } else { 1.0 }
    }
}

/// Draws the panels; none when there is none.
pub fn draw(heading: &str, panels: &[Panel<'_>], footer: &str) -> Result<Option<String>> {
    let mut peers: Vec<&str> = Vec::new();
    for bar in panels.iter().flat_map(|panel| &panel.bars) {
        if !peers.contains(&bar.peer) {
            peers.push(bar.peer);
        }
    }
    if peers.is_empty() {
        return Ok(None);
    }
    peers.sort_by_key(|peer| (*peer == DIRECT, !peer.starts_with("drowse")));
    let block = HEAD + ROW * peers.iter().fold(0.0, |count, _| count + 1.0);
    let rows = panels.chunks(COLUMNS).fold(0.0, |count, _| count + 1.0);
    let columns = panels.iter().take(COLUMNS).fold(0.0, |count, _| count + 1.0_f64).max(2.0);
    let width = 2.0 * MARGIN + NAMES_WIDTH + columns * PANEL_WIDTH;
    let height = TOP + rows * (block + GAP) + BOTTOM;
    let svg = page(size(width, height), |area| {
        write(area, heading, (MARGIN, 30.0), Setting::TITLE)?;
        let mut top = TOP;
        for row in panels.chunks(COLUMNS) {
            names(area, &peers, top)?;
            let mut left = MARGIN + NAMES_WIDTH;
            for panel in row {
                one(area, panel, &peers, (left, top))?;
                left += PANEL_WIDTH;
            }
            top += block + GAP;
        }
        let marks = "Bars: medians; thin lines: interquartile range; ~: spread too wide to rank.";
        write(area, &format!("{marks} {footer}"), (MARGIN, height - 18.0), Setting::NOTE)
    })?;
    Ok(Some(svg))
}

fn size(width: f64, height: f64) -> (u32, u32) {
    let (width, height) = pixels((width, height));
    (width.unsigned_abs(), height.unsigned_abs())
}

fn names(area: &Area<'_>, peers: &[&str], top: f64) -> Result<()> {
    let mut y = top + HEAD + ROW / 2.0;
    for peer in peers {
        let setting = Setting { bold: peer.starts_with("drowse"), ..Setting::LABEL };
        write(area, peer, (MARGIN + NAMES_WIDTH - 10.0, y), setting.aligned(HPos::Right))?;
        y += ROW;
    }
    Ok(())
}

fn one(area: &Area<'_>, panel: &Panel<'_>, peers: &[&str], (left, top): (f64, f64)) -> Result<()> {
    write(area, &panel.title, (left, top + 12.0), Setting::HEADING)?;
    write(area, &panel.unit, (left, top + 30.0), Setting::NOTE)?;
    let scale = BAR_WIDTH / panel.end();
    let bottom = top + HEAD + ROW * peers.iter().fold(0.0, |count, _| count + 1.0);
    fill(area, (left - 1.0, top + HEAD), (left, bottom), &GRID)?;
    if let Some(direct) = panel.bars.iter().find(|bar| bar.peer == DIRECT) {
        let x = left + direct.summary.median.max(0.0) * scale;
        let mut y = top + HEAD;
        while y < bottom {
            fill(area, (x - 1.0, y), (x, (y + DASH).min(bottom)), &colour(DIRECT))?;
            y += 2.0 * DASH;
        }
    }
    let mut y = top + HEAD + ROW / 2.0;
    for peer in peers {
        match panel.bars.iter().find(|bar| bar.peer == *peer) {
            Some(bar) => row(area, bar, scale, (left, y))?,
            None => write(area, "not measured", (left + 6.0, y), Setting::NOTE)?,
        }
        y += ROW;
    }
    Ok(())
}

fn row(area: &Area<'_>, bar: &Bar<'_>, scale: f64, (left, y): (f64, f64)) -> Result<()> {
    let Summary { median, lower_quartile, upper_quartile, .. } = bar.summary;
    let x = |value: f64| left + (value.max(0.0) * scale).min(BAR_WIDTH);
    fill(area, (left, y - BAR / 2.0), (x(median), y + BAR / 2.0), &colour(bar.peer))?;
    fill(area, (x(lower_quartile), y), (x(upper_quartile), y + 1.0), &INK)?;
    let mark = if bar.summary.is_wide() { "~" } else { "" };
    let end = x(median).max(x(upper_quartile));
    let setting = Setting { bold: bar.peer.starts_with("drowse"), ..Setting::LABEL };
    let text = format!("{mark}{}", figure(median));
    let text_end = text.chars().fold(end + 8.0, |x, _| x + LETTER);
    fill(area, (end + 4.0, y - BAR / 2.0), (text_end, y + BAR / 2.0), &WHITE)?;
    write(area, &text, (end + 6.0, y), setting)
}

fn fill(area: &Area<'_>, from: (f64, f64), to: (f64, f64), colour: &impl Color) -> Result<()> {
    area.draw(&Rectangle::new([pixels(from), pixels(to)], colour.filled()))?;
    Ok(())
}
