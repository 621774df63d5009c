//! Columns, paragraphs and times of plain text, for terminals and mails.
//!
//! PURE. Owns: how they are laid out. Must never: choose a word.

use std::fmt::Write as _;
use std::time::Duration;

/// The columns of a terminal that nobody widened.
pub const WIDTH: usize = 80;
/// The narrowest paragraph; below it a line is rather too long than a tower of words.
const PARAGRAPH_MIN: usize = 24;

/// The first row is the heading. Each column is as wide as its longest cell, but for the last one, which is as long as
/// it is, or, `wrapped`, continued on further lines within [`WIDTH`] columns. Rows have the same number of cells, each of
/// which is [`printable`].
#[must_use]
pub fn table(rows: &[Vec<String>], wrapped: bool) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width =
        |column: usize| rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max();
    let widths: Vec<usize> =
        (0..columns.saturating_sub(1)).map(|column| width(column).unwrap_or(0)).collect();
    let indent = widths.iter().map(|width| width + 2).sum::<usize>();
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            let _infallible = write!(line, "{:width$}  ", printable(cell));
        }
        let last = row.get(widths.len()).map_or("", String::as_str);
        line.push_str(&if wrapped { paragraph(last, indent) } else { printable(last) });
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// Breaks `words` at blanks so that they fit beside `indent` columns; the first line is not indented. A word that is
/// too long stays whole: it can be copied. Without the characters that [`printable`] replaces.
#[must_use]
pub fn paragraph(words: &str, indent: usize) -> String {
    let room = WIDTH.saturating_sub(indent).max(PARAGRAPH_MIN);
    let (mut text, mut used) = (String::new(), 0);
    for word in words.split_whitespace() {
        let length = word.chars().count();
        if used > 0 && used + 1 + length > room {
            let _infallible = write!(text, "\n{:indent$}", "");
            used = 0;
        } else if used > 0 {
            text.push(' ');
            used += 1;
        }
        text.push_str(&printable(word));
        used += length;
    }
    text
}

/// One line that a terminal shows as it is: a `?` stands for each control character, and for each that turns the
/// direction of writing. Names and reasons come from peers, who may be hostile.
#[must_use]
pub fn printable(line: &str) -> String {
    let turns = |c: char| matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    line.chars().map(|c| if c.is_control() || turns(c) { '?' } else { c }).collect()
}

/// How long something took, in the unit that tells most: `850 us`, `12 ms`, `1.2 s`, `15 min`.
#[must_use]
pub fn precise(time: Duration) -> String {
    match time.as_micros() {
        micros @ 0..1000 => format!("{micros} us"),
        1000..1_000_000 => format!("{} ms", time.as_millis()),
        1_000_000..10_000_000 if time.subsec_millis() >= 100 => format!("{:.1} s", time.as_secs_f64()),
        _ => elapsed(time),
    }
}

/// How long something has lasted, in the largest unit of which there are two, rounded down: `90 s`, `12 min`, `3 h`.
#[must_use]
pub fn elapsed(time: Duration) -> String {
    match time.as_secs() {
        seconds @ 0..120 => format!("{seconds} s"),
        seconds @ 120..7200 => format!("{} min", seconds / 60),
        seconds @ 7200..172_800 => format!("{} h", seconds / 3600),
        seconds => format!("{} d", seconds / 86_400),
    }
}

/// An amount of memory, in the largest unit that it fills, rounded: `512 KiB`, `5.4 MiB`, `312 MiB`.
#[must_use]
pub fn memory(bytes: u64) -> String {
    const UNITS: [&str; 4] = ["KiB", "MiB", "GiB", "TiB"];
    // Tenths of the unit.
    let (mut tenths, mut unit) = (bytes.saturating_mul(10) / 1024, 0);
    while tenths >= 10_240 && unit + 1 < UNITS.len() {
        (tenths, unit) = (tenths / 1024, unit + 1);
    }
    let unit = UNITS.get(unit).copied().unwrap_or_default();
    format!("{} {unit}", two_digits(tenths.into()))
}

/// A number given in tenths, with two digits at least, rounded down: `5.4`, `312`.
#[must_use]
pub fn two_digits(tenths: u128) -> String {
    if tenths < 100 { format!("{}.{}", tenths / 10, tenths % 10) } else { (tenths / 10).to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_and_nothing_trails() {
        let rows = [["NAME", "N", "WHY"], ["dice", "10", "because"], ["ä", "1", ""]]
            .map(|row| row.map(String::from).to_vec());
        assert_eq!(table(&rows, false), "NAME  N   WHY\ndice  10  because\nä     1\n");
        assert_eq!(table(&[], false), "");
    }

    #[test]
    fn no_peer_commands_the_terminal() {
        assert_eq!(printable("a\x1b[2J\r\n\t\u{9b}\x7f\u{202e}b\u{2066}ä"), "a?[2J??????b?ä");
        let rows = [["NAME", "WHY"], ["\x1b]0;x\x07", "two\nlines \x1b[0m"]]
            .map(|row| row.map(String::from).to_vec());
        assert_eq!(table(&rows, false), "NAME    WHY\n?]0;x?  two?lines ?[0m\n");
        assert_eq!(table(&rows, true), "NAME    WHY\n?]0;x?  two lines ?[0m\n");
        assert_eq!(paragraph("a \x1b[1mb\n\u{202e}c", 0), "a ?[1mb ?c");
    }

    #[test]
    fn the_last_column_is_continued_below_itself() {
        let long = "word ".repeat(30);
        let rows = [vec!["a".to_owned(), long.clone()], vec!["bb".to_owned(), "c".to_owned()]];
        let text = table(&rows, true);
        assert!(text.lines().all(|line| line.chars().count() <= WIDTH), "{text}");
        assert_eq!(text.split_whitespace().filter(|word| *word == "word").count(), 30);
        assert!(
            text.starts_with("a   word") && text.contains("\n    word") && text.ends_with("\nbb  c\n"),
            "{text}"
        );
    }

    #[test]
    fn a_time_has_the_largest_unit_that_tells_something() {
        let cases =
            [(0, "0 s"), (119, "119 s"), (120, "2 min"), (7199, "119 min"), (7200, "2 h"), (200_000, "2 d")];
        for (seconds, words) in cases {
            assert_eq!(elapsed(Duration::from_secs(seconds)), words);
        }
        assert_eq!(elapsed(Duration::from_millis(3999)), "3 s");
    }

    #[test]
    fn a_short_time_is_told_precisely() {
        let cases = [(850, "850 us"), (12_900, "12 ms"), (1_240_000, "1.2 s"), (1_000_000, "1 s")];
        for (micros, words) in cases {
            assert_eq!(precise(Duration::from_micros(micros)), words);
        }
        assert_eq!(precise(Duration::from_mins(15)), "15 min");
    }

    #[test]
    fn memory_has_two_digits_at_least() {
        let cases = [(0, "0.0 KiB"), (5_700_000, "5.4 MiB"), (312 << 20, "312 MiB"), (1 << 30, "1.0 GiB")];
        for (bytes, words) in cases {
            assert_eq!(memory(bytes), words);
        }
    }

    #[test]
    fn a_word_that_is_too_long_stays_whole() {
        let word = "x".repeat(100);
        assert_eq!(paragraph(&format!("a {word} b"), 10), format!("a\n          {word}\n          b"));
    }
}
