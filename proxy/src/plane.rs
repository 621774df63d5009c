//! Planes: how a flow's bytes travel.
//!
//! Owns: the trait that every plane fulfils. Must never: accept, connect, or decide when a backend stops.
//! Everything works with `copy`; every faster plane is an optimisation under the same tests.

use std::os::fd::OwnedFd;
use std::time::Duration;

use crate::admission::Seat;

pub mod choose;
pub mod copy;
pub mod forward;
pub mod handoff;
pub mod sockmap;
pub mod splice;

/// One client connection with its backend connection, both connected stream sockets.
#[derive(Debug)]
pub struct Flow {
    /// The accepted side. Nothing has been read from it.
    pub client: OwnedFd,
    /// The backend's side. At most a PROXY protocol header has been written to it.
    pub backend: OwnedFd,
    /// The client's place among those of its source, until the flow ends.
    pub seat: Seat,
}

/// A way to move the bytes of flows that the proxy accepted. The plane `handoff` is none: its flows never come here.
///
/// A plane owns the flows that it was given, counts them in the service's [`crate::accounting::Accounting`] (from
/// `open` on, not from when a worker gets round to it) and ends each of them exactly once.
pub trait Plane: Send {
    /// The plane's name as users see it.
    fn name(&self) -> &'static str;

    /// Takes a flow over.
    fn open(&self, flow: Flow);

    /// Resets every open flow: both sides get a RST where the protocol has one.
    fn reset_all(&self);

    /// The backend's processes are gone: every open flow ends as soon as the client has what the backend had sent.
    /// A client that does not close its half would otherwise keep a dead flow open.
    fn backend_gone(&self);

    /// Closes, FIN first, every flow that moved no byte for `silent_for`. A flow that moved one since stays.
    fn close_silent(&self, silent_for: Duration);
}
