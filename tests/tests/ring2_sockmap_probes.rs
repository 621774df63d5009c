//! Ring 2: what the plane `sockmap` sees of the kernel before it is used. Each test in namespaces of its own. Needs root.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use aya::Pod;
use aya::maps::{HashMap, Map, MapData};
use drowse::clock;
use drowse::ebpf::facts::BPFFS;
use drowse::ebpf::{Layout, Object, layout, pin_name};
use drowse::plane::choose::Redirection;
use drowse::plane::sockmap::{Announcements, Sockmap};
use drowse_ebpf::{Direction, Proxied, Taken, map};
use drowse_tests::deadline::eventually;
use drowse_tests::isolated::isolated;

const NAME: &str = "probes";

/// Much longer than they take; this is no place to measure time.
const WITHIN: Duration = Duration::from_millis(500);

/// Where `skc_bound_dev_if` lies in `struct sock_common`, with which `struct sock` begins: zero for most sockets.
const BOUND_DEV_IF: u32 = 20;

/// As the service does it.
fn prepare(layout: Layout) -> Result<(Object, Sockmap, Announcements)> {
    let mut object = Object::load(Path::new(BPFFS), NAME, Some(layout))?;
    let (sockmap, announcements) = Sockmap::prepare(&mut object, Redirection::Own)?;
    Ok((object, sockmap, announcements))
}

/// The one line that says why the plane cannot be used.
fn reason(layout: Layout) -> Result<String> {
    let error = prepare(layout).err().context("the probes pass")?;
    let reason = format!("{error:#}");
    ensure!(!reason.contains('\n'), "more than one line: {reason}");
    Ok(reason)
}

/// The entries of a pinned map.
fn entries<V: Pod>(name: &str) -> Result<usize> {
    let pin: PathBuf = [BPFFS, &pin_name(NAME)?, name].iter().collect();
    let entries: HashMap<_, u64, V> = HashMap::try_from(Map::HashMap(MapData::from_pin(pin)?))?;
    Ok(entries.keys().count())
}

/// All sockets of this network namespace.
fn sockets() -> Result<String> {
    let all = fs::read_to_string("/proc/thread-self/net/sockstat")?;
    Ok(all.lines().next().context("no line about sockets")?.to_owned())
}

/// The TCP sockets of this network namespace, in whatever state.
fn connections() -> Result<Vec<String>> {
    let mut found = Vec::new();
    for family in ["tcp", "tcp6"] {
        let all = fs::read_to_string(format!("/proc/thread-self/net/{family}"))?;
        found.extend(all.lines().skip(1).map(str::to_owned));
    }
    Ok(found)
}

fn nothing_is_left(sockmap: &Sockmap, announcements: &mut Announcements) -> Result<()> {
    // A child of another test has them, too, from its fork to its exec.
    eventually("the connections to be gone", Duration::from_secs(10), || {
        Ok(connections()?.is_empty().then_some(()))
    })?;
    assert_eq!(sockmap.counters().read(), Proxied::default());
    assert_eq!(announcements.take(), None);
    assert_eq!(entries::<Direction>(map::DIRECTIONS)?, 0);
    assert_eq!(entries::<Taken>(map::TAKEN)?, 0);
    // What was in a sockmap is freed a grace period later.
    eventually("the sockets to be gone", Duration::from_secs(10), || {
        Ok((sockets()? == "sockets: used 0").then_some(()))
    })
}

#[test]
fn this_kernel_passes_all_probes_and_they_leave_nothing_behind() -> Result<()> {
    isolated(|| {
        let (_object, sockmap, mut announcements) = prepare(layout()?)?;
        nothing_is_left(&sockmap, &mut announcements)?;
        for _ in 0..50 {
            let start = clock::now();
            sockmap.probe(&mut announcements)?;
            let took = clock::now().saturating_sub(start);
            println!("the probes took {took:?}");
            ensure!(took < WITHIN, "the probes took {took:?}");
        }
        nothing_is_left(&sockmap, &mut announcements)
    })
}

#[test]
fn where_only_ipv6_has_a_loopback_the_probes_pass() -> Result<()> {
    isolated(|| {
        ip(&["address", "del", "127.0.0.1/8", "dev", "lo"])?;
        prepare(layout()?)?;
        Ok(())
    })
}

#[test]
fn without_a_loopback_the_reason_says_so() -> Result<()> {
    isolated(|| {
        ip(&["link", "set", "lo", "down"])?;
        let reason = reason(layout()?)?;
        println!("{reason}");
        for part in ["is `lo` up?", "127.0.0.1: ", "::1: "] {
            ensure!(reason.contains(part), "{reason}");
        }
        Ok(())
    })
}

#[test]
fn wrong_offsets_are_noticed() -> Result<()> {
    isolated(|| {
        let right = layout()?;
        let written = "the program does not see what is written to a socket";
        let empty = "the program does not find the room of an empty send queue";
        let full = "the program does not see that a send queue is full";
        for (what, expected, wrong) in [
            ("write_seq is what is queued", written, Layout { write_seq: right.wmem_queued, ..right }),
            ("write_seq never moves", written, Layout { write_seq: right.sndbuf, ..right }),
            (
                "the send buffer is as large as its queue",
                empty,
                Layout { sndbuf: right.wmem_queued, ..right },
            ),
            ("the queue is as large as its buffer", empty, Layout { wmem_queued: right.sndbuf, ..right }),
            ("the queue is always empty", full, Layout { wmem_queued: BOUND_DEV_IF, ..right }),
        ] {
            let reason = reason(wrong).with_context(|| what.to_owned())?;
            println!("{what}: {reason}");
            ensure!(reason.contains(expected), "{what}: {reason}");
        }
        Ok(())
    })
}

fn ip(arguments: &[&str]) -> Result<()> {
    let status = Command::new("ip").args(arguments).status().context("run ip (package iproute2)")?;
    ensure!(status.success(), "ip {}: {status}", arguments.join(" "));
    Ok(())
}
