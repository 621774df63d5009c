//! TCP connections of drowse with itself, and waiting for what happens on them.
//!
//! Owns: the sockets of the probes, and the bytes that are sent over them. Must never: wait for longer than the deadline, or
//! leave a connection behind, not even one in `TIME_WAIT`.
//! Rests on: a close with a linger time of zero, which resets (tcp(7)); `reno`, which every kernel has and which does not
//! pace, as the system's own congestion control may.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::retry_on_intr;
use rustix::net::sockopt;
use socket2::{Domain, Protocol, Socket, Type};

use crate::clock::{self, Monotonic};
use crate::plane::copy::{self, Received, Sent};

/// Bytes that a socket may have queued each way; the kernel doubles it. Small, so that few bytes fill it.
pub(super) const QUEUE_BYTES: usize = 32 * 1024;

/// Connections that may wait to be accepted, ours and strangers'.
const BACKLOG: i32 = 16;

/// Between two looks at something that no descriptor tells of.
const LOOK_AGAIN: Duration = Duration::from_millis(1);

/// A listener on the loopback, and the time until which everything must have happened.
#[derive(Debug)]
pub(super) struct Loopback {
    listener: Socket,
    address: SocketAddr,
    pub(super) deadline: Deadline,
}

impl Loopback {
    /// Listens on the loopback's IPv4 address, or else on its IPv6 address.
    pub(super) fn open(within: Duration) -> anyhow::Result<Self> {
        let deadline = Deadline { at: clock::now() + within, within };
        let v4 = Self::on(Ipv4Addr::LOCALHOST.into(), deadline);
        let Err(v4) = v4 else { return v4 };
        let v6 = Self::on(Ipv6Addr::LOCALHOST.into(), deadline);
        v6.map_err(|v6| {
            anyhow::anyhow!(
                "no connection over the loopback can be made to try the kernel with (is `lo` up?): \
                 {v4:#}; {v6:#}"
            )
        })
    }

    fn on(address: IpAddr, deadline: Deadline) -> anyhow::Result<Self> {
        let listen = || -> anyhow::Result<Self> {
            let any_port = SocketAddr::new(address, 0);
            let listener = new_socket(any_port)?;
            listener.bind(&any_port.into())?;
            listener.listen(BACKLOG)?;
            listener.set_nonblocking(true)?;
            let address = listener.local_addr()?.as_socket().context("the listener has no address")?;
            let loopback = Self { listener, address, deadline };
            loopback.pair()?;
            Ok(loopback)
        };
        listen().with_context(|| address.to_string())
    }

    /// A connection: the socket that connected, and the one that was accepted.
    pub(super) fn pair(&self) -> anyhow::Result<(OwnedFd, OwnedFd)> {
        let near = new_socket(self.address)?;
        near.connect_timeout(&self.address.into(), self.deadline.left().max(LOOK_AGAIN))?;
        let name = near.local_addr()?.as_socket();
        loop {
            ensure!(
                self.deadline.wait(&[(self.listener.as_fd(), PollFlags::IN)]),
                "no connection is accepted"
            );
            // Whoever else connects is closed.
            let (far, peer) = self.listener.accept()?;
            tune(&far)?;
            if peer.as_socket() == name {
                near.set_nonblocking(true)?;
                return Ok((near.into(), far.into()));
            }
        }
    }
}

fn new_socket(address: SocketAddr) -> anyhow::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    tune(&socket)?;
    Ok(socket)
}

fn tune(socket: &Socket) -> anyhow::Result<()> {
    socket.set_linger(Some(Duration::ZERO))?;
    socket.set_tcp_nodelay(true)?;
    socket.set_send_buffer_size(QUEUE_BYTES)?;
    socket.set_recv_buffer_size(QUEUE_BYTES)?;
    // Without it the probes take longer.
    let _ = sockopt::set_tcp_congestion(socket, "reno");
    Ok(())
}

/// The time until which everything must have happened.
#[derive(Clone, Copy, Debug)]
pub(super) struct Deadline {
    at: Monotonic,
    within: Duration,
}

impl Deadline {
    fn left(self) -> Duration {
        self.at.saturating_sub(clock::now())
    }

    /// Waits for one of these events. Returns whether there is one, in time.
    pub(super) fn wait(self, events: &[(impl AsFd, PollFlags)]) -> bool {
        wait_for(events, self.left()) && !self.left().is_zero()
    }

    /// Waits for one of these events, or for the time in which something may have happened that none of them tells of.
    /// Returns whether the deadline is still to come.
    pub(super) fn wait_briefly(self, events: &[(impl AsFd, PollFlags)]) -> bool {
        let _ = wait_for(events, self.left().min(LOOK_AGAIN));
        !self.left().is_zero()
    }

    /// Looks until `look` sees it. Returns whether it did.
    pub(super) fn until(self, mut look: impl FnMut() -> bool) -> bool {
        let nothing: [(OwnedFd, PollFlags); 0] = [];
        loop {
            if look() {
                return true;
            }
            if !self.wait_briefly(&nothing) {
                return look();
            }
        }
    }

    /// Receives the bytes of the stream from `position` on, `count` of them.
    pub(super) fn expect(self, at: &OwnedFd, position: u64, count: usize) -> anyhow::Result<()> {
        let mut got = Vec::with_capacity(count);
        while got.len() < count {
            let mut buffer = vec![0; count - got.len()];
            match copy::receive(at, &mut buffer) {
                Received::Bytes(bytes) => got.extend(buffer.into_iter().take(bytes)),
                Received::Nothing => ensure!(
                    self.wait(&[(at, PollFlags::IN)]),
                    "{} of {count} bytes came in {:?}",
                    got.len(),
                    self.within
                ),
                Received::Finished => bail!("the stream ended after {} of {count} bytes", got.len()),
                Received::Reset => bail!("the connection failed after {} of {count} bytes", got.len()),
            }
        }
        ensure!(got == stream(position, count), "the bytes came in another order");
        Ok(())
    }
}

/// Waits for one of these events. Returns whether there is one.
pub(super) fn wait_for(events: &[(impl AsFd, PollFlags)], time: Duration) -> bool {
    let mut fds: Vec<_> = events.iter().map(|(fd, events)| PollFd::new(fd, *events)).collect();
    let time = Timespec::try_from(time).ok();
    retry_on_intr(|| poll(&mut fds, time.as_ref())).is_ok_and(|ready| ready > 0)
}

/// The bytes of a stream from `position` on, `count` of them: no two parts are alike.
pub(super) fn stream(position: u64, count: usize) -> Vec<u8> {
    let byte = |position: u64| {
        let mixed = position.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        (mixed ^ (mixed >> 32)).wrapping_mul(0xbf58_476d_1ce4_e5b9).to_be_bytes()[0]
    };
    (position..).take(count).map(byte).collect()
}

/// Sends the bytes of the stream from `position` on, `count` of them, for which there is room.
pub(super) fn give(to: &OwnedFd, position: u64, count: usize) -> anyhow::Result<()> {
    let sent = copy::send(to, &stream(position, count));
    ensure!(sent == Sent::Bytes(count), "a socket with room for {count} bytes does not take them ({sent:?})");
    Ok(())
}
