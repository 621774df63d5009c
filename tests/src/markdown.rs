//! What a Markdown document tells its readers to run, and where it sends them.
//!
//! PURE. Owns: the reading of fenced blocks, links and headings, and the comparison of documented output with the real
//! one. Must never: run anything.
//!
//! Rests on: `pulldown-cmark`, which reads Markdown as the places do where people read these documents.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, bail};
use pulldown_cmark::{CodeBlockKind, Event, Parser, Tag, TagEnd};

/// Stands for any number of lines in documented output, and at the end of a line for its rest.
const ANY_LINES: &str = "...";
/// Words behind a number that say how much of what it is: they change with the number.
const UNITS: [&str; 11] = ["ns", "us", "ms", "s", "min", "h", "bytes", "B", "KiB", "MiB", "GiB"];
/// From so many digits on, a word of hexadecimal digits is a number and no word.
const HEX_DIGITS_MIN: usize = 8;

/// A document, taken apart.
#[derive(Debug, Default)]
pub struct Document {
    /// Its fenced blocks, in order.
    pub blocks: Vec<Block>,
    /// Where its links and pictures lead, each with its line.
    pub links: Vec<(usize, String)>,
    /// The fragments by which its headings can be linked.
    pub anchors: BTreeSet<String>,
}

/// A fenced block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Block {
    /// The line of its fence, from 1 on.
    pub line: usize,
    /// The word after the fence: `sh`, `console`, `ini`, ...
    pub language: String,
    /// What is in it.
    pub text: String,
    /// The HTML comment directly before it, without its brackets.
    pub mark: Option<String>,
}

/// Takes a document apart.
#[must_use]
#[expect(
    clippy::wildcard_enum_match_arm,
    reason = "of all that a document may have, some things matter here"
)]
pub fn parse(text: &str) -> Document {
    let mut document = Document::default();
    let mut headings: BTreeMap<String, usize> = BTreeMap::new();
    let (mut mark, mut heading) = (None, None::<String>);
    let mut open: Option<Block> = None;
    for (event, range) in Parser::new_ext(text, pulldown_cmark::Options::ENABLE_TABLES).into_offset_iter() {
        let line = 1 + text.get(..range.start).unwrap_or_default().matches('\n').count();
        match event {
            Event::Html(html) => mark = comment(&html),
            Event::Start(Tag::HtmlBlock) | Event::End(TagEnd::HtmlBlock) => {}
            Event::Start(Tag::CodeBlock(kind)) => {
                let CodeBlockKind::Fenced(info) = kind else { continue };
                let language = info.split_whitespace().next().unwrap_or_default().to_owned();
                open = Some(Block { line, language, text: String::new(), mark: mark.take() });
            }
            Event::End(TagEnd::CodeBlock) => document.blocks.extend(open.take()),
            Event::Start(Tag::Heading { .. }) => heading = Some(String::new()),
            Event::End(TagEnd::Heading(_)) => {
                let anchor = anchor(&heading.take().unwrap_or_default());
                let seen = headings.entry(anchor.clone()).or_default();
                document.anchors.insert(if *seen == 0 { anchor } else { format!("{anchor}-{seen}") });
                *seen += 1;
            }
            Event::Start(Tag::Link { dest_url, .. } | Tag::Image { dest_url, .. }) => {
                document.links.push((line, dest_url.into_string()));
            }
            Event::Text(words) | Event::Code(words) => {
                if let Some(block) = &mut open {
                    block.text.push_str(&words);
                } else if let Some(heading) = &mut heading {
                    heading.push_str(&words);
                }
            }
            _other => mark = None,
        }
    }
    document
}

/// The text of an HTML comment.
fn comment(html: &str) -> Option<String> {
    Some(html.trim().strip_prefix("<!--")?.strip_suffix("-->")?.trim().to_owned())
}

/// A heading's fragment, as GitHub and others make it.
fn anchor(heading: &str) -> String {
    let kept = heading.chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c));
    kept.flat_map(char::to_lowercase).map(|c| if c == ' ' { '-' } else { c }).collect()
}

/// Who types a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Who {
    /// The prompt is `#`.
    Root,
    /// The prompt is `$`.
    Person,
}

/// A command in a `console` block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Typed {
    /// Who types it.
    pub who: Who,
    /// What is typed; more than one line if a backslash ends the first.
    pub command: String,
    /// What the document says that it prints.
    pub output: Vec<String>,
}

/// The commands of a `console` block: what follows a prompt, each with the lines up to the next one.
///
/// # Errors
/// The block does not begin with a prompt.
pub fn typed(block: &Block) -> Result<Vec<Typed>> {
    let mut commands: Vec<Typed> = Vec::new();
    for line in block.text.lines() {
        let new = [("# ", Who::Root), ("$ ", Who::Person)]
            .into_iter()
            .find_map(|(prompt, who)| Some((who, line.strip_prefix(prompt)?)));
        match (new, commands.last_mut()) {
            (_, Some(last)) if last.command.ends_with('\\') && last.output.is_empty() => {
                last.command.push('\n');
                last.command.push_str(line);
            }
            (Some((who, command)), _) => {
                commands.push(Typed { who, command: command.to_owned(), output: Vec::new() });
            }
            (None, Some(last)) => last.output.push(line.to_owned()),
            (None, None) => bail!("a console block begins with '# ' or '$ ', not with {line:?}"),
        }
    }
    Ok(commands)
}

/// The files in a block, by a first line `# /PATH` or `# ~/PATH`: path and text. None: the block is no file.
#[must_use]
pub fn files(block: &Block) -> Vec<(String, String)> {
    let mut files: Vec<(String, String)> = Vec::new();
    for line in block.text.split_inclusive('\n') {
        let path = line.strip_prefix("# ").map(str::trim).filter(|path| {
            (path.starts_with('/') || path.starts_with("~/")) && !path.contains(char::is_whitespace)
        });
        match (path, files.last_mut()) {
            (Some(path), _) => files.push((path.to_owned(), line.to_owned())),
            (None, Some((_, text))) => text.push_str(line),
            (None, None) => return files,
        }
    }
    files
}

/// Whether `real` looks as `documented` says: the same words in the same lines, whatever the numbers are. Blank lines
/// do not count. `...` stands for any lines, and after a blank at the end of a line for the rest of it.
///
/// # Errors
/// It does not. The message has both, as they were compared.
pub fn compare(documented: &[String], real: &str) -> Result<()> {
    let shape = |lines: &mut dyn Iterator<Item = &str>| -> Vec<String> {
        lines.map(shape).filter(|line| !line.is_empty()).collect()
    };
    let wanted = shape(&mut documented.iter().map(String::as_str));
    let seen = shape(&mut real.lines());
    matches(&wanted, &seen).then_some(()).with_context(|| {
        format!("the output is\n{real}\n  compared as {seen:#?}\n  documented as {wanted:#?}")
    })
}

fn matches(wanted: &[String], seen: &[String]) -> bool {
    match wanted.split_first() {
        None => seen.is_empty(),
        Some((first, rest)) if first == ANY_LINES => {
            (0..=seen.len()).any(|skipped| matches(rest, seen.get(skipped..).unwrap_or_default()))
        }
        Some((first, rest)) => seen.split_first().is_some_and(|(line, more)| {
            let same = match first.strip_suffix(ANY_LINES) {
                Some(start) if start.ends_with(' ') => line.starts_with(start),
                _ => line == first,
            };
            same && matches(rest, more)
        }),
    }
}

/// A line without what differs from run to run: numbers with their units become `N`, so does the kernel's version and a
/// dash, which is a number that nobody knows, and blanks become one.
fn shape(line: &str) -> String {
    let mut words: Vec<String> = Vec::new();
    for word in line.split_whitespace() {
        let unit = word.trim_end_matches([',', ';', '.', ')', ':']);
        match words.last_mut() {
            Some(last) if last.ends_with('N') && UNITS.contains(&unit) => {
                last.push_str(word.get(unit.len()..).unwrap_or_default());
            }
            Some(last) if last == "Linux" => words.push("N".to_owned()),
            _ if word == "-" => words.push("N".to_owned()),
            _ => words.push(without_numbers(word)),
        }
    }
    words.join(" ")
}

fn without_numbers(word: &str) -> String {
    let parts = word.split_inclusive(|c: char| !c.is_ascii_alphanumeric());
    let mut text = String::new();
    for part in parts {
        let digits = part.trim_end_matches(|c: char| !c.is_ascii_alphanumeric());
        let is_hex = digits.len() >= HEX_DIGITS_MIN
            && digits.chars().all(|c| c.is_ascii_hexdigit())
            && digits.contains(|c: char| c.is_ascii_digit());
        text.push_str(if is_hex { "N" } else { digits });
        text.push_str(part.get(digits.len()..).unwrap_or_default());
    }
    let mut plain = String::new();
    for c in text.chars() {
        match c {
            '0'..='9' if plain.ends_with('N') => {}
            '0'..='9' if plain.ends_with("N.") => {
                plain.pop();
            }
            '0'..='9' => plain.push('N'),
            _ => plain.push(c),
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "# A title\n\n<!-- background -->\n```sh\necho\n```\n\n<!-- lost -->\n\nwords [x](y.md#z)\n\n\
        ```console\n# one \\\n    two\nout\n$ three\n```\n\n## A title\n\n- item\n\n  ```ini\n  # /etc/a\n  b=c\n\n  # ~/d\n  e\n  ```\n";

    #[test]
    fn blocks_have_their_line_their_mark_and_their_text() {
        let document = parse(TEXT);
        let seen: Vec<_> = document
            .blocks
            .iter()
            .map(|block| (block.line, block.language.as_str(), block.mark.as_deref()))
            .collect();
        assert_eq!(seen, [(4, "sh", Some("background")), (12, "console", None), (23, "ini", None)]);
        assert_eq!(document.links, [(10, "y.md#z".to_owned())]);
        assert_eq!(document.anchors.iter().collect::<Vec<_>>(), ["a-title", "a-title-1"]);
    }

    #[test]
    fn commands_and_files_are_found() {
        let blocks = parse(TEXT).blocks;
        let commands = typed(&blocks[1]).unwrap();
        assert_eq!(commands[0].command, "one \\\n    two");
        assert_eq!((commands[0].who, &commands[0].output[..]), (Who::Root, &["out".to_owned()][..]));
        assert_eq!((commands[1].who, commands[1].command.as_str()), (Who::Person, "three"));
        assert!(typed(&blocks[0]).is_err());
        let expected = [("/etc/a", "# /etc/a\nb=c\n\n"), ("~/d", "# ~/d\ne\n")];
        assert_eq!(files(&blocks[2]), expected.map(|(path, text)| (path.to_owned(), text.to_owned())));
        assert!(files(&blocks[0]).is_empty());
    }

    #[test]
    fn numbers_differ_and_words_do_not() {
        let lines = |text: &str| text.lines().map(str::to_owned).collect::<Vec<_>>();
        for (documented, real) in [
            ("dice  awake  3 s  1+2", "dice awake   12 min 0+31\n"),
            ("took 0.012 s, Linux 6.18.44-fc-v657", "took 3 ms, Linux 6.1.0-35-amd64"),
            ("pid 12, id 0123456789abcdef", "pid 7, id fedcba98765432a0\n\n"),
            ("a\n...\nd", "a\nb\nc\nd"),
            ("a b ...\nd", "a  b c\nd"),
            ("...", ""),
            ("127.0.0.1:8080", "127.0.0.1:99"),
            ("web  -  4 s", "web  18 MiB  4 s"),
        ] {
            assert!(compare(&lines(documented), real).is_ok(), "{documented:?} {real:?}");
        }
        for (documented, real) in [
            ("awake: 1 flow", "awake: 2 flows"),
            ("a", "a\nb"),
            ("a ...", "ab"),
            ("a...", "ab"),
            ("a\n...\nd", "a\nb"),
            ("", "more"),
            ("12", "x"),
            ("deadbeef", "feedbeef"),
        ] {
            assert!(compare(&lines(documented), real).is_err(), "{documented:?} {real:?}");
        }
    }
}
