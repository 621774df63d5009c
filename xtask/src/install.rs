//! `cargo xtask install`: what building and testing need beyond Rust itself, as far as it is missing.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, bail};

use crate::build_ebpf::DEBIAN_PACKAGES;
use crate::{process, say};

/// A Debian package, and a program or file of it that shows whether it is there.
const PACKAGES: [(&str, &str); 10] = [
    ("bpftool", "bpftool"),
    ("curl", "curl"),
    ("dbus", "dbus-daemon"),
    ("dbus-user-session", "/usr/lib/systemd/user/dbus.socket"),
    ("iproute2", "ip"),
    ("python3", "python3"),
    ("systemd", "systemctl"),
    ("util-linux", "setpriv"),
    ("gcc", "cc"),
    ("libc6-dev", "/usr/include/stdio.h"),
];

/// Tools from crates.io: package, version, program.
const CARGO_TOOLS: [(&str, &str, &str); 2] =
    [("cargo-nextest", "0.9.143", "cargo-nextest"), ("cargo-deny", "0.20.2", "cargo-deny")];

/// Installs what is missing.
pub fn run() -> anyhow::Result<()> {
    let packages = missing_packages()?;
    if packages.is_empty() {
        say("all Debian packages are there");
    } else if can_install() {
        debian_packages(&packages)?;
    } else {
        bail!(
            "packages are missing; on Debian, as root: `apt-get update` and `apt-get install {}`",
            packages.join(" ")
        );
    }
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

/// Installs `packages` with apt-get.
pub fn debian_packages(packages: &[&str]) -> anyhow::Result<()> {
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
