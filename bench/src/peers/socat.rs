//! socat: a process for each flow.
//!
//! Debian's socat cannot take a listening socket over, so it opens one, and its start is waited for. Its processes
//! would outlive a killed parent: it runs in a PID namespace of its own.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Result, bail};

use super::{BACKLOG, Peer, Started, Wanted, installed, version_of};
use crate::cases::Unavailable;
use crate::cpus::started_on;
use crate::process::{Running, family};

/// Flows, and so processes, at most: with more, a benchmark measures the scheduler.
const FLOWS_MAX: usize = 256;
/// How long it may take until it listens.
const LISTEN_WITHIN: Duration = Duration::from_secs(10);

/// socat, told to fork.
#[derive(Debug)]
pub struct Socat;

impl Socat {
    fn line(wanted: &Wanted<'_>, listen: SocketAddr) -> Vec<String> {
        let (ip, port) = (listen.ip(), listen.port());
        vec![
            "socat".to_owned(),
            "-b131072".to_owned(),
            format!("TCP4-LISTEN:{port},bind={ip},fork,reuseaddr,backlog={BACKLOG},nodelay"),
            format!("TCP4:{},nodelay", wanted.backend),
        ]
    }
}

impl Peer for Socat {
    fn name(&self) -> &'static str {
        "socat"
    }

    fn version(&self) -> Result<String> {
        version_of("socat", "-V", "socat version")
    }

    fn flows_max(&self, _files_max: u64) -> usize {
        FLOWS_MAX
    }

    fn command_line(&self, wanted: &Wanted<'_>) -> Vec<String> {
        Self::line(wanted, SocketAddr::new(wanted.listen, 80))
    }

    fn has_process_for_each_flow(&self) -> bool {
        true
    }

    fn start(&self, wanted: &Wanted<'_>) -> Result<Started> {
        let Some(program) = installed("socat") else {
            bail!(Unavailable("socat is not installed; `cargo xtask bench` as root installs it"));
        };
        // Its port is free again when the listener is dropped at once.
        let (_, address) = wanted.listener()?;
        let mut command = family(program);
        command.args(Self::line(wanted, address).iter().skip(1));
        let mut process = started_on(&wanted.layout.proxy, || Running::start_family(self.name(), command))?;
        process.wait_for_port(address, LISTEN_WITHIN)?;
        Ok(Started { address, process: Some(process), directory: None })
    }
}
