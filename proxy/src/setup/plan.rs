//! What `drowse enable` and `drowse disable` will do, or what stands in the way.
//!
//! PURE: facts in, changes or problems out. Owns: every decision, and the words for each problem and its next step.
//! Must never: look at anything by itself, or stop at the first problem.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use super::Names;
use super::contents::{self, Link, Record};
use super::facts::{Facts, ListenerFacts, Own};
use crate::activation::systemd::manager::Job;
use crate::address::Address;
use crate::config::{EnableArgs, RunArgs};
use crate::report::text::elapsed;

/// A file that gets another content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// Which file.
    pub path: PathBuf,
    /// What is in it now; nothing if it is not there.
    pub before: Option<String>,
    /// What will be in it; nothing if it is removed.
    pub after: Option<String>,
}

/// Something that systemd is asked to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Remove the links that start a unit at boot.
    Disable {
        /// The unit.
        unit: String,
        /// The links are those in `/run`.
        at_runtime: bool,
    },
    /// Put the links of a unit in their places.
    Enable(String),
    /// Put links back where they were.
    Restore(Vec<Link>),
    /// Read all unit files again.
    Reload,
    /// Start, stop or restart a unit.
    Do(Job, String),
}

/// Everything that will be done, in this order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// What was found, in plain words.
    pub found: Vec<String>,
    /// What people should know before they go on.
    pub notes: Vec<String>,
    /// What is done before files change.
    pub before: Vec<Step>,
    /// The files.
    pub files: Vec<Change>,
    /// What is done once they have changed.
    pub after: Vec<Step>,
    /// Whether the service is started at the very end. If it cannot be, all the rest stays.
    pub start: bool,
    /// Directories that are removed if they are empty at the end, innermost first.
    pub directories: Vec<PathBuf>,
    /// How it is at the end.
    pub outcome: String,
}

impl Plan {
    /// Whether everything is as it should be.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.before.is_empty() && self.files.is_empty() && self.after.is_empty()
    }
}

impl Step {
    /// What is done, in plain words.
    #[must_use]
    pub fn describe(&self, names: &Names) -> String {
        match self {
            Self::Disable { unit, .. } if *unit == names.unit => {
                format!("no more start of {unit} at boot: its first connection starts it")
            }
            Self::Disable { unit, .. } => format!("disable {unit}"),
            Self::Enable(unit) => format!("enable {unit}: systemd listens from boot on"),
            Self::Restore(links) => {
                let paths: Vec<_> = links.iter().map(|link| link.path.display().to_string()).collect();
                format!("start {} at boot again: {}", names.unit, paths.join(", "))
            }
            Self::Reload => "reload systemd's units".to_owned(),
            Self::Do(job, unit) if *unit == names.service && *job == Job::Start => {
                format!("start {unit}, because {} runs: it sleeps once nobody uses it", names.unit)
            }
            Self::Do(job, unit) => format!("{} {unit}", job.verb()),
        }
    }
}

/// Everything that is wrong, each with its next step.
pub type Problems = Vec<String>;

/// What `drowse enable` does.
///
/// # Errors
/// All problems at once.
pub fn enable(args: &EnableArgs, facts: &Facts) -> Result<Plan, Problems> {
    let names = &facts.names;
    let mut problems = Vec::new();
    let run = args.run_args(&names.unit).map_err(|error| problems.push(error)).ok();
    privileges(facts, &mut problems);
    backend_unit(facts, &mut problems);
    templates(facts, &mut problems);
    if let (Some(run), Some(limit)) = (&run, facts.service.open_files_max)
        && let Err(error) = run.connections_max(limit)
    {
        problems.push(error);
    }
    listeners(args, facts, &mut problems);
    backend_address(args, facts, &mut problems);
    strangers_files(facts, &mut problems);

    let record = record(facts);
    let conf = contents::configuration(names, &record, &args.backend, args.options.given());
    let socket = contents::socket(names, &args.listen);
    let mut written = |text: Result<String, String>| text.map_err(|error| problems.push(error)).ok();
    let (conf, socket) = (written(conf), written(socket));
    let (Some(conf), Some(socket), Some(run), true) = (conf, socket, run, problems.is_empty()) else {
        return Err(problems);
    };
    let service = if names.user { None } else { contents::service(names, &facts.hindrances) };
    let files = [
        (&facts.places.conf, Some(conf)),
        (&facts.places.socket, Some(socket)),
        (&facts.places.service, service),
    ];
    let files: Vec<Change> =
        files.into_iter().filter_map(|(path, after)| change(facts, path, after)).collect();
    let after = steps(facts, &files);
    Ok(Plan {
        found: found(facts),
        notes: notes(args, facts),
        before: Vec::new(),
        files,
        after,
        start: false,
        directories: Vec::new(),
        outcome: outcome(&run, facts),
    })
}

fn change(facts: &Facts, path: &Path, after: Option<String>) -> Option<Change> {
    let before = facts.files.get(path).cloned();
    (before != after).then(|| Change { path: path.to_owned(), before, after })
}

/// What was noted by an earlier run, and what this one adds.
fn record(facts: &Facts) -> Record {
    let mut record = facts.files.get(&facts.places.conf).map(|text| Record::read(text)).unwrap_or_default();
    record.links.retain(|old| facts.links.iter().all(|link| link.path != old.path));
    record.links.extend(facts.links.iter().cloned());
    record.directories.extend(facts.missing_directories.iter().cloned());
    record
}

fn privileges(facts: &Facts, problems: &mut Problems) {
    if !facts.may_write {
        problems.push(
            "only root may set up a service of the system: run this with sudo, or with --user for a service of your own"
                .to_owned(),
        );
    }
    problems.extend(facts.unreadable.iter().cloned());
}

/// The service itself can be started, and by this name.
fn backend_unit(facts: &Facts, problems: &mut Problems) {
    let (unit, user) = (&facts.names.unit, facts.names.user_flag());
    let found = &facts.backend;
    match found.load_state.as_str() {
        "loaded" if found.id != *unit => {
            let id = &found.id;
            problems.push(format!("{unit} is another name of {id}: enable {id} instead"));
        }
        "loaded" => {}
        "not-found" => problems.push(format!(
            "there is no {unit}: check the name with systemctl{user} list-unit-files '*.service', or run systemctl{user} \
             daemon-reload after writing it"
        )),
        "masked" => {
            problems.push(format!("{unit} is masked and cannot be started: systemctl{user} unmask {unit}"));
        }
        other => problems.push(format!(
            "{unit} cannot be loaded ({other}): see systemctl{user} status {unit}"
        )),
    }
}

/// drowse's own units are there.
fn templates(facts: &Facts, problems: &mut Problems) {
    let (names, directory) = (&facts.names, if facts.names.user { "units/user/" } else { "units/" });
    let user = names.user_flag();
    let units = [(&names.socket, &facts.socket.load_state), (&names.service, &facts.service.load_state)];
    let with = |state: &str| {
        units.iter().filter(|(_, found)| *found == state).map(|(unit, _)| unit.as_str()).collect::<Vec<_>>()
    };
    let (missing, masked) = (with("not-found"), with("masked"));
    if !missing.is_empty() {
        problems.push(format!(
            "drowse's own units are not installed ({} not found): install the package, or copy drowse@.socket and \
             drowse@.service of {directory} to {}, and run systemctl{user} daemon-reload",
            missing.join(" and "),
            facts.places.directory.display(),
        ));
    }
    for unit in masked {
        problems.push(format!("{unit} is masked: systemctl{user} unmask {unit}"));
    }
    if let Some(program) = facts.service.program.as_ref().filter(|_| !facts.service.program_is_there) {
        problems.push(format!(
            "{} runs {program}, which is not there: install drowse at that path",
            names.service
        ));
    }
}

/// Each public address is free, or ours already.
fn listeners(args: &EnableArgs, facts: &Facts, problems: &mut Problems) {
    for (address, found) in args.listen.iter().zip(&facts.listeners) {
        if args.listen.iter().filter(|other| *other == address).count() > 1 {
            let again = format!("--listen {address} is given more than once: drop all but one");
            if !problems.contains(&again) {
                problems.push(again);
            }
        }
        if let Some(problem) = listener(args, facts, address, found) {
            problems.push(problem);
        }
    }
}

fn listener(args: &EnableArgs, facts: &Facts, address: &Address, found: &ListenerFacts) -> Option<String> {
    let (unit, user) = (&facts.names.unit, facts.names.user_flag());
    let obstacle = found.obstacle.as_ref()?;
    if found.is_ours {
        return None;
    }
    if !found.is_taken {
        return Some(format!("--listen {address}: {obstacle}"));
    }
    let own =
        facts.own_sockets.iter().find(|own| own.is_up && own.listens.iter().any(|at| overlap(at, address)));
    if let Some(Own { name, .. }) = own {
        return Some(format!(
            "--listen {address} is held by {name}, which starts {unit} by itself: systemctl{user} disable --now {name}"
        ));
    }
    if found.holders.iter().any(|holder| holder.is_of(unit)) {
        return Some(format!(
            "{unit} itself listens at {address}. Clients shall find drowse there, so the service must move to another \
             address: set {} in its own configuration (which file, systemctl{user} cat {unit} may tell), restart it \
             with systemctl{user} restart {unit}, and run this again",
            args.backend
        ));
    }
    let who = match found.holders.first() {
        Some(holder) if holder.is_systemd => {
            format!("a socket unit (see systemctl{user} list-sockets)")
        }
        Some(holder) => holder.describe(),
        None => format!("somebody else (find out as root: {})", find(address)),
    };
    Some(format!("--listen {address} is taken by {who}: stop it, or choose another address"))
}

/// A command that shows who listens at `address`.
fn find(address: &Address) -> String {
    address.port().map_or_else(|| "ss -lxp".to_owned(), |port| format!("ss -ltnp sport = :{port}"))
}

/// Whether listeners at both addresses are in each other's way, as far as they can be told without a look-up.
#[must_use]
pub fn overlap(one: &Address, other: &Address) -> bool {
    match (one, other) {
        (Address::Tcp { .. }, Address::Tcp { .. }) => {
            let (a, b) = (literal(one), literal(other));
            one.port() == other.port()
                && match (a, b) {
                    (Some(a), Some(b)) => {
                        a.ip().is_unspecified() || b.ip().is_unspecified() || a.ip() == b.ip()
                    }
                    (None, _) | (_, None) => one == other,
                }
        }
        _ => one == other,
    }
}

/// The address of a listener that needs no look-up.
fn literal(address: &Address) -> Option<SocketAddr> {
    let Address::Tcp { host, port } = address else { return None };
    let ip = if host.is_empty() { std::net::Ipv6Addr::UNSPECIFIED.into() } else { host.parse().ok()? };
    Some(SocketAddr::new(ip, *port))
}

/// The backend's address is another one, can be looked up, and nobody else sits there.
fn backend_address(args: &EnableArgs, facts: &Facts, problems: &mut Problems) {
    let (unit, found) = (&facts.names.unit, &facts.reach);
    let backend = &args.backend;
    if let Some(error) = &found.unresolved {
        problems.push(format!("--backend {backend} is no address here: {error}"));
        return;
    }
    for address in args.listen.iter().filter(|address| meets(address, facts)) {
        if address == backend {
            problems.push(format!("--listen and --backend are both {backend}: they must differ"));
        } else {
            problems.push(format!(
                "--listen {address} takes in the backend's own address {backend}: let the service listen at another port"
            ));
        }
    }
    let is_strange = !facts.backend.is_up && !found.holders.is_empty();
    let known = |holder: &super::holders::Holder| holder.is_of(unit) || holder.is_systemd;
    if let Some(stranger) = found.holders.iter().find(|holder| !known(holder)).filter(|_| is_strange) {
        problems.push(format!(
            "{unit} does not run, and {} listens at its address {backend}: drowse would not start it; stop that one, or \
             give the right --backend",
            stranger.describe()
        ));
    }
}

/// Whether somebody who connects to the backend would reach the listener.
fn meets(listen: &Address, facts: &Facts) -> bool {
    let listener = literal(listen);
    facts.reach.addresses.iter().any(|backend| match (backend.as_socket(), &listener) {
        (Some(backend), Some(listener)) => {
            let any = listener.ip().is_unspecified()
                && (backend.ip().to_canonical().is_loopback() || backend.ip().is_unspecified());
            backend.port() == listener.port() && (any || backend.ip() == listener.ip())
        }
        (None, None) => crate::address::display(backend) == listen.to_string(),
        (Some(_), None) | (None, Some(_)) => false,
    })
}

/// Nothing is overwritten that somebody else wrote.
fn strangers_files(facts: &Facts, problems: &mut Problems) {
    for path in [&facts.places.conf, &facts.places.socket, &facts.places.service] {
        if facts.files.get(path).is_some_and(|text| !contents::is_ours(text)) {
            problems.push(format!(
                "{} was not written by drowse enable: move it away, and give its settings as options here",
                path.display()
            ));
        }
    }
    for (path, text) in &facts.drop_ins {
        if contents::sets(text, "ListenStream") {
            problems.push(format!(
                "{} has addresses for {} already: move it away, and give them with --listen",
                path.display(),
                facts.names.socket
            ));
        }
    }
}

/// What systemd is asked to do.
fn steps(facts: &Facts, files: &[Change]) -> Vec<Step> {
    let (names, places) = (&facts.names, &facts.places);
    let changed = |path: &PathBuf| files.iter().any(|change| change.path == *path);
    let mut steps = Vec::new();
    if is_enabled(facts) && !facts.links.is_empty() {
        let at_runtime = facts.backend.file_state == "enabled-runtime";
        steps.push(Step::Disable { unit: names.unit.clone(), at_runtime });
    }
    if facts.socket.file_state != "enabled" {
        steps.push(Step::Enable(names.socket.clone()));
    }
    if !steps.is_empty() || !files.is_empty() {
        steps.push(Step::Reload);
    }
    let service_runs = facts.service.is_up;
    if facts.socket.is_up && changed(&places.socket) {
        // drowse requires its socket and is restarted with it.
        steps.push(Step::Do(Job::Restart, names.socket.clone()));
    } else {
        if !facts.socket.is_up {
            if service_runs {
                // A socket is not started beside its running service.
                steps.push(Step::Do(Job::Stop, names.service.clone()));
            }
            steps.push(Step::Do(Job::Start, names.socket.clone()));
        }
        let is_stale = changed(&places.conf) || changed(&places.service);
        if facts.socket.is_up && service_runs && is_stale {
            steps.push(Step::Do(Job::Restart, names.service.clone()));
        }
    }
    if facts.backend.is_up && !(facts.socket.is_up && service_runs) {
        steps.push(Step::Do(Job::Start, names.service.clone()));
    }
    steps
}

fn is_enabled(facts: &Facts) -> bool {
    matches!(facts.backend.file_state.as_str(), "enabled" | "enabled-runtime")
}

fn found(facts: &Facts) -> Vec<String> {
    let unit = &facts.names.unit;
    let running = if facts.backend.is_up { "runs" } else { "does not run" };
    let boot = if is_enabled(facts) { "is started at boot" } else { "is not started at boot by itself" };
    vec![format!("{unit} {running} and {boot}")]
}

fn notes(args: &EnableArgs, facts: &Facts) -> Vec<String> {
    let (unit, user) = (&facts.names.unit, facts.names.user_flag());
    let mut notes = Vec::new();
    if facts.backend.file_state == "generated" {
        notes.push(format!(
            "{unit} is made by a generator, which may start it at boot; drowse then finds it awake and puts it to sleep"
        ));
    }
    if is_enabled(facts) && facts.links.is_empty() {
        let by = if facts.names.user {
            "for all users (/etc/systemd/user)"
        } else {
            "by its package (/usr/lib/systemd/system)"
        };
        notes.push(format!("{unit} is enabled {by}: drowse finds it awake and puts it to sleep"));
    }
    for other in &facts.dependents {
        notes.push(format!(
            "{other} starts {unit} when it starts itself; drowse then finds it awake and puts it to sleep"
        ));
    }
    for Own { name, is_up, .. } in &facts.own_sockets {
        let now = if *is_up { "holds" } else { "would hold" };
        notes.push(format!(
            "{name} {now} a listener of {unit}, too: whoever connects there starts it and passes drowse by, and nothing \
             is handed off. To leave all to drowse: systemctl{user} disable --now {name}"
        ));
    }
    if let (false, Some(path)) = (facts.names.user, &facts.guessed_socket) {
        let judged =
            if facts.hindrances.closed_socket.is_some() { "gets CAP_DAC_OVERRIDE to" } else { "may" };
        notes.push(format!(
            "{} is not there, by its directories drowse {judged} connect: run this again while {unit} runs, and the \
             socket itself decides",
            path.display()
        ));
    }
    notes.extend(backend_notes(args, facts));
    if !facts.names.user
        && let Some(reason) = &facts.no_handoff
    {
        notes.push(format!("no hand-off here, drowse moves all bytes itself: {reason}"));
    }
    notes
}

/// What is odd about a service that runs and its address.
fn backend_notes(args: &EnableArgs, facts: &Facts) -> Option<String> {
    let (unit, backend, found) = (&facts.names.unit, &args.backend, &facts.reach);
    if !facts.backend.is_up {
        return None;
    }
    if !found.is_answered {
        let elsewhere: Vec<_> = found.elsewhere.iter().map(ToString::to_string).collect();
        let hint = match elsewhere.as_slice() {
            [] => String::new(),
            all => format!("; it listens at {}", all.join(", ")),
        };
        return Some(format!("{unit} runs, and nobody accepts connections at its address {backend}{hint}"));
    }
    let strangers: Vec<_> =
        found.holders.iter().filter(|holder| !holder.is_of(unit) && !holder.is_systemd).collect();
    match strangers.first() {
        Some(stranger) if strangers.len() == found.holders.len() => {
            Some(format!("not {unit} but {} listens at {backend}", stranger.describe()))
        }
        _ => None,
    }
}

fn outcome(run: &RunArgs, facts: &Facts) -> String {
    let unit = &facts.names.unit;
    let time = if run.idle_time == std::time::Duration::MAX {
        return format!(
            "{unit} wakes on its first connection and is never put to sleep (--idle-time infinity)"
        );
    } else {
        elapsed(run.idle_time)
    };
    if facts.backend.is_up {
        format!("{unit} runs, sleeps after {time} without use, and wakes on the next connection")
    } else {
        format!("{unit} sleeps until its first connection, and again after {time} without use")
    }
}

/// What `drowse disable` does.
///
/// # Errors
/// All problems at once.
pub fn disable(facts: &Facts) -> Result<Plan, Problems> {
    let (names, places) = (&facts.names, &facts.places);
    let mut problems = Vec::new();
    privileges(facts, &mut problems);
    // The record goes last: until then another run can do what this one did not.
    let ours = [&places.service, &places.socket, &places.conf];
    let (mut files, mut strange) = (Vec::new(), Vec::new());
    for path in ours {
        match facts.files.get(path) {
            Some(text) if contents::is_ours(text) => {
                files.push(Change { path: path.clone(), before: Some(text.clone()), after: None });
            }
            Some(_) => strange.push(path.display().to_string()),
            None => {}
        }
    }
    if !strange.is_empty() {
        let user = names.user_flag();
        problems.push(format!(
            "{} was written by hand and not by drowse enable: remove it yourself, after systemctl{user} disable --now {}",
            strange.join(" and "),
            names.socket
        ));
    }
    if !problems.is_empty() {
        return Err(problems);
    }
    if files.is_empty() {
        let outcome = format!("drowse enable has not set up {}", names.unit);
        return Ok(Plan { outcome, ..Plan::default() });
    }
    let record = facts.files.get(&places.conf).map(|text| Record::read(text)).unwrap_or_default();
    let mut before = Vec::new();
    for (unit, is_up) in [(&names.socket, facts.socket.is_up), (&names.service, facts.service.is_up)] {
        if is_up {
            before.push(Step::Do(Job::Stop, unit.clone()));
        }
    }
    if facts.socket.file_state == "enabled" {
        before.push(Step::Disable { unit: names.socket.clone(), at_runtime: false });
    }
    let was_enabled = !record.links.is_empty();
    if was_enabled {
        before.push(Step::Restore(record.links));
    }
    let after = vec![Step::Reload];
    // It may fall asleep until drowse is stopped.
    let start = was_enabled || facts.backend.is_up;
    let mut directories: Vec<PathBuf> = [&places.socket, &places.service]
        .iter()
        .filter_map(|path| path.parent())
        .map(Path::to_owned)
        .collect();
    directories.extend(record.directories.into_iter().rev());
    let kept =
        facts.drop_ins.iter().map(|(path, _)| format!("{} was written by hand and stays", path.display()));
    let unit = &names.unit;
    let outcome = match (was_enabled, facts.backend.is_up) {
        (true, _) => format!("{unit} runs, is started at boot, and never sleeps"),
        (false, true) => format!("{unit} runs, and never sleeps"),
        (false, false) => format!(
            "{unit} does not run and nothing wakes it any more; start it with systemctl{} start {unit}",
            names.user_flag()
        ),
    };
    Ok(Plan { found: found(facts), notes: kept.collect(), before, files, after, start, directories, outcome })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Action, Cli};
    use crate::setup::facts::{BackendFacts, Reach, ServiceFacts, UnitFacts, places};
    use crate::setup::holders::Holder;
    use clap::Parser as _;

    const ADDRESSES: [&str; 4] = ["--listen", "127.0.0.1:8080", "--backend", "127.0.0.1:8081"];

    /// Makes the facts worse.
    type Spoil = Box<dyn Fn(&mut Facts)>;

    fn args(options: &[&str]) -> EnableArgs {
        let line = ["drowse", "enable", "web"].iter().chain(options);
        let Action::Enable(enable) = Cli::try_parse_from(line).unwrap().action else { panic!("not enable") };
        *enable
    }

    /// A service that runs, is started at boot, and can be set up.
    fn facts() -> Facts {
        let names = Names::new("web", false).unwrap();
        Facts {
            places: places(&names).unwrap(),
            may_write: true,
            backend: BackendFacts {
                id: "web.service".into(),
                load_state: "loaded".into(),
                is_up: true,
                file_state: "enabled".into(),
            },
            socket: UnitFacts { load_state: "bad-setting".into(), ..UnitFacts::default() },
            service: ServiceFacts { load_state: "loaded".into(), ..ServiceFacts::default() },
            listeners: vec![ListenerFacts::default()],
            reach: Reach {
                addresses: vec!["127.0.0.1:8081".parse::<SocketAddr>().unwrap().into()],
                is_answered: true,
                ..Reach::default()
            },
            links: vec![Link { path: "/etc/x.wants/web.service".into(), target: "/lib/web.service".into() }],
            names,
            ..Facts::default()
        }
    }

    /// The facts once the plan has been carried out.
    fn done(plan: &Plan, mut facts: Facts) -> Facts {
        for Change { path, after, .. } in &plan.files {
            match after {
                Some(text) => drop(facts.files.insert(path.clone(), text.clone())),
                None => drop(facts.files.remove(path)),
            }
        }
        for step in &plan.after {
            match step {
                Step::Disable { unit, .. } if *unit == facts.names.unit => {
                    facts.backend.file_state = "disabled".into();
                    facts.links.clear();
                }
                Step::Enable(_) => facts.socket.file_state = "enabled".into(),
                Step::Do(Job::Start, unit) if *unit == facts.names.socket => facts.socket.is_up = true,
                Step::Do(Job::Start, unit) if *unit == facts.names.service => facts.service.is_up = true,
                Step::Disable { .. } | Step::Restore(_) | Step::Reload | Step::Do(..) => {}
            }
        }
        facts.socket.load_state = "loaded".into();
        facts
    }

    fn holder(program: &str, unit: &str) -> Holder {
        let unit = Some(unit.to_owned());
        Holder {
            pid: 7,
            program: program.into(),
            innermost: unit.clone(),
            unit,
            is_systemd: program == "systemd",
        }
    }

    #[test]
    fn a_service_is_set_up_once_and_undone_once() {
        let plan = enable(&args(&ADDRESSES), &facts()).unwrap();
        let unit = |name: &str| name.to_owned();
        let expected = [
            Step::Disable { unit: unit("web.service"), at_runtime: false },
            Step::Enable(unit("drowse@web.socket")),
            Step::Reload,
            Step::Do(Job::Start, unit("drowse@web.socket")),
            Step::Do(Job::Start, unit("drowse@web.service")),
        ];
        assert_eq!(plan.after, expected);
        assert_eq!(plan.files.len(), 2, "{:?}", plan.files);
        let after = done(&plan, facts());
        assert!(enable(&args(&ADDRESSES), &after).unwrap().is_empty());

        let undo = disable(&after).unwrap();
        assert!(undo.files.iter().all(|change| change.after.is_none()) && undo.files.len() == 2);
        assert!(undo.start, "it may be asleep when drowse is stopped");
        let again = disable(&done(&undo, after)).unwrap();
        assert!(again.is_empty() && again.outcome.contains("has not set up"), "{again:?}");
    }

    #[test]
    fn only_what_an_option_concerns_is_restarted() {
        let after = done(&enable(&args(&ADDRESSES), &facts()).unwrap(), facts());
        let restart = |options: &[&str]| {
            let plan = enable(&args(options), &after).unwrap();
            let jobs = plan.after.iter().filter(|step| matches!(step, Step::Do(..)));
            jobs.map(|step| step.describe(&after.names)).collect::<Vec<_>>()
        };
        assert_eq!(
            restart(&[&ADDRESSES[..], &["--idle-time", "1h"]].concat()),
            ["restart drowse@web.service"]
        );
        let moved = ["--listen", ":80", "--backend", "127.0.0.1:8081"];
        assert_eq!(restart(&moved), ["restart drowse@web.socket"]);
    }

    #[test]
    fn a_service_that_sleeps_already_wakes_with_its_first_client() {
        let mut facts = facts();
        (facts.backend.is_up, facts.backend.file_state) = (false, "static".into());
        facts.links.clear();
        let plan = enable(&args(&ADDRESSES), &facts).unwrap();
        assert_eq!(plan.after.last(), Some(&Step::Do(Job::Start, "drowse@web.socket".into())));
        assert!(!plan.after.iter().any(|step| matches!(step, Step::Disable { .. })));
        let undo = disable(&done(&plan, facts)).unwrap();
        assert!(!undo.start && !undo.before.iter().any(|step| matches!(step, Step::Restore(_))), "{undo:?}");
    }

    #[test]
    fn an_undoing_that_was_interrupted_is_completed_by_the_next() {
        let set_up = || done(&enable(&args(&ADDRESSES), &facts()).unwrap(), facts());
        let mut undo = disable(&set_up()).unwrap();
        let disabled = Step::Disable { unit: "drowse@web.socket".into(), at_runtime: false };
        let needs_the_record = [Step::Restore(facts().links), disabled];
        assert!(needs_the_record.iter().all(|step| undo.before.contains(step)), "{:?}", undo.before);
        while let Some(last) = undo.files.pop() {
            let again = disable(&done(&undo, set_up())).unwrap();
            assert!(again.before.contains(&Step::Restore(facts().links)), "without {last:?}: {again:?}");
        }
    }

    #[test]
    fn each_problem_has_its_next_step() {
        let web = || vec![holder("web", "web.service")];
        let taken = |holders| ListenerFacts {
            is_taken: true,
            obstacle: Some("somebody listens there".into()),
            holders,
            is_ours: false,
        };
        let cases: Vec<(&str, Spoil)> = vec![
            ("only root may", Box::new(|facts| facts.may_write = false)),
            ("systemctl list-unit-files", Box::new(|facts| facts.backend.load_state = "not-found".into())),
            ("systemctl unmask web.service", Box::new(|facts| facts.backend.load_state = "masked".into())),
            ("enable httpd.service instead", Box::new(|facts| facts.backend.id = "httpd.service".into())),
            ("install the package", Box::new(|facts| facts.socket.load_state = "not-found".into())),
            ("unmask drowse@web.service", Box::new(|facts| facts.service.load_state = "masked".into())),
            ("install drowse at that path", Box::new(|facts| facts.service.program = Some("/x".into()))),
            ("must move to another", Box::new(move |facts| facts.listeners = vec![taken(web())])),
            (
                "is taken by a socket unit",
                Box::new(move |facts| facts.listeners = vec![taken(vec![holder("systemd", "init.scope")])]),
            ),
            ("ss -ltnp sport = :8080", Box::new(move |facts| facts.listeners = vec![taken(vec![])])),
            (
                "systemctl disable --now web.socket",
                Box::new(move |facts| {
                    facts.listeners = vec![taken(vec![])];
                    let listens = vec!["[::]:8080".parse().unwrap()];
                    facts.own_sockets = vec![Own { name: "web.socket".into(), is_up: true, listens }];
                }),
            ),
            (
                "drowse would not start it",
                Box::new(|facts| {
                    facts.backend.is_up = false;
                    facts.reach.holders = vec![holder("x", "other.service")];
                }),
            ),
            ("is no address here", Box::new(|facts| facts.reach.unresolved = Some("no such name".into()))),
            (
                "move it away, and give its settings as options",
                Box::new(|facts| drop(facts.files.insert(facts.places.conf.clone(), "DROWSE_X=1".into()))),
            ),
            (
                "give them with --listen",
                Box::new(|facts| facts.drop_ins = vec![("/x.conf".into(), "ListenStream=80".into())]),
            ),
        ];
        for (words, spoil) in cases {
            let mut facts = facts();
            spoil(&mut facts);
            let problems = enable(&args(&ADDRESSES), &facts).unwrap_err();
            assert!(problems.len() == 1 && problems[0].contains(words), "{words}: {problems:?}");
        }
        let same = ["--listen", ":8081", "--backend", "127.0.0.1:8081"];
        let problems = enable(&args(&same), &facts()).unwrap_err();
        assert!(problems[0].contains("takes in the backend's own address"), "{problems:?}");
    }

    #[test]
    fn an_address_that_is_ours_already_is_no_problem() {
        let mut facts = facts();
        facts.listeners = vec![ListenerFacts {
            is_ours: true,
            is_taken: true,
            obstacle: Some("x".into()),
            holders: vec![],
        }];
        assert!(enable(&args(&ADDRESSES), &facts).is_ok());
    }

    #[test]
    fn what_is_odd_is_told_and_stops_nobody() {
        let cases: Vec<(&str, Spoil)> = vec![
            (
                "nobody accepts connections at its address 127.0.0.1:8081; it listens at 127.0.0.1:9000",
                Box::new(|facts| {
                    facts.reach.is_answered = false;
                    facts.reach.elsewhere = vec!["127.0.0.1:9000".parse().unwrap()];
                }),
            ),
            (
                "not web.service but x (process 7, x.service) listens",
                Box::new(|facts| facts.reach.holders = vec![holder("x", "x.service")]),
            ),
            (
                "news.service starts web.service",
                Box::new(|facts| facts.dependents = vec!["news.service".into()]),
            ),
            (
                "systemctl disable --now web.socket",
                Box::new(|facts| {
                    facts.own_sockets = vec![Own { name: "web.socket".into(), ..Own::default() }];
                }),
            ),
            (
                "/run/x is not there, by its directories drowse may connect",
                Box::new(|facts| facts.guessed_socket = Some("/run/x".into())),
            ),
            ("web.service is enabled by its package", Box::new(|facts| facts.links.clear())),
            ("no hand-off here", Box::new(|facts| facts.no_handoff = Some("no bpffs".into()))),
        ];
        for (words, spoil) in cases {
            let mut facts = facts();
            spoil(&mut facts);
            let notes = enable(&args(&ADDRESSES), &facts).unwrap().notes;
            assert!(notes.len() == 1 && notes[0].contains(words), "{words}: {notes:?}");
        }
    }

    #[test]
    fn what_is_enabled_for_all_users_stays() {
        let mut facts = facts();
        facts.names = Names::new("web", true).unwrap();
        facts.links.clear();
        let plan = enable(&args(&ADDRESSES), &facts).unwrap();
        assert!(!plan.after.iter().any(|step| matches!(step, Step::Disable { .. })), "{:?}", plan.after);
        assert!(plan.notes[0].contains("is enabled for all users (/etc/systemd/user)"), "{:?}", plan.notes);
        let mut after = done(&plan, facts);
        after.backend.file_state = "enabled".into();
        assert!(enable(&args(&ADDRESSES), &after).unwrap().is_empty());
    }

    #[test]
    fn what_others_wrote_stays() {
        let mut facts = facts();
        facts.files.insert(facts.places.conf.clone(), "DROWSE_BACKEND=:1\n".into());
        let problems = disable(&facts).unwrap_err();
        assert!(problems[0].contains("was written by hand"), "{problems:?}");
    }
}
