//! Fixtures of the tests that need more than one function.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};

pub mod deadline;
pub mod fake_systemd;
pub mod isolated;
pub mod markdown;
pub mod package;
pub mod pinned;
pub mod planes;
pub mod process;
pub mod random;
pub mod scrape;
pub mod service;
pub mod systemd;
pub mod whoami;

/// The program under test: `DROWSE_BIN`, or the `drowse` that was built into the same target directory as this test.
///
/// # Errors
/// It has not been built: `cargo test -p drowse-tests` alone does not build another package's program.
pub fn drowse_binary() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("DROWSE_BIN") {
        return PathBuf::from(path).canonicalize().context("find the program that DROWSE_BIN names");
    }
    let test = std::env::current_exe().context("find this test's own executable")?;
    // target/debug/deps/ring3_wake-0123456789abcdef -> target/debug/drowse
    let Some(path) = test.ancestors().nth(2).map(|profile| profile.join("drowse")) else {
        bail!("the test {} is in no target directory", test.display());
    };
    if !path.is_file() {
        bail!("{} has not been built: run cargo xtask test, or cargo build -p drowse", path.display());
    }
    Ok(path)
}

/// The directory of the workspace, where `units/` is.
#[must_use]
pub fn workspace() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}
