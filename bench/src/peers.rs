//! The peers: what stands between client and backend.
//!
//! Owns: how each peer is started, so that its own users would call it a fair start. Must never: treat drowse better
//! than another. Every proxy gets a listening socket that is already open, as systemd passes it, so no peer's own
//! start is in a measurement that is not about starting; socat, which cannot take one, opens one that is like it.

use std::fs;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use tempfile::TempDir;

use crate::cpus::{Layout, started_on};
use crate::process::{Running, socket_activated};

mod drowse;
mod haproxy;
mod nginx;
mod socat;
mod socket_proxyd;

pub use drowse::{Drowse, Plane};
pub use haproxy::Haproxy;
pub use nginx::Nginx;
pub use socat::Socat;
pub use socket_proxyd::SocketProxyd;

/// Files that a proxy keeps open beside those of its flows, at most.
const OWN_FILES_MAX: u64 = 100;
/// Connections that wait in a proxy's listener, at most: what systemd asks for and the kernel's default limit allows
/// (`net.core.somaxconn`).
pub const BACKLOG: i32 = 4096;
/// Where programs are that are not on everybody's PATH.
const MORE_DIRECTORIES: [&str; 2] = ["/usr/sbin", "/sbin"];

/// What a peer has to connect.
#[derive(Debug, Clone, Copy)]
pub struct Wanted<'a> {
    /// Where the backend listens.
    pub backend: SocketAddr,
    /// The address, without a port, at which clients reach the proxy.
    pub listen: IpAddr,
    /// Flows open at the same time.
    pub flows: usize,
    /// The processors of each part.
    pub layout: &'a Layout,
}

impl Wanted<'_> {
    /// Opens the listening socket that a proxy is given.
    fn listener(&self) -> Result<(TcpListener, SocketAddr)> {
        let listener =
            TcpListener::bind((self.listen, 0)).context("open a listening socket for the proxy")?;
        rustix::net::listen(&listener, BACKLOG).context("set the listener's backlog")?;
        let address = listener.local_addr().context("read the listener's address")?;
        Ok((listener, address))
    }

    /// `template` with what is the same for all peers filled in.
    fn fill(&self, template: &str) -> String {
        template
            .replace("@BACKEND@", &self.backend.to_string())
            .replace("@THREADS@", &self.layout.proxy.len().to_string())
    }
}

/// A started peer; dropping it ends it.
#[derive(Debug)]
pub struct Started {
    /// Where clients connect.
    pub address: SocketAddr,
    /// The proxy's process; none for a direct connection.
    pub process: Option<Running>,
    /// The proxy's files, kept until its process is gone.
    directory: Option<TempDir>,
}

impl Started {
    /// Where the proxy's own files are, if it has any: of drowse its status socket.
    #[must_use]
    pub fn directory(&self) -> Option<&Path> {
        self.directory.as_ref().map(TempDir::path)
    }

    /// Adds what the proxy said last to an error of its clients.
    ///
    /// # Errors
    /// The error of `outcome`.
    pub fn explain<T>(&mut self, outcome: Result<T>) -> Result<T> {
        match (&mut self.process, outcome) {
            (Some(process), Err(err)) => Err(err.context(process.last_words())),
            (_, outcome) => outcome,
        }
    }
}

/// One way from the client to the backend.
pub trait Peer {
    /// The name in reports.
    fn name(&self) -> &'static str;

    /// The version as the program itself tells it, or that it is not installed.
    ///
    /// # Errors
    /// When the program cannot be run.
    fn version(&self) -> Result<String>;

    /// How many flows it can hold at once when it may open `files_max` files.
    fn flows_max(&self, files_max: u64) -> usize;

    /// The command line of the proxy, for the report; empty for a direct connection.
    fn command_line(&self, wanted: &Wanted<'_>) -> Vec<String>;

    /// The configuration file, for the report, with `@NAME@` for what a run fills in; none when there is none.
    fn configuration(&self) -> Option<String> {
        None
    }

    /// Whether each flow has a process of its own, which is gone, with its counters, before its costs can be read.
    fn has_process_for_each_flow(&self) -> bool {
        false
    }

    /// Whether the backend itself must hold the connections of its clients; a measurement without that is an error.
    fn hands_off(&self) -> bool {
        false
    }

    /// Whether it must load eBPF programs, for which a user needs root.
    fn needs_ebpf(&self) -> bool {
        false
    }

    /// The plane of drowse that must carry the connections of its clients; a measurement without that is an error.
    fn forwards_by(&self) -> Option<Plane> {
        None
    }

    /// Starts it.
    ///
    /// # Errors
    /// When it does not start; [`crate::cases::Unavailable`] when it is not installed.
    fn start(&self, wanted: &Wanted<'_>) -> Result<Started> {
        start_activated(self, wanted, |_| {})
    }
}

/// Starts `peer` with its command line and a listening socket, as `set_up` leaves the command.
fn start_activated(
    peer: &(impl Peer + ?Sized),
    wanted: &Wanted<'_>,
    set_up: impl FnOnce(&mut Command),
) -> Result<Started> {
    let (listener, address) = wanted.listener()?;
    let line = peer.command_line(wanted);
    let (program, arguments) = line.split_first().context("find the proxy's program")?;
    let mut command = socket_activated(program, listener);
    command.args(arguments);
    set_up(&mut command);
    let process = started_on(&wanted.layout.proxy, || Running::start(peer.name(), command))?;
    Ok(Started { address, process: Some(process), directory: None })
}

/// No proxy: the limit.
#[derive(Debug)]
pub struct Direct;

impl Peer for Direct {
    fn name(&self) -> &'static str {
        "direct"
    }

    fn version(&self) -> Result<String> {
        Ok("no proxy".to_owned())
    }

    fn flows_max(&self, files_max: u64) -> usize {
        flows_of(files_max, 1)
    }

    fn command_line(&self, _wanted: &Wanted<'_>) -> Vec<String> {
        Vec::new()
    }

    fn start(&self, wanted: &Wanted<'_>) -> Result<Started> {
        Ok(Started { address: wanted.backend, process: None, directory: None })
    }
}

fn flows_of(files_max: u64, files_each: u64) -> usize {
    usize::try_from(files_max.saturating_sub(OWN_FILES_MAX) / files_each).unwrap_or(usize::MAX)
}

/// Where `program` is installed.
fn installed(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let directories = std::env::split_paths(&path).chain(MORE_DIRECTORIES.map(PathBuf::from));
    directories.map(|directory| directory.join(program)).find(|file| file.is_file())
}

/// A directory of its own for a proxy, with its configuration in the file `name`.
fn configured(name: &str, text: &str) -> Result<TempDir> {
    let directory = tempfile::tempdir().context("make a directory for a proxy's configuration")?;
    fs::write(directory.path().join(name), text).with_context(|| format!("write {name}"))?;
    Ok(directory)
}

/// The first line of what `program option` prints that begins with `begin`.
fn version_line(program: &Path, option: &str, begin: &str) -> Result<String> {
    let output =
        Command::new(program).arg(option).output().with_context(|| format!("run {}", program.display()))?;
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text);
    Ok(text.lines().find(|line| line.starts_with(begin)).unwrap_or("unknown").to_owned())
}

/// As [`version_line`], for a program that may be missing.
fn version_of(program: &str, option: &str, begin: &str) -> Result<String> {
    installed(program)
        .map_or_else(|| Ok("not installed".to_owned()), |program| version_line(&program, option, begin))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_peer_can_hold_follows_from_its_files_per_flow() {
        let proxyd = SocketProxyd { program: PathBuf::new() };
        assert_eq!(proxyd.flows_max(20_000), 3_316);
        let drowse = |plane| Drowse { program: PathBuf::new(), plane, variant: Vec::new() };
        assert!((9_000..10_000).contains(&drowse(Plane::Splice).flows_max(20_000)));
        assert!(drowse(Plane::Handoff).flows_max(20_000) >= 10_000);
        assert!(Haproxy.flows_max(20_000) >= 9_000);
        assert!(Nginx.flows_max(20_000) >= 9_000);
        assert!(Socat.flows_max(20_000) < 512);
        assert_eq!(Direct.flows_max(50), 0);
        assert_eq!(Haproxy.flows_max(50), 0);
    }

    #[test]
    fn a_plane_of_the_kernel_has_a_name_of_its_own_and_hand_off_no_limit_of_connections() {
        let layout = Layout { client: vec![0], proxy: vec![0, 1], backend: vec![1] };
        let line = |plane, port: u16, variant: &[&str]| {
            let variant = variant.iter().map(|option| (*option).to_owned()).collect();
            let backend = SocketAddr::from(([127, 0, 0, 1], port));
            let wanted = Wanted { backend, listen: [127, 0, 0, 1].into(), flows: 7, layout: &layout };
            let drowse = Drowse { program: PathBuf::new(), plane, variant };
            (drowse.name(), drowse.command_line(&wanted).join(" "))
        };
        let (name, first) = line(Plane::Handoff, 81, &[]);
        assert_eq!(name, "drowse-handoff");
        assert!(!first.contains("--connections-max") && first.contains("--name="), "{first}");
        let named = |line: &str| line.split(' ').find(|word| word.starts_with("--name=")).map(str::to_owned);
        assert_ne!(named(&first), named(&line(Plane::Handoff, 82, &[]).1));
        let (_, spliced) = line(Plane::Splice, 81, &[]);
        assert!(spliced.ends_with("--connections-max=8") && named(&spliced).is_none(), "{spliced}");
        for (plane, name) in [(Plane::Sockmap, "drowse-sockmap"), (Plane::SockmapEnds, "drowse-sockmap-ends")]
        {
            let (peer, line) = line(plane, 81, &[]);
            let option = name.replace("drowse-", "--plane=");
            assert_eq!(peer, name);
            assert!(line.split(' ').any(|word| word == option), "{line}");
            assert!(line.ends_with("--connections-max=8") && named(&line) == named(&first), "{line}");
        }
        let variant = line(Plane::Handoff, 81, &["--a=1", "--b"]);
        assert_eq!(variant, ("drowse-handoff-variant", format!("{first} --a=1 --b")));
    }

    #[test]
    fn a_configuration_is_filled_in_whole() {
        let layout = Layout { client: vec![0], proxy: vec![0, 1], backend: vec![1] };
        let backend = SocketAddr::from(([127, 0, 0, 1], 81));
        let wanted = Wanted { backend, listen: [127, 0, 0, 1].into(), flows: 7, layout: &layout };
        let listen = SocketAddr::from(([127, 0, 0, 1], 80));
        let texts = [haproxy::rendered(&wanted), nginx::rendered(&wanted, listen, Path::new("/m.so"))];
        for text in texts {
            let settings: Vec<&str> = text.lines().filter(|line| !line.trim().starts_with('#')).collect();
            assert!(settings.iter().all(|line| !line.contains("@N") && !line.contains("@B")), "{text}");
            assert!(text.contains("127.0.0.1:81"), "{text}");
            assert_eq!(settings.iter().filter(|line| line.matches('@').count() > 1).count(), 0, "{text}");
        }
    }
}
