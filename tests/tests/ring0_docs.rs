//! Documents that agree with the program and with each other.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result, ensure};
use clap::{Arg, Command, CommandFactory as _};
use drowse::config::Cli;
use drowse_tests::markdown::{Document, parse};
use drowse_tests::workspace;

/// Where documents are.
const PLACES: [&str; 4] = ["docs", "units", "bench", "."];
const OPTIONS: &str = "docs/reference/options.md";
/// With this variable the test writes what it would compare.
const WRITE: &str = "DROWSE_TEST_WRITE";

/// Every Markdown file, by its path from the root of the repository.
fn documents() -> Result<BTreeMap<PathBuf, Document>> {
    let mut found = BTreeMap::new();
    let mut left: Vec<PathBuf> = PLACES.map(PathBuf::from).to_vec();
    while let Some(directory) = left.pop() {
        for entry in fs::read_dir(workspace().join(&directory)).context("look for documents")? {
            let entry = entry?;
            let path = directory.join(entry.file_name());
            let path: PathBuf = path.components().filter(|part| *part != Component::CurDir).collect();
            if entry.file_type()?.is_dir() {
                if directory != Path::new(".") {
                    left.push(path);
                }
            } else if path.extension().is_some_and(|extension| extension == "md") {
                let text = fs::read_to_string(workspace().join(&path))?;
                found.insert(path, parse(&text));
            }
        }
    }
    Ok(found)
}

/// `docs/how-to` and `../explanation.md` make `docs/explanation.md`.
fn resolve(directory: &Path, link: &str) -> PathBuf {
    let mut path = directory.to_owned();
    for part in Path::new(link).components() {
        if part == Component::ParentDir {
            path.pop();
        } else {
            path.push(part);
        }
    }
    path
}

#[test]
fn every_link_leads_somewhere() -> Result<()> {
    let documents = documents()?;
    let (mut broken, mut links) = (String::new(), 0);
    for (path, document) in &documents {
        for (line, link) in &document.links {
            if link.contains("://") {
                continue;
            }
            links += 1;
            let (file, fragment) = link.split_once('#').unwrap_or((link, ""));
            let directory = path.parent().unwrap_or(Path::new(""));
            let there = if file.is_empty() { path.clone() } else { resolve(directory, file) };
            let has_anchor = || documents.get(&there).is_some_and(|there| there.anchors.contains(fragment));
            if !workspace().join(&there).exists() || !fragment.is_empty() && !has_anchor() {
                writeln!(broken, "{}:{line}: {link}", path.display())?;
            }
        }
    }
    ensure!(broken.is_empty(), "links that lead nowhere:\n{broken}");
    ensure!(links > 50, "only {links} links were found");
    Ok(())
}

/// The index leads to each page, so that none is lost.
#[test]
fn the_index_has_every_page() -> Result<()> {
    let documents = documents()?;
    let index = documents.get(Path::new("docs/README.md")).context("find the index")?;
    for path in documents.keys().filter_map(|path| path.strip_prefix("docs").ok()) {
        let name = path.to_string_lossy();
        ensure!(
            name == "README.md" || index.links.iter().any(|(_, link)| *link == name),
            "{name} is not in it"
        );
    }
    Ok(())
}

/// The reference of options is made from their definition.
#[test]
fn the_reference_has_every_option() -> Result<()> {
    let wanted = reference(&Cli::command());
    let path = workspace().join(OPTIONS);
    if std::env::var_os(WRITE).is_some() {
        fs::write(&path, &wanted).context("write the reference")?;
    }
    let written = fs::read_to_string(&path).with_context(|| format!("read {OPTIONS}"))?;
    ensure!(
        written == wanted,
        "{OPTIONS} is not what the options are; write it anew with \
         {WRITE}=1 cargo nextest run -p drowse-tests -E 'test(the_reference_has_every_option)'"
    );
    for option in ["--idle-time TIME", "DROWSE_IDLE_TIME", "`15min`", "--plane", "`handoff`"] {
        ensure!(wanted.contains(option), "{option} is missing");
    }
    Ok(())
}

fn reference(command: &Command) -> String {
    let mut text = "# Options\n\n\
        What `--help` says, in one place; this page is made from it.\n\n\
        Each option of `drowse run` can also come from the environment, by the name beside it: under systemd as a line in\n\
        `/etc/drowse/NAME.conf`. Times are written as systemd does: `90s`, `15min`, `2h 30s`, `infinity`.\n"
        .to_owned();
    for command in command.get_subcommands() {
        // Writing to a string cannot fail.
        let _ = write!(text, "\n## drowse {}\n\n{}.\n\n", command.get_name(), help(command.get_about()));
        let shared = command.get_name() == "enable";
        for arg in command.get_arguments().filter(|arg| !arg.is_hide_set() && !is_of_clap(arg)) {
            if !(shared && is_of_run(arg)) {
                text.push_str(&entry(arg));
            }
        }
        if shared {
            text.push_str("- and the options of [`drowse run`](#drowse-run), which are written to the service's configuration.\n");
        }
    }
    text
}

fn is_of_clap(arg: &Arg) -> bool {
    matches!(arg.get_id().as_str(), "help" | "version")
}

/// Whether `drowse enable` takes the option to write it down.
fn is_of_run(arg: &Arg) -> bool {
    let own = ["unit", "listen", "backend", "user", "dry_run", "try_out"];
    !own.contains(&arg.get_id().as_str())
}

fn entry(arg: &Arg) -> String {
    let values: Vec<String> =
        arg.get_value_names().unwrap_or_default().iter().map(ToString::to_string).collect();
    let values = if arg.get_action().takes_values() { values.join(" ") } else { String::new() };
    let name = match arg.get_long() {
        Some(long) => format!("--{long} {values}").trim_end().to_owned(),
        None => values,
    };
    let mut beside: Vec<String> = Vec::new();
    beside.extend(arg.get_env().map(|env| format!("`{}`", env.to_string_lossy())));
    let defaults: Vec<_> = arg.get_default_values().iter().map(|value| value.to_string_lossy()).collect();
    if !defaults.is_empty() && arg.get_action().takes_values() {
        beside.push(format!("default `{}`", defaults.join(" ")));
    }
    let beside = if beside.is_empty() { String::new() } else { format!(" ({})", beside.join(", ")) };
    let mut text = format!("- **`{name}`**{beside}: {}.\n", help(arg.get_long_help().or(arg.get_help())));
    let possible = if arg.get_action().takes_values() { arg.get_possible_values() } else { Vec::new() };
    for value in possible {
        let _ = writeln!(text, "  - `{}`: {}", value.get_name(), help(value.get_help()));
    }
    text
}

fn help(text: Option<&clap::builder::StyledStr>) -> String {
    let words = text.map(ToString::to_string).unwrap_or_default();
    words.split_whitespace().collect::<Vec<_>>().join(" ").replace('<', "\\<")
}
