//! nginx as a stream proxy.
//!
//! A master with workers, which a killed master would leave behind: it runs in a PID namespace of its own. It takes
//! listening sockets over from the descriptors that the variable `NGINX` lists, as when it replaces itself, and
//! expects them to be non-blocking.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::{OWN_FILES_MAX, Peer, Started, Wanted, configured, flows_of, installed, version_of};
use crate::cases::Unavailable;
use crate::cpus::started_on;
use crate::process::{Running, socket_activated_family};

const TEMPLATE: &str = include_str!("../../peers/nginx.conf");
const CONFIGURATION: &str = "nginx.conf";
/// Where distributions put the module.
const MODULES: [&str; 2] =
    ["/usr/lib/nginx/modules/ngx_stream_module.so", "/usr/lib64/nginx/modules/ngx_stream_module.so"];
/// Connections that its configuration allows beside those of the case's flows.
const MORE_CONNECTIONS: usize = 100;

/// nginx, with `bench/peers/nginx.conf`.
#[derive(Debug)]
pub struct Nginx;

impl Peer for Nginx {
    fn name(&self) -> &'static str {
        "nginx"
    }

    fn version(&self) -> Result<String> {
        version_of("nginx", "-v", "nginx")
    }

    /// Two sockets for each flow.
    fn flows_max(&self, files_max: u64) -> usize {
        flows_of(files_max.saturating_sub(OWN_FILES_MAX), 2)
    }

    fn command_line(&self, _wanted: &Wanted<'_>) -> Vec<String> {
        ["nginx", "-p", ".", "-e", "stderr", "-c", CONFIGURATION].map(str::to_owned).to_vec()
    }

    fn configuration(&self) -> Option<String> {
        Some(TEMPLATE.to_owned())
    }

    fn start(&self, wanted: &Wanted<'_>) -> Result<Started> {
        let module = MODULES.iter().map(PathBuf::from).find(|file| file.is_file());
        let (Some(program), Some(module)) = (installed("nginx"), module) else {
            bail!(Unavailable(
                "nginx with its stream module is not installed; `cargo xtask bench` as root installs it"
            ));
        };
        let (listener, address) = wanted.listener()?;
        listener.set_nonblocking(true).context("make the listener non-blocking")?;
        let directory = configured(CONFIGURATION, &rendered(wanted, address, &module))?;
        let mut command = socket_activated_family(program, listener);
        command.args(self.command_line(wanted).iter().skip(1));
        command.current_dir(&directory).env("NGINX", "3;");
        let process = started_on(&wanted.layout.proxy, || Running::start_family(self.name(), command))?;
        Ok(Started { address, process: Some(process), directory: Some(directory) })
    }
}

pub(super) fn rendered(wanted: &Wanted<'_>, listen: SocketAddr, module: &Path) -> String {
    wanted
        .fill(TEMPLATE)
        .replace("@CONNECTIONS@", &(2 * wanted.flows + MORE_CONNECTIONS).to_string())
        .replace("@LISTEN@", &listen.to_string())
        .replace("@MODULE@", &module.display().to_string())
}
