//! The first thing that the README tells people to run.

use std::process::{Command, Output};

use anyhow::{Context, Result, ensure};
use drowse_tests::isolated::isolated;
use drowse_tests::workspace;

const DEMO: [&str; 2] = ["xtask", "demo"];
/// The demo bounds each of its steps, but not the build before them, which is optimised. Ends all of it.
const BOUND: [&str; 3] = ["timeout", "--kill-after=10s", "20m"];

/// As root it runs in a network of its own, by a user who is not root there but may read root's files, for the compiler may
/// be among them. Else it runs as it does for everybody.
#[test]
fn the_demo_shows_a_service_that_wakes_and_sleeps() -> Result<()> {
    let output = if rustix::process::geteuid().is_root() {
        isolated(|| run(&["unshare", "--user", "--map-user=1000", "--map-group=1000", "cargo"]))?
    } else {
        run(&["cargo"])?
    };
    let said = String::from_utf8_lossy(&output.stdout);
    println!("{said}{}", String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.success(), "{}", output.status);
    let mut rest = &*said;
    for wanted in [
        "cold request: {\"dice\": ",
        "warm request: {\"dice\": ",
        "... and it is: ",
        "wakes it again: {\"dice\": ",
    ] {
        let (_, after) = rest.split_once(wanted).with_context(|| format!("no {wanted:?} in order"))?;
        rest = after;
    }
    Ok(())
}

fn run(cargo: &[&str]) -> Result<Output> {
    let [timeout, bound @ ..] = BOUND;
    let mut command = Command::new(timeout);
    command.args(bound).args(cargo).args(DEMO).current_dir(workspace());
    command.output().context("start the demo")
}
