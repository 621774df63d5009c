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
        version_line(&self.program, "--version", "")
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
