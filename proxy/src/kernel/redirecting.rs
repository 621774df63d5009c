//! Whether the kernel moves the bytes of flows that come to drowse, and why not.
//!
//! PURE but for lines of log. Owns: the words. Must never: load or attach anything.

use tracing::{info, warn};

use crate::config::{PlaneChoice, RunArgs};
use crate::plane::choose::{self, ListenerFacts, Redirection};

/// How far it is.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Stage {
    /// The proxy is to move the bytes.
    Unwanted,
    /// Not tried yet.
    Wanted(Redirection),
    /// The plane has it.
    Used(Redirection),
    /// It is not possible.
    Refused(String),
}

/// See the module.
#[derive(Debug)]
pub(super) struct Redirecting {
    stage: Stage,
    /// It was asked for by name: that it is not possible is worth a warning.
    warns: bool,
}

impl Redirecting {
    /// Nothing is tried yet.
    pub(super) fn new(run: &RunArgs, listeners: &[ListenerFacts]) -> Self {
        let stage = match choose::redirection(run, listeners) {
            Ok(None) => Stage::Unwanted,
            Ok(Some(redirection)) => Stage::Wanted(redirection),
            Err(reason) => Stage::Refused(reason),
        };
        Self { stage, warns: matches!(run.plane, PlaneChoice::Sockmap | PlaneChoice::SockmapEnds) }
    }

    /// The way that is wanted, and is not known to be impossible.
    pub(super) fn wanted(&self) -> Option<Redirection> {
        match self.stage {
            Stage::Wanted(redirection) | Stage::Used(redirection) => Some(redirection),
            Stage::Unwanted | Stage::Refused(_) => None,
        }
    }

    /// The plane `name` moves flows by the kernel from now on.
    pub(super) fn used(&mut self, name: &str) {
        let Stage::Wanted(redirection) = self.stage else { return };
        info!("the kernel moves the bytes of flows that come to drowse ({name})");
        self.stage = Stage::Used(redirection);
    }

    /// It is not possible, for this `reason`, which may be in the log already.
    pub(super) fn refused(&mut self, reason: String, is_told: bool) {
        if self.wanted().is_none() {
            return;
        }
        if !self.warns && !is_told {
            info!("flows that come to drowse are moved by splice, not by sockmap: {reason}");
        }
        self.stage = Stage::Refused(reason);
        self.tell_contradiction();
    }

    /// A warning, if what was asked for by name is not possible.
    pub(super) fn tell_contradiction(&self) {
        if let Stage::Refused(reason) = &self.stage
            && self.warns
        {
            warn!("flows are moved by splice, not by sockmap: {reason}");
        }
    }

    /// Why flows are not moved as they should be; `None`: they are.
    pub(super) fn obstacle(&self) -> Option<String> {
        match &self.stage {
            Stage::Unwanted | Stage::Used(_) => None,
            Stage::Wanted(wanted) => {
                Some(format!("{} once the backend was started or found to run", wanted.word()))
            }
            Stage::Refused(reason) => Some(format!("no sockmap: {reason}")),
        }
    }
}
