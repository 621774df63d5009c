//! drowse itself, treated as every other peer.

use std::path::PathBuf;

use anyhow::{Context, Result};

use super::{Peer, Started, Wanted, flows_of, start_activated, version_line};

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
    /// Programs of the kernel move the bytes between drowse's own two sockets.
    Sockmap,
    /// The same, from the sockets of client and backend themselves.
    SockmapEnds,
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
            Self::Sockmap => "sockmap",
            Self::SockmapEnds => "sockmap-ends",
            Self::Splice => "splice",
            Self::Copy => "copy",
        }
    }

    /// The name in reports, and that of a variant.
    fn names(self) -> [&'static str; 2] {
        match self {
            Self::Handoff => ["drowse-handoff", "drowse-handoff-variant"],
            Self::Sockmap => ["drowse-sockmap", "drowse-sockmap-variant"],
            Self::SockmapEnds => ["drowse-sockmap-ends", "drowse-sockmap-ends-variant"],
            Self::Splice => ["drowse-splice", "drowse-splice-variant"],
            Self::Copy => ["drowse-copy", "drowse-copy-variant"],
        }
    }

    /// Whether drowse must load eBPF programs for it.
    fn needs_ebpf(self) -> bool {
        matches!(self, Self::Handoff | Self::Sockmap | Self::SockmapEnds)
    }

    /// How often drowse may wake up for each request over a flow that this plane carries, at most; none where it must
    /// wake up to move bytes: about once, or twice with the answer.
    #[must_use]
    pub fn wakes_max(self) -> Option<f64> {
        match self {
            Self::Sockmap | Self::SockmapEnds => Some(0.1),
            Self::Handoff | Self::Splice | Self::Copy => None,
        }
    }
}

impl Peer for Drowse {
    fn name(&self) -> &'static str {
        let [plain, variant] = self.plane.names();
        if self.variant.is_empty() { plain } else { variant }
    }

    fn version(&self) -> Result<String> {
        version_line(&self.program, "--version", "")
    }

    /// Two sockets for each flow; pipes belong to flows that move bytes. A flow that was handed off is one socket of
    /// the backend, as without a proxy.
    fn flows_max(&self, files_max: u64) -> usize {
        flows_of(files_max, if self.hands_off() { 1 } else { 2 })
    }

    /// A plane of the kernel pins what it counts under its name, which no other instance on this machine may have.
    /// Hand-off refuses to be limited, since it does not see the connections.
    fn command_line(&self, wanted: &Wanted<'_>) -> Vec<String> {
        let name = || format!("--name=drowse-bench-{}-{}", std::process::id(), wanted.backend.port());
        let mut line = vec![
            self.program.display().to_string(),
            "run".to_owned(),
            format!("--backend={}", wanted.backend),
            format!("--plane={}", self.plane.option()),
        ];
        line.extend(self.needs_ebpf().then(name));
        line.extend((!self.hands_off()).then(|| format!("--connections-max={}", wanted.flows + 1)));
        line.extend_from_slice(&self.variant);
        line
    }

    fn hands_off(&self) -> bool {
        self.plane == Plane::Handoff
    }

    fn needs_ebpf(&self) -> bool {
        self.plane.needs_ebpf()
    }

    fn forwards_by(&self) -> Option<Plane> {
        (!self.hands_off()).then_some(self.plane)
    }

    /// Its status socket is where nobody else's is.
    fn start(&self, wanted: &Wanted<'_>) -> Result<Started> {
        let directory = tempfile::tempdir().context("make a directory for drowse's status socket")?;
        let started = start_activated(self, wanted, |command| {
            command.env("DROWSE_RUNTIME_DIR", directory.path());
        })?;
        Ok(Started { directory: Some(directory), ..started })
    }
}
