//! `cargo xtask bench`: drowse beside its peers.
//!
//! Owns: installing the peers, building drowse and the benchmark optimised, and passing the arguments on. Must never:
//! know a case or how a peer is started; those belong to `drowse-bench`, which documents them (`cargo xtask bench
//! --help`).

use std::env;
use std::ffi::{OsStr, OsString};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::install;

/// Measure drowse beside a direct connection and its peers.
#[derive(Debug, clap::Args)]
#[command(disable_help_flag = true)]
pub struct BenchArgs {
    /// Arguments of drowse-bench, such as --quick, --only CASE, --check; --help lists them all.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGUMENT")]
    arguments: Vec<OsString>,
}

/// Installs missing peers, builds both programs and runs the benchmark.
///
/// # Errors
/// When an installation or a build fails, or the benchmark does, or a bar is not reached; the benchmark has then said which.
pub fn run(args: &BenchArgs) -> Result<()> {
    if !args.arguments.iter().any(|argument| ["-h", "--help"].map(OsStr::new).contains(&argument.as_os_str()))
    {
        install::peers(|peer| is_wanted(&args.arguments, peer)).context("install the peers")?;
    }
    cargo(["build", "--release", "--quiet", "--package", "drowse"], &[]).context("build drowse")?;
    let bench = ["run", "--release", "--quiet", "--package", "drowse-bench"];
    cargo(bench, &args.arguments).context("run the benchmark")
}

/// Whether the benchmark's `arguments` have it measure `peer`: all of them without `--peers`, else those it names.
fn is_wanted(arguments: &[OsString], peer: &str) -> bool {
    let arguments: Vec<_> = arguments.iter().map(|argument| argument.to_string_lossy()).collect();
    let has = |list: &str| list.split(',').any(|name| name == peer);
    let mut lists = arguments.iter().enumerate().filter_map(|(index, argument)| {
        let list = arguments.get(index + 1).filter(|_| argument == "--peers").map(AsRef::as_ref);
        list.or_else(|| argument.strip_prefix("--peers="))
    });
    let first = lists.next();
    first.is_none_or(|first| has(first) || lists.any(has))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_peers_are_wanted_unless_some_are_named() {
        let wanted = |arguments: &[&str]| {
            let arguments: Vec<OsString> = arguments.iter().map(OsString::from).collect();
            ["haproxy", "nginx"].map(|peer| is_wanted(&arguments, peer))
        };
        assert_eq!(wanted(&["--quick"]), [true, true]);
        assert_eq!(wanted(&["--peers=direct,nginx"]), [false, true]);
        assert_eq!(wanted(&["--peers", "direct", "--peers=haproxy"]), [true, false]);
        assert_eq!(wanted(&["--peers", "direct"]), [false, false]);
    }
}
