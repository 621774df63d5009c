//! What `drowse enable` and `drowse disable` must know before they decide.
//!
//! Owns: looking at systemd, files, sockets and processes. Must never: change anything, or decide what a fact means.

use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use socket2::SockAddr;

use super::contents::{Hindrances, Link, is_drop_in, is_ours, sets, variable};
use super::holders::{Holder, Listening, try_to_bind};
use super::plan::overlap;
use super::{Names, Places};
use crate::activation::Failure;
use crate::activation::systemd::manager::{Manager, Properties};
use crate::address::Address;
use crate::config::EnableArgs;
use crate::ebpf::{Answer, Fact};
use crate::pairing;
use crate::report::check;

/// How long the backend may take to accept a connection that only looks whether it does.
const CONNECT_TIME: Duration = Duration::from_secs(1);

/// Everything that was found.
#[derive(Debug, Default)]
pub struct Facts {
    /// The names of the service's units.
    pub names: Names,
    /// Where its files are.
    pub places: Places,
    /// We are root, or the service is our own.
    pub may_write: bool,
    /// Files that are there and cannot be read, a line each.
    pub unreadable: Vec<String>,
    /// The service itself.
    pub backend: BackendFacts,
    /// `drowse@NAME.socket`.
    pub socket: UnitFacts,
    /// `drowse@NAME.service`.
    pub service: ServiceFacts,
    /// Socket units that start the service by themselves.
    pub own_sockets: Vec<Own>,
    /// Other units that start it, but for those that do by one of `links`.
    pub dependents: Vec<String>,
    /// The public addresses, in the order of `--listen`.
    pub listeners: Vec<ListenerFacts>,
    /// The backend's address.
    pub reach: Reach,
    /// The text of those of the service's files that are there.
    pub files: BTreeMap<PathBuf, String>,
    /// Other drop-ins of `drowse@NAME.socket`, and their text.
    pub drop_ins: Vec<(PathBuf, String)>,
    /// The links by which systemd starts the service at boot.
    pub links: Vec<Link>,
    /// All other links there, among them the unit's own file if that is a link to another place.
    pub other_links: Vec<Link>,
    /// Directories that must be made, outermost first.
    pub missing_directories: Vec<PathBuf>,
    /// What of the sandbox would keep drowse from the backend.
    pub hindrances: Hindrances,
    /// The backend's unix socket, if it is not there and no earlier run has judged it.
    pub guessed_socket: Option<PathBuf>,
    /// Why this machine allows no hand-off, if it does not.
    pub no_handoff: Option<String>,
}

/// A unit.
#[derive(Clone, Debug, Default)]
pub struct UnitFacts {
    /// `loaded`, `not-found`, `masked`, ...
    pub load_state: String,
    /// It runs or is about to.
    pub is_up: bool,
    /// `enabled`, `disabled`, `static`, ...
    pub file_state: String,
}

/// The unit that is to sleep.
#[derive(Clone, Debug, Default)]
pub struct BackendFacts {
    /// Its own name, where ours is an alias.
    pub id: String,
    /// As [`UnitFacts::load_state`].
    pub load_state: String,
    /// As [`UnitFacts::is_up`].
    pub is_up: bool,
    /// As [`UnitFacts::file_state`].
    pub file_state: String,
}

/// `drowse@NAME.service`.
#[derive(Clone, Debug, Default)]
pub struct ServiceFacts {
    /// As [`UnitFacts::load_state`].
    pub load_state: String,
    /// As [`UnitFacts::is_up`].
    pub is_up: bool,
    /// Its limit on open files.
    pub open_files_max: Option<u64>,
    /// The program that it runs.
    pub program: Option<String>,
    /// Whether that program is there.
    pub program_is_there: bool,
}

/// A socket unit of the service's own.
#[derive(Clone, Debug, Default)]
pub struct Own {
    /// Its name.
    pub name: String,
    /// It listens now.
    pub is_up: bool,
    /// Where.
    pub listens: Vec<Address>,
}

/// A public address.
#[derive(Clone, Debug, Default)]
pub struct ListenerFacts {
    /// `drowse@NAME.socket` listens there now.
    pub is_ours: bool,
    /// Somebody listens there.
    pub is_taken: bool,
    /// Why systemd could not listen there now.
    pub obstacle: Option<String>,
    /// Who listens there, as far as we may see.
    pub holders: Vec<Holder>,
}

/// The backend's address.
#[derive(Clone, Debug, Default)]
pub struct Reach {
    /// What it resolves to.
    pub addresses: Vec<SockAddr>,
    /// Why it does not resolve.
    pub unresolved: Option<String>,
    /// Somebody accepts connections there.
    pub is_answered: bool,
    /// Who listens there, as far as we may see.
    pub holders: Vec<Holder>,
    /// Where the service's processes listen.
    pub elsewhere: Vec<std::net::SocketAddr>,
}

impl Facts {
    /// Looks at everything; at addresses only if there is something to enable.
    ///
    /// # Errors
    /// systemd cannot be asked.
    pub async fn look(
        names: Names,
        places: Places,
        args: Option<&EnableArgs>,
        manager: &Manager,
    ) -> Result<Self, Failure> {
        let listed =
            manager.units(&[names.unit.clone(), names.socket.clone(), names.service.clone()]).await?;
        let mut facts =
            Self { may_write: names.user || rustix::process::geteuid().is_root(), ..Self::default() };
        let (backend, socket, service) = tokio::try_join!(
            manager.properties(&names.unit),
            manager.properties(&names.socket),
            manager.properties(&names.service),
        )?;
        if let [b, s, d] = listed.as_slice() {
            facts.backend = BackendFacts {
                id: b.id.clone(),
                load_state: b.load_state.clone(),
                is_up: b.is_up(),
                file_state: backend.text("UnitFileState"),
            };
            facts.socket = UnitFacts {
                load_state: s.load_state.clone(),
                is_up: s.is_up(),
                file_state: socket.text("UnitFileState"),
            };
            facts.service = service_facts(&d.load_state, d.is_up(), &service);
        }
        (facts.links, facts.other_links) = links_of(&names.unit, &places);
        facts.dependents = dependents(&backend, &facts.links);
        facts.own_sockets = own_sockets(manager, &backend).await?;
        facts.read_files(&places);
        facts.no_handoff = no_handoff(check::handoff_facts(), rustix::process::geteuid().is_root());
        if let Some(args) = args {
            facts.missing_directories = missing(&places);
            let listening = Listening::look(names.user);
            let ours = if facts.socket.is_up { addresses(&socket) } else { Vec::new() };
            for address in &args.listen {
                facts.listeners.push(listener(address, &ours, &listening).await);
            }
            facts.reach = reach(&args.backend, &names.unit, &listening).await;
            let earlier = facts.earlier(&args.backend, &places);
            (facts.hindrances, facts.guessed_socket) = hindrances(&args.backend, &facts.reach, earlier);
        }
        Ok(Self { names, places, ..facts })
    }

    /// Whether an earlier run, for the same backend, found its unix socket closed.
    fn earlier(&self, backend: &Address, places: &Places) -> Option<bool> {
        let conf = self.files.get(&places.conf).filter(|text| is_ours(text))?;
        let is_same = variable(conf, "DROWSE_BACKEND").is_some_and(|value| value == backend.to_string());
        let is_closed = |text: &String| is_ours(text) && sets(text, "AmbientCapabilities");
        is_same.then(|| self.files.get(&places.service).is_some_and(is_closed))
    }

    fn read_files(&mut self, places: &Places) {
        for path in [&places.conf, &places.socket, &places.service] {
            match fs::read_to_string(path) {
                Ok(text) => drop(self.files.insert(path.clone(), text)),
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => self.unreadable.push(format!("cannot read {}: {error}", path.display())),
            }
        }
        let directory = places.socket.parent().and_then(|directory| fs::read_dir(directory).ok());
        for entry in directory.into_iter().flatten().flatten() {
            let path = entry.path();
            if path != places.socket
                && is_drop_in(&path)
                && let Ok(text) = fs::read_to_string(&path)
            {
                self.drop_ins.push((path, text));
            }
        }
    }
}

/// What of the machine is against hand-off. What a caller who is not root may do says nothing: the unit gives the service
/// its capabilities.
fn no_handoff(facts: Vec<Fact>, is_root: bool) -> Option<String> {
    let mut facts = facts.into_iter().filter(|fact| is_root || fact.subject != "capabilities");
    facts.find(|fact| fact.answer == Answer::No).map(|fact| fact.reason)
}

fn service_facts(load_state: &str, is_up: bool, properties: &Properties) -> ServiceFacts {
    let program = properties.rows("ExecStart").into_iter().next().and_then(|row| row.into_iter().next());
    ServiceFacts {
        load_state: load_state.to_owned(),
        is_up,
        open_files_max: properties.number("LimitNOFILE"),
        program_is_there: program.as_ref().is_some_and(|program| Path::new(program).exists()),
        program,
    }
}

/// The units that start this one when they are started or are due, but for what `links` make them do.
fn dependents(backend: &Properties, links: &[Link]) -> Vec<String> {
    let by_links: Vec<_> =
        links.iter().filter_map(|link| link.path.parent()?.file_stem()?.to_str()).collect();
    let mut all: Vec<String> =
        ["WantedBy", "RequiredBy", "RequisiteOf", "BoundBy", "UpheldBy", "TriggeredBy"]
            .into_iter()
            .flat_map(|name| backend.list(name))
            .collect();
    all.retain(|name| !is_socket(name) && !by_links.contains(&name.as_str()));
    all.sort();
    all.dedup();
    all
}

fn is_socket(name: &str) -> bool {
    name.rsplit_once('.').is_some_and(|(_, kind)| kind == "socket")
}

async fn own_sockets(manager: &Manager, backend: &Properties) -> Result<Vec<Own>, Failure> {
    let mut found = Vec::new();
    for name in backend.list("TriggeredBy").into_iter().filter(|name| is_socket(name)) {
        let properties = manager.properties(&name).await?;
        let is_up = matches!(properties.text("ActiveState").as_str(), "active" | "activating");
        found.push(Own { is_up, listens: addresses(&properties), name });
    }
    Ok(found)
}

/// Where a socket unit listens for connections.
fn addresses(socket: &Properties) -> Vec<Address> {
    let rows = socket.rows("Listen");
    let stream = |row: &Vec<String>| match row.as_slice() {
        [kind, address] if kind == "Stream" => address.parse().ok(),
        _ => None,
    };
    rows.iter().filter_map(stream).collect()
}

/// The links that name `unit`, or point at a file of that name, but for the unit's own file; and all others.
fn links_of(unit: &str, places: &Places) -> (Vec<Link>, Vec<Link>) {
    let directories = [&places.directory, &places.runtime_directory];
    let is_named = |path: &Path| path.file_name().is_some_and(|name| name == unit);
    let is_own_file = |link: &Link| directories.iter().any(|directory| link.path == directory.join(unit));
    let links = directories.into_iter().flat_map(|directory| symlinks(directory));
    links.partition(|link| (is_named(&link.path) || is_named(&link.target)) && !is_own_file(link))
}

/// The symbolic links in a directory of units and in the directories there.
fn symlinks(directory: &Path) -> Vec<Link> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        if let Ok(target) = fs::read_link(&path) {
            found.push(Link { path, target });
        } else if path.is_dir() {
            let inner = fs::read_dir(&path).into_iter().flatten().flatten().map(|entry| entry.path());
            found.extend(inner.filter_map(|path| Some(Link { target: fs::read_link(&path).ok()?, path })));
        }
    }
    found.sort_by(|a, b| a.path.cmp(&b.path));
    found
}

/// The directories above our files that are not there, but for those of drop-ins.
fn missing(places: &Places) -> Vec<PathBuf> {
    let conf = places.conf.parent().into_iter().flat_map(Path::ancestors);
    let mut all: Vec<PathBuf> = conf
        .chain(places.directory.ancestors())
        .filter(|directory| !directory.exists())
        .map(Path::to_owned)
        .collect();
    all.sort();
    all.dedup();
    all
}

async fn listener(address: &Address, ours: &[Address], listening: &Listening) -> ListenerFacts {
    let is_ours = ours.iter().any(|at| overlap(at, address));
    let resolved = match address.resolve_to_listen().await {
        Ok(resolved) => resolved,
        Err(error) => {
            let obstacle = Some(format!("it is no address here: {error}"));
            return ListenerFacts { is_ours, obstacle, ..ListenerFacts::default() };
        }
    };
    let holders: Vec<Holder> = listening.at(&resolved).into_iter().cloned().collect();
    let errors: Vec<_> = resolved.iter().filter_map(|one| try_to_bind(one).err()).collect();
    let unix = resolved.iter().any(|one| one.as_socket().is_none());
    let is_taken = errors.iter().any(|error| error.kind() == ErrorKind::AddrInUse)
        || (unix && listening.is_anybody_at(&resolved));
    let obstacle = if is_taken {
        Some("somebody listens there".to_owned())
    } else if errors.iter().any(|error| error.kind() == ErrorKind::AddrNotAvailable) {
        Some(
            "this machine has no such address: choose one that `ip address` shows, or :PORT for all"
                .to_owned(),
        )
    } else {
        // Who may not bind may still tell systemd to.
        let other = errors.iter().find(|error| error.kind() != ErrorKind::PermissionDenied);
        other.map(|error| format!("nobody can listen there: {error}")).or_else(|| no_socket(address))
    };
    ListenerFacts { is_ours, is_taken, obstacle, holders }
}

/// A file in the way of a unix socket.
fn no_socket(address: &Address) -> Option<String> {
    let Address::Unix(path) = address else { return None };
    let found = fs::symlink_metadata(path).ok().filter(|found| !found.file_type().is_socket())?;
    let what = if found.is_dir() { "directory" } else { "file" };
    Some(format!("there is a {what} that is no socket: remove it, or choose another path"))
}

async fn reach(backend: &Address, unit: &str, listening: &Listening) -> Reach {
    let addresses = match backend.resolve().await {
        Ok(addresses) if !addresses.is_empty() => addresses,
        Ok(_) => return Reach { unresolved: Some("the name has no address".to_owned()), ..Reach::default() },
        Err(error) => return Reach { unresolved: Some(error.to_string()), ..Reach::default() },
    };
    let is_listed = listening.is_anybody_at(&addresses);
    let connected = tokio::time::timeout(CONNECT_TIME, pairing::connect(backend));
    let is_answered = is_listed || matches!(connected.await, Ok(Ok(_)));
    let holders = listening.at(&addresses).into_iter().cloned().collect();
    Reach { is_answered, holders, elsewhere: listening.of(unit), addresses, unresolved: None }
}

/// What the sandbox must let through, and the socket that nobody has seen yet; `earlier`: it was closed when it was judged.
fn hindrances(backend: &Address, reach: &Reach, earlier: Option<bool>) -> (Hindrances, Option<PathBuf>) {
    let ips = reach.addresses.iter().filter_map(|one| Some(one.as_socket()?.ip().to_canonical()));
    let addresses = ips.filter(|ip| !ip.is_loopback() && !ip.is_unspecified()).collect();
    let Address::Unix(path) = backend else {
        return (Hindrances { addresses, ..Hindrances::default() }, None);
    };
    let is_there = !fs::metadata(path).is_err_and(|error| error.kind() == ErrorKind::NotFound);
    let is_open = match earlier {
        Some(was_closed) if !is_there => !was_closed,
        // A directory that is not there either may be made for the service alone.
        None | Some(_) => {
            (!is_there || allows(path, 0o002))
                && path.ancestors().skip(1).all(|directory| allows(directory, 0o001))
        }
    };
    let closed_socket = (!is_open).then(|| path.clone());
    let guessed = (!is_there && earlier.is_none()).then(|| path.clone());
    (Hindrances { addresses, closed_socket, socket: Some(path.clone()) }, guessed)
}

/// Whether the mode of a file has all of `bits`.
fn allows(path: &Path, bits: u32) -> bool {
    fs::metadata(path).is_ok_and(|found| found.permissions().mode() & bits == bits)
}

/// Where the files of the services of the system, or of this user, are.
///
/// # Errors
/// The user has no home.
pub fn places(names: &Names) -> anyhow::Result<Places> {
    let (units, runtime, configuration) = if names.user {
        let variable =
            |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let home = || variable("HOME").map(|home| home.join(".config"));
        let config =
            variable("XDG_CONFIG_HOME").or_else(home).context("find your configuration: set HOME")?;
        let runtime = variable("XDG_RUNTIME_DIR").unwrap_or_default();
        (config.join("systemd/user"), runtime.join("systemd/user"), config.join("drowse"))
    } else {
        ("/etc/systemd/system".into(), "/run/systemd/system".into(), "/etc/drowse".into())
    };
    let drop_in = |unit: &str| units.join(format!("{unit}.d")).join("drowse.conf");
    Ok(Places {
        conf: configuration.join(format!("{}.conf", names.instance)),
        socket: drop_in(&names.socket),
        service: drop_in(&names.service),
        directory: units,
        runtime_directory: runtime,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::setup::contents::{Record, configuration, service};
    use std::os::unix::net::UnixListener;

    fn set_mode(path: &Path, mode: u32) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn a_socket_that_is_not_there_is_judged_once() {
        let directory = tempfile::tempdir().unwrap();
        set_mode(directory.path(), 0o755);
        let path = directory.path().join("socket");
        let judge = |path: &Path, earlier| {
            let (found, guessed) = hindrances(&Address::Unix(path.to_owned()), &Reach::default(), earlier);
            (found.closed_socket.is_some(), guessed.is_some())
        };
        assert_eq!(judge(&path, None), (false, true), "its directories are open");
        assert_eq!(judge(&path, Some(false)), (false, false));
        assert_eq!(judge(&path, Some(true)), (true, false), "what was decided stays");
        assert_eq!(judge(&directory.path().join("later/socket"), None), (true, true));
        set_mode(directory.path(), 0o700);
        assert_eq!(judge(&path, None), (true, true), "its directory is closed");
        assert_eq!(judge(&path, Some(false)), (false, false), "what was decided stays");

        set_mode(directory.path(), 0o755);
        let _listener = UnixListener::bind(&path).unwrap();
        for (mode, is_closed) in [(0o666, false), (0o660, true)] {
            set_mode(&path, mode);
            for earlier in [None, Some(false), Some(true)] {
                assert_eq!(judge(&path, earlier), (is_closed, false), "{mode:o} {earlier:?}");
            }
        }
    }

    #[test]
    fn an_earlier_run_is_believed_for_the_same_backend() {
        let names = Names::new("web", false).unwrap();
        let places = places(&names).unwrap();
        let (backend, other): (Address, Address) = ("/run/x".parse().unwrap(), "/run/y".parse().unwrap());
        let closed = Hindrances { closed_socket: Some("/run/x".into()), ..Hindrances::default() };
        let conf = configuration(&names, &Record::default(), &backend, &[]).unwrap();
        let drop_in = service(&names, &closed).unwrap();
        let mut facts = Facts::default();
        assert_eq!(facts.earlier(&backend, &places), None);
        facts.files.insert(places.conf.clone(), conf);
        assert_eq!(facts.earlier(&backend, &places), Some(false));
        facts.files.insert(places.service.clone(), drop_in);
        assert_eq!(facts.earlier(&backend, &places), Some(true));
        assert_eq!(facts.earlier(&other, &places), None);
    }

    #[test]
    fn what_the_caller_may_not_do_is_no_reason_against_hand_off() {
        let no = |subject| Fact { subject, answer: Answer::No, reason: subject.to_owned() };
        assert_eq!(no_handoff(vec![no("capabilities")], false), None);
        assert_eq!(no_handoff(vec![no("capabilities"), no("bpffs")], false).as_deref(), Some("bpffs"));
        assert_eq!(no_handoff(vec![no("capabilities")], true).as_deref(), Some("capabilities"));
    }
}
