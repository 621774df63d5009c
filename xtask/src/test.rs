//! `cargo xtask test`: all rings.
//!
//! Owns: the order. What a run as an ordinary user cannot do is said, not skipped in silence.

use std::process::Command;

use crate::{dist, install, lint, process, say};

/// Run all tests.
#[derive(Debug, clap::Args)]
pub struct TestArgs {
    /// Run the test suites so many times
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
}

/// Rings that need no privileges.
const UNPRIVILEGED: &str = "not (binary(/^ring2/) or binary(/^ring3/))";
/// Everything but the tests of the Debian package.
const WITHOUT_DPKG: &str = "not binary(ring3_package)";

/// Installs what is missing, then runs lints, the packaging with its eBPF build, rings 0 to 3 and a short benchmark.
pub fn run(args: &TestArgs) -> anyhow::Result<()> {
    install::run()?;
    lint::run()?;
    dist::run()?;
    say("building drowse and the tests");
    process::run(Command::new("cargo").args(["build", "--quiet", "--workspace", "--bins"]))?;
    let is_root = rustix::process::geteuid().is_root();
    let mut nextest = Command::new("cargo");
    nextest.args(["nextest", "run", "--workspace"]);
    if args.rounds > 1 {
        nextest.args(["--stress-count", &args.rounds.to_string()]);
    }
    if !is_root {
        say("not root: rings 2 (kernel) and 3 (a booted systemd) do not run; run this as root to have them");
        nextest.args(["--filterset", UNPRIVILEGED]);
    } else if process::find("dpkg-deb").is_none() {
        say("no dpkg-deb here: the tests of the packages do not run; run this on Debian to have them");
        nextest.args(["--filterset", WITHOUT_DPKG]);
    }
    process::run(&mut nextest)?;
    say("a short benchmark, to see that it works");
    process::run(Command::new("cargo").args(["xtask", "bench", "--quick"]))
}
