//! `cargo xtask lint`: formatting, lints of user space and eBPF code, licences and duplicate versions.

use std::process::Command;

use crate::{process, say};

/// Runs every check that needs no test.
pub fn run() -> anyhow::Result<()> {
    say("formatting");
    process::run(Command::new("cargo").args(["fmt", "--all", "--check"]))?;
    say("lints of everything, the eBPF programs included");
    let clippy = ["clippy", "--quiet", "--workspace", "--all-targets", "--features", "drowse-ebpf/programs"];
    process::run(Command::new("cargo").args(clippy).args(["--", "-D", "warnings"]))?;
    say("licences, sources and duplicate versions");
    process::run(Command::new("cargo").args([
        "deny",
        "--log-level",
        "error",
        "check",
        "licenses",
        "bans",
        "sources",
    ]))
}
