//! The flows that were handed off: counted when they open and close, inspected when user space asks.
//!
//! Owns: [`MARKS`], [`FLOWS`], [`SERVICE`]. Must never: run for each packet; an open flow costs nothing until somebody
//! wants to know. The one thing it changes of a socket is to turn keep-alive on.
//! Rests on: socket storage with `BPF_F_CLONE` being inherited by what a listener accepts before the callback
//! `PASSIVE_ESTABLISHED` (`sk_clone_lock` in `net/core/sock.c`; Linux 5.4); a state callback staying on for the life of
//! its socket; `bpf_tcp_sock` (5.1) and `bpf_sk_lookup_tcp` (4.20), which finds a connection in the namespace of the
//! frame that the classifier is run with.

use core::ptr;

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::{
    BPF_F_CLONE, BPF_F_NO_PREALLOC, BPF_NOEXIST, BPF_SK_STORAGE_GET_F_CREATE, BPF_SOCK_OPS_STATE_CB_FLAG,
    SO_KEEPALIVE, SOL_SOCKET, bpf_sock,
};
use aya_ebpf::btf_maps::{Array, HashMap};
use aya_ebpf::helpers::{
    bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_ktime_get_ns, bpf_setsockopt, bpf_sk_release,
    bpf_tcp_sock,
};
use aya_ebpf::macros::{btf_map, classifier};
use aya_ebpf::programs::{SockOpsContext, TcContext};
use aya_log_ebpf::{debug, warn};
use drowse_ebpf::{
    ETHERNET_BYTES, Endpoint, FAMILY_V4, FAMILY_V6, FLOWS_MAX, Flow, INSPECTED_MAX, Mark, Service,
};

use crate::observe::{Address, local_address, remote_address};
use crate::storage::Storage;
use crate::zero::zero;
use crate::{atomic, find, steer};

/// The open flows, by socket cookie. Without preallocation: most services have few.
#[btf_map]
pub static FLOWS: HashMap<u64, Flow, FLOWS_MAX, { BPF_F_NO_PREALLOC as usize }> = HashMap::new();

/// The counters.
#[btf_map]
pub static SERVICE: Array<Service, 1> = Array::new();

/// The cookie of our network namespace; the loader sets it.
// SAFETY: nothing else defines a symbol of this name.
#[unsafe(no_mangle)]
static NETNS_COOKIE: u64 = 0;

/// The marks, inherited.
#[btf_map]
pub static MARKS: Storage<Mark, { (BPF_F_NO_PREALLOC | BPF_F_CLONE) as usize }> = Storage::new();

/// Flows that are open.
#[inline(always)]
pub fn open() -> u64 {
    // SAFETY: a read of one word, which others only add to.
    SERVICE.get_ptr(0).map_or(0, |service| unsafe { ptr::addr_of!((*service).flows_open).read_volatile() })
}

/// Why a connection is not a flow of ours.
enum Uncounted {
    /// drowse accepts it, it came to no public address, or to another network namespace.
    NotOurs,
    /// No room; counted in [`Service::uncounted_total`].
    Full,
}

/// A connection was accepted by somebody.
#[inline(always)]
pub fn established(ctx: &SockOpsContext) {
    match try_established(ctx) {
        Ok(cookie) => debug!(ctx, "flow {} was handed off", cookie),
        Err(Uncounted::Full) => warn!(ctx, "a flow was handed off that there is no room to count"),
        Err(Uncounted::NotOurs) => {}
    }
}

#[inline(always)]
fn try_established(ctx: &SockOpsContext) -> Result<u64, Uncounted> {
    let (local_port, socket_family) = (ctx.local_port(), ctx.family());
    let (local, remote) = (local_address(ctx), remote_address(ctx));
    let (family, local) = as_packets_have_it(socket_family, local);
    let (_, client) = as_packets_have_it(socket_family, remote);
    steer::entry(local, local_port, family).ok_or(Uncounted::NotOurs)?;
    // SAFETY: the kernel passed the context in; the socket is checked before it is used. The helpers only read.
    let (socket, cookie, now_ns) = unsafe {
        let own_netns = ptr::addr_of!(NETNS_COOKIE).read_volatile();
        let socket = ptr::addr_of!((*ctx.ops).__bindgen_anon_2.sk).read_volatile();
        if socket.is_null() || bpf_get_netns_cookie(ctx.as_ptr()) != own_netns || is_proxied(socket) {
            return Err(Uncounted::NotOurs);
        }
        (socket, bpf_get_socket_cookie(ctx.as_ptr()), bpf_ktime_get_ns())
    };
    let service = SERVICE.get_ptr_mut(0).ok_or(Uncounted::NotOurs)?;
    let flow = Flow {
        opened_ns: now_ns,
        last_activity_ns: now_ns,
        bytes_to_backend: zero().into(),
        bytes_to_client: zero().into(),
        client,
        local,
        client_port: u32::from_be(ctx.remote_port()),
        local_port,
        family,
        // SAFETY: the kernel gave the socket to this program.
        bound_dev_if: unsafe { ptr::addr_of!((*socket).bound_dev_if).read_volatile() },
    };
    // SAFETY: the verifier has checked the pointers; totals are added to atomically. The mark comes before the entry, so
    // that no inspection takes the entry for one of another socket.
    unsafe {
        let mark = MARKS.get(socket, BPF_SK_STORAGE_GET_F_CREATE);
        if !mark.is_null() {
            ptr::addr_of_mut!((*mark).cookie).write_volatile(cookie);
        }
        if mark.is_null() || FLOWS.insert(cookie, flow, u64::from(BPF_NOEXIST)).is_err() {
            atomic::add(ptr::addr_of_mut!((*service).uncounted_total), 1);
            return Err(Uncounted::Full);
        }
        atomic::add(ptr::addr_of_mut!((*service).flows_open), 1);
        atomic::add(ptr::addr_of_mut!((*service).flows_total), 1);
        touch(service, now_ns);
    }
    watch(ctx);
    Ok(cookie)
}

/// Whether drowse's own listener accepted `socket`, which then has inherited a mark.
///
/// # Safety
/// `socket` is a full socket that the kernel gave to this program.
#[inline(always)]
unsafe fn is_proxied(socket: *mut bpf_sock) -> bool {
    // SAFETY: the caller's promise.
    !unsafe { MARKS.get(socket, 0) }.is_null()
}

/// Asks to be told of the end of this connection. A flow whose end nobody hears of would keep the backend awake: if this
/// fails, the inspection at a take-over finds it. And a client that vanishes without a word is found out by keep-alive, as
/// on a connection through the proxy.
#[inline(always)]
fn watch(ctx: &SockOpsContext) {
    let flags = ctx.cb_flags() | BPF_SOCK_OPS_STATE_CB_FLAG;
    let _ = ctx.set_cb_flags(flags.cast_signed());
    let mut on = 1_i32;
    let (level, option) = (SOL_SOCKET.cast_signed(), SO_KEEPALIVE.cast_signed());
    // SAFETY: the helper wants the context that the kernel passed in, and reads four bytes.
    let _ = unsafe { bpf_setsockopt(ctx.as_ptr(), level, option, ptr::from_mut(&mut on).cast(), 4) };
}

/// IPv4 on an IPv6 socket is IPv4 to those who look at packets.
///
/// Word by word, or the compiler chooses between two places on the stack, which the verifier allows only those who have
/// `CAP_PERFMON`.
#[inline(always)]
fn as_packets_have_it(family: u32, address: Address) -> (u32, [u32; 4]) {
    let [a, b, c, d] = address.ip6;
    let is_mapped = a == 0 && b == 0 && c == u32::to_be(0xffff);
    let is_v6 = family == FAMILY_V6 && !is_mapped;
    let v4 = if family == FAMILY_V6 { d } else { address.ip4 };
    let family = if is_v6 { FAMILY_V6 } else { FAMILY_V4 };
    let rest = |word| if is_v6 { word } else { 0 };
    (family, [if is_v6 { a } else { v4 }, rest(b), rest(c), rest(d)])
}

/// A socket with a state callback went over to another state.
#[inline(always)]
pub fn state_changed(ctx: &SockOpsContext) {
    /// `BPF_TCP_CLOSE`.
    const CLOSED: u32 = 7;
    if ctx.arg(1) != CLOSED {
        return;
    }
    // SAFETY: the helper wants the context that the kernel passed in.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    let Some(flow) = FLOWS.get_ptr_mut(cookie) else { return };
    let Some(service) = SERVICE.get_ptr_mut(0) else { return };
    // SAFETY: the kernel passed the context in; the verifier has checked the other pointers. The read is of two
    // counters of the socket, the write is under the same rule as in an inspection.
    unsafe {
        let received = ptr::addr_of!((*ctx.ops).bytes_received).read_volatile();
        let acked = ptr::addr_of!((*ctx.ops).bytes_acked).read_volatile();
        let now_ns = bpf_ktime_get_ns();
        account(flow, service, received, acked, now_ns);
        touch(service, now_ns);
        forget(service, cookie);
    }
    debug!(ctx, "flow {} closed", cookie);
}

/// Takes a flow out of the books. Whoever removes the entry counts it, so it is counted once.
///
/// # Safety
/// `service` points to the entry of [`SERVICE`].
#[inline(always)]
unsafe fn forget(service: *mut Service, cookie: u64) {
    if FLOWS.remove(cookie).is_ok() {
        // SAFETY: the caller's promise. Adding the largest number takes one off.
        unsafe { atomic::add(ptr::addr_of_mut!((*service).flows_open), u64::MAX) };
    }
}

/// Writes down how far a connection has got. Returns whether it has moved since.
///
/// A state callback and an inspection may be here at once for one flow: then both add, and the totals are a little too
/// high; nothing is ever counted as silent that moved.
///
/// # Safety
/// The pointers are to entries of [`FLOWS`] and [`SERVICE`].
#[inline(always)]
unsafe fn account(flow: *mut Flow, service: *mut Service, received: u64, acked: u64, now_ns: u64) -> bool {
    // SAFETY: the caller's promise.
    unsafe {
        let (to_backend, to_client) =
            (ptr::addr_of_mut!((*flow).bytes_to_backend), ptr::addr_of_mut!((*flow).bytes_to_client));
        let more_to_backend = received.wrapping_sub(to_backend.read_volatile());
        let more_to_client = acked.wrapping_sub(to_client.read_volatile());
        if more_to_backend == 0 && more_to_client == 0 {
            return false;
        }
        to_backend.write_volatile(received);
        to_client.write_volatile(acked);
        ptr::addr_of_mut!((*flow).last_activity_ns).write_volatile(now_ns);
        atomic::add(ptr::addr_of_mut!((*service).bytes_to_backend), more_to_backend);
        atomic::add(ptr::addr_of_mut!((*service).bytes_to_client), more_to_client);
    }
    true
}

/// # Safety
/// `service` points to the entry of [`SERVICE`].
#[inline(always)]
unsafe fn touch(service: *mut Service, now_ns: u64) {
    // SAFETY: the caller's promise. The last writer's time stays, which is what the field means.
    unsafe { ptr::addr_of_mut!((*service).last_activity_ns).write_volatile(now_ns) };
}

/// Entry point: see [`drowse_ebpf::Inspection`]. Run once for each cookie, by the kernel's own loop (`repeat`): one in the
/// program would be too much for the verifier. The packet's control buffer lives through all runs and counts them.
#[expect(clippy::needless_pass_by_value, reason = "the signature that aya's macro asks for")]
#[classifier]
pub fn inspect_flows(ctx: TcContext) -> i32 {
    // SAFETY: the kernel passed the context in and allows reads and writes of the control buffer.
    let run = unsafe {
        let runs: *mut u32 = ptr::addr_of_mut!((*ctx.skb.skb).cb).cast();
        let run = runs.read_volatile();
        runs.write_volatile(run + 1);
        run as usize
    };
    if run < INSPECTED_MAX
        && let Some(service) = SERVICE.get_ptr_mut(0)
        && let Ok([_, remove]) = ctx.load::<[u32; 2]>(ETHERNET_BYTES)
        && let Ok(cookie) = ctx.load::<u64>(ETHERNET_BYTES + 8 + 8 * run)
    {
        inspect(&ctx, service, cookie, remove != 0);
    }
    0
}

#[inline(always)]
fn inspect(ctx: &TcContext, service: *mut Service, cookie: u64, remove: bool) {
    let Some(flow) = FLOWS.get_ptr_mut(cookie) else { return };
    // SAFETY: the verifier has checked the pointer; these fields are never written once the entry is in the map.
    let (client, local, client_port, bound_dev_if) = unsafe {
        let local = Endpoint { address: (*flow).local, port: (*flow).local_port, family: (*flow).family };
        ((*flow).client, local, (*flow).client_port, (*flow).bound_dev_if)
    };
    let socket = find::socket(ctx, &local, client, client_port);
    // SAFETY: the socket is released before this returns; the other pointers are to entries of the maps.
    unsafe {
        let is_there = !socket.is_null() && is_flow(socket, cookie) && {
            let tcp = bpf_tcp_sock(socket);
            if !tcp.is_null() {
                let received = ptr::addr_of!((*tcp).bytes_received).read_volatile();
                let acked = ptr::addr_of!((*tcp).bytes_acked).read_volatile();
                let now_ns = bpf_ktime_get_ns();
                if account(flow, service, received, acked, now_ns) {
                    touch(service, now_ns);
                }
            }
            true
        };
        if !socket.is_null() {
            bpf_sk_release(socket.cast());
        }
        if !is_there && remove && bound_dev_if == 0 {
            forget(service, cookie);
        }
    }
}

/// Whether `socket` is the one that was counted under `cookie`, and not a later one with the same addresses.
///
/// # Safety
/// `socket` is one that the kernel gave to this program and that was not released yet.
#[inline(always)]
unsafe fn is_flow(socket: *mut bpf_sock, cookie: u64) -> bool {
    // SAFETY: the caller's promise; the mark is checked before it is read.
    unsafe {
        let mark = MARKS.get(socket, 0);
        !mark.is_null() && ptr::addr_of!((*mark).cookie).read_volatile() == cookie
    }
}
