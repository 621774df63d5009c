//! A network of the benchmark's own, and a BPF file system.
//!
//! Owns: entering a fresh network namespace and its settings. Must never: change a setting of the host's network, or leave
//! a pin behind: hand-off needs a BPF file system, and not every machine has one mounted.
//! In a fresh network namespace only `lo` exists, down, and `net.ipv4.tcp_congestion_control` is the namespace's own.
//! Pacing congestion controls (bbr) throttle even the loopback, which hides the proxy behind the pacing.
//! A socket belongs to the network namespace of the thread that made it (`network_namespaces(7)`), so a remote client
//! is a thread in a second namespace, behind a veth pair (`veth(4)`). 198.18.0.0/15 is set aside for benchmarks
//! (RFC 2544).

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::net::Ipv4Addr;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustix::mount::{MountFlags, mount};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::process::{self, Running, readable_within};

/// How long a second namespace may take.
const MADE_WITHIN: Duration = Duration::from_secs(10);
const CONGESTION_CONTROL: &str = "/proc/sys/net/ipv4/tcp_congestion_control";

/// Where the traffic of this run flows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Network {
    /// A network namespace made for this run, with a mount namespace.
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
            Self::Namespace => &["--net", "--mount"],
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
/// When the loopback cannot be brought up, the congestion control cannot be set or read, or a BPF file system cannot be
/// mounted.
pub fn prepare(network: Network) -> Result<String> {
    if network == Network::Namespace {
        mount("bpf", "/sys/fs/bpf", "bpf", MountFlags::empty(), None).context("mount a BPF file system")?;
    }
    prepare_loopback(network)
}

fn prepare_loopback(network: Network) -> Result<String> {
    if network != Network::Host {
        ip(&["link", "set", "lo", "up"]).context("bring up the loopback of the namespace")?;
        fs::write(CONGESTION_CONTROL, "reno").context("set reno as the namespace's congestion control")?;
    }
    let name = fs::read_to_string(CONGESTION_CONTROL).context("read the congestion control")?;
    Ok(name.trim().to_owned())
}

/// The other side of a pair of network devices, in a network namespace of its own, which lasts as long as this value.
#[derive(Debug)]
pub struct Remote {
    namespace: File,
}

impl Remote {
    /// Where a proxy listens for remote clients.
    pub const PROXY: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 1);
    /// Where remote clients come from.
    pub const CLIENT: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 2);

    /// Makes the namespace, and the pair that joins it to the one that [`prepare`] prepared.
    ///
    /// # Errors
    /// When one of them cannot be made; the host's own network is left alone.
    pub fn new(network: Network) -> Result<Self> {
        ensure!(network != Network::Host, "the host's network stays as it is");
        let mut holder = process::command("unshare");
        // The namespace lives as long as a process in it, or an open file, keeps it; the answer tells that it is there.
        holder.args(["--net", "--", "sh", "-c", "echo made; read end"]);
        holder.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut holder = Running::start("a second network namespace", holder)?;
        let stdout = holder.take_stdout().context("read the second namespace's stdout")?;
        ensure!(readable_within(&stdout, MADE_WITHIN)?, "the second namespace takes too long");
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line).context("wait for the second namespace")?;
        ensure!(line == "made\n", "{}", holder.last_words());
        let path = format!("/proc/{}/ns/net", holder.pid());
        let remote = Self { namespace: File::open(path).context("open the second namespace")? };
        let (near, far, pid) = ("drowse-near", "drowse-far", holder.pid().to_string());
        ip(&["link", "add", near, "type", "veth", "peer", "name", far, "netns", &pid])?;
        set_up(near, Self::PROXY)?;
        remote.run(|| {
            prepare_loopback(network)?;
            set_up(far, Self::CLIENT)
        })?;
        Ok(remote)
    }

    /// Runs `act` on a thread of the remote side: sockets that it, or a thread that it starts, makes are there.
    ///
    /// # Errors
    /// When the thread cannot go there, or those of `act`.
    pub fn run<T: Send>(&self, act: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        thread::scope(|scope| {
            let there = scope.spawn(|| {
                move_into_link_name_space(self.namespace.as_fd(), Some(LinkNameSpaceType::Network))
                    .context("enter the second network namespace")?;
                act()
            });
            there.join().unwrap_or_else(|_| bail!("the remote client panicked"))
        })
    }
}

fn set_up(device: &str, address: Ipv4Addr) -> Result<()> {
    ip(&["address", "add", &format!("{address}/30"), "dev", device])?;
    ip(&["link", "set", device, "up"])
}

fn ip(arguments: &[&str]) -> Result<()> {
    let output = Command::new("ip").args(arguments).output();
    let output = output.context("cannot run `ip`; install iproute2")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "`ip {}` failed: {}", arguments.join(" "), said.trim());
    Ok(())
}

/// Whether the kernel lets this user make such a namespace.
fn allowed(network: Network) -> bool {
    Command::new("unshare")
        .args(network.unshare_options())
        .args(["--", "true"])
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

fn name(network: Network) -> Result<String> {
    let value = clap::ValueEnum::to_possible_value(&network).context("name the network")?;
    Ok(value.get_name().to_owned())
}
