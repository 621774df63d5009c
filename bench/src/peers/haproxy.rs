//! The proxy `haproxy` in TCP mode with splice.
//!
//! One process with threads, so what ends the process ends all of it.

use anyhow::{Result, bail};

use super::{OWN_FILES_MAX, Peer, Started, Wanted, configured, flows_of, installed, version_of};
use crate::cases::Unavailable;
use crate::cpus::started_on;
use crate::process::{Running, socket_activated};

const TEMPLATE: &str = include_str!("../../peers/haproxy.cfg");
const CONFIGURATION: &str = "haproxy.cfg";
/// `maxpipes` of the template.
const PIPES_MAX: u64 = 512;
/// Connections that its configuration allows beside those that a case opens, for those that still close.
const MORE_CONNECTIONS: usize = 50;

/// The proxy `haproxy`, with `bench/peers/haproxy.cfg`.
#[derive(Debug)]
pub struct Haproxy;

impl Peer for Haproxy {
    fn name(&self) -> &'static str {
        "haproxy"
    }

    fn version(&self) -> Result<String> {
        version_of("haproxy", "-v", "HAProxy")
    }

    /// Two sockets for each flow, and two files for each pipe; it does not start when its limits need more.
    fn flows_max(&self, files_max: u64) -> usize {
        let other = 2 * PIPES_MAX + OWN_FILES_MAX;
        flows_of(files_max.saturating_sub(other), 2).saturating_sub(MORE_CONNECTIONS)
    }

    fn command_line(&self, _wanted: &Wanted<'_>) -> Vec<String> {
        ["haproxy", "-db", "-f", CONFIGURATION].map(str::to_owned).to_vec()
    }

    fn configuration(&self) -> Option<String> {
        Some(TEMPLATE.to_owned())
    }

    fn start(&self, wanted: &Wanted<'_>) -> Result<Started> {
        let Some(program) = installed("haproxy") else {
            bail!(Unavailable("HAProxy is not installed; `cargo xtask bench` as root installs it"));
        };
        let directory = configured(CONFIGURATION, &rendered(wanted))?;
        let (listener, address) = wanted.listener()?;
        let mut command = socket_activated(program, listener);
        command.args(self.command_line(wanted).iter().skip(1)).current_dir(&directory);
        let process = started_on(&wanted.layout.proxy, || Running::start(self.name(), command))?;
        Ok(Started { address, process: Some(process), directory: Some(directory) })
    }
}

pub(super) fn rendered(wanted: &Wanted<'_>) -> String {
    wanted.fill(TEMPLATE).replace("@CONNECTIONS@", &(wanted.flows + MORE_CONNECTIONS).to_string())
}
