//! drowse itself, treated as every other peer.

use std::path::PathBuf;

use anyhow::Result;

use super::{Peer, Wanted, flows_of, version_line};

/// drowse with one of its planes, as a plain proxy that starts and stops nothing.
#[derive(Debug)]
pub struct Drowse {
    /// The program under test.
    pub program: PathBuf,
    /// The plane it is told to use.
    pub plane: Plane,
    /// More options of drowse, which make this a variant with a name of its own.
    pub variant: Vec<String>,
}

/// The planes that can be measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Plane {
    /// New connections are the backend's own; drowse only counts them.
    Handoff,
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
            Self::Handoff => "handoff",
            Self::Splice => "splice",
            Self::Copy => "copy",
        }
    }
}

impl Peer for Drowse {
    fn name(&self) -> &'static str {
        match (self.plane, self.variant.is_empty()) {
            (Plane::Handoff, true) => "drowse-handoff",
            (Plane::Handoff, false) => "drowse-handoff-variant",
            (Plane::Splice, true) => "drowse-splice",
            (Plane::Splice, false) => "drowse-splice-variant",
            (Plane::Copy, true) => "drowse-copy",
            (Plane::Copy, false) => "drowse-copy-variant",
        }
    }

    fn version(&self) -> Result<String> {
        version_line(&self.program, "--version", "")
    }

    /// Two sockets for each flow; pipes belong to flows that move bytes. A flow that was handed off is one socket of
    /// the backend, as without a proxy.
    fn flows_max(&self, files_max: u64) -> usize {
        flows_of(files_max, if self.hands_off() { 1 } else { 2 })
    }

    /// Hand-off refuses to be limited, since it does not see the connections. It pins what it counts under its name,
    /// which no other instance on this machine may have.
    fn command_line(&self, wanted: &Wanted<'_>) -> Vec<String> {
        let own = if self.hands_off() {
            format!("--name=drowse-bench-{}-{}", std::process::id(), wanted.backend.port())
        } else {
            format!("--connections-max={}", wanted.flows + 1)
        };
        let mut line = vec![
            self.program.display().to_string(),
            "run".to_owned(),
            format!("--backend={}", wanted.backend),
            format!("--plane={}", self.plane.option()),
            own,
        ];
        line.extend_from_slice(&self.variant);
        line
    }

    fn hands_off(&self) -> bool {
        self.plane == Plane::Handoff
    }
}
