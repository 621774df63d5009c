//! Ring 1: what drowse writes to stderr: who reads it is a person, or a file.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use drowse_tests::drowse_binary;
use drowse_tests::process::{Drowse, backend, connect, one_request, public};

const ECHO: &str = env!("CARGO_BIN_EXE_echo-backend");
/// What begins a colour.
const ESCAPE: char = '\u{1b}';

fn run(options: &[&str], backend_options: &[&str]) -> Result<Drowse> {
    let (public, backend) = (public(), backend());
    let addresses = ["--listen", &public, "--backend", &backend, "--plane", "splice"];
    Drowse::run(&[&addresses[..], options, &["--", ECHO, &backend], backend_options].concat())
}

#[test]
fn an_activation_and_a_stop_are_one_line_each() -> Result<()> {
    let mut drowse = run(&["--idle-time", "200ms"], &[])?;
    for _ in 0..3 {
        one_request(b"good morning")?;
        let awake = drowse.wait_for_line("is awake after")?;
        ensure!(awake.contains("ms: 1 client waited") && awake.contains(" INFO echo-backend"), "{awake}");
        let asleep = drowse.wait_for_line("is asleep")?;
        ensure!(asleep.contains("nobody used it for 200 ms; stopping took "), "{asleep}");
    }
    let said = drowse.all_output();
    let about = |word: &str| said.iter().filter(|line| line.contains(word)).count();
    ensure!(about("awake") == 3 && about("is asleep") == 3, "{said:#?}");
    ensure!(about("waking") == 0 && about("stopping echo-backend") == 0, "{said:#?}");
    // What the journal has as fields is in the words already; nothing else is a colour or a level for the journal.
    for word in ["latency", "event=", "reason=", "<6>", &ESCAPE.to_string()] {
        ensure!(about(word) == 0, "'{word}' in {said:#?}");
    }
    Ok(())
}

#[test]
fn silent_flows_that_are_closed_are_told_in_other_words() -> Result<()> {
    let mut drowse = run(&["--idle-time", "200ms", "--idle-policy", "traffic"], &[])?;
    let _silent = connect()?;
    drowse.wait_for_line("is asleep: no byte moved for 200 ms; ")?;
    Ok(())
}

#[test]
fn a_failure_is_one_line_with_its_reason() -> Result<()> {
    let mut drowse = run(&[], &["--exit", "3"])?;
    drop(connect()?);
    let line = drowse.wait_for_line("ERROR")?;
    ensure!(line.contains("echo-backend exited with status 3 (result exit-code)"), "{line}");
    ensure!(!line.contains("reason="), "{line}");
    Ok(())
}

#[test]
fn each_flow_is_told_to_who_wants_to_know() -> Result<()> {
    let mut drowse = run(&["--log-level", "debug"], &[])?;
    one_request(b"good morning")?;
    drowse.wait_for_line("waking echo-backend")?;
    drowse.wait_for_line("a client is connected to the backend")?;
    drowse.wait_for_line("a flow is over")?;
    Ok(())
}

#[test]
fn less_is_logged_to_who_wants_less() -> Result<()> {
    let mut drowse = run(&["--log-level", "error", "--idle-time", "100ms"], &[])?;
    one_request(b"good morning")?;
    drowse.wait_for_notification("STATUS=awake")?;
    drowse.wait_for_notification("STATUS=asleep")?;
    ensure!(drowse.all_output().is_empty(), "{:?}", drowse.all_output());
    Ok(())
}

/// What drowse says that fails at once, on a terminal (script(1) makes one).
fn on_a_terminal(variables: &[(&str, &str)]) -> Result<String> {
    let program = drowse_binary()?;
    let line = format!("{} run --listen /proc/none --backend {}", program.display(), backend());
    let mut script = Command::new("script");
    script.args(["--quiet", "--return", "--command", &line, "/dev/null"]);
    script.env_remove("NO_COLOR").env_remove("JOURNAL_STREAM").envs(variables.iter().copied());
    let output = script.output().context("run script (package bsdutils)")?;
    ensure!(output.status.code() == Some(1), "{output:?}");
    let said = String::from_utf8(output.stdout)?;
    ensure!(said.contains("cannot listen on /proc/none"), "{said}");
    Ok(said)
}

#[test]
fn a_terminal_has_colours_unless_somebody_wants_none() -> Result<()> {
    ensure!(on_a_terminal(&[])?.contains(ESCAPE), "no colour");
    ensure!(on_a_terminal(&[("NO_COLOR", "")])?.contains(ESCAPE), "an empty NO_COLOR says nothing");
    let plain = on_a_terminal(&[("NO_COLOR", "1")])?;
    ensure!(!plain.contains(ESCAPE), "{plain:?}");
    // A variable that somebody else's stderr had: this one is no journal.
    let foreign = on_a_terminal(&[("JOURNAL_STREAM", "8:12345")])?;
    ensure!(foreign.contains(ESCAPE) && !foreign.contains("<3>"), "{foreign:?}");
    Ok(())
}
