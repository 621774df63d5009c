//! Ring 3: the journal of a booted systemd, with the shipped unit and its sandbox, as `journalctl` shows it.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use drowse_tests::deadline::eventually;
use drowse_tests::service::{Installation, SOON, with_drowse};
use drowse_tests::workspace;
use serde_json::Value;

const ECHO: &str = env!("CARGO_BIN_EXE_echo-backend");
const UNIT: &str = "drowse@echo.service";

/// The fields of a message.
type Message = BTreeMap<String, Value>;

/// The messages that `journalctl MATCHES` finds.
fn messages(installation: &Installation, matches: &[&str]) -> Result<Vec<Message>> {
    installation.systemd.call(["journalctl", "--sync"])?;
    let text = installation.systemd.call([&["journalctl", "--quiet", "--output=json"], matches].concat())?;
    text.lines().map(|line| serde_json::from_str(line).context("read a message")).collect()
}

/// Waits for the one message of an event.
fn wait_for(installation: &Installation, event: &str) -> Result<Message> {
    let matches = [format!("_SYSTEMD_UNIT={UNIT}"), format!("DROWSE_EVENT={event}")];
    let matches: Vec<&str> = matches.iter().map(String::as_str).collect();
    eventually(event, SOON, || Ok(messages(installation, &matches)?.pop()))
}

fn ensure_fields(message: &Message, fields: &[(&str, &str)]) -> Result<()> {
    for (name, value) in fields {
        ensure!(
            message.get(*name).and_then(Value::as_str) == Some(value),
            "{name} is not {value}: {message:?}"
        );
    }
    Ok(())
}

fn text<'a>(message: &'a Message, name: &str) -> Result<&'a str> {
    message.get(name).and_then(Value::as_str).with_context(|| format!("no {name} in {message:?}"))
}

#[test]
fn a_wake_and_a_stop_have_their_fields_in_the_journal() -> Result<()> {
    with_drowse(ECHO, |installation| {
        installation.echo("", "DROWSE_IDLE_TIME=1s\nDROWSE_LOG_LEVEL=debug\nDROWSE_PLANE=splice")?;
        installation.ask()?;
        installation.wait_asleep("echo")?;
        let always =
            [("DROWSE_NAME", "echo"), ("DROWSE_UNIT", "echo.service"), ("SYSLOG_IDENTIFIER", "drowse")];
        let native = [("_TRANSPORT", "journal"), ("_COMM", "drowse")];

        let awake = wait_for(installation, "awake")?;
        ensure_fields(&awake, &[&always[..], &native, &[("PRIORITY", "6")]].concat())?;
        ensure!(text(&awake, "MESSAGE")?.starts_with("echo.service is awake after "), "{awake:?}");
        ensure!(text(&awake, "MESSAGE")?.ends_with(": 1 client waited"), "{awake:?}");
        let latency: u64 = text(&awake, "DROWSE_LATENCY_USEC")?.parse()?;
        ensure!((1000..20_000_000).contains(&latency), "{latency}");

        let asleep = wait_for(installation, "asleep")?;
        ensure_fields(
            &asleep,
            &[&always[..], &native, &[("PRIORITY", "6"), ("DROWSE_REASON", "idle")]].concat(),
        )?;
        let words = "echo.service is asleep: nobody used it for 1 s; stopping took ";
        ensure!(text(&asleep, "MESSAGE")?.starts_with(words), "{asleep:?}");
        text(&asleep, "DROWSE_LATENCY_USEC")?.parse::<u64>()?;

        let flow = wait_for(installation, "flow")?;
        ensure_fields(&flow, &[&always[..], &[("PRIORITY", "7"), ("DROWSE_PLANE", "splice")]].concat())?;
        let cookie = text(&flow, "DROWSE_FLOW")?;
        cookie.parse::<u64>()?;
        ensure_fields(&wait_for(installation, "flow_end")?, &[("DROWSE_FLOW", cookie)])?;

        // Nothing is said twice, and all of it is there for who looks for the unit.
        let all = messages(installation, &[&format!("_SYSTEMD_UNIT={UNIT}")])?;
        let about = |words: &str| {
            let has = |one: &&Message| text(one, "MESSAGE").is_ok_and(|it| it.contains(words));
            all.iter().filter(has).count()
        };
        ensure!(about("is awake after") == 1 && about("is asleep") == 1, "{all:#?}");

        let reference = std::fs::read_to_string(workspace().join("docs/reference/logs.md"))?;
        let is_told = |word: &str| reference.contains(&format!("| `{word}` |"));
        for message in &all {
            let fields = message.keys().filter(|field| field.starts_with("DROWSE_"));
            for word in fields.map(String::as_str).chain(text(message, "DROWSE_EVENT").ok()) {
                ensure!(is_told(word), "{word} is not in the reference: {message:?}");
            }
        }
        Ok(())
    })
}

#[test]
fn a_failed_start_has_its_reason_in_the_journal() -> Result<()> {
    with_drowse(ECHO, |installation| {
        installation.echo("--exit 3", "")?;
        ensure!(installation.ask().is_err(), "served by a backend that does not start");
        let failed = wait_for(installation, "failed")?;
        let unit =
            [("DROWSE_NAME", "echo"), ("DROWSE_UNIT", "echo.service"), ("SYSLOG_IDENTIFIER", "drowse")];
        ensure_fields(&failed, &[&unit[..], &[("PRIORITY", "3"), ("DROWSE_REASON", "exit-code")]].concat())?;
        ensure!(text(&failed, "MESSAGE")?.contains("exited with status 3"), "{failed:?}");
        Ok(())
    })
}

/// One that ends before the journal has looked at who it was.
#[test]
fn the_last_words_of_a_drowse_that_cannot_begin_are_found_by_its_unit() -> Result<()> {
    with_drowse(ECHO, |installation| {
        installation.echo("", "DROWSE_BACKEND=127.0.0.1:8080")?;
        drop(installation.connect()?);
        let said = eventually("the last words", SOON, || {
            let all = messages(installation, &[&format!("_SYSTEMD_UNIT={UNIT}")])?;
            let is_it = |one: &&Message| {
                text(one, "MESSAGE").is_ok_and(|it| it.contains("is where drowse itself listens"))
            };
            Ok(all.iter().find(is_it).cloned())
        })?;
        ensure_fields(
            &said,
            &[("PRIORITY", "3"), ("SYSLOG_IDENTIFIER", "drowse"), ("_TRANSPORT", "stdout")],
        )?;
        ensure!(!text(&said, "MESSAGE")?.contains("<3>"), "{said:?}");
        Ok(())
    })
}
