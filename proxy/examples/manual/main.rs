//! `cargo run --example manual -- DIRECTORY DATE`: writes the man pages and the shells' completions into DIRECTORY.
//!
//! Owns: which sections a page has. Options, subcommands and their words are those of `--help`, from the same
//! [`Cli`]; what a command line does not know (FILES, EXAMPLES, ...) is in the `.roff` files beside this one.
//! An example, so that the crates it needs are in no other build.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::{Command, CommandFactory as _, Parser};
use clap_complete::Shell;
use clap_mangen::Man;
use drowse::config::Cli;

/// Sections that only one page has. They come before [`COMMON`].
const OWN: [(&str, &str); 4] = [
    ("drowse", include_str!("drowse.roff")),
    ("drowse-run", include_str!("drowse-run.roff")),
    ("drowse-status", include_str!("drowse-status.roff")),
    ("drowse-check", include_str!("drowse-check.roff")),
];
/// Sections of every page.
const COMMON: &str = include_str!("common.roff");

/// Writes the man pages (`*.1`) and the completions of bash, zsh and fish.
#[derive(Parser)]
struct Arguments {
    /// Where to; it is made if it is missing
    directory: PathBuf,
    /// The date on the man pages, YYYY-MM-DD
    date: String,
}

fn main() -> anyhow::Result<()> {
    let Arguments { directory, date } = Arguments::parse();
    fs::create_dir_all(&directory).with_context(|| format!("make {}", directory.display()))?;
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        clap_complete::generate_to(shell, &mut Cli::command(), "drowse", &directory)
            .with_context(|| format!("write the completions of {shell}"))?;
    }

    let mut root = Cli::command().disable_help_subcommand(true);
    root.build();
    let pages: Vec<&Command> = std::iter::once(&root).chain(visible(&root)).collect();
    let names: Vec<String> = pages.iter().map(|page| name(page)).collect();
    for page in pages {
        write(page, &names, &directory, &date)
            .with_context(|| format!("write the page of {}", name(page)))?;
    }
    Ok(())
}

/// One page.
fn write(command: &Command, all: &[String], directory: &Path, date: &str) -> anyhow::Result<()> {
    let name = name(command);
    let source = concat!("drowse ", env!("CARGO_PKG_VERSION"));
    let man = Man::new(command.clone()).title(name.to_uppercase()).date(date).source(source).manual("drowse");
    let mut page = File::create(directory.join(format!("{name}.1")))?;
    man.render_title(&mut page)?;
    man.render_name_section(&mut page)?;
    // As --help has it, which says what is required and where COMMAND goes.
    let usage = command.clone().render_usage().to_string();
    let usage = usage.trim_start_matches("Usage:").trim();
    writeln!(page, ".SH SYNOPSIS\n.B {}", dashes(usage))?;
    man.render_description_section(&mut page)?;
    man.render_options_section(&mut page)?;
    if visible(command).next().is_some() {
        man.render_subcommands_section(&mut page)?;
    }
    for (_, sections) in OWN.iter().filter(|(owner, _)| *owner == name) {
        page.write_all(sections.as_bytes())?;
    }
    page.write_all(COMMON.as_bytes())?;
    let others =
        all.iter().filter(|other| **other != name).map(|other| format!(".BR {} (1),\n", dashes(other)));
    page.write_all(others.collect::<String>().as_bytes())?;
    page.write_all(b".BR systemd.socket (5),\n.BR systemd\\-socket\\-proxyd (8),\n.BR bpftool (8)\n")?;
    Ok(())
}

fn visible(command: &Command) -> impl Iterator<Item = &Command> {
    command.get_subcommands().filter(|subcommand| !subcommand.is_hide_set())
}

/// `drowse`, `drowse-run`, ...
fn name(command: &Command) -> String {
    command.get_display_name().unwrap_or_else(|| command.get_name()).to_owned()
}

/// A minus that is to be copied from a page is written so.
fn dashes(text: &str) -> String {
    text.replace('-', "\\-")
}
