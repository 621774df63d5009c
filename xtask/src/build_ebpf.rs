//! `cargo xtask build-ebpf`: builds the eBPF object and puts it where `proxy/build.rs` looks for it.
//!
//! Stable Rust has no `core` for eBPF, so it takes one of two ways, whichever is there: a rustup nightly with
//! `rust-src`, which builds `core` itself, or Debian's compiler with its prebuilt `core`. Both link with bpf-linker,
//! which loads an LLVM library at run time.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, bail};

use crate::{install, process, say, workspace};

const TARGET: &str = "bpfel-unknown-none";

/// 0.11 and later want LLVM's development files.
pub const BPF_LINKER: &str = "bpf-linker";
const BPF_LINKER_VERSION: &str = "0.10.4";

/// The LLVM that this bpf-linker loads: the start of the file's name, and the name it asks for.
const LIBLLVM_START: &str = "libLLVM.so.22";
const LIBLLVM_NAME: &str = "libLLVM.so.22.1";

/// Debian's compiler, its cargo, and its `core` for eBPF. Debian installs them beside rustup's.
pub const DEBIAN_PACKAGES: [&str; 3] = ["rustc-web", "cargo-web", "libstd-rust-web-dev-bpf"];
const DEBIAN_RUSTC: &str = "/usr/bin/rustc";
const DEBIAN_CARGO: &str = "/usr/bin/cargo";

/// How to get a `core` for eBPF.
enum Way {
    /// rustup's nightly, which has the source of `core`.
    Nightly,
    /// Debian's packages.
    Debian,
}

/// Builds the object.
pub fn run() -> anyhow::Result<()> {
    let root = workspace();
    let tools = root.join("target/tools");
    let way = way()?;
    let linker = bpf_linker(&tools)?;
    let llvm = libllvm(&tools, &way)?;

    let target_dir = root.join("target/ebpf-build");
    let mut command = match way {
        Way::Nightly => {
            say("compiler: rustup's nightly, which builds `core` from rust-src");
            let mut command = Command::new("cargo");
            // Else the toolchain that runs xtask goes on down.
            command.env_remove("RUSTC").env_remove("CARGO").env("RUSTUP_TOOLCHAIN", "nightly");
            command.args(["build", "-Z", "build-std=core"]);
            command
        }
        Way::Debian => {
            say("compiler: Debian's, with its prebuilt `core` for eBPF");
            let mut command = Command::new(DEBIAN_CARGO);
            command.env("RUSTC", DEBIAN_RUSTC).env("RUSTC_BOOTSTRAP", "1").arg("build");
            command
        }
    };
    command
        .args(["--locked", "--release", "--package", "drowse-ebpf", "--bin", "drowse-ebpf"])
        .args(["--features", "programs", "--target", TARGET, "--target-dir"])
        .arg(&target_dir)
        .current_dir(&root)
        .env("CARGO_ENCODED_RUSTFLAGS", rustflags(&linker))
        .env_remove("RUSTC_WRAPPER")
        .env_remove("RUSTC_WORKSPACE_WRAPPER")
        .env("LD_LIBRARY_PATH", library_path(&llvm)?);
    process::run(&mut command)?;

    let built = target_dir.join(TARGET).join("release/drowse-ebpf");
    let object = root.join("target/ebpf/drowse.o");
    if copy_if_different(&built, &object)? {
        say(&format!("new object: {}", object.display()));
    } else {
        say(&format!("unchanged: {}", object.display()));
    }
    Ok(())
}

/// The first way that is there. If none is, root gets Debian's.
fn way() -> anyhow::Result<Way> {
    if has_nightly_with_source()? {
        return Ok(Way::Nightly);
    }
    if !has_debian_core()? && install::can_install() {
        install::debian_packages(&DEBIAN_PACKAGES)?;
    }
    if has_debian_core()? {
        return Ok(Way::Debian);
    }
    bail!(
        "no Rust compiler for eBPF here. Either `rustup toolchain install nightly --component rust-src`, or on Debian \
         (as root) `apt-get update` and `apt-get install {}`",
        DEBIAN_PACKAGES.join(" ")
    )
}

/// Whether one of the ways is there.
pub fn has_compiler() -> anyhow::Result<bool> {
    Ok(has_nightly_with_source()? || has_debian_core()?)
}

fn has_nightly_with_source() -> anyhow::Result<bool> {
    // Only rustup knows `+nightly`; it is asked for an installed one, so that it does not download any.
    let installed = process::output(Command::new("rustup").args(["toolchain", "list"]))?.unwrap_or_default();
    if !installed.lines().any(|toolchain| toolchain.starts_with("nightly-")) {
        return Ok(false);
    }
    let mut rustc = Command::new("rustup");
    let sysroot = process::output(rustc.args(["run", "nightly", "rustc", "--print", "sysroot"]))?;
    let source = "lib/rustlib/src/rust/library/core/Cargo.toml";
    Ok(sysroot.is_some_and(|sysroot| Path::new(&sysroot).join(source).is_file()))
}

fn has_debian_core() -> anyhow::Result<bool> {
    if !Path::new(DEBIAN_CARGO).is_file() {
        return Ok(false);
    }
    let mut rustc = Command::new(DEBIAN_RUSTC);
    let libraries = process::output(rustc.args(["--print", "target-libdir", "--target", TARGET]))?;
    Ok(libraries.is_some_and(|libraries| has_core(Path::new(&libraries))))
}

fn has_core(libraries: &Path) -> bool {
    fs::read_dir(libraries).is_ok_and(|entries| {
        entries.flatten().any(|entry| entry.file_name().to_string_lossy().starts_with("libcore-"))
    })
}

/// A bpf-linker of our version: the one on PATH, or our own, which is built if it is missing.
fn bpf_linker(tools: &Path) -> anyhow::Result<PathBuf> {
    let own = tools.join("bin").join(BPF_LINKER);
    for linker in process::find(BPF_LINKER).into_iter().chain([own.clone()]) {
        let version = process::output(Command::new(&linker).arg("--version"))?.unwrap_or_default();
        if version == format!("{BPF_LINKER} {BPF_LINKER_VERSION}") {
            say(&format!("linker: {}", linker.display()));
            return Ok(linker);
        }
    }
    say(&format!("installing {BPF_LINKER} {BPF_LINKER_VERSION} into {} (about a minute)", tools.display()));
    let mut install = Command::new("cargo");
    install.args(["install", BPF_LINKER, "--version", BPF_LINKER_VERSION, "--locked", "--root"]).arg(tools);
    process::run(&mut install)?;
    Ok(own)
}

/// A directory with the LLVM library under the name that bpf-linker looks for. A rustup toolchain has it under another
/// one, and beside it a linker script with a promising name (`libLLVM-22-rust-*.so`) that cannot be loaded. Debian's
/// compiler loads the library by this name, too, so with it the library has to be Debian's.
fn libllvm(tools: &Path, way: &Way) -> anyhow::Result<PathBuf> {
    let multiarch = format!("/usr/lib/{}-linux-gnu", std::env::consts::ARCH);
    let debian = [PathBuf::from(multiarch), "/usr/lib/llvm-22/lib".into()];
    let rustup = process::output(Command::new("rustc").args(["--print", "sysroot"]))?;
    let rustup = rustup.map(|sysroot| Path::new(&sysroot).join("lib"));
    let directories: Vec<PathBuf> = match way {
        Way::Nightly => rustup.into_iter().chain(debian).collect(),
        Way::Debian => debian.into(),
    };

    let Some(library) = directories.iter().find_map(|directory| find_library(directory)) else {
        bail!(
            "no {LIBLLVM_START}* for bpf-linker in {directories:?}: use Rust {} (`rustup toolchain install`), whose \
             LLVM it is, or on Debian (as root) `apt-get install {}`, which bring it along",
            env!("CARGO_PKG_RUST_VERSION"),
            DEBIAN_PACKAGES.join(" "),
        );
    };
    say(&format!("LLVM: {}", library.display()));
    let directory = tools.join("llvm");
    fs::create_dir_all(&directory).with_context(|| format!("make {}", directory.display()))?;
    let link = directory.join(LIBLLVM_NAME);
    if fs::read_link(&link).ok().as_ref() != Some(&library) {
        match fs::remove_file(&link) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("remove {}", link.display()));
            }
            Ok(()) | Err(_) => {}
        }
        std::os::unix::fs::symlink(&library, &link).with_context(|| format!("make {}", link.display()))?;
    }
    Ok(directory)
}

/// The LLVM library in `directory`: a shared object, not a linker script. Of several the first by name.
fn find_library(directory: &Path) -> Option<PathBuf> {
    let names: BTreeSet<OsString> =
        fs::read_dir(directory).ok()?.flatten().map(|entry| entry.file_name()).collect();
    let fits = |name: &&OsString| name.to_string_lossy().starts_with(LIBLLVM_START);
    names.iter().filter(fits).map(|name| directory.join(name)).find(|file| is_elf(file))
}

fn is_elf(file: &Path) -> bool {
    let mut magic = [0; 4];
    let read = fs::File::open(file).and_then(|mut file| io::Read::read_exact(&mut file, &mut magic));
    read.is_ok() && magic == *b"\x7fELF"
}

/// Debug information is what bpf-linker makes the BTF of. `bpf_target_arch` tells aya-ebpf whose registers it reads.
fn rustflags(linker: &Path) -> OsString {
    let mut flags = OsString::from("-Cdebuginfo=2\x1f-Clink-arg=--btf\x1f-Clinker=");
    flags.push(linker);
    flags.push(format!("\x1f--cfg=bpf_target_arch=\"{}\"", std::env::consts::ARCH));
    flags
}

/// `LD_LIBRARY_PATH` with `first` in front.
fn library_path(first: &Path) -> anyhow::Result<OsString> {
    let rest = std::env::var_os("LD_LIBRARY_PATH").unwrap_or_default();
    let rest = std::env::split_paths(&rest).filter(|directory| !directory.as_os_str().is_empty());
    std::env::join_paths(std::iter::once(first.to_path_buf()).chain(rest)).context("build LD_LIBRARY_PATH")
}

/// Copies `from` to `to`, unless `to` has the same content already: a new time stamp would build drowse again. Says
/// whether it did.
fn copy_if_different(from: &Path, to: &Path) -> anyhow::Result<bool> {
    let new = fs::read(from).with_context(|| format!("read {}", from.display()))?;
    if fs::read(to).is_ok_and(|old| old == new) {
        return Ok(false);
    }
    let directory = to.parent().context("find the object's directory")?;
    fs::create_dir_all(directory).with_context(|| format!("make {}", directory.display()))?;
    // Written beside and renamed, so that nobody embeds half an object.
    let beside = to.with_extension("o.new");
    fs::write(&beside, new).with_context(|| format!("write {}", beside.display()))?;
    fs::rename(&beside, to).with_context(|| format!("rename {}", beside.display()))?;
    Ok(true)
}
