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

/// A process that listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// Its process id.
    pub pid: i32,
    /// Its name.
    pub program: String,
    /// The units whose cgroups it is in, outermost first.
    pub units: Vec<String>,
}

impl Holder {
    /// Whether it is a process of `unit`.
    #[must_use]
    pub fn is_of(&self, unit: &str) -> bool {
        self.units.iter().any(|one| one == unit)
    }

    /// Whether it is systemd itself, which holds the listeners of socket units.
    #[must_use]
    pub fn is_systemd(&self) -> bool {
        self.program == "systemd"
    }

    /// As people know it: `nginx (process 812, nginx.service)`.
    #[must_use]
    pub fn describe(&self) -> String {
        let unit = self.units.last().map(|unit| format!(", {unit}")).unwrap_or_default();
        format!("{} (process {}{unit})", self.program, self.pid)
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
    /// Looks, once. What cannot be read is left out.
    #[must_use]
    pub fn look() -> Self {
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
                    && let Some(holder) = holder(&process)
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
        holders.sort_by_key(|holder| holder.is_systemd());
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

fn holder(process: &Process) -> Option<Holder> {
    let cgroups = process.cgroups().ok()?.0;
    // The hierarchy of systemd: the unified one, or a hybrid's own one.
    let is_systemds = |group: &&ProcessCGroup| {
        group.hierarchy == 0 || group.controllers.iter().any(|name| name == "name=systemd")
    };
    let units = cgroups.iter().filter(is_systemds).map(|group| units_of(&group.pathname));
    let units = units.max_by_key(Vec::len).unwrap_or_default();
    Some(Holder { pid: process.pid, program: process.stat().ok()?.comm, units })
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
        let listening = Listening::look();
        for place in [at.clone(), SockAddr::unix(&path).unwrap()] {
            let holders = listening.at(&[place]);
            assert!(
                holders.iter().any(|holder| holder.pid.unsigned_abs() == std::process::id()),
                "{holders:?}"
            );
        }
        assert_eq!(try_to_bind(&at).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        drop(tcp);
        assert!(!Listening::look().is_anybody_at(std::slice::from_ref(&at)));
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
}
