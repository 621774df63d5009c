//! Puts the eBPF object, if `cargo xtask build-ebpf` has built one, where `ebpf.rs` embeds it.
//!
//! Without one the embedded file is empty: drowse builds with stable Rust alone, and says at run time what is missing.

use std::path::{Path, PathBuf};
use std::{env, fs, io};

fn main() -> io::Result<()> {
    let variable = |name| env::var_os(name).map(PathBuf::from).ok_or_else(|| io::Error::other(name));
    let object_dir = variable("CARGO_MANIFEST_DIR")?.join("../target/ebpf");
    let embedded = variable("OUT_DIR")?.join("drowse.o");

    // Cargo takes a missing path for a changed one and would build drowse anew each time; so it watches the
    // directory. Where none can be made (a read-only source tree) that is all that is lost.
    let _ = fs::create_dir_all(&object_dir);
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed={}", object_dir.display());
    embed(&object_dir.join("drowse.o"), &embedded)
}

fn embed(object: &Path, embedded: &Path) -> io::Result<()> {
    match fs::copy(object, embedded) {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => fs::write(embedded, []),
        Err(error) => Err(error),
    }
}
