//! Steering: an `sk_lookup` program that gives new connections on a public address to the backend's own listener.
//!
//! Owns: [`PUBLIC`], [`LISTENERS`]. Must never: drop a packet, or take a connection from somebody else's address; what
//! it does not assign goes to the listener that it would have gone to without the program.
//! Rests on: `sk_lookup` running before the listeners are looked up, for each packet of no connection, which nearly
//! always is a SYN (Linux 5.9); `bpf_sk_assign` refusing
//! a listener of another family, and one when an earlier program has chosen already; the kernel choosing among a
//! `SO_REUSEPORT` group after it.

use core::ptr;

use aya_ebpf::btf_maps::{HashMap, SockMap};
use aya_ebpf::macros::{btf_map, sk_lookup};
use aya_ebpf::programs::SkLookupContext;
use drowse_ebpf::{
    Endpoint, FAMILY_V4, FAMILY_V6, FLOWS_MARGIN, FLOWS_MAX, LISTENERS_MAX, PUBLIC_MAX, Steered,
};

use crate::zero::zero;
use crate::{atomic, flows};

/// The addresses whose new connections are handed off, with counters.
#[btf_map]
pub static PUBLIC: HashMap<Endpoint, Steered, PUBLIC_MAX> = HashMap::new();

/// The backend's listeners.
#[btf_map]
pub static LISTENERS: SockMap<{ LISTENERS_MAX as usize }> = SockMap::new();

/// `IPPROTO_TCP`.
const TCP: u32 = 6;
/// The verdict "go on", with the listener that was assigned or without one.
const PASS: u32 = 1;
/// `fe80::/10` in the first word of an address, network byte order.
const LINK_LOCAL: (u32, u32) = (u32::to_be(0xffc0_0000), u32::to_be(0xfe80_0000));

/// Entry point. Every way out is [`PASS`].
#[expect(clippy::needless_pass_by_value, reason = "the signature that aya's macro asks for")]
#[sk_lookup]
pub fn steer(ctx: SkLookupContext) -> u32 {
    if let Some(public) = wanted(&ctx) {
        count(public, assign(&ctx));
    }
    PASS
}

/// The entry of the address that the packet is for, if it is one of ours.
#[inline(always)]
fn wanted(ctx: &SkLookupContext) -> Option<*mut Steered> {
    // SAFETY: the kernel passed the context in and allows these reads for packets of any family. Volatile and
    // unconditional, see `observe::address`.
    let (protocol, family, port, remote, ip4, ip6) = unsafe {
        let ip6: *const u32 = ptr::addr_of!((*ctx.lookup).local_ip6).cast();
        let remote: *const u32 = ptr::addr_of!((*ctx.lookup).remote_ip6).cast();
        let word = |index| ip6.add(index).read_volatile();
        (
            ptr::addr_of!((*ctx.lookup).protocol).read_volatile(),
            ptr::addr_of!((*ctx.lookup).family).read_volatile(),
            ptr::addr_of!((*ctx.lookup).local_port).read_volatile(),
            remote.read_volatile(),
            ptr::addr_of!((*ctx.lookup).local_ip4).read_volatile(),
            [word(0), word(1), word(2), word(3)],
        )
    };
    if protocol != TCP {
        return None;
    }
    let address = match family {
        FAMILY_V4 => [ip4, 0, 0, 0],
        // A link-local connection is bound to its interface: an inspection would not find it.
        FAMILY_V6 if !is_link_local(remote) && !is_link_local(ip6[0]) => ip6,
        _ => return None,
    };
    entry(address, port, family)
}

/// Whether an IPv6 address with this first word is link-local.
#[inline(always)]
fn is_link_local(word: u32) -> bool {
    word & LINK_LOCAL.0 == LINK_LOCAL.1
}

/// The entry for this address, or for any address, of the port.
#[inline(always)]
pub fn entry(address: [u32; 4], port: u32, family: u32) -> Option<*mut Steered> {
    let any = Endpoint { address: [zero(); 4], port, family };
    PUBLIC.get_ptr_mut(Endpoint { address, port, family }).or_else(|| PUBLIC.get_ptr_mut(any))
}

/// Assigns the first of the backend's listeners that takes a packet of this family.
#[inline(always)]
fn assign(ctx: &SkLookupContext) -> bool {
    if flows::open() >= FLOWS_MAX as u64 - FLOWS_MARGIN {
        return false;
    }
    (0..LISTENERS_MAX).any(|slot| LISTENERS.redirect_sk_lookup(ctx, slot, 0).is_ok())
}

#[inline(always)]
fn count(public: *mut Steered, steered: bool) {
    // SAFETY: the verifier has checked the pointer; the fields are only ever added to.
    unsafe {
        if steered {
            atomic::add(ptr::addr_of_mut!((*public).steered_total), 1);
        } else {
            atomic::add(ptr::addr_of_mut!((*public).passed_total), 1);
        }
    }
}
