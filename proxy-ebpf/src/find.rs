//! Finding a socket by its addresses, as the kernel itself would for a packet.
//!
//! Owns: `find_listener`, which user space runs (`BPF_PROG_TEST_RUN`) to learn who accepts connections to the backend's
//! address. Must never: be attached anywhere.
//! Rests on: a test run of a classifier taking place in the network namespace of the process that asks (Linux 4.12);
//! a classifier being allowed to put a socket into a sockmap (5.10).

use core::ptr;

use aya_ebpf::bindings::{bpf_sock, bpf_sock_tuple};
use aya_ebpf::helpers::{bpf_map_update_elem, bpf_sk_lookup_tcp, bpf_sk_release};
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use drowse_ebpf::{ETHERNET_BYTES, Endpoint, FAMILY_V4, FAMILY_V6, LISTENERS_MAX, Search, found};

use crate::steer::LISTENERS;

/// `BPF_F_CURRENT_NETNS`: the namespace of the frame.
const CURRENT_NETNS: u64 = u64::MAX;
/// `BPF_TCP_LISTEN`.
const LISTEN: u32 = 10;

/// The addresses of a packet as `bpf_sk_lookup_tcp` takes them, all in network byte order.
#[repr(C)]
struct Tuple4 {
    source: u32,
    destination: u32,
    source_port: u16,
    destination_port: u16,
}

/// As [`Tuple4`], for IPv6.
#[repr(C)]
struct Tuple6 {
    source: [u32; 4],
    destination: [u32; 4],
    source_port: u16,
    destination_port: u16,
}

/// The socket that would get a packet from `source` to `local`: a connection, else a listener. Null if there is none;
/// otherwise it must be released.
#[expect(clippy::cast_possible_truncation, reason = "a port has 16 bits")]
#[inline(always)]
pub fn socket(ctx: &TcContext, local: &Endpoint, source: [u32; 4], source_port: u32) -> *mut bpf_sock {
    let (source_port, destination_port) = ((source_port as u16).to_be(), (local.port as u16).to_be());
    match local.family {
        FAMILY_V4 => {
            let mut tuple =
                Tuple4 { source: source[0], destination: local.address[0], source_port, destination_port };
            lookup(ctx, ptr::from_mut(&mut tuple).cast(), size_of::<Tuple4>())
        }
        FAMILY_V6 => {
            let mut tuple = Tuple6 { source, destination: local.address, source_port, destination_port };
            lookup(ctx, ptr::from_mut(&mut tuple).cast(), size_of::<Tuple6>())
        }
        _ => ptr::null_mut(),
    }
}

#[expect(clippy::cast_possible_truncation, reason = "a tuple has at most 36 bytes")]
#[inline(always)]
fn lookup(ctx: &TcContext, tuple: *mut bpf_sock_tuple, bytes: usize) -> *mut bpf_sock {
    // SAFETY: the tuple is as long as is said, and the context is the kernel's.
    unsafe { bpf_sk_lookup_tcp(ctx.skb.skb.cast(), tuple, bytes as u32, CURRENT_NETNS, 0) }
}

/// Entry point: see [`Search`].
#[expect(clippy::needless_pass_by_value, reason = "the signature that aya's macro asks for")]
#[classifier]
pub fn find_listener(ctx: TcContext) -> i32 {
    let Ok(search) = ctx.load::<Search>(ETHERNET_BYTES) else { return found::BAD_SEARCH.cast_signed() };
    if search.slot >= LISTENERS_MAX {
        return found::BAD_SEARCH.cast_signed();
    }
    let socket = socket(&ctx, &search.backend, search.backend.address, search.source_port);
    if socket.is_null() {
        return found::NOBODY.cast_signed();
    }
    // SAFETY: the socket is released before this returns.
    unsafe {
        let answer = if (*socket).state != LISTEN {
            found::NOBODY
        } else if (*socket).bound_dev_if != 0 {
            found::BOUND
        } else {
            store(socket, search.slot)
        };
        bpf_sk_release(socket.cast());
        answer.cast_signed()
    }
}

/// Puts a listener into its slot.
///
/// # Safety
/// `listener` is a listener that the kernel gave to this program and that was not released yet.
#[inline(always)]
unsafe fn store(listener: *mut bpf_sock, slot: u32) -> u32 {
    // SAFETY: the caller's promise.
    unsafe {
        let map = ptr::from_ref(&LISTENERS).cast_mut().cast();
        match bpf_map_update_elem(map, ptr::from_ref(&slot).cast(), listener.cast(), 0) {
            0 => found::STORED,
            _ => found::REFUSED,
        }
    }
}
