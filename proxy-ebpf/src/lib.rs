//! The ABI between the eBPF programs and user space: map names, keys, values, limits.
//!
//! Owns: every byte that crosses the border between the kernel and `drowse`. Must never: hold logic of either side.
//! Rests on: `repr(C)` without padding (the layout tests see to it), so that both compilers, and `bpftool` reading
//! the BTF, agree on each field.
#![no_std]

/// Names of the eBPF programs, as the object's symbols.
pub mod program {
    /// sockops: tells when somebody begins to listen on a watched port, and counts the flows that are handed off.
    pub const OBSERVE: &str = "observe";
    /// `sk_lookup`: gives new connections on a public address to the backend's own listener.
    pub const STEER: &str = "steer";
    /// Classifier, run by user space with a [`crate::Search`]: finds the backend's listener.
    pub const FIND_LISTENER: &str = "find_listener";
    /// Classifier, run by user space with a [`crate::Inspection`]: brings counters of open flows up to date.
    pub const INSPECT_FLOWS: &str = "inspect_flows";
    /// `sk_skb` verdict: sends what one socket of a proxied flow receives out of the other.
    pub const REDIRECT: &str = "redirect";
    /// `sk_msg`: gives what a peer of a proxied flow sends straight to the socket that it would come out of in the end.
    pub const SEND: &str = "send";
    /// Classifier, run by user space with a [`crate::Renewal`]: lets `send` do so, as far as there is room.
    pub const RENEW: &str = "renew";
}

/// Names of the maps, as the object's symbols and as the names of their pins.
pub mod map {
    /// Hash map: port ([`u32`](core::primitive::u32), host byte order) -> [`crate::Interest`]. User space writes it.
    pub const PORTS: &str = "PORTS";
    /// Hash map: port -> [`crate::Listens`]. User space makes the entries, the listen hook counts in them.
    pub const LISTENS: &str = "LISTENS";
    /// Ring buffer of [`crate::ListenEvent`]. Read by one process only.
    pub const LISTEN_EVENTS: &str = "LISTEN_EVENTS";
    /// Ring buffer of the programs' log lines, in aya-log's format.
    pub const LOG: &str = "AYA_LOGS";
    /// Hash map: [`crate::Endpoint`] -> [`crate::Steered`]. The addresses whose new connections are handed off. User
    /// space makes the entries, `steer` counts in them.
    pub const PUBLIC: &str = "PUBLIC";
    /// Sockmap with [`crate::LISTENERS_MAX`] slots: the backend's listeners. `find_listener` puts them in, the kernel
    /// takes them out when they close.
    pub const LISTENERS: &str = "LISTENERS";
    /// Socket storage: [`crate::Mark`]. User space puts one on drowse's own listeners, and what they accept inherits it:
    /// so a proxied connection is told from one that was handed off, which `observe` marks with its cookie.
    pub const MARKS: &str = "MARKS";
    /// Hash map: socket cookie ([`u64`](core::primitive::u64)) -> [`crate::Flow`], the open flows that were handed off.
    pub const FLOWS: &str = "FLOWS";
    /// Array with one entry: [`crate::Service`], the counters of all flows that were handed off.
    pub const SERVICE: &str = "SERVICE";

    /// Sockhash: socket cookie ([`u64`](core::primitive::u64)) -> a socket of a proxied flow whose received bytes come to
    /// `redirect`.
    pub const SOURCES: &str = "SOURCES";
    /// Sockhash: socket cookie -> a socket of a proxied flow. No program belongs to this map: here the programs find the
    /// socket that they redirect to.
    pub const SOCKETS: &str = "SOCKETS";
    /// Hash map: socket cookie of the source -> [`crate::Direction`]. User space makes and removes the entries, `redirect`
    /// counts in them.
    pub const DIRECTIONS: &str = "DIRECTIONS";
    /// Hash map: socket cookie of the source -> [`crate::Taken`]. User space alone writes it.
    pub const TAKEN: &str = "TAKEN";
    /// Array with one entry: [`crate::Proxied`]. `redirect` adds to it, and user space, which maps it into its memory.
    pub const PROXIED: &str = "PROXIED";
    /// Ring buffer of [`crate::PassingEvent`]. Read by one process only.
    pub const PASSING: &str = "PASSING";
    /// Sockhash: socket cookie of the source -> its peer, a socket of somebody else whose messages come to `send`. `renew`
    /// puts them in; they leave when they are closed.
    pub const ENDS: &str = "ENDS";
    /// Socket storage of those peers: [`crate::Credit`]. `renew` makes it, `send` draws on it.
    pub const CREDITS: &str = "CREDITS";

    /// The maps that are pinned for `bpftool` alone. Ring buffers are left out: they have one reader, which is `drowse`.
    pub const SHOWN: [&str; 6] = [PORTS, LISTENS, PUBLIC, DIRECTIONS, TAKEN, PROXIED];
    /// The maps that are pinned and taken over by the next drowse of the same name, because flows that were handed off
    /// outlive the one that did it. Together or not at all.
    pub const KEPT: [&str; 3] = [MARKS, FLOWS, SERVICE];
}

/// Names of the read-only globals that the loader sets.
pub mod global {
    /// `u8`: log lines above this level (aya-log's numbers: 0 none, 4 debug) are compiled out by the verifier.
    pub const LOG_LEVEL: &str = "AYA_LOG_LEVEL";
    /// `u64`: the cookie of our network namespace (`SO_NETNS_COOKIE`). Connections of other ones are not counted.
    pub const NETNS_COOKIE: &str = "NETNS_COOKIE";
    /// `u32`: where `write_seq` lies in `struct tcp_sock`, by the kernel's BTF.
    pub const WRITE_SEQ_OFFSET: &str = "WRITE_SEQ_OFFSET";
    /// `u32`: where `sk_wmem_queued` lies in `struct sock`.
    pub const WMEM_QUEUED_OFFSET: &str = "WMEM_QUEUED_OFFSET";
    /// `u32`: where `sk_sndbuf` lies in `struct sock`.
    pub const SNDBUF_OFFSET: &str = "SNDBUF_OFFSET";
    /// `u32`: where `copied_seq` lies in `struct tcp_sock`.
    pub const COPIED_SEQ_OFFSET: &str = "COPIED_SEQ_OFFSET";
    /// `u32`: where `mss_cache` lies in `struct tcp_sock`.
    pub const MSS_OFFSET: &str = "MSS_OFFSET";
    /// `u32`: where `notsent_lowat` lies in `struct tcp_sock`.
    pub const NOTSENT_LOWAT_OFFSET: &str = "NOTSENT_LOWAT_OFFSET";
    /// `u32`: where `icsk_ulp_ops` lies in `struct inet_connection_sock`.
    pub const ULP_OPS_OFFSET: &str = "ULP_OPS_OFFSET";
    /// `u32`: where `sk_socket` lies in `struct sock`.
    pub const SOCKET_OFFSET: &str = "SOCKET_OFFSET";
}

/// The most ports that one object watches.
pub const PORTS_MAX: usize = 64;

/// Bytes of the ring buffer of listen events: one page. A power of two and a multiple of the page size.
pub const LISTEN_EVENTS_BYTES: usize = 4096;

/// `AF_INET`, as in [`ListenEvent::family`].
pub const FAMILY_V4: u32 = 2;

/// `AF_INET6`, as in [`ListenEvent::family`].
pub const FAMILY_V6: u32 = 10;

// A ring buffer holds at least one event for each watched port, each with its header of 8 bytes.
const _: () = assert!(LISTEN_EVENTS_BYTES >= PORTS_MAX * (size_of::<ListenEvent>() + 8));

/// The most public addresses of one service.
pub const PUBLIC_MAX: usize = 64;

/// Slots for the backend's listeners.
pub const LISTENERS_MAX: u32 = 16;

/// The most handed-off flows that are open at a time; beyond it new connections are left to the proxy.
pub const FLOWS_MAX: usize = 65_536;

/// Flows that may be opened by handshakes under way when [`FLOWS_MAX`] less these are open already.
pub const FLOWS_MARGIN: u64 = 4096;

/// The flows that one run of `inspect_flows` looks at.
pub const INSPECTED_MAX: usize = 64;

const _: () = assert!(FLOWS_MARGIN < FLOWS_MAX as u64);

/// The most proxied flows that are redirected at a time; those beyond it are moved by user space.
pub const PROXIED_FLOWS_MAX: usize = 4096;

/// Sockets of these flows.
pub const PROXIED_SOCKETS_MAX: usize = 2 * PROXIED_FLOWS_MAX;

/// The most bytes of one direction that are redirected and not in the target's send queue yet.
pub const BACKLOG_MAX: u64 = 128 * 1024;

/// What a segment in a send queue takes beyond its bytes: its headers, and its `struct sk_buff`.
pub const SEGMENT_OVERHEAD: u64 = 2048;

/// What a message in a send queue takes beyond its bytes when it got there from a peer: a `struct sk_buff` with room for
/// headers and for its copy (1280 bytes on 64 bits), for each segment that it is cut into.
pub const MESSAGE_OVERHEAD: u64 = 1280;

/// The most bytes of a message that share one such `struct sk_buff`, as far as we count on it.
pub const MESSAGE_SEGMENT_MAX: u32 = 32 * 1024;

/// A renewal is asked for when so many messages more like the last one would be beyond the limit, or three quarters are used.
pub const MESSAGES_AHEAD: u64 = 8;

/// With less room in its send queue than this a target is not given messages of a peer.
pub const CREDIT_MIN: u64 = 16 * 1024;

/// Bytes of the ring buffer of directions that begin to pass.
pub const PASSING_EVENTS_BYTES: usize = 256 * 1024;

// Every direction may begin to pass at once, and again before the first event is read, each with its header of 8 bytes.
const _: () = assert!(PASSING_EVENTS_BYTES >= 2 * PROXIED_SOCKETS_MAX * (size_of::<PassingEvent>() + 8));
const _: () = assert!(PASSING_EVENTS_BYTES.is_power_of_two());

/// The length of an Ethernet header: the first bytes of what user space hands to a classifier, not used.
pub const ETHERNET_BYTES: usize = 14;

/// An address of this machine, and a port.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Endpoint {
    /// The address in network byte order; for [`FAMILY_V4`] only the first word counts. All zero: any address.
    pub address: [u32; 4],
    /// The port, host byte order.
    pub port: u32,
    /// The family of the packets, not of the socket: [`FAMILY_V4`] also for IPv4 on an IPv6 socket.
    pub family: u32,
}

/// What `steer` counted for one public address.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Steered {
    /// Packets of no connection, nearly all of them SYNs, that were given to the backend's listener.
    pub steered_total: u64,
    /// Those that were left to drowse: no listener of the backend fits, or there are too many flows.
    pub passed_total: u64,
}

/// The mark of a socket.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mark {
    /// The key of its flow in [`map::FLOWS`]; zero on drowse's listeners and on what they accepted.
    pub cookie: u64,
}

/// An open flow that was handed off.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flow {
    /// When the connection was established, `CLOCK_MONOTONIC`.
    pub opened_ns: u64,
    /// When an inspection last saw that bytes had moved, `CLOCK_MONOTONIC`.
    pub last_activity_ns: u64,
    /// Bytes from the client that the kernel has received, at the last inspection.
    pub bytes_to_backend: u64,
    /// Bytes to the client that it has acknowledged, at the last inspection.
    pub bytes_to_client: u64,
    /// The client's address, network byte order; for [`FAMILY_V4`] only the first word counts.
    pub client: [u32; 4],
    /// The address that the client connected to, as above.
    pub local: [u32; 4],
    /// The client's port, host byte order.
    pub client_port: u32,
    /// The port that the client connected to, host byte order.
    pub local_port: u32,
    /// The family of the packets: [`FAMILY_V4`] or [`FAMILY_V6`].
    pub family: u32,
    /// The index of the network interface that the socket is bound to, or zero. An inspection does not find those that are.
    pub bound_dev_if: u32,
}

/// The counters of all flows of a service that were handed off. Bytes and activity of flows that are open are as of the
/// last inspection. As in `TCP_INFO`, the end of a stream (FIN) counts as one byte.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Service {
    /// Flows, ever.
    pub flows_total: u64,
    /// Flows that are open: the entries of [`map::FLOWS`].
    pub flows_open: u64,
    /// Bytes from clients.
    pub bytes_to_backend: u64,
    /// Bytes to clients.
    pub bytes_to_client: u64,
    /// When a flow last opened, closed, or was seen to have moved bytes, `CLOCK_MONOTONIC`. Zero: never.
    pub last_activity_ns: u64,
    /// Flows that there was no room for in [`map::FLOWS`].
    pub uncounted_total: u64,
}

/// What user space asks `find_listener`: whoever accepts connections to this address shall be put into a slot. The
/// answer, the program's return value, is a [`found`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Search {
    /// The backend's address.
    pub backend: Endpoint,
    /// The slot of [`map::LISTENERS`].
    pub slot: u32,
    /// The source port of the connection that is thought of. Different ones find different members of a
    /// `SO_REUSEPORT` group.
    pub source_port: u32,
}

/// The answers of `find_listener`.
pub mod found {
    /// Nobody listens there, in this network namespace.
    pub const NOBODY: u32 = 0;
    /// The listener is in the slot.
    pub const STORED: u32 = 1;
    /// The kernel does not take the listener into a sockmap: it is of MPTCP, or has an upper layer protocol.
    pub const REFUSED: u32 = 2;
    /// The listener is bound to a network interface; what it accepts would be, too.
    pub const BOUND: u32 = 3;
    /// The question was not understood.
    pub const BAD_SEARCH: u32 = 4;
}

/// What user space asks `inspect_flows`: bring these flows up to date. The program is run once for each cookie.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Inspection {
    /// How many cookies follow, and how often the program is to be run.
    pub count: u32,
    /// Not zero: remove flows whose connection is not there. Only a drowse that takes over asks for this, because
    /// nobody was told of what closed in between.
    pub remove: u32,
    /// Keys of [`map::FLOWS`].
    pub cookies: [u64; INSPECTED_MAX],
}

impl Search {
    /// The question as a frame for a classifier: an empty Ethernet header and the fields.
    #[must_use]
    pub fn to_frame(&self) -> [u8; ETHERNET_BYTES + size_of::<Self>()] {
        let mut frame = [0; ETHERNET_BYTES + size_of::<Self>()];
        let [a, b, c, d] = self.backend.address;
        let words = [a, b, c, d, self.backend.port, self.backend.family, self.slot, self.source_port];
        let payload = frame.split_at_mut(ETHERNET_BYTES).1;
        for (place, word) in payload.chunks_exact_mut(4).zip(words) {
            place.copy_from_slice(&word.to_ne_bytes());
        }
        frame
    }
}

impl Inspection {
    /// The question about the first [`INSPECTED_MAX`] of `cookies`.
    #[must_use]
    pub fn of(cookies: &[u64], remove: bool) -> Self {
        let mut inspection = Self { count: 0, remove: u32::from(remove), cookies: [0; INSPECTED_MAX] };
        for (place, cookie) in inspection.cookies.iter_mut().zip(cookies) {
            *place = *cookie;
            inspection.count += 1;
        }
        inspection
    }

    /// The question as a frame for a classifier: an empty Ethernet header and the fields.
    #[must_use]
    pub fn to_frame(&self) -> [u8; ETHERNET_BYTES + size_of::<Self>()] {
        let mut frame = [0; ETHERNET_BYTES + size_of::<Self>()];
        let (head, cookies) = frame.split_at_mut(ETHERNET_BYTES).1.split_at_mut(8);
        for (place, word) in head.chunks_exact_mut(4).zip([self.count, self.remove]) {
            place.copy_from_slice(&word.to_ne_bytes());
        }
        for (place, cookie) in cookies.chunks_exact_mut(8).zip(self.cookies) {
            place.copy_from_slice(&cookie.to_ne_bytes());
        }
        frame
    }
}

/// One direction of a proxied flow, from the moment that the kernel moves its bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Direction {
    /// Bytes that were redirected.
    pub redirected: u64,
    /// Bytes that were passed to user space, which moves them.
    pub passed: u64,
    /// When bytes last came, `CLOCK_MONOTONIC`. Zero: never.
    pub last_activity_ns: u64,
    /// The cookie of the socket that the bytes go to.
    pub target: u64,
    /// What user space calls this direction.
    pub token: u64,
    /// `write_seq` of the target before the first byte.
    pub base: u32,
    /// Not zero: `base` is known.
    pub has_base: u32,
    /// Not zero: the bytes go to the client.
    pub to_client: u32,
    /// Segments that were redirected since the target's send queue had everything.
    pub segments: u32,
}

/// What user space did for one direction.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Taken {
    /// Bytes that were passed and that user space has moved on, all of them.
    pub bytes: u64,
    /// Bytes that user space wrote to the target.
    pub written: u64,
}

/// What a peer of a proxied flow may still send straight to the target, and since when.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Credit {
    /// The cookie of our socket that it is connected to: the key of its [`Direction`].
    pub source: u64,
    /// The cookie of the socket that its messages go to.
    pub target: u64,
    /// What its messages took of the target's memory, by our reckoning, since the beginning.
    pub charged: u64,
    /// How far [`Credit::charged`] may go.
    pub limit: u64,
    /// How far it goes before a renewal is asked for; [`u64::MAX`] once it is.
    pub low: u64,
    /// The most that a message was charged. One or two like it may be on their way to the target's queue.
    pub largest: u64,
    /// The peer's `write_seq` when everything that it had written to its connection was in the target's send queue.
    pub expected: u32,
    /// The bytes of a message that share a `struct sk_buff` in the target's queue, at least.
    pub segment: u32,
}

/// What user space asks `renew`, when it has moved on all that it received from a peer. The answer, the program's return
/// value, is a [`renewed`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Renewal {
    /// The peer's own address.
    pub peer: Endpoint,
    /// The address of our socket that it is connected to, of the same family, network byte order.
    pub own: [u32; 4],
    /// The port of our socket, host byte order.
    pub own_port: u32,
    /// Not zero: close the short cut; the answer is [`renewed::NOT_YET`].
    pub ends: u32,
    /// The cookie of our socket.
    pub source: u64,
    /// The cookie of the target.
    pub target: u64,
}

/// `TCP_NOTSENT_LOWAT` of drowse's own sockets in flows: no limit. It is what one drowse knows another one's sockets by, so
/// they have it before they have a peer: what is accepted, from its listener.
pub const DROWSE_UNSENT_MAX: u32 = u32::MAX;

/// The answers of `renew`.
pub mod renewed {
    /// Nobody in this network namespace has that address, or the kernel does not take it into a sockmap.
    pub const NOBODY: u32 = 0;
    /// The peer's messages go straight to the target.
    pub const RENEWED: u32 = 1;
    /// Not now: something that the peer wrote is on its way, the target has no room, or the peer was not accepted yet.
    pub const NOT_YET: u32 = 2;
    /// Never: the peer has an upper layer protocol (kTLS), so what its owner sends is not what is to arrive.
    pub const LAYERED: u32 = 3;
    /// Never: the peer is a drowse's own socket, to which the kernel may redirect already: [`crate::DROWSE_UNSENT_MAX`].
    pub const DROWSE: u32 = 4;
    /// The question was not understood.
    pub const BAD_RENEWAL: u32 = 5;
}

impl Renewal {
    /// The question as a frame for a classifier: an empty Ethernet header and the fields.
    #[must_use]
    pub fn to_frame(&self) -> [u8; ETHERNET_BYTES + size_of::<Self>()] {
        let mut frame = [0; ETHERNET_BYTES + size_of::<Self>()];
        let (head, cookies) = frame.split_at_mut(ETHERNET_BYTES).1.split_at_mut(48);
        let rest = [self.own_port, self.ends];
        let peer = self.peer.address.into_iter().chain([self.peer.port, self.peer.family]);
        let words = peer.chain(self.own).chain(rest);
        for (place, word) in head.chunks_exact_mut(4).zip(words) {
            place.copy_from_slice(&word.to_ne_bytes());
        }
        for (place, cookie) in cookies.chunks_exact_mut(8).zip([self.source, self.target]) {
            place.copy_from_slice(&cookie.to_ne_bytes());
        }
        frame
    }
}

/// A direction begins to pass.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PassingEvent {
    /// Its [`Direction::token`].
    pub token: u64,
}

/// The counters of all proxied flows of a service that the kernel moves, or moved.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Proxied {
    /// Flows, ever.
    pub flows_total: u64,
    /// Flows that are open.
    pub flows_open: u64,
    /// Bytes from clients that were redirected.
    pub redirected_to_backend: u64,
    /// Bytes to clients that were redirected.
    pub redirected_to_client: u64,
    /// Bytes from clients that were passed to user space.
    pub passed_to_backend: u64,
    /// Bytes to clients that were passed to user space.
    pub passed_to_client: u64,
    /// When bytes last came, `CLOCK_MONOTONIC`. Zero: never.
    pub last_activity_ns: u64,
    /// Flows that were left to user space, because the kernel does not take their sockets or has no room.
    pub refused_total: u64,
    /// Events of directions that begin to pass that found no room in the ring buffer.
    pub events_lost_total: u64,
    /// Peers of flows that were let send straight to the other side.
    pub peers_total: u64,
}

impl PassingEvent {
    /// Reads one event as it lies in the ring buffer. `None` if `bytes` is not an event of this ABI.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (token, rest) = take_u64(bytes)?;
        rest.is_empty().then_some(Self { token })
    }
}

/// What user space wants to know about a port.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Interest {
    /// Not zero: tell when somebody begins to listen on the port.
    pub listen: u32,
}

/// What the listen hook counted for one port.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Listens {
    /// Sockets that began to listen on the port, in any network namespace.
    pub listens_total: u64,
    /// Of these, the ones that user space was not told of, because the ring buffer was full.
    pub events_lost_total: u64,
    /// When the last one began to listen, `CLOCK_MONOTONIC`. Zero: none yet.
    pub last_listen_ns: u64,
    /// The cookie of the network namespace of the last one (`SO_NETNS_COOKIE`).
    pub netns_cookie: u64,
    /// The address family of the last one: [`FAMILY_V4`] or [`FAMILY_V6`].
    pub family: u32,
    /// Keeps the size a multiple of 8.
    pub reserved: u32,
}

/// Somebody began to listen on a watched port.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ListenEvent {
    /// When, `CLOCK_MONOTONIC`.
    pub time_ns: u64,
    /// The cookie of the listener's network namespace (`SO_NETNS_COOKIE`).
    pub netns_cookie: u64,
    /// The listener's address in network byte order; for [`FAMILY_V4`] only the first word counts.
    pub address: [u32; 4],
    /// The address family: [`FAMILY_V4`] or [`FAMILY_V6`].
    pub family: u32,
    /// The port, host byte order.
    pub port: u32,
}

impl ListenEvent {
    /// Reads one event as it lies in the ring buffer. `None` if `bytes` is not an event of this ABI.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        if bytes.len() != size_of::<Self>() {
            return None;
        }
        let (time_ns, rest) = take_u64(bytes)?;
        let (netns_cookie, mut rest) = take_u64(rest)?;
        let mut address = [0; 4];
        for word in &mut address {
            (*word, rest) = take_u32(rest)?;
        }
        let (family, rest) = take_u32(rest)?;
        let (port, _) = take_u32(rest)?;
        Some(Self { time_ns, netns_cookie, address, family, port })
    }
}

fn take_u64(bytes: &[u8]) -> Option<(u64, &[u8])> {
    bytes.split_first_chunk().map(|(word, rest)| (u64::from_ne_bytes(*word), rest))
}

fn take_u32(bytes: &[u8]) -> Option<(u32, &[u8])> {
    bytes.split_first_chunk().map(|(word, rest)| (u32::from_ne_bytes(*word), rest))
}

#[cfg(feature = "user")]
#[expect(unsafe_code, reason = "aya asks for its Pod marker on map values")]
mod pod {
    use super::{Direction, Endpoint, Flow, Interest, Listens, Mark, Proxied, Service, Steered, Taken};

    // SAFETY: repr(C), only integers, no padding: any bytes are a value and all bytes are initialised.
    unsafe impl aya::Pod for Interest {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Listens {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Endpoint {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Steered {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Mark {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Flow {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Service {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Direction {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Taken {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Proxied {}
}

#[cfg(test)]
mod tests {
    use core::mem::offset_of;

    use super::*;

    #[test]
    fn interest_has_no_padding() {
        assert_eq!(size_of::<Interest>(), 4);
        assert_eq!(offset_of!(Interest, listen), 0);
    }

    #[test]
    fn listens_has_no_padding() {
        assert_eq!(size_of::<Listens>(), 40);
        assert_eq!(align_of::<Listens>(), 8);
        assert_eq!(offset_of!(Listens, listens_total), 0);
        assert_eq!(offset_of!(Listens, events_lost_total), 8);
        assert_eq!(offset_of!(Listens, last_listen_ns), 16);
        assert_eq!(offset_of!(Listens, netns_cookie), 24);
        assert_eq!(offset_of!(Listens, family), 32);
        assert_eq!(offset_of!(Listens, reserved), 36);
    }

    #[test]
    fn listen_event_has_no_padding() {
        assert_eq!(size_of::<ListenEvent>(), 40);
        assert_eq!(align_of::<ListenEvent>(), 8);
        assert_eq!(offset_of!(ListenEvent, time_ns), 0);
        assert_eq!(offset_of!(ListenEvent, netns_cookie), 8);
        assert_eq!(offset_of!(ListenEvent, address), 16);
        assert_eq!(offset_of!(ListenEvent, family), 32);
        assert_eq!(offset_of!(ListenEvent, port), 36);
    }

    #[test]
    fn what_is_kept_has_no_padding() {
        assert_eq!(size_of::<Endpoint>(), 24);
        assert_eq!(size_of::<Steered>(), 16);
        assert_eq!(size_of::<Mark>(), 8);
        assert_eq!(size_of::<Flow>(), 4 * 8 + 2 * 16 + 4 * 4);
        assert_eq!(offset_of!(Flow, client), 32);
        assert_eq!(offset_of!(Flow, client_port), 64);
        assert_eq!(size_of::<Service>(), 48);
        assert_eq!(offset_of!(Service, last_activity_ns), 32);
    }

    #[test]
    fn a_search_is_written_field_by_field() {
        let backend = Endpoint { address: [1, 2, 3, 4], port: 5, family: 6 };
        let frame = Search { backend, slot: 7, source_port: 8 }.to_frame();
        assert_eq!(size_of::<Search>(), 32);
        assert_eq!(offset_of!(Search, slot), 24);
        assert_eq!(offset_of!(Search, source_port), 28);
        for (expected, word) in (1_u32..).zip(frame[ETHERNET_BYTES..].chunks_exact(4)) {
            assert_eq!(word, expected.to_ne_bytes());
        }
    }

    #[test]
    fn an_inspection_is_written_field_by_field() {
        assert_eq!(offset_of!(Inspection, remove), 4);
        assert_eq!(offset_of!(Inspection, cookies), 8);
        let frame = Inspection::of(&[7, 8], true).to_frame();
        let payload = &frame[ETHERNET_BYTES..];
        assert_eq!(payload[..4], 2_u32.to_ne_bytes());
        assert_eq!(payload[4..8], 1_u32.to_ne_bytes());
        assert_eq!(payload[8..16], 7_u64.to_ne_bytes());
        assert_eq!(payload[16..24], 8_u64.to_ne_bytes());
        assert!(payload[24..].iter().all(|byte| *byte == 0));
        let many: [u64; INSPECTED_MAX + 1] = [1; INSPECTED_MAX + 1];
        assert_eq!(Inspection::of(&many, false).count as usize, INSPECTED_MAX);
    }

    #[test]
    fn a_renewal_is_written_field_by_field() {
        assert_eq!(size_of::<Credit>(), 56);
        assert_eq!(size_of::<Renewal>(), 64);
        assert_eq!(offset_of!(Renewal, own), 24);
        assert_eq!(offset_of!(Renewal, own_port), 40);
        assert_eq!(offset_of!(Renewal, source), 48);
        let peer = Endpoint { address: [1, 2, 3, 4], port: 5, family: 6 };
        let own = [7, 8, 9, 10];
        let renewal = Renewal { peer, own, own_port: 11, ends: 12, source: 13, target: 14 };
        let frame = renewal.to_frame();
        let (words, cookies) = frame[ETHERNET_BYTES..].split_at(48);
        for (expected, word) in (1_u32..).zip(words.chunks_exact(4)) {
            assert_eq!(word, expected.to_ne_bytes());
        }
        for (expected, cookie) in (13_u64..).zip(cookies.chunks_exact(8)) {
            assert_eq!(cookie, expected.to_ne_bytes());
        }
    }

    #[test]
    fn an_event_is_read_field_by_field() {
        let mut bytes = [0_u8; size_of::<ListenEvent>()];
        bytes[0..8].copy_from_slice(&1_u64.to_ne_bytes());
        bytes[8..16].copy_from_slice(&2_u64.to_ne_bytes());
        for (index, word) in [3_u32, 4, 5, 6, FAMILY_V6, 8080].iter().enumerate() {
            bytes[16 + 4 * index..20 + 4 * index].copy_from_slice(&word.to_ne_bytes());
        }
        let event =
            ListenEvent { time_ns: 1, netns_cookie: 2, address: [3, 4, 5, 6], family: FAMILY_V6, port: 8080 };
        assert_eq!(ListenEvent::from_bytes(&bytes), Some(event));
    }

    #[test]
    fn an_event_of_another_size_is_refused() {
        let bytes = [0_u8; size_of::<ListenEvent>() + 1];
        assert_eq!(ListenEvent::from_bytes(&bytes), None);
        assert_eq!(ListenEvent::from_bytes(&bytes[..size_of::<ListenEvent>() - 1]), None);
        assert_eq!(ListenEvent::from_bytes(&[]), None);
    }
}
