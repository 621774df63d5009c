//! `cargo xtask install`: what building and testing need beyond Rust itself, as far as it is missing.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, bail};

use crate::build_ebpf::DEBIAN_PACKAGES;
use crate::{process, say};

/// A Debian package, and a program or file of it that shows whether it is there.
const PACKAGES: [(&str, &str); 13] = [
    ("bpftool", "bpftool"),
    ("curl", "curl"),
    ("dbus", "dbus-daemon"),
    ("dbus-user-session", "/usr/lib/systemd/user/dbus.socket"),
    ("iproute2", "ip"),
    ("man-db", "man"),
    ("polkitd", "/usr/lib/polkit-1/polkitd"),
    ("prometheus", "promtool"),
    ("python3", "/usr/bin/python3"),
    ("systemd", "systemctl"),
    ("util-linux", "setpriv"),
    ("gcc", "cc"),
    ("libc6-dev", "/usr/include/stdio.h"),
];

/// The peers of `cargo xtask bench`: name there, Debian package, and a program or file that shows whether it is there.
const PEERS: [(&str, &str, &str); 4] = [
    ("haproxy", "haproxy", "haproxy"),
    ("nginx", "nginx", "nginx"),
    ("nginx", "libnginx-mod-stream", "/usr/lib/nginx/modules/ngx_stream_module.so"),
    ("socat", "socat", "socat"),
];
/// Services that come with packages. We need the programs only.
const SERVICES: [&str; 3] = ["haproxy.service", "nginx.service", "prometheus.service"];

/// Tools that cargo installs: package, version, program.
const CARGO_TOOLS: [(&str, &str, &str); 2] =
    [("cargo-nextest", "0.9.143", "cargo-nextest"), ("cargo-deny", "0.20.2", "cargo-deny")];

/// Installs what is missing.
pub fn run() -> anyhow::Result<()> {
    let packages = missing_packages()?;
    let peer_packages = missing_peers(|_| true);
    if packages.is_empty() && peer_packages.is_empty() {
        say("all Debian packages are there");
    } else if !can_install() {
        bail!(
            "packages are missing; on Debian, as root: `apt-get update` and `apt-get install {}`",
            [packages, peer_packages].concat().join(" ")
        );
    }
    if !packages.is_empty() {
        debian_packages(&packages)?;
    }
    peers(|_| true)?;
    for (package, version, program) in CARGO_TOOLS {
        if process::find(program).is_some() {
            say(&format!("{package} is there"));
            continue;
        }
        say(&format!("installing {package} {version} with cargo"));
        let mut install = Command::new("cargo");
        process::run(install.args(["install", package, "--version", version, "--locked"]))?;
    }
    Ok(())
}

/// Installs the peers that are `wanted` by name and missing. Who may not is told of it: the
/// benchmark leaves out what is not there.
pub fn peers(wanted: impl Fn(&str) -> bool) -> anyhow::Result<()> {
    let packages = missing_peers(wanted);
    if packages.is_empty() {
        return Ok(());
    }
    if !can_install() {
        let packages = packages.join(" ");
        say(&format!("some peers are missing; on Debian, as root: `apt-get install {packages}`"));
        return Ok(());
    }
    debian_packages(&packages)
}

/// Packages of the peers that are `wanted` by name and not there.
fn missing_peers(wanted: impl Fn(&str) -> bool) -> Vec<&'static str> {
    let missing = PEERS.iter().filter(|(peer, _, program)| wanted(peer) && process::find(program).is_none());
    missing.map(|&(_, package, _)| package).collect()
}

/// The program of a Debian package, which is installed if it is missing and we may.
pub fn program(program: &str, package: &str) -> anyhow::Result<PathBuf> {
    if process::find(program).is_none() && can_install() {
        debian_packages(&[package])?;
    }
    process::find(program)
        .with_context(|| format!("{program} is missing; as root: apt-get install {package}"))
}

/// Whether we may install Debian packages: root, and there is an apt-get.
pub fn can_install() -> bool {
    rustix::process::geteuid().is_root() && process::find("apt-get").is_some()
}

/// Installs `packages`, without their services.
pub fn debian_packages(packages: &[&str]) -> anyhow::Result<()> {
    let comes_now = |service: &&str| packages.iter().any(|package| service.starts_with(package));
    let services: Vec<&str> = SERVICES.into_iter().filter(comes_now).collect();
    if services.is_empty() {
        return apt_get(packages);
    }
    let systemctl =
        |verb: &[&str]| process::run(Command::new("systemctl").args(verb).arg("--quiet").args(&services));
    // A masked service is not started when it is installed: nginx would take port 80.
    let has_systemd = Path::new("/run/systemd/system").exists();
    if has_systemd {
        systemctl(&["mask", "--runtime"])?;
    }
    let installed = apt_get(packages);
    if has_systemd {
        systemctl(&["unmask", "--runtime"])?;
    }
    installed?;
    systemctl(&["disable"])
}

fn apt_get(packages: &[&str]) -> anyhow::Result<()> {
    say(&format!("installing {}", packages.join(" ")));
    process::run(Command::new("apt-get").args(["update", "--quiet"]))?;
    let mut install = Command::new("apt-get");
    install.env("DEBIAN_FRONTEND", "noninteractive");
    install.args(["install", "--yes", "--quiet", "--no-install-recommends"]).args(packages);
    process::run(&mut install)
}

/// Debian packages whose program is not there. Rust for eBPF is one of them only if rustup does not provide it.
fn missing_packages() -> anyhow::Result<Vec<&'static str>> {
    let missing = PACKAGES.iter().filter(|(_, program)| process::find(program).is_none());
    let mut packages: Vec<_> = missing.map(|&(package, _)| package).collect();
    if !crate::build_ebpf::has_compiler()? {
        packages.extend(DEBIAN_PACKAGES);
    }
    Ok(packages)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::build_ebpf::BPF_LINKER;
    use crate::workspace;

    /// People decide by the README what they let into their machine.
    #[test]
    fn the_readme_names_everything_that_is_installed() {
        let readme = std::fs::read_to_string(workspace().join("README.md")).unwrap();
        let (_, rest) = readme.split_once("As root on Debian").unwrap();
        let (list, _) = rest.split_once("As anybody else").unwrap();
        let named: BTreeSet<&str> = list.split('`').skip(1).step_by(2).collect();
        let packages = PACKAGES.iter().map(|&(package, _)| package);
        let peers = PEERS.iter().map(|&(_, package, _)| package);
        let tools = CARGO_TOOLS.iter().map(|&(package, ..)| package);
        let installed: BTreeSet<&str> =
            packages.chain(peers).chain(DEBIAN_PACKAGES).chain(tools).chain([BPF_LINKER]).collect();
        assert_eq!(named, installed);
    }
}
