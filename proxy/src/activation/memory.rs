//! How much memory a backend uses.
//!
//! Owns: reading it. Must never: guess; what cannot be read is unknown.
//!
//! Rests on: `memory.current` of the backend's cgroup is what systemd calls `MemoryCurrent=`, with the file cache that
//! the backend brought in; without the memory controller there is no such file, and the resident sets of all processes
//! are added up, in which pages that several of them share count several times (`statm`, proc(5)).

use std::fs;
use std::path::Path;

use procfs::process::{Process, all_processes};

use crate::ebpf::cgroup2_root;

/// Times that the processes are looked at, because one may end meanwhile.
const LOOKS_MAX: usize = 3;

/// The memory of a cgroup, in bytes; `path` is from the root of the hierarchy, as systemd's `ControlGroup` has it.
#[must_use]
pub fn of_cgroup(path: &str) -> Option<u64> {
    let directory = cgroup2_root().ok()?.join(path.trim_start_matches('/'));
    if path.is_empty() || !directory.is_dir() {
        return None;
    }
    let current = fs::read_to_string(directory.join("memory.current"));
    current
        .ok()
        .and_then(|text| text.trim().parse().ok())
        .or_else(|| (0..LOOKS_MAX).find_map(|_| resident(&processes(&directory)?)))
}

/// The memory of a process group, in bytes.
#[must_use]
pub fn of_process_group(group: i32) -> Option<u64> {
    let all = all_processes().ok()?.flatten();
    let members = all.filter(|process| process.stat().is_ok_and(|stat| stat.pgrp == group));
    let pids: Vec<i32> = members.map(|process| process.pid).collect();
    resident(&pids)
}

/// The processes of a cgroup and those below it.
fn processes(directory: &Path) -> Option<Vec<i32>> {
    let text = fs::read_to_string(directory.join("cgroup.procs")).ok()?;
    let mut pids: Vec<i32> = text.lines().filter_map(|line| line.parse().ok()).collect();
    for entry in fs::read_dir(directory).ok()?.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            pids.extend(processes(&entry.path())?);
        }
    }
    Some(pids)
}

/// The resident sets of all of `pids`; unknown if there is none or one cannot be read.
fn resident(pids: &[i32]) -> Option<u64> {
    let of_one = |pid: &i32| Process::new(*pid).and_then(|process| process.statm()).ok();
    let pages = pids.iter().map(|pid| Some(of_one(pid)?.resident)).sum::<Option<u64>>()?;
    (pages > 0).then(|| pages.saturating_mul(procfs::page_size()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_own_process_group_uses_some_memory() {
        let group = rustix::process::getpgrp().as_raw_nonzero().get();
        let used = of_process_group(group).unwrap();
        assert!((1 << 20..1 << 40).contains(&used), "{used}");
    }

    #[test]
    fn what_is_not_there_is_unknown() {
        assert_eq!(of_cgroup(""), None);
        assert_eq!(of_cgroup("/no/such/cgroup"), None);
        assert_eq!(of_process_group(i32::MAX), None);
    }
}
