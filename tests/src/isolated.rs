//! Namespaces of a test's own: nothing that it does to network or mounts is seen by anybody else.
//!
//! Owns: one thread in a fresh network and mount namespace with a BPF file system of its own, and a second network
//! namespace at the other end of a veth pair for clients that are not local. Processes that the test starts live
//! there, too. Everything goes with the last thread and socket in it.
//! Must never: touch a namespace that it did not make. What is not namespaced (programs on the root cgroup, the cgroup
//! tree) tests must tell apart by ids or port numbers.
//!
//! Facts it rests on: namespaces belong to threads and are inherited by threads and processes (unshare(2), setns(2)).

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd as _};
use std::panic::resume_unwind;
use std::process::Command;
use std::thread;

use anyhow::{Context, Result, ensure};
use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space};

/// This side of [`Remote`].
pub const NEAR: &str = "10.99.0.1";
/// The other side of [`Remote`].
pub const FAR: &str = "10.99.0.2";

/// Runs `test` in a thread with namespaces of its own.
///
/// # Errors
/// Not root, or the test's.
///
/// # Panics
/// When `test` does.
pub fn isolated<T: Send>(test: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    ensure!(rustix::process::geteuid().is_root(), "ring 2 needs root: run cargo xtask test as root");
    in_thread(|| {
        unshare(UnshareFlags::NEWNET | UnshareFlags::NEWNS)?;
        let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
        mount_change("/", private).context("make the mounts private")?;
        mount("bpf", "/sys/fs/bpf", "bpf", MountFlags::empty(), None).context("mount a BPF file system")?;
        loopback_up()?;
        test()
    })
}

/// Runs `work` in a thread that has entered the network namespace `netns`. Sockets that it makes stay there.
///
/// # Errors
/// The namespace cannot be entered.
///
/// # Panics
/// When `work` does.
pub fn in_netns<T: Send>(netns: impl AsFd + Sync, work: impl FnOnce() -> T + Send) -> Result<T> {
    in_thread(|| {
        move_into_link_name_space(netns.as_fd(), Some(LinkNameSpaceType::Network))
            .context("enter the network namespace")?;
        Ok(work())
    })
}

/// A fresh network namespace in which the loopback is up. It lives as long as the file.
///
/// # Errors
/// Not root, or `ip` is not there.
pub fn new_netns() -> Result<File> {
    in_thread(|| {
        unshare(UnshareFlags::NEWNET)?;
        loopback_up()?;
        File::open("/proc/thread-self/ns/net").context("open the new network namespace")
    })
}

/// A second network namespace, a cable away: [`NEAR`] is here, [`FAR`] is there.
#[derive(Debug)]
pub struct Remote {
    netns: File,
}

impl Remote {
    /// Makes it, beside the namespace of this thread.
    ///
    /// # Errors
    /// The kernel has no veth, or `ip` is not there.
    pub fn connected() -> Result<Self> {
        let remote = Self { netns: new_netns()? };
        let there = format!("/proc/{}/fd/{}", std::process::id(), remote.netns.as_raw_fd());
        ip(&["link", "add", "near", "type", "veth", "peer", "name", "far", "netns", &there])?;
        plug_in("near", NEAR)?;
        remote.inside(|| plug_in("far", FAR))??;
        Ok(remote)
    }

    /// Runs `work` there. Sockets that it makes stay there.
    ///
    /// # Errors
    /// The namespace cannot be entered.
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        in_netns(&self.netns, work)
    }
}

fn in_thread<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    thread::scope(|scope| scope.spawn(work).join()).unwrap_or_else(|panic| resume_unwind(panic))
}

#[expect(deprecated, reason = "what makes it unsound is UnshareFlags::FILES, which is not used here")]
fn unshare(flags: UnshareFlags) -> Result<()> {
    rustix::thread::unshare(flags).context("make namespaces")
}

fn plug_in(link: &str, address: &str) -> Result<()> {
    ip(&["address", "add", &format!("{address}/24"), "dev", link])?;
    ip(&["link", "set", link, "up"])
}

fn loopback_up() -> Result<()> {
    ip(&["link", "set", "lo", "up"])
}

fn ip(arguments: &[&str]) -> Result<()> {
    let status = Command::new("ip").args(arguments).status().context("run ip (package iproute2)")?;
    ensure!(status.success(), "ip {}: {status}", arguments.join(" "));
    Ok(())
}
