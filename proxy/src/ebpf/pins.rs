//! Pins: maps in a directory `NAME` of the BPF file system, for `bpftool map dump pinned`.
//!
//! Owns: that directory, and the lock on it; the pins by which the next drowse takes over the counters of flows that
//! outlive this one. Must never: pin a program or a link (they would go on working after us), or touch the pins of a
//! drowse that runs.
//! Rests on: `flock(2)` on a directory, which the kernel releases with the process however it dies; on bpffs refusing
//! names with a dot (`bpf_lookup` in `kernel/bpf/inode.c`).

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use aya::Ebpf;
use aya::maps::{HashMap, Map, MapData, MapInfo};
use drowse_ebpf::{FLOWS_MAX, Flow, Mark, Service, map};
use rustix::fs::{FlockOperation, flock};

use super::facts::{self, Answer};

/// Where maps are pinned unless it is said otherwise.
pub const PIN_DIR: &str = "/sys/fs/bpf/drowse";

/// Longest name of a file, `NAME_MAX`.
const NAME_BYTES_MAX: usize = 255;

/// How often a directory that vanishes under our hands (a drowse of the same name that ends) is made anew.
const LOCK_ATTEMPTS: usize = 8;

/// The directory name that stands for `name` in the BPF file system: ASCII letters, digits and `_ - @ :` stay, every
/// other byte becomes `_`, so `dice.service` is `dice_service` and no name can leave its place.
///
/// # Errors
/// The name is empty or longer than 255 bytes.
pub fn pin_name(name: &str) -> anyhow::Result<String> {
    if name.is_empty() {
        bail!("the name is empty");
    }
    if name.len() > NAME_BYTES_MAX {
        bail!("the name is longer than {NAME_BYTES_MAX} bytes");
    }
    let keep = |byte: u8| byte.is_ascii_alphanumeric() || b"_-@:".contains(&byte);
    Ok(name.bytes().map(|byte| if keep(byte) { char::from(byte) } else { '_' }).collect())
}

/// Pinned maps. Dropping it removes the pins.
pub(super) struct Pins {
    directory: PathBuf,
    /// The pins that the next drowse takes over stay.
    pub(super) keep: bool,
    /// The directory, locked: while it is open, no other drowse touches the pins.
    _lock: File,
}

impl Pins {
    /// Makes the directory of `name` below `place` ours. Pins that a killed drowse of the same name left behind are
    /// removed, but for those that are taken over and have the shape that they have today.
    ///
    /// # Errors
    /// There is no BPF file system, it may not be written to, or a running drowse has pins of this name.
    pub(super) fn claim(place: &Path, name: &str) -> anyhow::Result<Self> {
        let bpffs = facts::bpffs(place);
        if bpffs.answer == Answer::No {
            bail!("{}", bpffs.reason);
        }
        let directory = place.join(pin_name(name)?);
        let lock = lock(&directory)?;
        let pins = Self { directory, keep: false, _lock: lock };
        pins.remove(&map::SHOWN).context("remove the pins of a drowse that was killed")?;
        if !pins.kept().all(|(map, path)| has_shape(map, &path)) {
            pins.remove(&map::KEPT).context("remove the pins of another version of drowse")?;
        }
        Ok(pins)
    }

    /// The maps that are taken over, or made, with their pins.
    pub(super) fn kept(&self) -> impl Iterator<Item = (&'static str, PathBuf)> {
        map::KEPT.into_iter().map(|name| (name, self.directory.join(name)))
    }

    /// Pins the maps of `ebpf` that are there to be looked at.
    ///
    /// # Errors
    /// A map cannot be pinned.
    pub(super) fn show(&self, ebpf: &Ebpf) -> anyhow::Result<()> {
        for name in map::SHOWN {
            let map = ebpf.map(name).with_context(|| format!("find map {name} in the eBPF object"))?;
            let path = self.directory.join(name);
            map.pin(&path).with_context(|| format!("pin {}", path.display()))?;
        }
        Ok(())
    }

    fn remove(&self, names: &[&str]) -> io::Result<()> {
        for name in names {
            match fs::remove_file(self.directory.join(name)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                Ok(()) | Err(_) => {}
            }
        }
        Ok(())
    }
}

impl Drop for Pins {
    fn drop(&mut self) {
        // What cannot be removed does no harm: maps without program, replaced by the next drowse of this name. The
        // directory goes before the lock does, and only if it is empty.
        let _ = self.remove(&map::SHOWN);
        if !self.keep {
            let _ = self.remove(&map::KEPT);
        }
        let _ = fs::remove_dir(&self.directory);
    }
}

/// Whether the map pinned at `path` is what this build calls `name`.
fn has_shape(name: &str, path: &Path) -> bool {
    let (value_size, entries) = match name {
        map::MARKS => (size_of::<Mark>(), 0),
        map::FLOWS => (size_of::<Flow>(), FLOWS_MAX),
        map::SERVICE => (size_of::<Service>(), 1),
        _ => return false,
    };
    let fits =
        |info: MapInfo| info.value_size() as usize == value_size && info.max_entries() as usize == entries;
    path.exists() && MapInfo::from_pin(path).is_ok_and(fits)
}

/// The open flows of the service `name` that were handed off, by cookie, `max` of them at most: as far as drowse has
/// brought their counters up to date. Costs two system calls a flow, and drowse nothing.
///
/// # Errors
/// The map is not pinned, because nothing is handed off or drowse is not loaded; or it is not ours to look into.
pub fn open_flows(name: &str, max: usize) -> anyhow::Result<BTreeMap<u64, Flow>> {
    let path = Path::new(PIN_DIR).join(pin_name(name)?).join(map::FLOWS);
    let data = MapData::from_pin(&path).with_context(|| format!("open {}", path.display()))?;
    let flows: HashMap<MapData, u64, Flow> =
        Map::HashMap(data).try_into().with_context(|| format!("understand {}", path.display()))?;
    // Fused, and a flow is there once: the walk begins anew after its end, and when its place in it is taken out.
    let found = flows.iter().fuse().take(max).filter_map(Result::ok).collect();
    Ok(found)
}

/// Makes `directory` and locks it.
fn lock(directory: &Path) -> anyhow::Result<File> {
    let shown = directory.display();
    for _ in 0..LOCK_ATTEMPTS {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)
            .with_context(|| format!("make {shown}"))?;
        let file = match File::open(directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            opened => opened.with_context(|| format!("open {shown}"))?,
        };
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Err(rustix::io::Errno::WOULDBLOCK) => {
                bail!("{shown} belongs to a drowse that runs: give one a --name")
            }
            locked => locked.with_context(|| format!("lock {shown}"))?,
        }
        // Between our open and our lock its former owner may have removed it.
        let ours = file.metadata().with_context(|| format!("look at {shown}"))?;
        if fs::metadata(directory).is_ok_and(|there| (there.dev(), there.ino()) == (ours.dev(), ours.ino())) {
            return Ok(file);
        }
    }
    bail!("{shown} vanishes again and again")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_unit_name_is_readable_as_a_pin_name() {
        assert_eq!(pin_name("dice.service").unwrap(), "dice_service");
        assert_eq!(pin_name("getty@tty1.service").unwrap(), "getty@tty1_service");
        assert_eq!(pin_name("a-b_c:1").unwrap(), "a-b_c:1");
    }

    #[test]
    fn no_name_leaves_its_directory() {
        for name in ["..", ".", "/", "../../etc", "a/b", "a\0b", "ä", "a\\x2db", "a\nb"] {
            let pin_name = pin_name(name).unwrap();
            assert!(!pin_name.contains(['/', '.', '\0', '\n', '\\']), "{name:?} -> {pin_name:?}");
            assert_eq!(pin_name.len(), name.len());
        }
    }

    #[test]
    fn an_empty_or_endless_name_is_refused() {
        assert!(pin_name("").is_err());
        assert!(pin_name(&"x".repeat(256)).is_err());
        assert!(pin_name(&"x".repeat(255)).is_ok());
    }
}
