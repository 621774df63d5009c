//! The short cut: what a peer of a proxied flow sends goes straight into the send queue that it would end in.
//!
//! A flow is client <-> C | B <-> backend, C and B being ours. Of the direction from X to Y (B to C, or C to B) the peer is
//! whoever is connected to X. If that socket is in our network namespace, its messages can skip X and us.
//!
//! Owns: [`ENDS`], [`CREDITS`]. Must never: touch a socket that is not a peer of our own flows; let a message overtake what
//! the peer sent before; give the target more than it has room for (the peer would be told to wait, and nobody would tell
//! it when to go on). Whatever is not sure goes its ordinary way: to X, and from there by a worker of drowse.
//!
//! **Capture.** `renew` looks the peer up by its addresses, in our network namespace, when drowse asks. A sockops program
//! would see every connection to the backend's port, of everybody, and after the fact; this sees exactly one, at a moment
//! of our choice, and leaves all others as they are. A peer is taken only when it was accepted, is ESTABLISHED, has no upper
//! layer protocol, and its place in the stream (`write_seq`) is where X has got to (`copied_seq`): a socket that happened to
//! have these addresses would not have that. And it is no drowse's: of what its kernel redirects to such a socket
//! (`skb_send_sock`) this program would be asked, too, and that drowse would wait in vain to see it in the socket's queue. Its
//! sockets have [`DROWSE_UNSENT_MAX`] from the beginning.
//!
//! **Order.** A worker asks for a renewal when it has written to Y all that it read from X. `write_seq` of the peer and
//! `copied_seq` of X count the same bytes. If they are equal, everything that the peer ever put on its connection is in Y's
//! send queue; that place is `expected`, and while the peer's `write_seq` is there, its messages may go to Y directly:
//!
//! - The peer sends to X while `renew` runs, before or after: its `write_seq` moves, and is not what is expected. Since what
//!   passes moves it, one message that passes ends the short cut by itself, until the next renewal.
//! - `send` decides under the peer's socket lock, and reads its `write_seq` there. A redirected message is in Y's queue when
//!   the peer's system call returns (`tcp_bpf_sendmsg_redir` to egress is synchronous), so that what it does next, be it a
//!   message that passes, a FIN or a reset, comes later. Two threads that send on one socket at once have no order anyway.
//! - The kernel splits a large send into messages, and asks for each. A message that passes and finds no room keeps its
//!   verdict for the next attempt, for which the program does not run: those bytes pass, `write_seq` moves with them.
//! - A message that was let pass and is still being written when a renewal comes in between (its sender sleeps for room):
//!   the rest of it passes, and moves `write_seq`.
//! - Somebody else who writes to the peer's connection without us (another drowse that does this to us) moves it, too.
//!
//! **Room.** What a message will take of Y's memory is charged before it goes, by the size of the segments that it is cut
//! into, and never given back; a renewal lets that go as far as there is room in Y's queue at that moment. `charged` is read
//! before the queue, so that a message counts in one of the two at least; twice the largest is taken off for what was charged
//! and is not there yet: the last one, and one of a second thread. A renewal is asked for before the credit ends, through the
//! same ring buffer as [`crate::redirect`]'s. The new limit is there before the new `expected`. So a redirect finds room, and a
//! peer hears from its own socket alone when to wait and when to go on. (When the kernel runs short of memory for TCP, a
//! redirect may still find none, and a peer that does not block is told to wait; it is told to go on when its own socket says
//! so, or never.) Memory is all that counts: `TCP_NOTSENT_LOWAT` of Y is off.
//!
//! **The end.** A peer stays in the map until it closes, or drowse ends; the short cut is closed by taking its credit. To take
//! it out while its owner closes it is a race inside the kernel (a warning in `sock_map_destroy`, seen on 6.18).
//!
//! Rests on: `bpf_sk_storage_get` and `bpf_skc_to_tcp_sock` in `sk_msg` programs (Linux 5.9), with offsets out of the
//! kernel's BTF; a classifier being allowed to put a socket into a sockhash (5.10). `bpf_sk_release` is not allowed in
//! `sk_msg`, so the target cannot be looked at there.

use core::ffi::c_void;
use core::ptr;

use aya_ebpf::bindings::{BPF_F_NO_PREALLOC, BPF_NOEXIST, BPF_SK_STORAGE_GET_F_CREATE, bpf_sock};
use aya_ebpf::btf_maps::SockHash;
use aya_ebpf::helpers::{bpf_ktime_get_ns, bpf_map_update_elem, bpf_sk_release, bpf_skc_to_tcp_sock};
use aya_ebpf::macros::{btf_map, classifier, sk_msg};
use aya_ebpf::programs::{SkMsgContext, TcContext};
use drowse_ebpf::{
    CREDIT_MIN, Credit, DROWSE_UNSENT_MAX, ETHERNET_BYTES, MESSAGE_OVERHEAD, MESSAGE_SEGMENT_MAX,
    MESSAGES_AHEAD, PROXIED_SOCKETS_MAX, PassingEvent, Renewal, renewed,
};

use crate::redirect::{DIRECTIONS, PASSING, PROXIED, SOCKETS, WRITE_SEQ_OFFSET, look_up, send_queue, word};
use crate::storage::Storage;
use crate::{atomic, find};

/// Cookie of our socket -> the peer that it is connected to, whose messages come to [`send`].
#[btf_map]
pub static ENDS: SockHash<u64, PROXIED_SOCKETS_MAX> = SockHash::new();

/// What those peers may send.
#[btf_map]
pub static CREDITS: Storage<Credit, { BPF_F_NO_PREALLOC as usize }> = Storage::new();

/// Where `copied_seq` lies in the kernel's `struct tcp_sock`; the loader sets it, and the next three.
// SAFETY: nothing else defines a symbol of this name.
#[unsafe(no_mangle)]
static COPIED_SEQ_OFFSET: u32 = 0;

/// Where `notsent_lowat` lies there.
// SAFETY: as above.
#[unsafe(no_mangle)]
static NOTSENT_LOWAT_OFFSET: u32 = 0;

/// Where `icsk_ulp_ops` lies in `struct inet_connection_sock`, which is the beginning of `struct tcp_sock`.
// SAFETY: as above.
#[unsafe(no_mangle)]
static ULP_OPS_OFFSET: u32 = 0;

/// Where `sk_socket` lies in `struct sock`, which is the beginning of that.
// SAFETY: as above.
#[unsafe(no_mangle)]
static SOCKET_OFFSET: u32 = 0;

/// `SK_PASS`: the ordinary way, or, after a redirect was asked for, to its target.
const PASS: u32 = 1;
/// `BPF_TCP_ESTABLISHED`.
const ESTABLISHED: u32 = 1;
/// `BPF_TCP_CLOSE_WAIT`: the peer heard our FIN, and may still send.
const CLOSE_WAIT: u32 = 8;
/// `BPF_TCP_LISTEN`.
const LISTEN: u32 = 10;

/// Entry point: [`PASS`], with a redirect or without.
#[expect(clippy::needless_pass_by_value, reason = "the signature that aya's macro asks for")]
#[sk_msg]
pub fn send(ctx: SkMsgContext) -> u32 {
    // SAFETY: the kernel passed the context in; the verifier checks each pointer.
    unsafe { send_on(&ctx) };
    PASS
}

/// Asks for a redirect if the short cut is open.
///
/// # Safety
/// `ctx` is the context that the kernel passed in.
#[inline(always)]
unsafe fn send_on(ctx: &SkMsgContext) {
    // SAFETY: the caller's promise. The kernel runs this under the peer's socket lock; `charged` has no other writer.
    unsafe {
        let bytes = u64::from(ptr::addr_of!((*ctx.msg).size).read_volatile());
        let peer = ptr::addr_of!((*ctx.msg).__bindgen_anon_3.sk).read_volatile();
        if peer.is_null() {
            return;
        }
        let credit = CREDITS.get(peer, 0);
        if credit.is_null() {
            return;
        }
        let tcp: *const c_void = bpf_skc_to_tcp_sock(peer.cast()).cast();
        if tcp.is_null() || pointer(tcp, &raw const ULP_OPS_OFFSET) != 0 {
            return;
        }
        if word(tcp, &raw const WRITE_SEQ_OFFSET) != ptr::addr_of!((*credit).expected).read_volatile() {
            return;
        }
        let segment = u64::from(ptr::addr_of!((*credit).segment).read_volatile());
        let cost = bytes + (bytes.checked_div(segment).unwrap_or(bytes) + 1) * MESSAGE_OVERHEAD;
        let largest = ptr::addr_of_mut!((*credit).largest);
        if cost > largest.read_volatile() {
            largest.write_volatile(cost);
        }
        // A full barrier: the limit that is read next is not older than what was expected.
        let charged = atomic::fetch_add(ptr::addr_of_mut!((*credit).charged), cost).wrapping_add(cost);
        let limit = ptr::addr_of!((*credit).limit).read_volatile();
        if charged > limit {
            return;
        }
        let mut target = ptr::addr_of!((*credit).target).read_volatile();
        if SOCKETS.redirect_msg(ctx, &mut target, 0) == i64::from(PASS) {
            count(credit, bytes);
            let low = ptr::addr_of!((*credit).low);
            let ends_soon =
                charged > low.read_volatile() || charged.wrapping_add(cost * MESSAGES_AHEAD) > limit;
            if ends_soon && low.read_volatile() != u64::MAX {
                low.cast_mut().write_volatile(u64::MAX);
                ask_for_renewal(credit);
            }
        }
    }
}

/// Tells the worker that the credit comes to its end.
///
/// # Safety
/// `credit` points to a value of [`CREDITS`].
#[inline(always)]
unsafe fn ask_for_renewal(credit: *mut Credit) {
    // SAFETY: the caller's promise.
    let source = unsafe { ptr::addr_of!((*credit).source).read_volatile() };
    let Some(direction) = DIRECTIONS.get_ptr(source) else { return };
    // SAFETY: the verifier has checked the pointer.
    let event = PassingEvent { token: unsafe { ptr::addr_of!((*direction).token).read_volatile() } };
    // If there is no room for it, a message passes sooner or later, and is a reason to renew.
    let _ = PASSING.output(event, 0);
}

/// Counts `bytes` that were redirected.
///
/// # Safety
/// `credit` points to a value of [`CREDITS`].
#[inline(always)]
unsafe fn count(credit: *mut Credit, bytes: u64) {
    // SAFETY: the caller's promise.
    let source = unsafe { ptr::addr_of!((*credit).source).read_volatile() };
    let Some(direction) = DIRECTIONS.get_ptr_mut(source) else { return };
    let Some(service) = PROXIED.get_ptr_mut(0) else { return };
    // SAFETY: the caller's promise; the verifier has checked the other pointers. Counters are added to atomically.
    unsafe {
        let now_ns = bpf_ktime_get_ns();
        ptr::addr_of_mut!((*direction).last_activity_ns).write_volatile(now_ns);
        ptr::addr_of_mut!((*service).last_activity_ns).write_volatile(now_ns);
        atomic::add(ptr::addr_of_mut!((*direction).redirected), bytes);
        let total = if ptr::addr_of!((*direction).to_client).read_volatile() != 0 {
            ptr::addr_of_mut!((*service).redirected_to_client)
        } else {
            ptr::addr_of_mut!((*service).redirected_to_backend)
        };
        atomic::add(total, bytes);
    }
}

/// Entry point: see [`Renewal`].
#[expect(clippy::needless_pass_by_value, reason = "the signature that aya's macro asks for")]
#[classifier]
pub fn renew(ctx: TcContext) -> i32 {
    let Ok(renewal) = ctx.load::<Renewal>(ETHERNET_BYTES) else { return renewed::BAD_RENEWAL.cast_signed() };
    let peer = find::socket(&ctx, &renewal.peer, renewal.own, renewal.own_port);
    if peer.is_null() {
        return renewed::NOBODY.cast_signed();
    }
    // SAFETY: the socket is released before this returns.
    unsafe {
        let answer = renew_at(peer, &renewal);
        bpf_sk_release(peer.cast());
        answer.cast_signed()
    }
}

/// Opens the short cut of `peer`, if it may be.
///
/// # Safety
/// `peer` is a socket that the kernel gave to this program and that was not released yet.
#[inline(always)]
unsafe fn renew_at(peer: *mut bpf_sock, renewal: &Renewal) -> u32 {
    // SAFETY: the caller's promise; the verifier checks each pointer.
    unsafe {
        let credit = CREDITS.get(peer, 0);
        if renewal.ends != 0 {
            if !credit.is_null() {
                ptr::addr_of_mut!((*credit).limit).write_volatile(0);
            }
            return renewed::NOT_YET;
        }
        let begins = credit.is_null() || ptr::addr_of!((*credit).source).read_volatile() != renewal.source;
        let state = ptr::addr_of!((*peer).state).read_volatile();
        if state == LISTEN {
            return renewed::NOBODY;
        }
        if state != ESTABLISHED && (begins || state != CLOSE_WAIT) {
            return renewed::NOT_YET;
        }
        let tcp: *const c_void = bpf_skc_to_tcp_sock(peer.cast()).cast();
        if tcp.is_null() {
            return renewed::NOBODY;
        }
        if pointer(tcp, &raw const ULP_OPS_OFFSET) != 0 {
            return renewed::LAYERED;
        }
        if begins && word(tcp, &raw const NOTSENT_LOWAT_OFFSET) == DROWSE_UNSENT_MAX {
            return renewed::DROWSE;
        }
        if pointer(tcp, &raw const SOCKET_OFFSET) == 0 {
            return renewed::NOT_YET;
        }
        let written = word(tcp, &raw const WRITE_SEQ_OFFSET);
        if look_up(renewal.source, |tcp| word(tcp, &raw const COPIED_SEQ_OFFSET)) != Some(written) {
            return renewed::NOT_YET;
        }
        let credit = CREDITS.get(peer, BPF_SK_STORAGE_GET_F_CREATE);
        if credit.is_null() {
            return renewed::NOBODY;
        }
        // A full barrier: what is read of the target's queue next is not older.
        let charged = atomic::fetch_add(ptr::addr_of_mut!((*credit).charged), 0);
        let Some(queue) = send_queue(renewal.target) else { return renewed::NOT_YET };
        if queue.room < CREDIT_MIN {
            return renewed::NOT_YET;
        }
        // One message may be under way, and one of a second thread. Each was within such a credit when it was let go.
        let under_way = 2 * ptr::addr_of!((*credit).largest).read_volatile();
        let credit_bytes = queue.room - (queue.room / 2).min(under_way);
        if begins {
            ptr::addr_of_mut!((*credit).source).write_volatile(renewal.source);
            ptr::addr_of_mut!((*credit).target).write_volatile(renewal.target);
            let (map, key) = (ptr::from_ref(&ENDS).cast_mut().cast(), ptr::from_ref(&renewal.source).cast());
            if bpf_map_update_elem(map, key, peer.cast(), u64::from(BPF_NOEXIST)) != 0 {
                return renewed::NOBODY;
            }
            if let Some(service) = PROXIED.get_ptr_mut(0) {
                atomic::add(ptr::addr_of_mut!((*service).peers_total), 1);
            }
        }
        ptr::addr_of_mut!((*credit).segment).write_volatile(queue.segment.min(MESSAGE_SEGMENT_MAX));
        ptr::addr_of_mut!((*credit).limit).write_volatile(charged.wrapping_add(credit_bytes));
        ptr::addr_of_mut!((*credit).low)
            .write_volatile(charged.wrapping_add(credit_bytes - credit_bytes / 4));
        // A full barrier again: whoever sees what is expected now sees the limit.
        atomic::fetch_add(ptr::addr_of_mut!((*credit).charged), 0);
        ptr::addr_of_mut!((*credit).expected).write_volatile(written);
        renewed::RENEWED
    }
}

/// The pointer at `*offset` of a socket, which is not followed.
///
/// # Safety
/// As for [`word`].
#[inline(always)]
unsafe fn pointer(tcp: *const c_void, offset: *const u32) -> u64 {
    // SAFETY: the caller's promise.
    unsafe { tcp.byte_add(offset.read_volatile() as usize).cast::<u64>().read_volatile() }
}
