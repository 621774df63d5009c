//! The ABI between the eBPF programs and user space: map names, keys, values, limits.
//!
//! Owns: every byte that crosses the border between the kernel and `drowse`. Must never: hold logic of either side.
//! Rests on: `repr(C)` without padding (the layout tests see to it), so that both compilers, and `bpftool` reading
//! the BTF, agree on each field.
#![no_std]

/// Names of the eBPF programs, as the object's symbols.
pub mod program {
    /// sockops: tells when somebody begins to listen on a watched port.
    pub const LISTEN_HOOK: &str = "listen_hook";
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

    /// The maps that are pinned for `bpftool`. Ring buffers are left out: they have one reader, which is `drowse`.
    pub const PINNED: [&str; 2] = [PORTS, LISTENS];
}

/// Names of the read-only globals that the loader sets.
pub mod global {
    /// `u8`: log lines above this level (aya-log's numbers: 0 none, 4 debug) are compiled out by the verifier.
    pub const LOG_LEVEL: &str = "AYA_LOG_LEVEL";
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
    use super::{Interest, Listens};

    // SAFETY: repr(C), only integers, no padding: any bytes are a value and all bytes are initialised.
    unsafe impl aya::Pod for Interest {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Listens {}
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
