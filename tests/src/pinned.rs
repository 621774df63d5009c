//! The pinned maps of a running or killed drowse, as `bpftool` shows them.
//!
//! Must never: read them in another way than a user would.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use drowse::ebpf::pin_name;
use serde_json::Value;

use crate::deadline::eventually;
use crate::process::SOON;

/// The counters of the flows that were handed off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counted {
    /// Ever.
    pub flows_total: u64,
    /// Now.
    pub flows_open: u64,
    /// Of all flows; a FIN counts as one.
    pub bytes_to_backend: u64,
    /// Of all flows; a FIN counts as one.
    pub bytes_to_client: u64,
    /// The entries of the map of open flows.
    pub entries: usize,
}

/// What is counted for the service `name`.
///
/// # Errors
/// The maps are not pinned, or `bpftool` is not there.
pub fn counted(name: &str) -> Result<Counted> {
    let service = dump(name, "SERVICE")?;
    let [service] = service.as_slice() else { anyhow::bail!("not one entry: {service:?}") };
    let field = |field: &str| {
        let value = service.pointer(&format!("/formatted/value/{field}")).and_then(Value::as_u64);
        value.with_context(|| format!("find {field} in {service}"))
    };
    Ok(Counted {
        flows_total: field("flows_total")?,
        flows_open: field("flows_open")?,
        bytes_to_backend: field("bytes_to_backend")?,
        bytes_to_client: field("bytes_to_client")?,
        entries: dump(name, "FLOWS")?.len(),
    })
}

/// Waits until `name` has `open` flows that were handed off, by the counter and by the entries.
///
/// # Errors
/// It does not become so; the message has the counters.
pub fn wait_until_open(name: &str, open: u64) -> Result<Counted> {
    let mut last = None;
    eventually(&format!("{open} open flows"), SOON, || {
        let now = counted(name)?;
        last = Some(now);
        Ok((now.flows_open == open && now.entries as u64 == open).then_some(now))
    })
    .with_context(|| format!("counted: {last:?}"))
}

/// The entries of a pinned map.
///
/// # Errors
/// It is not there.
pub fn dump(name: &str, map: &str) -> Result<Vec<Value>> {
    let path = format!("/sys/fs/bpf/drowse/{}/{map}", pin_name(name)?);
    let entries = bpftool(&["map", "dump", "pinned", &path])?;
    serde_json::from_value(entries).with_context(|| format!("understand the entries of {path}"))
}

/// The ids of the links by which `sk_lookup` programs are attached to the network namespace of this thread.
///
/// # Errors
/// `bpftool` is not there.
pub fn steering_links() -> Result<Vec<u64>> {
    let netns = rustix::fs::stat("/proc/thread-self/ns/net").context("find our network namespace")?.st_ino;
    let links = bpftool(&["link", "list"])?;
    let links = links.as_array().context("a list of links")?;
    let ours = |link: &&Value| link["type"] == "netns" && link["netns_ino"] == netns;
    Ok(links.iter().filter(ours).filter_map(|link| link["id"].as_u64()).collect())
}

/// The programs and links that a process holds, as (`prog` or `link`, id).
///
/// # Errors
/// It is not there.
pub fn held_by(pid: u32) -> Result<BTreeSet<(&'static str, u64)>> {
    let mut held = BTreeSet::new();
    for entry in std::fs::read_dir(format!("/proc/{pid}/fdinfo")).context("list the descriptors")? {
        // One that is closed meanwhile is not held.
        let Ok(info) = std::fs::read_to_string(entry?.path()) else { continue };
        for line in info.lines() {
            let Some((key, id)) = line.split_once(':') else { continue };
            let kind = match key {
                "prog_id" => "prog",
                "link_id" => "link",
                _ => continue,
            };
            held.insert((kind, id.trim().parse().with_context(|| format!("understand {line:?}"))?));
        }
    }
    Ok(held)
}

/// The ids of the maps that a process holds.
///
/// # Errors
/// It is not there.
pub fn maps_held_by(pid: u32) -> Result<BTreeSet<u64>> {
    let mut maps = BTreeSet::new();
    for entry in std::fs::read_dir(format!("/proc/{pid}/fdinfo")).context("list the descriptors")? {
        // One that is closed meanwhile is not held.
        let Ok(info) = std::fs::read_to_string(entry?.path()) else { continue };
        let id = info.lines().find_map(|line| line.strip_prefix("map_id:"));
        maps.extend(id.map(|id| id.trim().parse::<u64>()).transpose()?);
    }
    Ok(maps)
}

/// How many entries the maps have that a process holds and that `is_meant` by their names. They need not be pinned.
///
/// # Errors
/// The process is not there, or two maps have one name.
pub fn entries_held_by(pid: u32, is_meant: impl Fn(&str) -> bool) -> Result<BTreeMap<String, usize>> {
    let mut entries = BTreeMap::new();
    for id in maps_held_by(pid)? {
        let id = id.to_string();
        let shown = bpftool(&["map", "show", "id", &id])?;
        let name =
            shown.get("name").and_then(Value::as_str).with_context(|| format!("no name in {shown}"))?;
        if is_meant(name) {
            let dumped = bpftool(&["map", "dump", "id", &id])?;
            let count = dumped.as_array().with_context(|| format!("no entries in {dumped}"))?.len();
            ensure!(entries.insert(name.to_owned(), count).is_none(), "two maps {name}");
        }
    }
    Ok(entries)
}

/// Waits until the kernel has none of these programs and links any more.
///
/// # Errors
/// One stays; the message names it.
pub fn wait_until_gone(held: &BTreeSet<(&'static str, u64)>) -> Result<()> {
    ensure!(!held.is_empty(), "nothing was there to begin with");
    for (kind, id) in held {
        eventually(&format!("{kind} {id} to go"), SOON, || {
            let shown = Command::new("bpftool").args([kind, "show", "id", &id.to_string()]).output()?;
            Ok((!shown.status.success()).then_some(()))
        })?;
    }
    Ok(())
}

/// What `bpftool ARGUMENTS` says.
///
/// # Errors
/// It is not there, or refuses.
pub fn bpftool(arguments: &[&str]) -> Result<Value> {
    let output = Command::new("bpftool").arg("-j").args(arguments).output();
    let output = output.context("run bpftool (cargo xtask install as root)")?;
    let said = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success(), "bpftool {}: {said}", arguments.join(" "));
    serde_json::from_str(&said).with_context(|| format!("understand {said:?}"))
}
