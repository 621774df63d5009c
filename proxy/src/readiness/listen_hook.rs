//! The listen hook: the kernel tells us the instant somebody begins to listen on the backend's port.
//!
//! Owns: the program's attachment and its events. Must never: take an event for more than a hint. Another process,
//! also in another network namespace, may listen on the same port number; only a connect tells.
//! Rests on: sockops following the cgroup in which the listener was created. A socket-activated backend's listener was
//! created by PID 1, outside of the backend's own cgroup: so the hook is attached to the root and filters by port. The
//! attachment is a `bpf_link` that is not pinned: it ends with the process, however that dies.

use std::net::SocketAddr;
use std::os::fd::AsFd as _;
use std::time::Duration;
use std::{fmt, io};

use anyhow::{Context as _, bail};
use aya::maps::{MapData, RingBuf};
use aya::programs::{CgroupAttachMode, SockOps};
use drowse_ebpf as abi;

use crate::clock::Monotonic;
use crate::ebpf::{self, Log, Object, facts};
use crate::sys::Readable;

/// Somebody began to listen on a watched port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Listen {
    /// The listener's local address and port.
    pub address: SocketAddr,
    /// The cookie of the listener's network namespace (`SO_NETNS_COOKIE`, socket(7)).
    pub netns_cookie: u64,
    /// When it began to listen.
    pub time: Monotonic,
}

/// The events of the listen hook, and the programs' log.
pub struct ListenHook {
    events: Events,
    log: Log,
}

impl ListenHook {
    /// Attaches the hook of `object` for `ports`; it stays attached for as long as the object lives. Blocks for some
    /// milliseconds; to be called within a tokio runtime (`spawn_blocking`).
    ///
    /// # Errors
    /// The kernel refuses, or `ports` are too many. The backend's readiness has then to be learnt in another way.
    pub fn attach(object: &mut Object, ports: &[u16]) -> anyhow::Result<Self> {
        if ports.len() > abi::PORTS_MAX {
            bail!("the listen hook watches at most {} ports, not {}", abi::PORTS_MAX, ports.len());
        }
        watch(object, ports)?;
        let events = Events::new(object)?;
        let log = object.log()?;
        attach_to_root(object)?;
        Ok(Self { events, log })
    }

    /// The next time somebody begins to listen on a watched port, since [`ListenHook::attach`]. Pending for ever when
    /// nobody does. Cancel safe. Passes the program's log lines on while it waits.
    pub async fn listened(&mut self) -> Listen {
        loop {
            tokio::select! {
                event = self.events.next() => match event {
                    Ok(listen) => return listen,
                    // The runtime is shutting down.
                    Err(_) => std::future::pending().await,
                },
                passed_on = self.log.pass_on() => if passed_on.is_err() {
                    std::future::pending::<()>().await;
                },
            }
        }
    }
}

impl fmt::Debug for ListenHook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ListenHook").finish_non_exhaustive()
    }
}

/// Writes down which ports are watched, before anybody reads it.
fn watch(object: &mut Object, ports: &[u16]) -> anyhow::Result<()> {
    let mut listens = object.hash_map_mut::<u32, abi::Listens>(abi::map::LISTENS)?;
    for &port in ports {
        let zero = abi::Listens::default();
        listens
            .insert(u32::from(port), zero, 0)
            .with_context(|| format!("make a counter for port {port}"))?;
    }
    let mut interests = object.hash_map_mut::<u32, abi::Interest>(abi::map::PORTS)?;
    for &port in ports {
        let listen = abi::Interest { listen: 1 };
        interests.insert(u32::from(port), listen, 0).with_context(|| format!("watch port {port}"))?;
    }
    Ok(())
}

/// What the hook counted for `port`.
///
/// # Errors
/// The port is not watched, or the counters cannot be read.
pub fn listens(object: &Object, port: u16) -> anyhow::Result<abi::Listens> {
    let counters = object.hash_map::<u32, abi::Listens>(abi::map::LISTENS)?;
    counters.get(&u32::from(port), 0).with_context(|| format!("read the counters of port {port}"))
}

fn attach_to_root(object: &mut Object) -> anyhow::Result<()> {
    let root = facts::cgroup2_root()?;
    let cgroup = std::fs::File::open(&root).with_context(|| format!("open cgroup {}", root.display()))?;
    let program = object.program::<SockOps>(abi::program::OBSERVE)?;
    program.load().map_err(ebpf::explain).context("load the listen hook")?;
    // The mode is for the older way to attach; a link always goes beside the links of others.
    let attached = program.attach(cgroup, CgroupAttachMode::Single).map_err(ebpf::explain);
    attached.with_context(|| format!("attach the listen hook to cgroup {}", root.display()))?;
    Ok(())
}

/// The ring buffer of listen events.
struct Events {
    ring: RingBuf<MapData>,
    readable: Readable,
}

impl Events {
    fn new(object: &mut Object) -> anyhow::Result<Self> {
        let ring = object.ring_buffer(abi::map::LISTEN_EVENTS)?;
        let readable = Readable::new(ring.as_fd()).context("watch for listen events")?;
        Ok(Self { ring, readable })
    }

    /// The next event. Cancel safe: it is taken out only when it is returned.
    async fn next(&mut self) -> io::Result<Listen> {
        loop {
            let mut ready = self.readable.readable().await?;
            while let Some(bytes) = self.ring.next() {
                if let Some(listen) = abi::ListenEvent::from_bytes(&bytes).and_then(from_abi) {
                    return Ok(listen);
                }
            }
            ready.clear_ready();
        }
    }
}

/// The event in the words of user space. `None`: not one that the program writes.
fn from_abi(event: abi::ListenEvent) -> Option<Listen> {
    let abi::ListenEvent { address, port, family, .. } = event;
    Some(Listen {
        address: ebpf::socket_address(&abi::Endpoint { address, port, family })?,
        netns_cookie: event.netns_cookie,
        time: Duration::from_nanos(event.time_ns),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_in_network_byte_order() {
        let v4 = abi::ListenEvent {
            family: abi::FAMILY_V4,
            address: [u32::from_ne_bytes([127, 0, 0, 1]), 0, 0, 0],
            port: 80,
            netns_cookie: 7,
            time_ns: 1_500_000_000,
        };
        let listen = from_abi(v4).unwrap();
        assert_eq!(listen.address, "127.0.0.1:80".parse().unwrap());
        assert_eq!(listen.netns_cookie, 7);
        assert_eq!(listen.time, Duration::from_millis(1500));

        let one = u32::from_ne_bytes([0, 0, 0, 1]);
        let v6 = abi::ListenEvent { family: abi::FAMILY_V6, address: [0, 0, 0, one], ..v4 };
        assert_eq!(from_abi(v6).unwrap().address, "[::1]:80".parse().unwrap());
    }

    #[test]
    fn an_event_that_makes_no_sense_is_not_reported() {
        let event = abi::ListenEvent { family: abi::FAMILY_V4, ..abi::ListenEvent::default() };
        assert!(from_abi(event).is_some());
        assert_eq!(from_abi(abi::ListenEvent { family: 1, ..event }), None);
        assert_eq!(from_abi(abi::ListenEvent { port: 65536, ..event }), None);
    }
}
