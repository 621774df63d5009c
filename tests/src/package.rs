//! A booted systemd on which the Debian package can be installed, as on a machine of its own.
//!
//! Owns: dpkg's database there, a copy of the host's. Must never: put anything in its place that the package brings.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

use crate::service::{Installation, with_journal};
use crate::systemd::{Options, Systemd};
use crate::workspace;

/// Where the package is inside.
pub const PACKAGE: &str = "/root/drowse.deb";
/// Where the tarball is inside.
pub const TARBALL: &str = "/root/drowse.tar.gz";
const DATABASE: &str = "/var/lib/dpkg";

/// Boots a system that has `echo-backend`, the package at [`PACKAGE`] and the tarball at [`TARBALL`], neither of them
/// installed; runs `test`, and adds the journal to its error.
///
/// # Errors
/// The boot's, or the test's, or there is no package.
pub fn with_package(echo_backend: &str, test: impl FnOnce(&Installation) -> Result<()>) -> Result<()> {
    let (package, tarball) = (made("deb")?, made("gz")?);
    let systemd = Systemd::boot_with(&Options::new().bind(echo_backend, "/usr/bin/echo-backend"))?;
    // The boot makes it for tests that install by hand.
    fs::remove_dir(systemd.path("/etc/drowse")).context("remove /etc/drowse")?;
    copy_database(&systemd)?;
    systemd.install(package, PACKAGE)?;
    systemd.install(tarball, TARBALL)?;
    with_journal(&Installation { systemd }, test)
}

/// The package (`deb`) or tarball (`gz`) that `cargo xtask dist` made.
///
/// # Errors
/// There is none, or more than one.
pub fn made(end: &str) -> Result<PathBuf> {
    let dist = workspace().join("target/dist");
    let entries = fs::read_dir(&dist).into_iter().flatten().flatten().map(|entry| entry.path());
    let made: Vec<_> = entries.filter(|path| path.extension().is_some_and(|found| found == end)).collect();
    match made.as_slice() {
        [file] => Ok(file.clone()),
        found => bail!("one .{end} is needed in {}, not {found:?}: run cargo xtask dist", dist.display()),
    }
}

/// Where the system has its `/usr` from, as [`Options::new`] chooses it.
#[must_use]
pub fn tree() -> PathBuf {
    std::env::var_os("DROWSE_TEST_TREE").map_or_else(|| PathBuf::from("/"), PathBuf::from)
}

/// Gives the system the state of its own `/usr`: which packages are installed, and which files are whose.
fn copy_database(systemd: &Systemd) -> Result<()> {
    let database = tree().join(DATABASE.trim_start_matches('/'));
    let copy = |name: &Path| systemd.install(database.join(name), &format!("{DATABASE}/{}", name.display()));
    copy(Path::new("status"))?;
    let lists = fs::read_dir(database.join("info")).context("read dpkg's lists of files")?;
    let mut copied = 0;
    for list in lists {
        let name = list.context("read dpkg's lists of files")?.file_name();
        if Path::new(&name).extension().is_some_and(|end| end == "list") || name == "format" {
            copy(&Path::new("info").join(name))?;
            copied += 1;
        }
    }
    ensure!(copied > 1, "{} has no lists of files", database.display());
    fs::create_dir(systemd.path(&format!("{DATABASE}/updates"))).context("make dpkg's journal")
}
