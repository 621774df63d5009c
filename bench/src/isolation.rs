//! A network of the benchmark's own.
//!
//! Owns: entering a fresh network namespace and its settings. Must never: change a setting of the host's network.
//! In a fresh network namespace only `lo` exists, down, and `net.ipv4.tcp_congestion_control` is the namespace's own.
//! Pacing congestion controls (bbr) throttle even the loopback, which hides the proxy behind the pacing.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::process::CommandExt;
use std::process::Command;

use anyhow::{Context, Result, bail};

const CONGESTION_CONTROL: &str = "/proc/sys/net/ipv4/tcp_congestion_control";

/// Where the traffic of this run flows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Network {
    /// A network namespace made for this run.
    Namespace,
    /// A network namespace made for this run inside a user namespace, without root.
    UserNamespace,
    /// The host's loopback, with the host's settings.
    Host,
}

impl Network {
    /// The options of `unshare` for this network; none for the host's.
    fn unshare_options(self) -> &'static [&'static str] {
        match self {
            Self::Namespace => &["--net"],
            Self::UserNamespace => &["--user", "--map-root-user", "--net"],
            Self::Host => &[],
        }
    }
}

/// Starts this program again, with the same arguments and `option NETWORK`, in the most private network to be had.
/// Returns only when it cannot.
///
/// # Errors
/// When this program cannot be started again.
pub fn start_again_isolated(option: &str) -> Result<std::convert::Infallible> {
    let program = std::env::current_exe().context("find this program")?;
    let network = [Network::Namespace, Network::UserNamespace]
        .into_iter()
        .find(|network| allowed(*network))
        .unwrap_or(Network::Host);
    let value = format!("{option}={}", name(network)?);
    let arguments = std::env::args_os().skip(1);
    let mut command = if network == Network::Host {
        Command::new(&program)
    } else {
        let mut unshare = Command::new("unshare");
        unshare.args(network.unshare_options()).arg("--").arg(&program);
        unshare
    };
    Err(command.arg(OsStr::new(&value)).args(arguments).exec()).context("start again in a network namespace")
}

/// Prepares the network that this program was started again in, and returns its congestion control.
///
/// # Errors
/// When the loopback cannot be brought up or the congestion control cannot be set or read.
pub fn prepare(network: Network) -> Result<String> {
    if network != Network::Host {
        let up = Command::new("ip").args(["link", "set", "lo", "up"]).status();
        match up {
            Ok(status) if status.success() => {}
            Ok(status) => {
                bail!("bring up the loopback of the namespace: `ip link set lo up` failed, {status}")
            }
            Err(err) => {
                bail!("bring up the loopback of the namespace: cannot run `ip` ({err}); install iproute2")
            }
        }
        fs::write(CONGESTION_CONTROL, "reno").context("set reno as the namespace's congestion control")?;
    }
    let name = fs::read_to_string(CONGESTION_CONTROL).context("read the congestion control")?;
    Ok(name.trim().to_owned())
}

/// Whether the kernel lets this user make such a namespace.
fn allowed(network: Network) -> bool {
    Command::new("unshare")
        .args(network.unshare_options())
        .args(["--", "true"])
        .stderr(std::process::Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

fn name(network: Network) -> Result<String> {
    let value = clap::ValueEnum::to_possible_value(&network).context("name the network")?;
    Ok(value.get_name().to_owned())
}
