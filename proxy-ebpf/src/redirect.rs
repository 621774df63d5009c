//! Redirecting: a verdict program on the two sockets of a proxied flow, which sends what one receives out of the other.
//!
//! Owns: [`SOURCES`], [`SOCKETS`], [`DIRECTIONS`], [`TAKEN`], [`PROXIED`], [`PASSING`]. Must never: drop a byte, let one
//! overtake another, or redirect to a socket that does not keep up. Whatever is not sure is passed to user space.
//!
//! **The guard.** A redirect takes bytes off the source at once, so its sender is held back by nothing; a worker of the
//! kernel writes them to the target. What was redirected and is not in the target's own send queue yet is the backlog:
//! `redirected + written - (write_seq - base)`. Bytes are redirected only while the target's send buffer has room for all of
//! the backlog, and the backlog is small; beyond that they are passed and stay charged to the source, whose window closes as
//! in any TCP connection. (A backlog that waits for a peer to read would also hold up what the target itself receives and
//! passes, because the kernel keeps both in one queue.) Bytes that come while passed ones are outstanding are passed, too,
//! or they would overtake them. User space moves them, publishes how many in [`TAKEN`], and the next segment is redirected
//! again.
//!
//! **No wake-up is lost.** The program adds to `passed` first and then reads what user space has taken; user space publishes
//! first and then reads `passed`. Both with a full barrier between: one of them sees the other.
//!
//! Rests on: the verdict running for one segment of a socket at a time, under its lock (`sk_psock_verdict_data_ready`);
//! `bpf_skc_to_tcp_sock` (Linux 5.9), with offsets out of the kernel's BTF; `bpf_get_socket_cookie` of the receiving socket.
//! A FIN without bytes is a segment of no length. It has done its work when the verdict sees it, and it is dropped: in a
//! queue it is taken for an error of the socket (`sk_psock_backlog`), and what waits there to be sent is lost.

use core::ffi::c_void;
use core::ptr;

use aya_ebpf::bindings::{BPF_F_MMAPABLE, BPF_F_NO_PREALLOC, bpf_sock};
use aya_ebpf::btf_maps::{Array, HashMap, RingBuf, SockHash};
use aya_ebpf::helpers::{
    bpf_get_socket_cookie, bpf_ktime_get_ns, bpf_map_lookup_elem, bpf_sk_release, bpf_skc_to_tcp_sock,
};
use aya_ebpf::macros::{btf_map, stream_verdict};
use aya_ebpf::programs::SkBuffContext;
use drowse_ebpf::{
    BACKLOG_MAX, Direction, PASSING_EVENTS_BYTES, PROXIED_SOCKETS_MAX, PassingEvent, Proxied,
    SEGMENT_OVERHEAD, Taken,
};

use crate::atomic;

/// Socket cookie -> a socket whose received bytes come to [`redirect`].
#[btf_map]
pub static SOURCES: SockHash<u64, PROXIED_SOCKETS_MAX> = SockHash::new();

/// Socket cookie -> a socket of a proxied flow: where redirected bytes go. No program belongs to it.
#[btf_map]
pub static SOCKETS: SockHash<u64, PROXIED_SOCKETS_MAX> = SockHash::new();

/// Socket cookie of the source -> one direction of a flow.
#[btf_map]
pub static DIRECTIONS: HashMap<u64, Direction, PROXIED_SOCKETS_MAX, { BPF_F_NO_PREALLOC as usize }> =
    HashMap::new();

/// Socket cookie of the source -> what user space did for that direction.
#[btf_map]
pub static TAKEN: HashMap<u64, Taken, PROXIED_SOCKETS_MAX, { BPF_F_NO_PREALLOC as usize }> = HashMap::new();

/// The counters of all proxied flows.
#[btf_map]
pub static PROXIED: Array<Proxied, 1, { BPF_F_MMAPABLE as usize }> = Array::new();

/// Directions that begin to pass.
#[btf_map]
pub static PASSING: RingBuf<PassingEvent, PASSING_EVENTS_BYTES> = RingBuf::new();

/// Where `write_seq` lies in the kernel's `struct tcp_sock`; the loader sets it, and the next two.
// SAFETY: nothing else defines a symbol of this name.
#[unsafe(no_mangle)]
pub static WRITE_SEQ_OFFSET: u32 = 0;

/// Where `sk_wmem_queued` lies in `struct sock`, which is the beginning of `struct tcp_sock`.
// SAFETY: as above.
#[unsafe(no_mangle)]
pub static WMEM_QUEUED_OFFSET: u32 = 0;

/// Where `sk_sndbuf` lies there.
// SAFETY: as above.
#[unsafe(no_mangle)]
pub static SNDBUF_OFFSET: u32 = 0;

/// Where `mss_cache` lies in `struct tcp_sock`.
// SAFETY: as above.
#[unsafe(no_mangle)]
pub static MSS_OFFSET: u32 = 0;

/// `SK_PASS`: to the socket's own receive queue, or, after a redirect was asked for, to its target.
const PASS: u32 = 1;
/// `SK_DROP`.
const DROP: u32 = 0;

/// Entry point. [`DROP`] for a FIN without bytes, else [`PASS`].
#[expect(clippy::needless_pass_by_value, reason = "the signature that aya's macro asks for")]
#[stream_verdict]
pub fn redirect(ctx: SkBuffContext) -> u32 {
    let bytes = u64::from(ctx.len());
    if bytes == 0 {
        return DROP;
    }
    // SAFETY: the helper wants the context that the kernel passed in.
    let source = unsafe { bpf_get_socket_cookie(ctx.skb.skb.cast()) };
    if let Some(direction) = DIRECTIONS.get_ptr_mut(source)
        && let Some(service) = PROXIED.get_ptr_mut(0)
    {
        // SAFETY: the verifier has checked the pointers. User space makes an entry before the socket is in the map.
        unsafe { decide(&ctx, source, direction, service, bytes) };
    }
    PASS
}

/// Redirects `bytes`, or counts that they are passed.
///
/// # Safety
/// The pointers are to entries of [`DIRECTIONS`] and [`PROXIED`].
#[inline(always)]
unsafe fn decide(
    ctx: &SkBuffContext,
    source: u64,
    direction: *mut Direction,
    service: *mut Proxied,
    bytes: u64,
) {
    // SAFETY: the caller's promise. The entry's counters have one writer at a time, the service's are added to atomically.
    unsafe {
        let now_ns = bpf_ktime_get_ns();
        ptr::addr_of_mut!((*direction).last_activity_ns).write_volatile(now_ns);
        ptr::addr_of_mut!((*service).last_activity_ns).write_volatile(now_ns);
        let to_client = ptr::addr_of!((*direction).to_client).read_volatile() != 0;
        let passed = ptr::addr_of_mut!((*direction).passed);
        let passed_before = atomic::fetch_add(passed, bytes);
        let taken = taken(source);
        if passed_before == taken.bytes {
            if has_room(direction, taken.written, bytes) {
                let mut target = ptr::addr_of!((*direction).target).read_volatile();
                if SOCKETS.redirect_skb(ctx, &mut target, 0) == i64::from(PASS) {
                    atomic::fetch_add(passed, bytes.wrapping_neg());
                    atomic::add(ptr::addr_of_mut!((*direction).redirected), bytes);
                    let total = if to_client {
                        ptr::addr_of_mut!((*service).redirected_to_client)
                    } else {
                        ptr::addr_of_mut!((*service).redirected_to_backend)
                    };
                    atomic::add(total, bytes);
                    return;
                }
            }
            let event = PassingEvent { token: ptr::addr_of!((*direction).token).read_volatile() };
            if PASSING.output(event, 0).is_err() {
                atomic::add(ptr::addr_of_mut!((*service).events_lost_total), 1);
            }
        }
        let total = if to_client {
            ptr::addr_of_mut!((*service).passed_to_client)
        } else {
            ptr::addr_of_mut!((*service).passed_to_backend)
        };
        atomic::add(total, bytes);
    }
}

/// What user space did.
#[inline(always)]
fn taken(source: u64) -> Taken {
    TAKEN.get_ptr(source).map_or(Taken { bytes: 0, written: 0 }, |taken| {
        // SAFETY: the verifier has checked the pointer; user space replaces entries as a whole.
        unsafe {
            Taken {
                bytes: ptr::addr_of!((*taken).bytes).read_volatile(),
                written: ptr::addr_of!((*taken).written).read_volatile(),
            }
        }
    })
}

/// Whether the target keeps up, and has room.
///
/// # Safety
/// `direction` points to an entry of [`DIRECTIONS`].
#[expect(clippy::cast_possible_truncation, reason = "sequence numbers are compared modulo 2^32")]
#[inline(always)]
unsafe fn has_room(direction: *mut Direction, written: u64, bytes: u64) -> bool {
    // SAFETY: the caller's promise; the fields of the guard have one writer, the verdict on the source.
    unsafe {
        let target = ptr::addr_of!((*direction).target).read_volatile();
        let Some(queue) = send_queue(target) else { return false };
        if ptr::addr_of!((*direction).has_base).read_volatile() == 0 {
            ptr::addr_of_mut!((*direction).base).write_volatile(queue.write_seq);
            ptr::addr_of_mut!((*direction).has_base).write_volatile(1);
        }
        let base = ptr::addr_of!((*direction).base).read_volatile();
        let redirected = ptr::addr_of!((*direction).redirected).read_volatile();
        let given = redirected.wrapping_add(written) as u32;
        let backlog = u64::from(given.wrapping_sub(queue.write_seq.wrapping_sub(base)));
        // Each segment takes memory of its own. How many of them the backlog has is known only when it is empty.
        let segments = ptr::addr_of_mut!((*direction).segments);
        let queued = if backlog == 0 { 1 } else { segments.read_volatile() + 1 };
        segments.write_volatile(queued);
        // Somebody else wrote to the target, if it has got more than it was given; then this is huge, too.
        let backlog = backlog + bytes;
        // They are cut into what the target may send at once.
        let cut = u64::from(queued) + backlog.checked_div(queue.segment.into()).unwrap_or(backlog);
        backlog <= BACKLOG_MAX && backlog + cut * SEGMENT_OVERHEAD <= queue.room
    }
}

/// A socket's send queue.
pub struct SendQueue {
    /// How far it has got.
    write_seq: u32,
    /// The memory that it may still take.
    pub room: u64,
    /// The bytes that a segment has room for, at least.
    pub segment: u32,
}

/// The target's send queue, if it is there.
#[inline(always)]
pub fn send_queue(target: u64) -> Option<SendQueue> {
    look_up(target, |tcp| {
        // SAFETY: the socket is there as long as this runs.
        let word = |offset| unsafe { word(tcp, offset) };
        let write_seq = word(&raw const WRITE_SEQ_OFFSET);
        let queued = word(&raw const WMEM_QUEUED_OFFSET);
        let limit = word(&raw const SNDBUF_OFFSET);
        let segment = word(&raw const MSS_OFFSET);
        SendQueue { write_seq, room: u64::from(limit.saturating_sub(queued)), segment }
    })
}

/// What `read` finds in our socket whose cookie is `cookie`, if it is there.
#[inline(always)]
pub fn look_up<T>(cookie: u64, read: impl FnOnce(*const c_void) -> T) -> Option<T> {
    // SAFETY: the socket is released before this returns.
    unsafe {
        let map = ptr::from_ref(&SOCKETS).cast_mut().cast();
        let socket: *mut bpf_sock = bpf_map_lookup_elem(map, ptr::from_ref(&cookie).cast()).cast();
        if socket.is_null() {
            return None;
        }
        let tcp: *const c_void = bpf_skc_to_tcp_sock(socket.cast()).cast();
        let found = if tcp.is_null() { None } else { Some(read(tcp)) };
        bpf_sk_release(socket.cast());
        found
    }
}

/// The word at `*offset` of a socket.
///
/// # Safety
/// `tcp` is what `bpf_skc_to_tcp_sock` gave; the kernel checks the read like one of its own.
#[inline(always)]
pub unsafe fn word(tcp: *const c_void, offset: *const u32) -> u32 {
    // SAFETY: the caller's promise.
    unsafe { tcp.byte_add(offset.read_volatile() as usize).cast::<u32>().read_volatile() }
}
