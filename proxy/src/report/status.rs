//! `drowse status`: every service in a line each, or one in full.
//!
//! Owns: the words and the columns, and who is asked: the status sockets, and systemd for those that do not answer there.
//! Must never: change anything, or wait longer than a second for a service or for systemd.

use std::fmt::Write as _;
use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;
use futures_util::future::try_join_all;

use crate::activation::Failure;
use crate::clock;
use crate::config::StatusArgs;
use crate::ebpf::pin_name;
use crate::report::Said;
use crate::report::control::{self, Service, Silence};
use crate::report::counters::RedirectedCounters;
use crate::report::remembered::Today;
use crate::report::sleepers::{self, Known, Place};
use crate::report::snapshot::{FlowCount, HandoffState, Refused, Snapshot, Source};
use crate::report::text::{elapsed, memory, paragraph, table};

/// How wide the labels of one service's lines are.
const LABEL_WIDTH: usize = 13;

/// Answers `drowse status`.
///
/// # Errors
/// A directory with status sockets cannot be read.
pub async fn status(args: &StatusArgs) -> anyhow::Result<Said> {
    let places = control::places(args.look.runtime_dir.as_deref());
    let Some(name) = &args.name else {
        let (services, notes) = every_service(&places, None).await?;
        let mut said = if args.look.json { all_as_json(&services)? } else { all(&services) };
        said.notes.extend(notes);
        return Ok(said);
    };
    let file_name = pin_name(name).context("look for a service")?;
    let directories: Vec<_> = places.iter().map(|place| place.directory.clone()).collect();
    let mut services = control::ask_all(&directories, |found| found == file_name).await?;
    let mut notes = Vec::new();
    if services.iter().all(|service| service.answer.is_err()) {
        (services, notes) = every_service(&places, Some(name)).await?;
        services.retain(|service| match &service.answer {
            Ok(snapshot) => snapshot.name == *name || has_unit(snapshot, name),
            Err(_) => service.file_name == file_name,
        });
    }
    services.sort_by_key(|service| service.answer.is_err());
    let mut said = match services.first() {
        None => unknown(name),
        Some(Service { answer: Ok(snapshot), .. }) => {
            let answer = if args.look.json { json(snapshot)? } else { whole(snapshot) };
            Said { answer, notes: vec![], success: true }
        }
        Some(Service { answer: Err(silence), .. }) => failed(format!("{name}: {silence}")),
    };
    said.notes.extend(notes);
    Ok(said)
}

/// All services, and what stood in the way of a whole answer: those that answer themselves, and of the others what
/// systemd says, if there is a `name` only of that one.
async fn every_service(places: &[Place], name: Option<&str>) -> anyhow::Result<(Vec<Service>, Vec<String>)> {
    let (mut all, mut notes) = (Vec::new(), Vec::new());
    for (services, note) in try_join_all(places.iter().map(|place| services_of(place, name))).await? {
        all.extend(services);
        notes.extend(note);
    }
    Ok((all, notes))
}

async fn services_of(place: &Place, name: Option<&str>) -> anyhow::Result<(Vec<Service>, Option<String>)> {
    let sockets = control::ask_all(std::slice::from_ref(&place.directory), |_| true);
    let Some(manager) = &place.manager else { return Ok((sockets.await?, None)) };
    let (services, known) = tokio::join!(sockets, sleepers::known(manager));
    let mut services = services?;
    let told = match known {
        Ok(Some(known)) => tell(&known, &mut services, &place.directory, name).await,
        Ok(None) => Ok(()),
        Err(failure) => Err(failure),
    };
    services.sort_by(|a, b| a.name().cmp(b.name()));
    let note = told.err().map(|failure| {
        format!("only what runs is shown, and not what sleeps without its drowse: {}", failure.message)
    });
    Ok((services, note))
}

/// Adds what systemd says of those that do not answer by themselves.
async fn tell(
    known: &Known,
    services: &mut Vec<Service>,
    directory: &Path,
    name: Option<&str>,
) -> Result<(), Failure> {
    let mut wanted = Vec::new();
    for instance in &known.instances {
        let Ok(file_name) = pin_name(&instance.name) else { continue };
        match services.iter().find(|service| service.file_name == file_name).map(|service| &service.answer) {
            Some(Ok(_)) => {}
            Some(Err(silence)) => wanted.push((instance.clone(), Some(silence.clone()))),
            None => wanted.push((instance.clone(), None)),
        }
    }
    if wanted.is_empty() {
        return Ok(());
    }
    for snapshot in known.tell(wanted, directory, name).await? {
        let Ok(file_name) = pin_name(&snapshot.name) else { continue };
        services.retain(|service| service.file_name != file_name);
        services.push(Service { file_name, answer: Ok(snapshot) });
    }
    Ok(())
}

/// Whether `name` is the service's unit, with or without `.service`.
fn has_unit(snapshot: &Snapshot, name: &str) -> bool {
    snapshot.unit.as_deref().is_some_and(|unit| sleepers::is_unit(unit, name))
}

fn unknown(name: &str) -> Said {
    let instance = name.strip_suffix(".service").unwrap_or(name);
    failed(format!(
        "no drowse named '{name}' runs, and no systemd here has an active drowse@{instance}.socket; see drowse status \
         for all, or set it up with drowse enable"
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
        let answer = "no drowse runs here, and none waits for a first connection\n";
        return Said { answer: answer.to_owned(), notes: vec![], success: true };
    }
    let heading = ["NAME", "STATE", "SINCE", "MEMORY", "LAST WAKE", "TODAY", "FLOWS", "HELD", "PLANE", "WHY"];
    let heading = heading.map(str::to_owned).to_vec();
    let rows: Vec<_> = std::iter::once(heading).chain(services.iter().map(row)).collect();
    Said { answer: table(&rows, false), notes: vec![], success: true }
}

fn row(service: &Service) -> Vec<String> {
    let name = service.name().to_owned();
    let unknown = || "-".to_owned();
    match &service.answer {
        Ok(snapshot) => {
            let answered = snapshot.source == Source::Drowse;
            let of_drowse = |words: String| if answered { words } else { unknown() };
            vec![
                name,
                snapshot.state.word().to_owned(),
                snapshot.since_s.map_or_else(unknown, elapsed_s),
                memory_in_short(snapshot),
                snapshot.last_activation.map_or_else(unknown, |last| {
                    format!("{:.3} s, {} ago", last.took_s, elapsed_s(last.ago_s))
                }),
                snapshot.today.map_or_else(unknown, today),
                of_drowse(flows(snapshot)),
                of_drowse(snapshot.held.to_string()),
                of_drowse(plane(snapshot)),
                why(snapshot),
            ]
        }
        Err(silence) => {
            let state = if *silence == Silence::Gone { "gone" } else { "?" };
            let mut cells = vec![name, state.to_owned()];
            cells.resize_with(9, unknown);
            cells.push(silence.to_string());
            cells
        }
    }
}

/// What the backend uses, or what its sleep saves.
fn memory_in_short(snapshot: &Snapshot) -> String {
    match (snapshot.memory_bytes, snapshot.memory_saved_bytes) {
        (Some(bytes), _) => memory(bytes),
        (None, Some(bytes)) => format!("saves {}", memory(bytes)),
        (None, None) => "-".to_owned(),
    }
}

/// The wake-ups of today: `3`, or `3 since 14:05`.
fn today(today: Today) -> String {
    let since =
        if today.whole_day { String::new() } else { format!(" since {}", clock::time_of_day(today.since_s)) };
    format!("{}{since}", today.activations)
}

/// Open flows: those that drowse moves, and after a plus those that were handed off.
pub(super) fn flows(snapshot: &Snapshot) -> String {
    let (proxied, handed_off) = (snapshot.flows.proxied.open, snapshot.flows.handed_off.open);
    if handed_off > 0 { format!("{proxied}+{handed_off}") } else { proxied.to_string() }
}

/// How new connections travel, or will when the backend is awake.
pub(super) fn plane(snapshot: &Snapshot) -> String {
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
pub(super) fn why(snapshot: &Snapshot) -> String {
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
    let answered = snapshot.source == Source::Drowse;
    if answered {
        say("drowse", format!("process {}, at most {} connections", snapshot.pid, snapshot.connections_max));
    } else {
        say("drowse", "does not answer: all this is from systemd and from what it left".to_owned());
    }
    say("state", lasts(snapshot));
    for (number, reason) in snapshot.idle.reasons.iter().enumerate() {
        say(if number == 0 { "why awake" } else { "" }, reason.clone());
    }
    if let Some(bytes) = snapshot.memory_bytes {
        say("memory", format!("{} in use", memory(bytes)));
    } else if let Some(bytes) = snapshot.memory_saved_bytes {
        say("memory", format!("saves {} while it sleeps", memory(bytes)));
    }
    if !answered {
        say("wake-ups", wake_ups(snapshot));
        return text;
    }
    say("clients", format!("{} wait for the backend{}", snapshot.held, refused(snapshot.refused)));
    let count = |flows: FlowCount| format!("{} open, {} since the start of drowse", flows.open, flows.total);
    say("flows", format!("proxied: {}", count(snapshot.flows.proxied)));
    if let Some(redirected) = &snapshot.counters.redirected {
        say("", moved_by_the_kernel(redirected));
    }
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

/// What the kernel does of the proxied flows.
fn moved_by_the_kernel(counted: &RedirectedCounters) -> String {
    let RedirectedCounters { flows_open, flows_total, refused_total, .. } = counted;
    let redirected = counted.redirected_to_backend + counted.redirected_to_client;
    let passed = counted.passed_to_backend + counted.passed_to_client;
    let refused =
        if *refused_total > 0 { format!("; {refused_total} left to drowse") } else { String::new() };
    format!(
        "of these moved by the kernel: {flows_open} open, {flows_total} in all, {redirected} bytes redirected, {passed} \
         passed to drowse{refused}"
    )
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

/// The state, and for how long, if that is known: `awake for 2 min`.
pub(super) fn lasts(snapshot: &Snapshot) -> String {
    let since = snapshot.since_s.map_or_else(String::new, |since_s| format!(" for {}", elapsed_s(since_s)));
    format!("{}{since}", snapshot.state.word())
}

pub(super) fn wake_ups(snapshot: &Snapshot) -> String {
    let total = Some(snapshot.activations_total.to_string()).filter(|_| snapshot.source == Source::Drowse);
    let last = snapshot
        .last_activation
        .map(|last| format!("the last took {:.3} s and was {} ago", last.took_s, elapsed_s(last.ago_s)));
    let today = snapshot.today.map(|counted| format!("today: {}", today(counted)));
    let all: Vec<_> = [total, last, today].into_iter().flatten().collect();
    if all.is_empty() { "unknown".to_owned() } else { all.join("; ") }
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
    // What stands in the way of both is told once.
    let told = |why: &&String| handoff.reason.as_ref().is_none_or(|reason| !why.ends_with(reason.as_str()));
    let why = snapshot.plane.reason.as_ref().filter(told).map_or_else(String::new, |why| format!(" ({why})"));
    format!("{}{why}; hand-off is {state}{reason}", snapshot.plane.forward)
}

/// How long something has lasted.
fn elapsed_s(seconds: f64) -> String {
    Duration::try_from_secs_f64(seconds).map_or_else(|_no_time| "?".to_owned(), elapsed)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::report::counters::Counters;
    use crate::report::snapshot::{
        Activation, Flows, HandoffView, Idle, LastFailure, ListenerView, PlaneView, SCHEMA, StateName,
    };

    pub(in crate::report) fn snapshot() -> Snapshot {
        Snapshot {
            schema: SCHEMA,
            name: "dice".into(),
            unit: Some("dice.service".into()),
            backend: "127.0.0.1:8081".into(),
            pid: 4711,
            source: Source::Drowse,
            state: StateName::Awake,
            since_s: Some(170.5),
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
            memory_bytes: Some(300 << 20),
            memory_saved_bytes: None,
            last_activation: Some(Activation { took_s: 0.4216, ago_s: 170.5 }),
            today: Some(Today { activations: 2, since_s: 0, whole_day: true }),
            activations_total: 3,
            failures_total: 1,
            last_failure: Some(LastFailure {
                result: "exit-code".into(),
                message: "dice.service exited with status 3".into(),
                ago_s: 7300.0,
            }),
            plane: PlaneView {
                forward: "splice".into(),
                reason: None,
                handoff: HandoffView::off(["0.0.0.0:8080"].into_iter(), Some("no bpffs is mounted".into())),
            },
            counters: Counters::default(),
        }
    }

    #[test]
    fn why_flows_are_moved_as_they_are_is_told_once() {
        let mut snapshot = snapshot();
        snapshot.plane.reason = Some("no sockmap: no bpffs is mounted".into());
        assert_eq!(planes(&snapshot), "splice; hand-off is off: no bpffs is mounted");
        snapshot.plane.reason = Some("no sockmap: CAP_PERFMON is missing".into());
        let both = "splice (no sockmap: CAP_PERFMON is missing); hand-off is off: no bpffs is mounted";
        assert_eq!(planes(&snapshot), both);
    }

    #[test]
    fn what_the_kernel_moves_is_told_with_the_flows() {
        let mut snapshot = snapshot();
        let mut counted = RedirectedCounters {
            flows_open: 2,
            flows_total: 9,
            redirected_to_backend: 100,
            redirected_to_client: 23,
            passed_to_client: 4,
            ..RedirectedCounters::default()
        };
        snapshot.counters.redirected = Some(counted);
        let line = "of these moved by the kernel: 2 open, 9 in all, 123 bytes redirected, 4 passed to drowse";
        let flat = |text: String| text.split_whitespace().collect::<Vec<_>>().join(" ");
        let text = flat(whole(&snapshot));
        assert!(text.contains(&format!("{line} handed off:")), "{text}");
        counted.refused_total = 7;
        assert_eq!(moved_by_the_kernel(&counted), format!("{line}; 7 left to drowse"));
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
        (asleep.memory_bytes, asleep.memory_saved_bytes) = (None, Some(312 << 20));
        let mut sleeper = asleep.clone();
        (sleeper.name, sleeper.source) = ("sleeper".into(), Source::Systemd);
        (sleeper.today, sleeper.last_activation, sleeper.memory_saved_bytes) = (None, None, None);
        sleeper.since_s = None;
        sleeper.line = "asleep: systemd holds the socket".into();
        let services = [
            service(Ok(asleep)),
            service(Ok(snapshot())),
            service(Ok(sleeper)),
            service(Err(Silence::Late)),
            service(Err(Silence::Gone)),
        ];
        let expected = "\
            NAME           STATE   SINCE  MEMORY         LAST WAKE           TODAY  FLOWS  HELD  PLANE   WHY\n\
            a-longer-name  asleep  2 min  saves 312 MiB  0.422 s, 2 min ago  2      0      0     splice  the next connection wakes x.service\n\
            dice           awake   2 min  300 MiB        0.422 s, 2 min ago  2      2      0     splice  2 open flows, last used 3 s ago\n\
            sleeper        asleep  -      -              -                   -      -      -     -       systemd holds the socket\n\
            dice_service   ?       -      -              -                   -      -      -     -       does not answer\n\
            dice_service   gone    -      -              -                   -      -      -     -       does not run: it was killed; its next start tidies up\n";
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
  memory       300 MiB in use
  clients      0 wait for the backend; refused since the start of drowse: 12 may
               not wake it, 3 came beyond the limit of their source
  flows        proxied: 2 open, 17 since the start of drowse
               handed off: 0 open, 0 since the start of drowse
  bytes        1200 to the backend, 34000 to clients
  wake-ups     3; the last took 0.422 s and was 2 min ago; today: 2
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
            !said.success && said.notes.concat().contains("no systemd here has an active drowse@dice.socket"),
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
