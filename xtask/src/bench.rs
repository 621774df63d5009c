//! `cargo xtask bench`: drowse beside its peers.
//!
//! Owns: building drowse and the benchmark optimised, and passing the arguments on. Must never: know a case or a peer;
//! those belong to `drowse-bench`, which documents them (`cargo xtask bench --help`).

use std::env;
use std::ffi::OsString;
use std::process::Command;

use anyhow::{Context, Result, ensure};

/// Measure drowse beside a direct connection and its peers.
#[derive(Debug, clap::Args)]
#[command(disable_help_flag = true)]
pub struct BenchArgs {
    /// Arguments of drowse-bench, such as --quick, --only CASE, --check; --help lists them all.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGUMENT")]
    arguments: Vec<OsString>,
}

/// Builds both programs and runs the benchmark.
///
/// # Errors
/// When a build fails, or the benchmark does, or a bar is not reached; the benchmark has then said which.
pub fn run(args: &BenchArgs) -> Result<()> {
    cargo(["build", "--release", "--quiet", "--package", "drowse"], &[]).context("build drowse")?;
    let bench = ["run", "--release", "--quiet", "--package", "drowse-bench"];
    cargo(bench, &args.arguments).context("run the benchmark")
}

fn cargo<const N: usize>(fixed: [&str; N], passed_on: &[OsString]) -> Result<()> {
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.args(fixed);
    if !passed_on.is_empty() {
        command.arg("--").args(passed_on);
    }
    let status = command.status().context("start cargo")?;
    ensure!(status.success(), "it ended with {status}");
    Ok(())
}
