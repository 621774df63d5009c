//! `cargo xtask`: everything around the build that cargo alone does not do. One file per subcommand.

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

mod build_ebpf;
mod install;
mod process;

/// Builds, tests and shows drowse.
#[derive(Parser)]
#[command(name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Build the eBPF object, which the next `cargo build` of drowse embeds
    BuildEbpf,
    /// Install what building and testing need, as far as it is missing (Debian packages: as root)
    Install,
}

fn main() -> ExitCode {
    let done = match Arguments::parse().task {
        Task::BuildEbpf => build_ebpf::run(),
        Task::Install => install::run(),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// The directory of the workspace.
fn workspace() -> PathBuf {
    let xtask = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    xtask.parent().map_or_else(|| xtask.clone(), PathBuf::from)
}

/// Tells the user what happens.
fn say(line: &str) {
    // Nobody reads any more: then nobody is told.
    let _ = writeln!(std::io::stdout(), "xtask: {line}");
}
