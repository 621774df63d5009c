//! Who listens where on this machine.
//!
//! Owns: reading the socket tables and the descriptors of processes. Must never: connect to anybody, or change
//! anything; an address is tried by binding to it for a moment.
//!
//! Rests on: `/proc/net/{tcp,tcp6,unix}` and `/proc/PID/{fd,cgroup}` (proc(5)); the descriptors of another user's
//! processes are hidden from all but root, so a holder may be unknown.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::path::Path;

use procfs::ProcessCGroup;
use procfs::net::{TcpState, UnixState};
use procfs::process::{FDTarget, Process, all_processes};
use socket2::{SockAddr, Socket, Type};

use crate::address;
use crate::report::text::printable;

/// A process that listens.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Holder {
    /// Its process id.
    pub pid: i32,
    /// Its name, which it may choose.
    pub program: String,
    /// The innermost unit in whose cgroup it is, whoever's.
    pub innermost: Option<String>,
    /// The unit of our systemd that it belongs to.
    pub unit: Option<String>,
    /// It is our systemd itself, which holds the listeners of socket units.
    pub is_systemd: bool,
}

impl Holder {
    /// Whether it is a process of `unit`.
    #[must_use]
    pub fn is_of(&self, unit: &str) -> bool {
        self.unit.as_deref() == Some(unit)
    }

    /// As people know it: `nginx (process 812, nginx.service)`.
    #[must_use]
    pub fn describe(&self) -> String {
        let unit = self.innermost.as_ref().map(|unit| format!(", {unit}")).unwrap_or_default();
        printable(&format!("{} (process {}{unit})", self.program, self.pid))
    }
}

/// Whose systemd is asked: its units are those of its own cgroups alone.
#[derive(Debug)]
struct Owner {
    /// The cgroup below which the system's units are: empty, but in a container without a cgroup namespace.
    root: String,
    /// Whose systemd it is, if not the system's.
    user: Option<u32>,
}

impl Owner {
    fn look(user: bool) -> Self {
        // Where systemd puts itself: cgroups of its units are beside that one.
        let init = Process::new(1).ok().and_then(|process| cgroup(&process)).unwrap_or_default();
        let root = init.strip_suffix("/init.scope").unwrap_or_default().to_owned();
        Self { root, user: user.then(|| rustix::process::getuid().as_raw()) }
    }

    fn holder(&self, pid: i32, program: String, cgroup: &str) -> Holder {
        let units = units_of(cgroup);
        let below = cgroup.strip_prefix(&self.root).map(units_of).unwrap_or_default();
        let unit = match (self.user, below.as_slice()) {
            (None, [unit, ..]) => Some(unit.clone()),
            (Some(user), [manager, unit, ..]) if *manager == format!("user@{user}.service") => {
                Some(unit.clone())
            }
            (None | Some(_), _) => None,
        };
        // Whoever may enter a user's init.scope is that user.
        let is_systemd = match self.user {
            None => pid == 1,
            Some(_) => program == "systemd" && unit.as_deref() == Some("init.scope"),
        };
        Holder { pid, program, innermost: units.last().cloned(), unit, is_systemd }
    }
}

/// A place where somebody listens.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Place {
    Inet(SocketAddr),
    Unix(String),
}

/// All listeners of this network namespace, as far as we may see who they belong to.
#[derive(Clone, Debug, Default)]
pub struct Listening {
    places: Vec<(Place, u64)>,
    holders: HashMap<u64, Vec<Holder>>,
}

impl Listening {
    /// Looks, once, for the system's systemd or that of the `user` that we are. What cannot be read is left out.
    #[must_use]
    pub fn look(user: bool) -> Self {
        let owner = Owner::look(user);
        let tcp = procfs::net::tcp().unwrap_or_default().into_iter();
        let tcp = tcp.chain(procfs::net::tcp6().unwrap_or_default());
        let inet = tcp
            .filter(|entry| entry.state == TcpState::Listen)
            .map(|entry| (Place::Inet(entry.local_address), entry.inode));
        let unix = procfs::net::unix().unwrap_or_default().into_iter();
        // A listener is unconnected; so is a socket that is bound and does not listen yet.
        let unix = unix
            .filter(|entry| entry.state == UnixState::UNCONNECTED && entry.socket_type == STREAM)
            .filter_map(|entry| Some((Place::Unix(entry.path?.to_str()?.to_owned()), entry.inode)));
        let places: Vec<_> = inet.chain(unix).collect();
        let mut holders: HashMap<u64, Vec<Holder>> =
            places.iter().map(|(_, inode)| (*inode, Vec::new())).collect();
        for process in all_processes().into_iter().flatten().flatten() {
            for inode in sockets(&process) {
                if let Some(of_socket) = holders.get_mut(&inode)
                    && let Some(holder) = holder(&owner, &process)
                {
                    of_socket.push(holder);
                }
            }
        }
        Self { places, holders }
    }

    /// Who listens at one of `addresses`: those that a connection there would reach, systemd last.
    #[must_use]
    pub fn at(&self, addresses: &[SockAddr]) -> Vec<&Holder> {
        let places = self.places.iter().filter(|(place, _)| addresses.iter().any(|one| reaches(one, place)));
        let mut holders: Vec<&Holder> =
            places.filter_map(|(_, inode)| self.holders.get(inode)).flatten().collect();
        holders.sort_by_key(|holder| holder.is_systemd);
        holders.dedup();
        holders
    }

    /// Whether somebody listens at one of `addresses`.
    #[must_use]
    pub fn is_anybody_at(&self, addresses: &[SockAddr]) -> bool {
        self.places.iter().any(|(place, _)| addresses.iter().any(|one| reaches(one, place)))
    }

    /// The TCP addresses where processes of `unit` listen.
    #[must_use]
    pub fn of(&self, unit: &str) -> Vec<SocketAddr> {
        let is_of =
            |inode: &u64| self.holders.get(inode).is_some_and(|all| all.iter().any(|one| one.is_of(unit)));
        let inet = |(place, inode): &(Place, u64)| match place {
            Place::Inet(address) if is_of(inode) => Some(*address),
            Place::Inet(_) | Place::Unix(_) => None,
        };
        let mut found: Vec<_> = self.places.iter().filter_map(inet).collect();
        found.sort_unstable();
        found.dedup();
        found
    }
}

/// `SOCK_STREAM`, as `/proc/net/unix` has it.
const STREAM: u16 = 1;

fn sockets(process: &Process) -> impl Iterator<Item = u64> {
    let descriptors = process.fd().into_iter().flatten().flatten();
    descriptors.filter_map(
        |descriptor| {
            if let FDTarget::Socket(inode) = descriptor.target { Some(inode) } else { None }
        },
    )
}

fn holder(owner: &Owner, process: &Process) -> Option<Holder> {
    Some(owner.holder(process.pid, process.stat().ok()?.comm, &cgroup(process)?))
}

/// The cgroup of a process in the hierarchy of systemd: the unified one, or a hybrid's own one.
fn cgroup(process: &Process) -> Option<String> {
    let is_systemds = |group: &ProcessCGroup| {
        group.hierarchy == 0 || group.controllers.iter().any(|name| name == "name=systemd")
    };
    let groups = process.cgroups().ok()?.0.into_iter().filter(is_systemds).map(|group| group.pathname);
    groups.max_by_key(|path| units_of(path).len())
}

/// The units in the path of a cgroup: `/system.slice/web.service/sub` is of `web.service`.
fn units_of(cgroup: &str) -> Vec<String> {
    let is_unit = |name: &&str| {
        Path::new(name)
            .extension()
            .is_some_and(|kind| ["service", "socket", "scope"].iter().any(|one| kind == *one))
    };
    cgroup.split('/').filter(is_unit).map(str::to_owned).collect()
}

/// Whether a connection to `address` may come to a listener at `place`.
fn reaches(address: &SockAddr, place: &Place) -> bool {
    match (address.as_socket(), place) {
        (Some(address), Place::Inet(listener)) => {
            let (ip, at) = (address.ip().to_canonical(), listener.ip().to_canonical());
            let any = at.is_unspecified() && (listener.is_ipv6() || ip.is_ipv4());
            address.port() == listener.port() && (any || ip == at || ip.is_unspecified())
        }
        (None, Place::Unix(name)) => address::display(address) == *name,
        (Some(_), Place::Unix(_)) | (None, Place::Inet(_)) => false,
    }
}

/// Binds to `address` for a moment, as systemd will. A path is not bound to: whoever listens there is found by
/// [`Listening`], and systemd replaces a socket file that nobody listens at.
///
/// # Errors
/// What stands in the way; `AddrInUse` if somebody listens there.
pub fn try_to_bind(address: &SockAddr) -> io::Result<()> {
    if address.as_socket().is_none() {
        return Ok(());
    }
    let socket = Socket::new(address.domain(), Type::STREAM, None)?;
    // With SO_REUSEADDR only a socket that listens is in the way, none in TIME_WAIT.
    socket.set_reuse_address(true)?;
    if address.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    socket.bind(address)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    #[test]
    fn our_own_listeners_are_found_with_their_process() {
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let at = SockAddr::from(tcp.local_addr().unwrap());
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let _unix = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let listening = Listening::look(false);
        for place in [at.clone(), SockAddr::unix(&path).unwrap()] {
            let holders = listening.at(&[place]);
            assert!(
                holders.iter().any(|holder| holder.pid.unsigned_abs() == std::process::id()),
                "{holders:?}"
            );
        }
        assert_eq!(try_to_bind(&at).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        drop(tcp);
        assert!(!Listening::look(false).is_anybody_at(std::slice::from_ref(&at)));
        assert!(try_to_bind(&at).is_ok());
    }

    #[test]
    fn a_wildcard_is_reached_and_another_address_is_not() {
        let place = |text: &str| Place::Inet(text.parse().unwrap());
        let address = |text: &str| SockAddr::from(text.parse::<SocketAddr>().unwrap());
        for (wanted, listener, expected) in [
            ("127.0.0.1:80", "0.0.0.0:80", true),
            ("127.0.0.1:80", "[::]:80", true),
            ("[::1]:80", "0.0.0.0:80", false),
            ("127.0.0.1:80", "127.0.0.2:80", false),
            ("127.0.0.1:80", "127.0.0.1:81", false),
            ("[::]:80", "127.0.0.2:80", true),
        ] {
            assert_eq!(reaches(&address(wanted), &place(listener)), expected, "{wanted} {listener}");
        }
    }

    #[test]
    fn units_are_read_from_a_cgroup() {
        assert_eq!(units_of("/system.slice/web.service/worker"), ["web.service"]);
        assert_eq!(
            units_of("/user.slice/user-0.slice/user@0.service/app.slice/web.service"),
            ["user@0.service", "web.service"]
        );
        assert!(units_of("/").is_empty());
    }

    #[test]
    fn only_our_own_systemds_units_and_process_count() {
        let of = |user: Option<u32>, pid: i32, cgroup: &str| {
            let owner = Owner { root: String::new(), user };
            owner.holder(pid, "systemd".to_owned(), cgroup)
        };
        let (system, users) =
            ("/system.slice/web.service/worker.service", "/user.slice/user-7.slice/user@7.service");
        let in_users = format!("{users}/app.slice/web.service");
        for (user, cgroup, expected) in [
            (None, system, Some("web.service")),
            (Some(7), system, None),
            (None, &in_users, Some("user@7.service")),
            (Some(7), &in_users, Some("web.service")),
            (Some(8), &in_users, None),
            (None, "/machine.slice/box.scope/payload/system.slice/web.service", Some("box.scope")),
        ] {
            assert_eq!(of(user, 9, cgroup).unit.as_deref(), expected, "{user:?} {cgroup}");
        }
        let inside = Owner { root: "/box.scope".to_owned(), user: None };
        assert!(inside.holder(9, String::new(), "/box.scope/system.slice/web.service").is_of("web.service"));
        assert!(!inside.holder(9, String::new(), "/system.slice/web.service").is_of("web.service"));

        let init = format!("{users}/init.scope");
        assert!(of(None, 1, "/init.scope").is_systemd && !of(None, 9, "/init.scope").is_systemd);
        assert!(of(Some(7), 9, &init).is_systemd);
        for other in [
            of(None, 9, &init),
            of(Some(8), 9, &init),
            of(Some(7), 9, &in_users),
            of(Some(7), 1, "/init.scope"),
        ] {
            assert!(!other.is_systemd, "{other:?}");
        }
    }

    #[test]
    fn a_name_cannot_move_the_cursor() {
        let holder = Holder { pid: 7, program: "a\u{1b}[2J\n\u{9b}b".to_owned(), ..Holder::default() };
        assert_eq!(holder.describe(), "a?[2J??b (process 7)");
    }
}
