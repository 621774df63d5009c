//! The listen hook: tells user space when somebody begins to listen on a watched port.
//!
//! Owns: [`PORTS`], [`LISTENS`], [`LISTEN_EVENTS`]. Must never: change a socket.
//! Rests on: `BPF_SOCK_OPS_TCP_LISTEN_CB` being called after the socket is in state LISTEN, so a connect succeeds from
//! then on (`__inet_listen_sk` in `net/ipv4/af_inet.c`; Linux 4.19), and on `bpf_get_netns_cookie` for sockops (5.15).

use core::ptr;

use aya_ebpf::EbpfContext as _;
use aya_ebpf::btf_maps::{HashMap, RingBuf};
use aya_ebpf::helpers::{bpf_get_netns_cookie, bpf_ktime_get_ns};
use aya_ebpf::macros::btf_map;
use aya_ebpf::programs::SockOpsContext;
use aya_log_ebpf::{debug, warn};
use drowse_ebpf::{FAMILY_V4, FAMILY_V6, Interest, LISTEN_EVENTS_BYTES, ListenEvent, Listens, PORTS_MAX};

use crate::atomic;
use crate::observe::local_address;

/// port -> what user space wants to know about it.
#[btf_map]
pub static PORTS: HashMap<u32, Interest, PORTS_MAX> = HashMap::new();

/// port -> what was counted.
#[btf_map]
pub static LISTENS: HashMap<u32, Listens, PORTS_MAX> = HashMap::new();

/// What user space is told.
#[btf_map]
pub static LISTEN_EVENTS: RingBuf<ListenEvent, LISTEN_EVENTS_BYTES> = RingBuf::new();

/// Why user space was told nothing.
enum Untold {
    /// Nobody watches this port.
    NotWatched,
    /// Neither IPv4 nor IPv6.
    OtherFamily,
    /// No room in the ring buffer; counted in [`Listens::events_lost_total`].
    RingFull,
}

/// A socket began to listen.
#[inline(always)]
pub fn listened(ctx: &SockOpsContext) {
    match try_listened(ctx) {
        Ok(port) => debug!(ctx, "port {} is listened on", port),
        Err(Untold::RingFull) => {
            warn!(ctx, "port {} is listened on, but the ring buffer is full", ctx.local_port());
        }
        Err(Untold::NotWatched | Untold::OtherFamily) => {}
    }
}

/// Counts and tells. The port, if user space was told.
#[inline(always)]
fn try_listened(ctx: &SockOpsContext) -> Result<u32, Untold> {
    let port = ctx.local_port();
    // SAFETY: user space writes the map before the program is attached and removes nothing while it is.
    let interest = unsafe { PORTS.get(port) }.ok_or(Untold::NotWatched)?;
    if interest.listen == 0 {
        return Err(Untold::NotWatched);
    }
    let event = event(ctx, port)?;
    let told = LISTEN_EVENTS.output(event, 0).is_ok();
    count(&event, told);
    if told { Ok(port) } else { Err(Untold::RingFull) }
}

/// The event for this listener.
#[inline(always)]
fn event(ctx: &SockOpsContext, port: u32) -> Result<ListenEvent, Untold> {
    let family = ctx.family();
    let local = local_address(ctx);
    let address = match family {
        FAMILY_V4 => [local.ip4, 0, 0, 0],
        FAMILY_V6 => local.ip6,
        _ => return Err(Untold::OtherFamily),
    };
    // SAFETY: both helpers only read; the first one wants the context that the kernel passed in.
    let (netns_cookie, time_ns) = unsafe { (bpf_get_netns_cookie(ctx.as_ptr()), bpf_ktime_get_ns()) };
    Ok(ListenEvent { time_ns, netns_cookie, address, family, port })
}

/// Adds `event` to the port's counters. A port without an entry is not counted.
#[inline(always)]
fn count(event: &ListenEvent, told: bool) {
    let Some(listens) = LISTENS.get_ptr_mut(event.port) else { return };
    // SAFETY: the verifier has checked the pointer, and nobody removes entries. Totals are added atomically, because
    // several CPUs may be here at once; of the other fields the last writer's value stays, which is what they mean.
    unsafe {
        atomic::add(ptr::addr_of_mut!((*listens).listens_total), 1);
        if !told {
            atomic::add(ptr::addr_of_mut!((*listens).events_lost_total), 1);
        }
        ptr::addr_of_mut!((*listens).last_listen_ns).write_volatile(event.time_ns);
        ptr::addr_of_mut!((*listens).netns_cookie).write_volatile(event.netns_cookie);
        ptr::addr_of_mut!((*listens).family).write_volatile(event.family);
    }
}
