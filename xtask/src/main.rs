//! `cargo xtask`: everything around the build that cargo alone does not do. One file per subcommand.

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

mod bench;
mod build_ebpf;
mod demo;
mod dist;
mod install;
mod lint;
mod process;
mod test;

/// Builds, tests, measures and shows drowse.
#[derive(Parser)]
#[command(name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// See the main job: a service that sleeps, wakes on its first request, and sleeps again
    Demo,
    /// Install what is missing and run every test: lints, rings 0 to 3, a short benchmark
    Test(test::TestArgs),
    /// Check formatting, lints and licences
    Lint,
    /// Compare drowse with a direct connection and with other proxies
    Bench(bench::BenchArgs),
    /// Build the eBPF object, which the next `cargo build` of drowse embeds
    BuildEbpf,
    /// Build the Debian package and the tarball in target/dist
    Dist,
    /// Install what building and testing need, as far as it is missing (Debian packages: as root)
    Install,
}

fn main() -> ExitCode {
    let done = match Arguments::parse().task {
        Task::Demo => demo::run(),
        Task::Test(arguments) => test::run(&arguments),
        Task::Lint => lint::run(),
        Task::Bench(arguments) => bench::run(&arguments),
        Task::BuildEbpf => build_ebpf::run(),
        Task::Dist => dist::run(),
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
