//! The sockops program: one attachment to the root cgroup, for everything that drowse wants to hear of TCP sockets.
//!
//! Owns: the entry point. Must never: change a socket, a reply or a verdict; what it calls looks, counts and tells.
//! Rests on: the kernel calling it for every TCP socket below the cgroup, hence the test of `op` first; and on the
//! verdict 1 for "go on" (0 would make the kernel treat the callback as failed).

use core::ptr;

use aya_ebpf::bindings::{
    BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB, BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_TCP_LISTEN_CB,
};
use aya_ebpf::macros::sock_ops;
use aya_ebpf::programs::SockOpsContext;

use crate::{flows, listen_hook};

/// The verdict "go on".
const PASS: u32 = 1;

/// Entry point. Every way out is [`PASS`].
#[expect(clippy::needless_pass_by_value, reason = "the signature that aya's macro asks for")]
#[sock_ops]
pub fn observe(ctx: SockOpsContext) -> u32 {
    match ctx.op() {
        BPF_SOCK_OPS_TCP_LISTEN_CB => listen_hook::listened(&ctx),
        BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB => flows::established(&ctx),
        BPF_SOCK_OPS_STATE_CB => flows::state_changed(&ctx),
        _ => {}
    }
    PASS
}

/// One end of a connection as either family has it; what the socket's family does not have means nothing.
#[derive(Clone, Copy)]
pub struct Address {
    /// IPv4, network byte order.
    pub ip4: u32,
    /// IPv6, network byte order.
    pub ip6: [u32; 4],
}

/// The local address.
#[inline(always)]
pub fn local_address(ctx: &SockOpsContext) -> Address {
    // SAFETY: the kernel passed the context in; the pointers are to its own fields.
    unsafe { address(ptr::addr_of!((*ctx.ops).local_ip4), ptr::addr_of!((*ctx.ops).local_ip6).cast()) }
}

/// The peer's address.
#[inline(always)]
pub fn remote_address(ctx: &SockOpsContext) -> Address {
    // SAFETY: as above.
    unsafe { address(ptr::addr_of!((*ctx.ops).remote_ip4), ptr::addr_of!((*ctx.ops).remote_ip6).cast()) }
}

/// Reads an address of either family.
///
/// Volatile and unconditional, or the compiler joins the reads of both families into one through a computed pointer
/// into the context, which the verifier refuses.
///
/// # Safety
/// The pointers are to one and to four words of a context, which the kernel lets be read for sockets of any family.
#[inline(always)]
unsafe fn address(ip4: *const u32, ip6: *const u32) -> Address {
    // SAFETY: the caller's promise.
    unsafe {
        let word = |index| ip6.add(index).read_volatile();
        Address { ip4: ip4.read_volatile(), ip6: [word(0), word(1), word(2), word(3)] }
    }
}
