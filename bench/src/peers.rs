//! The peers: what stands between client and backend.
//!
//! Owns: how each peer is started, so that its own users would call it a fair start. Must never: treat drowse better
//! than another. Every proxy gets a listening socket that is already open, as systemd passes it, so no peer's own
//! start is in a measurement that is not about starting.

use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::cpus::{Layout, started_on};
use crate::process::{Running, socket_activated};

/// Files that a proxy keeps open beside those of its flows, at most.
const OWN_FILES_MAX: u64 = 100;

/// What a peer has to connect.
#[derive(Debug, Clone, Copy)]
pub struct Wanted<'a> {
    /// Where the backend listens.
    pub backend: SocketAddr,
    /// Flows open at the same time.
    pub flows: usize,
    /// The processors of each part.
    pub layout: &'a Layout,
}

/// A started peer; dropping it ends it.
#[derive(Debug)]
pub struct Started {
    /// Where clients connect.
    pub address: SocketAddr,
    /// The proxy's process; none for a direct connection.
    pub process: Option<Running>,
}

impl Started {
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

    /// The version as the program itself tells it.
    ///
    /// # Errors
    /// When the program cannot be run.
    fn version(&self) -> Result<String>;

    /// How many flows it can hold at once when it may open `files_max` files.
    fn flows_max(&self, files_max: u64) -> usize;

    /// The command line of the proxy, for the report; empty for a direct connection.
    fn command_line(&self, wanted: &Wanted<'_>) -> Vec<String>;

    /// Its configuration file, for the report; none where the command line says all.
    fn configuration(&self) -> Option<String> {
        None
    }

    /// Starts it.
    ///
    /// # Errors
    /// When it does not start.
    fn start(&self, wanted: &Wanted<'_>) -> Result<Started> {
        let listener = TcpListener::bind("127.0.0.1:0").context("open a listening socket for the proxy")?;
        let address = listener.local_addr().context("read the listener's address")?;
        let line = self.command_line(wanted);
        let (program, arguments) = line.split_first().context("find the proxy's program")?;
        let mut command = socket_activated(program, listener);
        command.args(arguments);
        let process = started_on(&wanted.layout.proxy, || Running::start(self.name(), command))?;
        Ok(Started { address, process: Some(process) })
    }
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
        Ok(Started { address: wanted.backend, process: None })
    }
}

/// systemd's own proxy, socket-activated, with its default of 256 connections raised as far as needed.
#[derive(Debug)]
pub struct SocketProxyd {
    /// Debian keeps it outside of `PATH`.
    pub program: PathBuf,
}

impl Peer for SocketProxyd {
    fn name(&self) -> &'static str {
        "systemd-socket-proxyd"
    }

    fn version(&self) -> Result<String> {
        first_line(&self.program)
    }

    /// It keeps two sockets and two pipes for each flow: six files.
    fn flows_max(&self, files_max: u64) -> usize {
        flows_of(files_max, 6)
    }

    fn command_line(&self, wanted: &Wanted<'_>) -> Vec<String> {
        vec![
            self.program.display().to_string(),
            format!("--connections-max={}", wanted.flows + 1),
            wanted.backend.to_string(),
        ]
    }
}

/// drowse with one of its planes, as a plain proxy that starts and stops nothing.
#[derive(Debug)]
pub struct Drowse {
    /// The program under test.
    pub program: PathBuf,
    /// The plane it is told to use.
    pub plane: Plane,
}

/// The planes that can be measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Plane {
    /// The kernel moves the bytes through a pipe.
    Splice,
    /// drowse reads and writes the bytes.
    Copy,
}

impl Plane {
    /// The value of `--plane`.
    #[must_use]
    pub fn option(self) -> &'static str {
        match self {
            Self::Splice => "splice",
            Self::Copy => "copy",
        }
    }
}

impl Peer for Drowse {
    fn name(&self) -> &'static str {
        match self.plane {
            Plane::Splice => "drowse-splice",
            Plane::Copy => "drowse-copy",
        }
    }

    fn version(&self) -> Result<String> {
        first_line(&self.program)
    }

    /// Two sockets for each flow; pipes belong to flows that move bytes.
    fn flows_max(&self, files_max: u64) -> usize {
        flows_of(files_max, 2)
    }

    fn command_line(&self, wanted: &Wanted<'_>) -> Vec<String> {
        vec![
            self.program.display().to_string(),
            "run".to_owned(),
            format!("--backend={}", wanted.backend),
            format!("--plane={}", self.plane.option()),
            format!("--connections-max={}", wanted.flows + 1),
        ]
    }
}

fn flows_of(files_max: u64, files_each: u64) -> usize {
    usize::try_from(files_max.saturating_sub(OWN_FILES_MAX) / files_each).unwrap_or(usize::MAX)
}

/// The first line of `program --version`.
fn first_line(program: &Path) -> Result<String> {
    let output = Command::new(program)
        .arg("--version")
        .output()
        .with_context(|| format!("run {}", program.display()))?;
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text.lines().next().unwrap_or("unknown").to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_peer_can_hold_follows_from_its_files_per_flow() {
        let proxyd = SocketProxyd { program: PathBuf::new() };
        assert_eq!(proxyd.flows_max(20_000), 3_316);
        let drowse = Drowse { program: PathBuf::new(), plane: Plane::Splice };
        assert!(drowse.flows_max(20_000) >= 9_000);
        assert_eq!(Direct.flows_max(50), 0);
    }
}
