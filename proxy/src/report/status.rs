//! `drowse status`: every running drowse in a line each, or one in full.
//!
//! Owns: the words and the columns. Must never: change anything, or wait longer than a second for a service.

use std::fmt::Write as _;
use std::time::Duration;

use anyhow::Context as _;

use crate::config::StatusArgs;
use crate::ebpf::pin_name;
use crate::report::Said;
use crate::report::control::{self, Service, Silence};
use crate::report::snapshot::{FlowCount, HandoffState, Refused, Snapshot};
use crate::report::text::{elapsed, paragraph, table};

/// How wide the labels of one service's lines are.
const LABEL_WIDTH: usize = 13;

/// Answers `drowse status`.
///
/// # Errors
/// A directory with status sockets cannot be read.
pub async fn status(args: &StatusArgs) -> anyhow::Result<Said> {
    let directories = control::directories(args.look.runtime_dir.as_deref());
    let Some(name) = &args.name else {
        let services = control::ask_all(&directories, |_| true).await?;
        return if args.look.json { all_as_json(&services) } else { Ok(all(&services)) };
    };
    let file_name = pin_name(name).context("look for a service")?;
    let mut services = control::ask_all(&directories, |found| found == file_name).await?;
    if services.is_empty() {
        services = control::ask_all(&directories, |_| true).await?;
        services.retain(|service| service.answer.as_ref().is_ok_and(|snapshot| has_unit(snapshot, name)));
    }
    services.sort_by_key(|service| service.answer.is_err());
    match services.first() {
        None => Ok(unknown(name)),
        Some(Service { answer: Ok(snapshot), .. }) => {
            let answer = if args.look.json { json(snapshot)? } else { whole(snapshot) };
            Ok(Said { answer, notes: vec![], success: true })
        }
        Some(Service { answer: Err(silence), .. }) => Ok(failed(format!("{name}: {silence}"))),
    }
}

/// Whether `name` is the service's unit, with or without `.service`.
fn has_unit(snapshot: &Snapshot, name: &str) -> bool {
    let unit = snapshot.unit.as_deref();
    unit.is_some_and(|unit| unit == name || unit.strip_suffix(".service") == Some(name))
}

fn unknown(name: &str) -> Said {
    let instance = name.strip_suffix(".service").unwrap_or(name);
    failed(format!(
        "no drowse named '{name}' runs; under systemd it may not have been needed yet, see: \
         systemctl status drowse@{instance}.socket"
    ))
}

fn failed(note: String) -> Said {
    Said { answer: String::new(), notes: vec![note], success: false }
}

fn json(answer: &impl serde::Serialize) -> anyhow::Result<String> {
    Ok(serde_json::to_string_pretty(answer).context("write JSON")? + "\n")
}

fn all_as_json(services: &[Service]) -> anyhow::Result<Said> {
    let answers: Vec<&Snapshot> =
        services.iter().filter_map(|service| service.answer.as_ref().ok()).collect();
    Ok(Said { answer: json(&answers)?, notes: silences(services), success: true })
}

/// A line for each service that does not answer.
pub(super) fn silences(services: &[Service]) -> Vec<String> {
    let silent = |service: &Service| Some(format!("{}: {}", service.name(), service.answer.as_ref().err()?));
    services.iter().filter_map(silent).collect()
}

/// One line for each service.
fn all(services: &[Service]) -> Said {
    if services.is_empty() {
        let answer = "no drowse runs here; those under systemd start with their first connection,\n\
                      see: systemctl list-sockets 'drowse@*'\n";
        return Said { answer: answer.to_owned(), notes: vec![], success: true };
    }
    let heading = ["NAME", "STATE", "SINCE", "FLOWS", "HELD", "PLANE", "WHY"].map(str::to_owned).to_vec();
    let rows: Vec<_> = std::iter::once(heading).chain(services.iter().map(row)).collect();
    Said { answer: table(&rows, false), notes: vec![], success: true }
}

fn row(service: &Service) -> Vec<String> {
    let name = service.name().to_owned();
    match &service.answer {
        Ok(snapshot) => vec![
            name,
            snapshot.state.word().to_owned(),
            elapsed_s(snapshot.since_s),
            flows(snapshot),
            snapshot.held.to_string(),
            plane(snapshot),
            why(snapshot),
        ],
        Err(silence) => {
            let state = if *silence == Silence::Gone { "gone" } else { "?" };
            let unknown = || "-".to_owned();
            vec![name, state.to_owned(), unknown(), unknown(), unknown(), unknown(), silence.to_string()]
        }
    }
}

/// Open flows: those that drowse moves, and after a plus those that were handed off.
fn flows(snapshot: &Snapshot) -> String {
    let (proxied, handed_off) = (snapshot.flows.proxied.open, snapshot.flows.handed_off.open);
    if handed_off > 0 { format!("{proxied}+{handed_off}") } else { proxied.to_string() }
}

/// How new connections travel, or will when the backend is awake.
fn plane(snapshot: &Snapshot) -> String {
    let planes: Vec<&str> =
        snapshot.plane.handoff.listeners.iter().map(|listener| snapshot.plane.of(listener)).collect();
    let forward = snapshot.plane.forward.as_str();
    let handed_off = planes.iter().filter(|plane| **plane != forward).count();
    match handed_off {
        0 => forward.to_owned(),
        all if all == planes.len() => "handoff".to_owned(),
        _ => format!("handoff, {forward}"),
    }
}

/// Why it is in this state, in a few words.
fn why(snapshot: &Snapshot) -> String {
    if !snapshot.idle.reasons.is_empty() {
        return snapshot.idle.reasons.join("; ");
    }
    let line = snapshot.line.as_str();
    let after_state = line.strip_prefix(snapshot.state.word()).and_then(|rest| rest.strip_prefix(": "));
    after_state.unwrap_or(line).to_owned()
}

/// Everything about one service.
fn whole(snapshot: &Snapshot) -> String {
    let mut text = paragraph(&format!("{}: {}", snapshot.name, snapshot.line), 2) + "\n";
    let mut say = |label: &str, words: String| {
        let words = paragraph(&words, LABEL_WIDTH + 2);
        let _infallible = writeln!(text, "  {label:LABEL_WIDTH$}{words}");
    };
    let unit = snapshot.unit.as_deref().map_or_else(String::new, |unit| format!(", {unit}"));
    say("backend", format!("{}{unit}", snapshot.backend));
    say("drowse", format!("process {}, at most {} connections", snapshot.pid, snapshot.connections_max));
    say("state", format!("{} for {}", snapshot.state.word(), elapsed_s(snapshot.since_s)));
    for (number, reason) in snapshot.idle.reasons.iter().enumerate() {
        say(if number == 0 { "why awake" } else { "" }, reason.clone());
    }
    say("clients", format!("{} wait for the backend{}", snapshot.held, refused(snapshot.refused)));
    let count = |flows: FlowCount| format!("{} open, {} since the start of drowse", flows.open, flows.total);
    say("flows", format!("proxied: {}", count(snapshot.flows.proxied)));
    say("", format!("handed off: {}", count(snapshot.flows.handed_off)));
    let Snapshot { bytes_to_backend, bytes_to_client, .. } = snapshot;
    say("bytes", format!("{bytes_to_backend} to the backend, {bytes_to_client} to clients"));
    say("wake-ups", wake_ups(snapshot));
    say("failures", failures(snapshot));
    say("plane", planes(snapshot));
    for listener in &snapshot.plane.handoff.listeners {
        let reason = match &listener.reason {
            None => String::new(),
            Some(reason) if listener.handed_off => format!(", but: {reason}"),
            Some(reason) => format!(", not handed off: {reason}"),
        };
        say("listener", format!("{}: {}{reason}", listener.address, snapshot.plane.of(listener)));
    }
    text
}

/// Who was refused, if anybody was.
fn refused(refused: Refused) -> String {
    let reasons = [
        (refused.may_not_wake, "may not wake it"),
        (refused.too_many_of_source, "came beyond the limit of their source"),
    ];
    let some = reasons.iter().filter(|(count, _)| *count > 0).map(|(count, why)| format!("{count} {why}"));
    match some.collect::<Vec<_>>().join(", ") {
        none if none.is_empty() => none,
        some => format!("; refused since the start of drowse: {some}"),
    }
}

fn wake_ups(snapshot: &Snapshot) -> String {
    let last = snapshot
        .last_activation
        .map(|last| format!("; the last took {:.3} s and was {} ago", last.took_s, elapsed_s(last.ago_s)));
    format!("{}{}", snapshot.activations_total, last.unwrap_or_default())
}

fn failures(snapshot: &Snapshot) -> String {
    let last = snapshot.last_failure.as_ref().map(|last| {
        format!("; the last {} ago: {} (result {})", elapsed_s(last.ago_s), last.message, last.result)
    });
    format!("{}{}", snapshot.failures_total, last.unwrap_or_default())
}

/// Which planes there are, and why there is no other.
fn planes(snapshot: &Snapshot) -> String {
    let handoff = &snapshot.plane.handoff;
    let state = match handoff.state {
        HandoffState::On => "on",
        HandoffState::Ready => "ready, for when the backend is awake",
        HandoffState::Off => "off",
    };
    let reason = handoff.reason.as_ref().map_or_else(String::new, |reason| format!(": {reason}"));
    format!("{}; hand-off is {state}{reason}", snapshot.plane.forward)
}

/// How long something has lasted.
fn elapsed_s(seconds: f64) -> String {
    Duration::try_from_secs_f64(seconds).map_or_else(|_no_time| "?".to_owned(), elapsed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::counters::Counters;
    use crate::report::snapshot::{
        Activation, Flows, HandoffView, Idle, LastFailure, ListenerView, PlaneView, SCHEMA, StateName,
    };

    fn snapshot() -> Snapshot {
        Snapshot {
            schema: SCHEMA,
            name: "dice".into(),
            unit: Some("dice.service".into()),
            backend: "127.0.0.1:8081".into(),
            pid: 4711,
            state: StateName::Awake,
            since_s: 170.5,
            line: "awake: 2 flows".into(),
            held: 0,
            refused: Refused { may_not_wake: 12, too_many_of_source: 3 },
            connections_max: 10_000,
            flows: Flows {
                proxied: FlowCount { open: 2, total: 17 },
                handed_off: FlowCount { open: 0, total: 0 },
            },
            bytes_to_backend: 1200,
            bytes_to_client: 34_000,
            idle: Idle { sleeps_in_s: None, reasons: vec!["2 open flows, last used 3 s ago".into()] },
            last_activation: Some(Activation { took_s: 0.4216, ago_s: 170.5 }),
            activations_total: 3,
            failures_total: 1,
            last_failure: Some(LastFailure {
                result: "exit-code".into(),
                message: "dice.service exited with status 3".into(),
                ago_s: 7300.0,
            }),
            plane: PlaneView {
                forward: "splice".into(),
                handoff: HandoffView::off(["0.0.0.0:8080"].into_iter(), Some("no bpffs is mounted".into())),
            },
            counters: Counters::default(),
        }
    }

    fn service(answer: Result<Snapshot, Silence>) -> Service {
        Service { file_name: "dice_service".into(), answer }
    }

    #[test]
    fn each_service_has_a_line_in_aligned_columns() {
        let mut asleep = snapshot();
        asleep.name = "a-longer-name".into();
        asleep.state = StateName::Asleep;
        asleep.line = "asleep: the next connection wakes x.service".into();
        asleep.idle.reasons.clear();
        asleep.flows.proxied.open = 0;
        let services = [
            service(Ok(asleep)),
            service(Ok(snapshot())),
            service(Err(Silence::Late)),
            service(Err(Silence::Gone)),
        ];
        let expected = "\
            NAME           STATE   SINCE  FLOWS  HELD  PLANE   WHY\n\
            a-longer-name  asleep  2 min  0      0     splice  the next connection wakes x.service\n\
            dice           awake   2 min  2      0     splice  2 open flows, last used 3 s ago\n\
            dice_service   ?       -      -      -     -       does not answer\n\
            dice_service   gone    -      -      -     -       does not run: it was killed; its next start tidies up\n";
        assert_eq!(all(&services).answer, expected);
    }

    #[test]
    fn what_is_handed_off_is_seen_in_the_line() {
        let mut snapshot = snapshot();
        snapshot.flows.handed_off = FlowCount { open: 3, total: 5 };
        let handed_off = ListenerView { address: "0.0.0.0:80".into(), handed_off: true, reason: None };
        snapshot.plane.handoff =
            HandoffView { state: HandoffState::Ready, listeners: vec![handed_off], reason: None };
        assert_eq!((flows(&snapshot), plane(&snapshot)), ("2+3".to_owned(), "handoff".to_owned()));
        let proxied = ListenerView {
            address: "[::]:80".into(),
            handed_off: false,
            reason: Some("the backend listens on IPv4 only".into()),
        };
        snapshot.plane.handoff.listeners.push(proxied);
        assert_eq!(plane(&snapshot), "handoff, splice");
        let text = whole(&snapshot);
        assert!(
            text.contains("[::]:80: splice, not handed off: the backend listens on IPv4 only\n"),
            "{text}"
        );
        assert!(text.contains("hand-off is ready, for when the backend is awake\n"), "{text}");
    }

    #[test]
    fn a_whole_answer_is_plain_words() {
        let expected = "\
dice: awake: 2 flows
  backend      127.0.0.1:8081, dice.service
  drowse       process 4711, at most 10000 connections
  state        awake for 2 min
  why awake    2 open flows, last used 3 s ago
  clients      0 wait for the backend; refused since the start of drowse: 12 may
               not wake it, 3 came beyond the limit of their source
  flows        proxied: 2 open, 17 since the start of drowse
               handed off: 0 open, 0 since the start of drowse
  bytes        1200 to the backend, 34000 to clients
  wake-ups     3; the last took 0.422 s and was 2 min ago
  failures     1; the last 2 h ago: dice.service exited with status 3 (result
               exit-code)
  plane        splice; hand-off is off: no bpffs is mounted
  listener     0.0.0.0:8080: splice
";
        assert_eq!(whole(&snapshot()), expected);
    }

    #[test]
    fn nobody_there_is_an_answer_and_an_unknown_name_is_none() {
        let said = all(&[]);
        assert!(said.success && said.answer.contains("no drowse runs here"), "{said:?}");
        let said = unknown("dice.service");
        assert!(
            !said.success && said.notes.concat().contains("systemctl status drowse@dice.socket"),
            "{said:?}"
        );
    }

    #[test]
    fn a_unit_is_found_with_and_without_its_suffix() {
        let snapshot = snapshot();
        assert!(has_unit(&snapshot, "dice.service") && has_unit(&snapshot, "dice"));
        assert!(!has_unit(&snapshot, "dic") && !has_unit(&snapshot, "dice.socket"));
    }
}
