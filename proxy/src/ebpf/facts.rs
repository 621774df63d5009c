//! What this build, this kernel and these privileges allow: facts, each with three answers.
//!
//! Owns: looking. Must never: change anything or decide what is done about a fact.
//! Rests on: capabilities(7): `CAP_SYS_ADMIN` stands in for `CAP_BPF` and, in `bpf(2)`, for `CAP_NET_ADMIN`.

use std::fs;
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use rustix::fs::statfs;
use rustix::thread::{CapabilitySet, capabilities};
use serde::Serialize;

use super::layout::KERNEL_BTF;

/// Where the BPF file system is mounted by custom, and by systemd.
pub const BPFFS: &str = "/sys/fs/bpf";

/// `BPF_FS_MAGIC` of `linux/magic.h`.
const BPFFS_MAGIC: u64 = 0xcafe_4a11;

/// `CGROUP2_SUPER_MAGIC` of `linux/magic.h`.
const CGROUP2_MAGIC: u64 = 0x6367_7270;

/// An answer to a question about the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Answer {
    /// It is so.
    Yes,
    /// It is not so.
    No,
    /// Only trying would tell.
    Unknown,
}

/// One fact.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Fact {
    /// What it is about, as users see it.
    pub subject: &'static str,
    /// Whether it is there.
    pub answer: Answer,
    /// What was found; with `No`, what to do about it.
    pub reason: String,
}

/// Everything that eBPF needs here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Availability {
    /// The object is part of this executable.
    pub object: Fact,
    /// The process holds `CAP_BPF` and `CAP_NET_ADMIN`.
    pub capabilities: Fact,
    /// A cgroup2 hierarchy is mounted.
    pub cgroup2: Fact,
    /// A BPF file system is mounted. Maps are pinned there; all but the hand-off works without.
    pub bpffs: Fact,
    /// The process holds `CAP_PERFMON`. Only the plane sockmap needs it.
    pub perfmon: Fact,
    /// The kernel tells its types. Only the plane sockmap needs it.
    pub btf: Fact,
}

impl Availability {
    /// The first needed thing that is certainly missing, in one line. `None`: trying is worth while.
    #[must_use]
    pub fn obstacle(&self) -> Option<&str> {
        let needed = [&self.object, &self.capabilities, &self.cgroup2];
        let missing = needed.into_iter().find(|fact| fact.answer == Answer::No);
        missing.map(|fact| fact.reason.as_str())
    }

    /// What the plane sockmap needs beyond that and is certainly missing, in one line. `None`: trying is worth while.
    #[must_use]
    pub fn sockmap_obstacle(&self) -> Option<&str> {
        let missing = [&self.perfmon, &self.btf].into_iter().find(|fact| fact.answer == Answer::No);
        missing.map(|fact| fact.reason.as_str())
    }
}

/// Looks at build, privileges and mounts. Changes nothing and loads nothing.
#[must_use]
pub fn availability() -> Availability {
    Availability {
        object: object(super::OBJECT),
        capabilities: privileges(),
        cgroup2: match cgroup2_root() {
            Ok(path) => fact("cgroup2", Answer::Yes, format!("mounted at {}", path.display())),
            Err(error) => fact("cgroup2", Answer::No, format!("{error:#}")),
        },
        bpffs: bpffs(Path::new(BPFFS)),
        perfmon: perfmon(),
        btf: btf(Path::new(KERNEL_BTF)),
    }
}

/// Major and minor number of a kernel's release, as uname(2) has it. `None`: it begins with no such numbers.
#[must_use]
pub fn kernel_version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

/// As [`kernel_version`], with the number of the stable release: zero if there is none.
#[must_use]
pub fn kernel_release(release: &str) -> Option<(u32, u32, u32)> {
    let (major, minor) = kernel_version(release)?;
    let numbers = release.split(|c: char| !c.is_ascii_digit() && c != '.').next()?;
    let patch = numbers.split('.').nth(2).and_then(|patch| patch.parse().ok());
    Some((major, minor, patch.unwrap_or(0)))
}

fn fact(subject: &'static str, answer: Answer, reason: impl Into<String>) -> Fact {
    Fact { subject, answer, reason: reason.into() }
}

fn object(object: &[u8]) -> Fact {
    let subject = "object";
    if object.is_empty() {
        fact(
            subject,
            Answer::No,
            "eBPF is not built in: run `cargo xtask build-ebpf`, then build drowse again",
        )
    } else {
        fact(subject, Answer::Yes, format!("built in, {} bytes", object.len()))
    }
}

fn privileges() -> Fact {
    let subject = "capabilities";
    match capabilities(None) {
        Ok(sets) => {
            let missing = missing_capabilities(sets.effective);
            if !missing.is_empty() {
                let reason = format!(
                    "eBPF needs CAP_BPF and CAP_NET_ADMIN, missing: {}; run as root, or set \
                     AmbientCapabilities=CAP_BPF CAP_NET_ADMIN in the unit",
                    missing.join(" and ")
                );
                return fact(subject, Answer::No, reason);
            }
            if in_user_namespace() {
                let reason = "CAP_BPF and CAP_NET_ADMIN, but in a user namespace, where bpf(2) ignores them";
                return fact(subject, Answer::Unknown, reason);
            }
            fact(subject, Answer::Yes, "CAP_BPF and CAP_NET_ADMIN")
        }
        Err(error) => fact(subject, Answer::Unknown, format!("capget failed: {error}")),
    }
}

/// The programs of the plane sockmap read the kernel's own structures.
fn perfmon() -> Fact {
    let subject = "perfmon";
    match capabilities(None) {
        Ok(sets) if sets.effective.intersects(CapabilitySet::SYS_ADMIN | CapabilitySet::PERFMON) => {
            fact(subject, Answer::Yes, "CAP_PERFMON")
        }
        Ok(_) => fact(
            subject,
            Answer::No,
            "sockmap needs CAP_PERFMON, which is missing; run as root, or add it to AmbientCapabilities= in the unit",
        ),
        Err(error) => fact(subject, Answer::Unknown, format!("capget failed: {error}")),
    }
}

fn btf(path: &Path) -> Fact {
    let subject = "btf";
    let shown = path.display();
    match fs::File::open(path) {
        Ok(_) => fact(subject, Answer::Yes, format!("the kernel's types are at {shown}")),
        Err(error) => fact(
            subject,
            Answer::No,
            format!(
                "sockmap needs the kernel's types, {shown}: {error}; a kernel with CONFIG_DEBUG_INFO_BTF has it"
            ),
        ),
    }
}

/// The capabilities that loading and attaching need and `effective` lacks.
fn missing_capabilities(effective: CapabilitySet) -> Vec<&'static str> {
    let needed = [(CapabilitySet::BPF, "CAP_BPF"), (CapabilitySet::NET_ADMIN, "CAP_NET_ADMIN")];
    let lacks = |set| !effective.intersects(CapabilitySet::SYS_ADMIN | set);
    needed.into_iter().filter(|&(set, _)| lacks(set)).map(|(_, name)| name).collect()
}

/// Whether user ids are mapped, which the initial user namespace does not do.
fn in_user_namespace() -> bool {
    let map = fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    !map.is_empty() && map.split_ascii_whitespace().ne(["0", "0", "4294967295"])
}

/// Whether a BPF file system is mounted at `path`.
pub(super) fn bpffs(directory: &Path) -> Fact {
    let subject = "bpffs";
    let path = directory.parent().filter(|_| !directory.exists()).unwrap_or(directory);
    let path_shown = path.display();
    match statfs(path) {
        Ok(found) if is_magic(found.f_type, BPFFS_MAGIC) => {
            fact(subject, Answer::Yes, format!("mounted at {path_shown}"))
        }
        Ok(_) => fact(
            subject,
            Answer::No,
            format!("no BPF file system at {path_shown}: `mount -t bpf bpf {path_shown}` as root"),
        ),
        Err(error) => fact(subject, Answer::Unknown, format!("cannot look at {path_shown}: {error}")),
    }
}

/// `f_type` is signed on some architectures and unsigned on others; magic numbers have 32 bits.
fn is_magic(f_type: impl TryInto<i128>, magic: u64) -> bool {
    f_type.try_into().is_ok_and(|f_type| f_type & 0xffff_ffff == i128::from(magic))
}

/// The root of the cgroup2 hierarchy that this process sees: the unified one, or the one of a hybrid set-up. In a
/// cgroup namespace that is the namespace's root.
///
/// # Errors
/// No cgroup2 hierarchy is mounted, or the mounts cannot be read.
pub fn cgroup2_root() -> anyhow::Result<PathBuf> {
    let mounts = fs::read("/proc/self/mountinfo").context("read /proc/self/mountinfo")?;
    for path in cgroup2_mounts(&mounts) {
        // A later mount may hide this one.
        if statfs(&path).is_ok_and(|found| is_magic(found.f_type, CGROUP2_MAGIC)) {
            return Ok(path);
        }
    }
    bail!("no cgroup2 hierarchy is mounted: boot with systemd, or `mount -t cgroup2 none DIR`")
}

/// Mount points of cgroup2 in `mountinfo` (`proc_pid_mountinfo(5)`), mounts of a whole hierarchy first.
fn cgroup2_mounts(mountinfo: &[u8]) -> Vec<PathBuf> {
    let mut mounts: Vec<(bool, PathBuf)> = mountinfo
        .split(|&byte| byte == b'\n')
        .filter_map(|line| {
            let mut fields = line.split(|&byte| byte == b' ');
            let part_of_it = fields.nth(3)? != b"/";
            let path = unescape(fields.next()?);
            let fs_type = fields.skip_while(|&field| field != b"-").nth(1)?;
            (fs_type == b"cgroup2").then(|| (part_of_it, PathBuf::from(std::ffi::OsString::from_vec(path))))
        })
        .collect();
    mounts.sort_by_key(|&(part_of_it, _)| part_of_it);
    mounts.into_iter().map(|(_, path)| path).collect()
}

/// Undoes the kernel's `\ooo` for space, tab, newline and backslash.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, after)) = rest.split_first() {
        let octal = after.first_chunk::<3>().filter(|_| byte == b'\\').and_then(|digits| {
            let digits = std::str::from_utf8(digits).ok()?;
            u8::from_str_radix(digits, 8).ok()
        });
        plain.push(octal.unwrap_or(byte));
        rest = if octal.is_some() { after.get(3..).unwrap_or_default() } else { after };
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cgroup2_is_found_in_a_hybrid_hierarchy() {
        let mountinfo = b"31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755\n\
            37 31 0:34 / /sys/fs/cgroup/pids rw,relatime - cgroup cgroup rw,pids\n\
            38 31 0:35 / /sys/fs/cgroup/unified rw,relatime shared:9 - cgroup2 cgroup2 rw\n";
        assert_eq!(cgroup2_mounts(mountinfo), [PathBuf::from("/sys/fs/cgroup/unified")]);
    }

    #[test]
    fn a_whole_hierarchy_goes_before_a_part_and_names_are_unescaped() {
        let mountinfo = b"1 0 0:1 /machine.slice /part rw - cgroup2 none rw\n\
            2 0 0:1 / /with\\040space\\134 rw shared:1 master:2 - cgroup2 none rw\n\n\
            nonsense\n3 0 0:1 / /x rw - tmpfs cgroup2 rw\n";
        assert_eq!(cgroup2_mounts(mountinfo), [PathBuf::from("/with space\\"), PathBuf::from("/part")]);
    }

    #[test]
    fn cap_sys_admin_stands_in_for_both() {
        assert!(missing_capabilities(CapabilitySet::SYS_ADMIN).is_empty());
        assert!(missing_capabilities(CapabilitySet::BPF | CapabilitySet::NET_ADMIN).is_empty());
        assert_eq!(missing_capabilities(CapabilitySet::BPF), ["CAP_NET_ADMIN"]);
        assert_eq!(missing_capabilities(CapabilitySet::empty()), ["CAP_BPF", "CAP_NET_ADMIN"]);
    }

    #[test]
    fn a_build_without_object_says_what_to_run() {
        let found = object(&[]);
        assert_eq!(found.answer, Answer::No);
        assert!(found.reason.contains("cargo xtask build-ebpf"), "{}", found.reason);
    }

    #[test]
    fn a_directory_that_is_no_bpffs_is_seen() {
        let found = bpffs(Path::new("/proc"));
        assert_eq!(found.answer, Answer::No);
        assert!(found.reason.contains("mount -t bpf"), "{}", found.reason);
        assert_eq!(bpffs(Path::new("/proc/not-made-yet")).answer, Answer::No);
        assert_eq!(bpffs(Path::new("/nowhere/at-all")).answer, Answer::Unknown);
    }

    #[test]
    fn only_what_is_needed_is_an_obstacle() {
        let yes = |subject| fact(subject, Answer::Yes, "");
        let mut found = Availability {
            object: yes("object"),
            capabilities: fact("capabilities", Answer::Unknown, "unknown"),
            cgroup2: yes("cgroup2"),
            bpffs: fact("bpffs", Answer::No, "none"),
            perfmon: fact("perfmon", Answer::Unknown, "unknown"),
            btf: yes("btf"),
        };
        assert_eq!((found.obstacle(), found.sockmap_obstacle()), (None, None));
        found.perfmon = fact("perfmon", Answer::No, "no perfmon");
        assert_eq!((found.obstacle(), found.sockmap_obstacle()), (None, Some("no perfmon")));
        found.cgroup2 = fact("cgroup2", Answer::No, "no cgroup2");
        assert_eq!(found.obstacle(), Some("no cgroup2"));
    }

    #[test]
    fn a_kernel_without_types_says_what_it_lacks() {
        let found = btf(Path::new("/proc/no-such-file"));
        assert_eq!(found.answer, Answer::No);
        assert!(found.reason.contains("CONFIG_DEBUG_INFO_BTF"), "{}", found.reason);
    }
}
