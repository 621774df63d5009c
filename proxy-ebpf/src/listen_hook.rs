//! The listen hook: a sockops program that tells user space when somebody begins to listen on a watched port.
//!
//! Owns: [`PORTS`], [`LISTENS`], [`LISTEN_EVENTS`]. Must never: change a socket, a reply or a verdict; it looks, counts
//! and tells.
//! Rests on: `BPF_SOCK_OPS_TCP_LISTEN_CB` being called after the socket is in state LISTEN, so a connect succeeds from
//! then on (`__inet_listen_sk` in `net/ipv4/af_inet.c`; Linux 4.19), and on `bpf_get_netns_cookie` for sockops (5.15).
//! The program runs for every TCP connection below the cgroup, hence the test of `op` first.

use core::ptr;

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::BPF_SOCK_OPS_TCP_LISTEN_CB;
use aya_ebpf::btf_maps::{HashMap, RingBuf};
use aya_ebpf::helpers::{bpf_get_netns_cookie, bpf_ktime_get_ns};
use aya_ebpf::macros::{btf_map, sock_ops};
use aya_ebpf::programs::SockOpsContext;
use aya_log_ebpf::{debug, warn};
use drowse_ebpf::{FAMILY_V4, FAMILY_V6, Interest, LISTEN_EVENTS_BYTES, ListenEvent, Listens, PORTS_MAX};

use crate::atomic;

/// port -> what user space wants to know about it.
#[btf_map]
pub static PORTS: HashMap<u32, Interest, PORTS_MAX> = HashMap::new();

/// port -> what was counted.
#[btf_map]
pub static LISTENS: HashMap<u32, Listens, PORTS_MAX> = HashMap::new();

/// What user space is told.
#[btf_map]
pub static LISTEN_EVENTS: RingBuf<ListenEvent, LISTEN_EVENTS_BYTES> = RingBuf::new();

/// Why an invocation told user space nothing.
enum Untold {
    /// Another kind of callback.
    OtherCallback,
    /// Nobody watches this port.
    NotWatched,
    /// Neither IPv4 nor IPv6.
    OtherFamily,
    /// No room in the ring buffer; counted in [`Listens::events_lost_total`].
    RingFull,
}

/// The sockops verdict "go on". The other one, 0, would make the kernel treat the callback as failed.
const PASS: u32 = 1;

/// Entry point. Every way out is [`PASS`].
#[expect(clippy::needless_pass_by_value, reason = "the signature that aya's macro asks for")]
#[sock_ops]
pub fn listen_hook(ctx: SockOpsContext) -> u32 {
    match try_listen_hook(&ctx) {
        Ok(port) => {
            debug!(&ctx, "port {} is listened on", port);
            PASS
        }
        Err(Untold::RingFull) => {
            warn!(&ctx, "port {} is listened on, but the ring buffer is full", ctx.local_port());
            PASS
        }
        Err(Untold::OtherCallback | Untold::NotWatched | Untold::OtherFamily) => PASS,
    }
}

/// Counts and tells. The port, if user space was told.
#[inline(always)]
fn try_listen_hook(ctx: &SockOpsContext) -> Result<u32, Untold> {
    if ctx.op() != BPF_SOCK_OPS_TCP_LISTEN_CB {
        return Err(Untold::OtherCallback);
    }
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
    let (ip4, ip6) = local_address(ctx);
    let address = match family {
        FAMILY_V4 => [ip4, 0, 0, 0],
        FAMILY_V6 => ip6,
        _ => return Err(Untold::OtherFamily),
    };
    // SAFETY: both helpers only read; the first one wants the context that the kernel passed in.
    let (netns_cookie, time_ns) = unsafe { (bpf_get_netns_cookie(ctx.as_ptr()), bpf_ktime_get_ns()) };
    Ok(ListenEvent { time_ns, netns_cookie, address, family, port })
}

/// The local address as either family has it; the one that the socket's family does not have means nothing.
///
/// Volatile and unconditional, or the compiler joins the reads of both families into one through a computed pointer
/// into the context, which the verifier refuses.
#[inline(always)]
fn local_address(ctx: &SockOpsContext) -> (u32, [u32; 4]) {
    // SAFETY: the kernel passed the context in and allows these reads for sockets of any family.
    unsafe {
        let ip6: *const u32 = ptr::addr_of!((*ctx.ops).local_ip6).cast();
        let word = |index| ip6.add(index).read_volatile();
        (ptr::addr_of!((*ctx.ops).local_ip4).read_volatile(), [word(0), word(1), word(2), word(3)])
    }
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
