//! How `drowse top` looks: a model in, a frame out.
//!
//! PURE. Owns: columns, words of the frame, colours. Must never: need colour or more than 80 columns to be understood.

use std::collections::VecDeque;
use std::time::Duration;

use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Cell, Paragraph, Row, Table, TableState, Wrap};

use crate::report::snapshot::{Snapshot, StateName};
use crate::report::status;
use crate::report::status_line::rough;
use crate::report::text::{elapsed, printable, two_digits};
use crate::report::top::model::{FlowLine, Model, Rates, Sort, Watched, open_flows};

/// Lines of the pane of one service above its flows.
const WORDS_LINES: u16 = 4;
/// The fewest lines of the table of services beside that pane.
const SERVICES_LINES_MIN: u16 = 4;
/// Eighths of a line, and the same for terminals without them.
const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
const BARS_ASCII: [char; 8] = ['.', '.', ':', ':', '+', '+', '#', '#'];
/// The columns of services, with how wide each is; the last one gets what is left.
const COLUMNS: [(&str, Option<Sort>, Constraint); 9] = [
    ("NAME", Some(Sort::Name), Constraint::Fill(3)),
    ("STATE", Some(Sort::State), Constraint::Length(8)),
    ("SLEEPS", Some(Sort::Sleeps), Constraint::Length(7)),
    ("FLOWS", Some(Sort::Flows), Constraint::Length(9)),
    ("HELD", Some(Sort::Held), Constraint::Length(5)),
    ("IN/s", Some(Sort::ToBackend), Constraint::Length(5)),
    ("OUT/s", Some(Sort::ToClient), Constraint::Length(6)),
    ("PLANE", None, Constraint::Length(7)),
    ("TRAFFIC", None, Constraint::Fill(2)),
];

/// What the terminal can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Abilities {
    /// It may be coloured.
    pub colour: bool,
    /// It shows more than ASCII.
    pub unicode: bool,
}

/// Draws `model`.
pub fn draw(frame: &mut Frame<'_>, model: &Model, can: Abilities) {
    let old = model.trouble.as_ref().filter(|_| !model.shown().is_empty());
    let [title, trouble, rest, footer] = Layout::vertical([
        Constraint::Length(1),
        Constraint::Length(u16::from(old.is_some())),
        Constraint::Min(1),
        Constraint::Length(1),
    ])
    .areas(frame.area());
    frame.render_widget(heading(model), title);
    if let Some(why) = old {
        frame.render_widget(Paragraph::new(format!("no news: {why}")), trouble);
    }
    if let Some(watched) = model.looked_into() {
        let above = u16::try_from(model.shown().len()).unwrap_or(u16::MAX).saturating_add(1);
        let most = rest.height.saturating_sub(rest.height / 2).max(SERVICES_LINES_MIN);
        let [services, pane] =
            Layout::vertical([Constraint::Length(above.min(most)), Constraint::Min(0)]).areas(rest);
        draw_services(frame, model, can, services);
        draw_one(frame, model, watched, pane);
    } else {
        draw_services(frame, model, can, rest);
    }
    frame.render_widget(keys(model), footer);
    // Control characters get no cell, but what turns the direction of writing is in that of the character before it.
    for cell in &mut frame.buffer_mut().content {
        if printable(cell.symbol()) != cell.symbol() {
            cell.set_symbol("?");
        }
    }
}

fn heading(model: &Model) -> Paragraph<'static> {
    let states = [
        StateName::Awake,
        StateName::Settling,
        StateName::Stopping,
        StateName::Waking,
        StateName::Failed,
        StateName::Asleep,
    ];
    let answers = || model.all().iter().filter_map(|watched| watched.answer.as_ref().ok());
    let mut parts: Vec<String> = states
        .iter()
        .map(|state| (answers().filter(|snapshot| snapshot.state == *state).count(), state.word()))
        .filter(|(count, _)| *count > 0)
        .map(|(count, word)| format!("{count} {word}"))
        .collect();
    let silent = model.all().len() - answers().count();
    if silent > 0 {
        parts.push(format!("{silent} silent"));
    }
    let rates = model.all().iter().filter_map(|watched| watched.rates);
    let all = rates.fold(Rates::default(), |sum, one| Rates {
        to_backend: sum.to_backend.saturating_add(one.to_backend),
        to_client: sum.to_client.saturating_add(one.to_client),
    });
    let flows: u64 = answers().map(open_flows).sum();
    let interval = humantime::format_duration(model.interval);
    let words = format!(
        "drowse  {}  flows {flows}  in {}/s  out {}/s  every {interval}",
        parts.join(", "),
        bytes(all.to_backend),
        bytes(all.to_client)
    );
    Paragraph::new(words).style(Style::new().add_modifier(Modifier::BOLD))
}

fn draw_services(frame: &mut Frame<'_>, model: &Model, can: Abilities, area: Rect) {
    let shown = model.shown();
    if shown.is_empty() {
        frame.render_widget(Paragraph::new(nobody(model)).wrap(Wrap { trim: true }), area);
        return;
    }
    let heading = COLUMNS.map(|(name, sort, _)| {
        let arrow = if model.reversed { "^" } else { "v" };
        if sort == Some(model.sort) { format!("{name}{arrow}") } else { name.to_owned() }
    });
    let widths = COLUMNS.map(|(_, _, width)| width);
    let picture = Layout::horizontal(widths).spacing(1).split(area).last().map_or(0, |last| last.width);
    let rows = shown.iter().map(|watched| row(watched, can, usize::from(picture)));
    let table = Table::new(rows, widths)
        .header(Row::new(heading).style(Style::new().add_modifier(Modifier::BOLD | Modifier::UNDERLINED)))
        .row_highlight_style(Style::new().add_modifier(Modifier::REVERSED));
    let mut state = TableState::new().with_selected(model.selected());
    frame.render_stateful_widget(table, area, &mut state);
}

/// Why there is no service to show.
fn nobody(model: &Model) -> String {
    match &model.trouble {
        Some(trouble) => trouble.clone(),
        None if model.all().is_empty() => {
            "no drowse runs here; those under systemd start with their first connection, \
             see: systemctl list-sockets 'drowse@*'"
                .to_owned()
        }
        None => format!("no service has '{}' in its name, unit or state", model.filter),
    }
}

fn row(watched: &Watched, can: Abilities, picture: usize) -> Row<'static> {
    let name = Cell::new(watched.name.clone());
    let rate = |of: fn(Rates) -> u64| watched.rates.map_or_else(|| "-".to_owned(), |rates| bytes(of(rates)));
    match &watched.answer {
        Ok(snapshot) => Row::new([
            name,
            Cell::new(snapshot.state.word()).style(colour(can, state_colour(snapshot.state))),
            Cell::new(sleeps(snapshot)),
            Cell::new(status::flows(snapshot)),
            Cell::new(snapshot.held.to_string()),
            Cell::new(rate(|rates| rates.to_backend)),
            Cell::new(rate(|rates| rates.to_client)),
            Cell::new(status::plane(snapshot)),
            Cell::new(sparkline(&watched.history, picture, can)),
        ]),
        Err(silence) => {
            let mut cells = vec![name, Cell::new("?").style(colour(can, Color::Magenta))];
            cells.extend(std::iter::repeat_n(Cell::new("-"), COLUMNS.len() - 3));
            cells.push(Cell::new(silence.to_string()));
            Row::new(cells)
        }
    }
}

/// When it goes to sleep.
fn sleeps(snapshot: &Snapshot) -> String {
    let awake = matches!(snapshot.state, StateName::Awake | StateName::Settling);
    match snapshot.idle.sleeps_in_s.and_then(|time| Duration::try_from_secs_f64(time).ok()) {
        Some(time) => rough(time),
        None if !awake => "-".to_owned(),
        None if open_flows(snapshot) + snapshot.held > 0 => "in use".to_owned(),
        None if snapshot.state == StateName::Settling => "now".to_owned(),
        None => "never".to_owned(),
    }
}

fn state_colour(state: StateName) -> Color {
    match state {
        StateName::Awake => Color::Green,
        StateName::Waking | StateName::Settling | StateName::Stopping => Color::Yellow,
        StateName::Failed => Color::Red,
        StateName::Asleep => Color::Blue,
    }
}

fn colour(can: Abilities, colour: Color) -> Style {
    if can.colour { Style::new().fg(colour) } else { Style::new() }
}

/// The latest rates as bars, as high as each is beside the highest; what did not move has none.
fn sparkline(history: &VecDeque<u64>, width: usize, can: Abilities) -> String {
    let bars = if can.unicode { BARS } else { BARS_ASCII };
    let latest = history.iter().skip(history.len().saturating_sub(width));
    let highest = latest.clone().max().copied().unwrap_or(0);
    let bar = |rate: &u64| {
        let eighth = u128::from(*rate).saturating_mul(8).div_ceil(u128::from(highest.max(1)));
        let index = usize::try_from(eighth).unwrap_or(0);
        index.checked_sub(1).and_then(|index| bars.get(index)).copied().unwrap_or(' ')
    };
    format!("{:>width$}", latest.map(bar).collect::<String>())
}

/// Everything about the one that is looked into.
fn draw_one(frame: &mut Frame<'_>, model: &Model, watched: &Watched, area: Rect) {
    let [words, flows] = Layout::vertical([Constraint::Length(WORDS_LINES), Constraint::Min(0)]).areas(area);
    let bold = Style::new().add_modifier(Modifier::BOLD);
    let said = match &watched.answer {
        Ok(snapshot) => {
            Line::from(vec![Span::styled(format!("{}: ", watched.name), bold), Span::raw(about(snapshot))])
        }
        Err(silence) => Line::from(format!("{}: {silence}", watched.name)),
    };
    frame.render_widget(Paragraph::new(said).wrap(Wrap { trim: true }), words);
    let Ok(snapshot) = &watched.answer else { return };
    match model.known_flows() {
        Some(Ok(lines)) => draw_flows(frame, snapshot, lines, flows),
        Some(Err(reason)) if snapshot.flows.handed_off.open > 0 => {
            frame.render_widget(Paragraph::new(reason.clone()).wrap(Wrap { trim: true }), flows);
        }
        Some(Err(_no_map_without_hand_off)) => draw_flows(frame, snapshot, &[], flows),
        None => {}
    }
}

fn about(snapshot: &Snapshot) -> String {
    let why = status::why(snapshot);
    let wake_ups = status::wake_ups(snapshot);
    let failures = match &snapshot.last_failure {
        None => String::new(),
        Some(last) => format!("; {} failures, the last: {}", snapshot.failures_total, last.message),
    };
    format!("{}; {why}; wake-ups: {wake_ups}{failures}", status::lasts(snapshot))
}

fn draw_flows(frame: &mut Frame<'_>, snapshot: &Snapshot, lines: &[FlowLine], area: Rect) {
    let [heading, table] = Layout::vertical([Constraint::Length(1), Constraint::Min(0)]).areas(area);
    let (proxied, handed_off) = (snapshot.flows.proxied.open, snapshot.flows.handed_off.open);
    let words = format!(
        "{proxied} flows are proxied, their bytes are counted together; {handed_off} are handed off{}",
        if lines.is_empty() { "" } else { ":" }
    );
    frame.render_widget(Paragraph::new(words), heading);
    if lines.is_empty() {
        return;
    }
    let widths = [
        Constraint::Fill(1),
        Constraint::Length(8),
        Constraint::Length(8),
        Constraint::Length(7),
        Constraint::Length(7),
        Constraint::Length(6),
        Constraint::Length(6),
    ];
    let rows = lines.iter().take(usize::from(table.height)).map(|line| {
        let rate = |of: fn(Rates) -> u64| line.rates.map_or_else(|| "-".to_owned(), |rates| bytes(of(rates)));
        Row::new([
            line.client.clone(),
            elapsed(line.age),
            elapsed(line.silent),
            bytes(line.bytes.0),
            bytes(line.bytes.1),
            rate(|rates| rates.to_backend),
            rate(|rates| rates.to_client),
        ])
    });
    let heading = Row::new(["CLIENT", "AGE", "SILENT", "IN", "OUT", "IN/s", "OUT/s"])
        .style(Style::new().add_modifier(Modifier::BOLD | Modifier::UNDERLINED));
    frame.render_widget(Table::new(rows, widths).header(heading), table);
}

fn keys(model: &Model) -> Paragraph<'static> {
    let words = if model.is_filtering {
        format!("/{}_   Enter keeps it, Esc clears it", model.filter)
    } else {
        let filter = if model.filter.is_empty() { String::new() } else { format!(" ({})", model.filter) };
        format!("q quit   s sort   r reverse   / filter{filter}   Enter flows   Up Down select")
    };
    Paragraph::new(words).style(Style::new().add_modifier(Modifier::DIM))
}

/// A number of bytes in five columns: `999`, `1.5K`, `340M`. The units are powers of 1024.
fn bytes(count: u64) -> String {
    let mut unit = 0_u32;
    while unit < 6 && count >> (10 * unit) >= 1000 {
        unit += 1;
    }
    let Some(letter) =
        unit.checked_sub(1).and_then(|index| "KMGTPE".chars().nth(usize::try_from(index).ok()?))
    else {
        return count.to_string();
    };
    format!("{}{letter}", two_digits((u128::from(count) * 10) >> (10 * unit)))
}

#[cfg(test)]
mod tests {
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    use super::*;
    use crate::report::control::{Service, Silence};
    use crate::report::snapshot::LastFailure;
    use crate::report::top::keys::Key;
    use crate::report::top::model::CountedFlow;
    use crate::report::top::model::tests::service;

    const PLAIN: Abilities = Abilities { colour: false, unicode: true };

    const fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn terminal(model: &Model, can: Abilities, width: u16, height: u16) -> Terminal<TestBackend> {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| draw(frame, model, can)).unwrap();
        terminal
    }

    /// The lines of a screen, without the blanks at their ends.
    fn lines(model: &Model, can: Abilities, width: u16, height: u16) -> Vec<String> {
        let terminal = terminal(model, can, width, height);
        let cells = terminal.backend().buffer().content().chunks(usize::from(width));
        cells
            .map(|line| {
                line.iter().map(ratatui::buffer::Cell::symbol).collect::<String>().trim_end().to_owned()
            })
            .collect()
    }

    fn services(bytes: u64) -> Vec<Service> {
        let mut asleep = service("blog", 0);
        let snapshot = asleep.answer.as_mut().unwrap();
        (snapshot.state, snapshot.flows.proxied.open) = (StateName::Asleep, 0);
        snapshot.idle.reasons.clear();
        let mut idle = service("a-service-with-a-very-long-name.service", 0);
        let snapshot = idle.answer.as_mut().unwrap();
        (snapshot.idle.sleeps_in_s, snapshot.flows.proxied.open) = (Some(720.0), 0);
        vec![
            idle,
            asleep,
            service("dice", bytes),
            Service { file_name: "wiki".into(), answer: Err(Silence::Late) },
        ]
    }

    fn model() -> Model {
        let mut model = Model::new(s(1));
        model.update(services(0), s(10));
        model.update(services(1000), s(11));
        model.update(services(1_500_000), s(12));
        model
    }

    #[test]
    fn eighty_columns_have_room_for_everything() {
        let expected = [
            "drowse  2 awake, 1 asleep, 1 silent  flows 2  in 1.4M/s  out 4.2M/s  every 1s",
            "NAMEv           STATE    SLEEPS  FLOWS     HELD  IN/s  OUT/s  PLANE   TRAFFIC",
            "a-service-with- awake    12 min  0         0     0     0      splice",
            "blog            asleep   -       0         0     0     0      splice",
            "dice            awake    in use  2         0     1.4M  4.2M   splice          ▁█",
            "wiki            ?        -       -         -     -     -      -       does not a",
            "",
            "q quit   s sort   r reverse   / filter   Enter flows   Up Down select",
        ];
        assert_eq!(lines(&model(), PLAIN, 80, 8), expected);
    }

    #[test]
    fn no_colour_is_none_and_colour_only_repeats_the_words() {
        let coloured = |can| {
            let terminal = terminal(&model(), can, 80, 8);
            terminal.backend().buffer().content().iter().filter(|cell| cell.fg != Color::Reset).count()
        };
        assert_eq!(coloured(PLAIN), 0);
        let colour = Abilities { colour: true, ..PLAIN };
        assert!(coloured(colour) >= "awake".len());
        assert_eq!(lines(&model(), PLAIN, 80, 8), lines(&model(), colour, 80, 8));
    }

    #[test]
    fn a_terminal_without_unicode_gets_none() {
        let lines = lines(&model(), Abilities { colour: false, unicode: false }, 80, 8);
        assert!(lines.concat().is_ascii(), "{lines:?}");
        assert!(lines[4].ends_with(".#"), "{lines:?}");
    }

    #[test]
    fn any_size_is_drawn() {
        let mut model = model();
        for _ in 0..2 {
            for (width, height) in [(1, 1), (10, 3), (40, 5), (80, 24), (300, 100)] {
                lines(&model, PLAIN, width, height);
            }
            model.press(Key::Enter);
        }
    }

    #[test]
    fn no_peer_commands_the_terminal() {
        let words = "\x1b[2J\u{9b}31m\u{202e}evil\r\n\u{2066}\x07";
        let mut hostile = service("dice", 0);
        let snapshot = hostile.answer.as_mut().unwrap();
        (snapshot.name, snapshot.plane.forward) = (words.into(), words.into());
        snapshot.idle.reasons = vec![words.into()];
        snapshot.flows.handed_off.open = 1;
        snapshot.last_failure = Some(LastFailure { result: words.into(), message: words.into(), ago_s: 1.0 });
        let silent = Service { file_name: words.into(), answer: Err(Silence::Odd(words.into())) };
        let mut model = Model::new(s(1));
        for looked_into in [hostile, silent] {
            model.update(vec![looked_into], s(1));
            model.trouble = Some(words.into());
            model.press(Key::Enter);
            let of = model.looked_into().unwrap().id.clone();
            model.update_flows(&of, Err(words.into()), s(1));
            let screen = lines(&model, PLAIN, 80, 24).concat();
            let turns = |c| ('\u{2028}'..'\u{2070}').contains(&c);
            assert!(screen.contains("evil") && !screen.contains(char::is_control), "{screen:?}");
            assert!(!screen.contains(turns), "{screen:?}");
            model.press(Key::Enter);
        }
    }

    #[test]
    fn nobody_is_told_and_why() {
        let mut model = Model::new(s(1));
        assert!(lines(&model, PLAIN, 80, 5)[1].starts_with("asking"));
        model.update(vec![], s(1));
        assert!(lines(&model, PLAIN, 80, 5)[1].starts_with("no drowse runs here"));
        model.trouble = Some("read /run/drowse: not permitted".into());
        assert!(lines(&model, PLAIN, 80, 5)[1].contains("not permitted"));
        model.update(services(0), s(2));
        model.trouble = Some("read /run/drowse: not permitted".into());
        let old = lines(&model, PLAIN, 80, 8);
        assert!(
            old[1] == "no news: read /run/drowse: not permitted" && old[2].starts_with("NAME"),
            "{old:?}"
        );
        assert!(old[5].starts_with("dice"), "{old:?}");
        model.update(services(0), s(2));
        for key in "/nothing".chars() {
            model.press(Key::Char(key));
        }
        let lines = lines(&model, PLAIN, 80, 5);
        assert!(
            lines[1].contains("no service has 'nothing'") && lines[4].starts_with("/nothing_"),
            "{lines:?}"
        );
    }

    #[test]
    fn the_sorted_column_and_its_direction_are_shown() {
        let mut model = model();
        model.press(Key::Char('s'));
        model.press(Key::Char('r'));
        let lines = lines(&model, PLAIN, 80, 8);
        assert!(lines[1].starts_with("NAME ") && lines[1].contains(" STATE^ "), "{lines:?}");
        assert!(lines[2].starts_with("wiki"), "{lines:?}");
    }

    #[test]
    fn the_selected_line_is_reversed_and_stays_in_sight() {
        let mut model = Model::new(s(1));
        model.update((0..100).map(|number| service(&format!("service-{number:02}"), 0)).collect(), s(1));
        model.press(Key::End);
        let terminal = terminal(&model, PLAIN, 80, 24);
        let reversed = |cell: &&ratatui::buffer::Cell| cell.modifier.contains(Modifier::REVERSED);
        let line: String = terminal
            .backend()
            .buffer()
            .content()
            .iter()
            .filter(reversed)
            .map(ratatui::buffer::Cell::symbol)
            .collect();
        assert!(line.starts_with("service-99 ") && line.chars().count() == 80, "{line:?}");
    }

    #[test]
    fn one_service_is_looked_into() {
        let mut model = model();
        let mut busy = service("dice", 0);
        let snapshot = busy.answer.as_mut().unwrap();
        snapshot.flows.handed_off.open = 2;
        snapshot.last_failure =
            Some(LastFailure { result: "x".into(), message: "it broke".into(), ago_s: 1.0 });
        model.update(vec![busy], s(20));
        model.press(Key::Enter);
        let of = model.looked_into().unwrap().id.clone();
        let flow = CountedFlow {
            cookie: 1,
            client: "192.0.2.1:40000".into(),
            opened: s(10),
            last_activity: s(19),
            bytes: (2048, 1 << 40),
        };
        model.update_flows(&of, Ok(vec![flow.clone()]), s(20));
        model.update_flows(&of, Ok(vec![CountedFlow { bytes: (4096, 1 << 40), ..flow }]), s(21));
        let shown = lines(&model, PLAIN, 80, 24);
        assert!(shown[3].starts_with("dice: awake for 2 min; 2 open flows, last used"), "{shown:#?}");
        assert!(shown.join(" ").contains("it broke"), "{shown:#?}");
        assert_eq!(shown[7], "2 flows are proxied, their bytes are counted together; 2 are handed off:");
        assert_eq!(
            shown[9].split_whitespace().collect::<Vec<_>>().join(" "),
            "192.0.2.1:40000 11 s 2 s 4.0K 1.0T 2.0K 0"
        );
        model.update_flows(&of, Err("the map is not ours".into()), s(22));
        assert!(lines(&model, PLAIN, 80, 24)[7].contains("the map is not ours"));
    }

    #[test]
    fn a_number_of_bytes_fits_five_columns() {
        let cases = [
            (0, "0"),
            (999, "999"),
            (1000, "0.9K"),
            (1536, "1.5K"),
            (10 << 10, "10K"),
            (999 << 10, "999K"),
            (1000 << 10, "0.9M"),
            (340 << 20, "340M"),
            (u64::MAX, "15E"),
        ];
        for (count, words) in cases {
            assert_eq!(bytes(count), words);
        }
    }
}
