//! systemd's own proxy.

use std::path::PathBuf;

use anyhow::Result;

use super::{Peer, Wanted, flows_of, version_line};

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
        version_line(&self.program, "--version", "")
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
