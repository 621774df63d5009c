//! Pairing: a held client waits at the gate, then gets a connection to the backend.
//!
//! Owns: clients from accept until they are flows. Must never: read from a client, so that what it sent meanwhile
//! is forwarded in order by the plane; or show a refused connect to a client, which is held on.

use std::future::Future;
use std::io;
use std::os::fd::AsFd as _;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use ppp::{v1, v2};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{SendFlags, send};
use socket2::{Domain, SockAddr, Socket, Type};
use tokio::io::Interest;
use tokio::sync::watch;

use crate::address::Address;
use crate::admission::Seat;
use crate::clock::{self, Monotonic};
use crate::config::{ProxyProtocol, RunArgs};
use crate::plane::Flow;
use crate::sys;

/// How long one connect may take; a backend that is down by a dropped packet is asked again.
const CONNECT_TIME: Duration = Duration::from_secs(5);
/// How long the connection that proved readiness may wait for a client before it is too old to be used.
const SCOUT_TIME: Duration = Duration::from_secs(1);

/// The pause before a client is held anew that epoll had no room for.
const NO_EPOLL_PAUSE: Duration = Duration::from_millis(100);

/// What clients wait for.
#[derive(Clone, Copy, Debug, Default)]
struct Opening {
    open: bool,
    /// Clients of an earlier epoch are reset.
    epoch: u64,
}

impl Opening {
    /// Whether a client of `epoch` has to wait on.
    fn waits(&self, epoch: u64) -> bool {
        !self.open && self.epoch == epoch
    }
}

/// Lets held clients through to the backend, or turns them away.
#[derive(Debug, Default)]
pub struct Gate {
    opening: watch::Sender<Opening>,
    /// The connection that proved the backend ready, for the first client through.
    scout: Mutex<Option<(Socket, Monotonic)>>,
}

/// How a held client's wait ended.
#[derive(Debug)]
pub enum Outcome {
    /// It has its connection to the backend.
    Paired(Flow),
    /// The backend did not take the connection; the client is unharmed.
    Refused(Socket, Seat, io::Error),
    /// The client reset its connection.
    Left,
    /// It was turned away with a reset.
    TurnedAway,
}

impl Gate {
    /// Opens or closes the gate for those who wait now or will.
    pub fn set_open(&self, open: bool) {
        self.opening.send_if_modified(|opening| std::mem::replace(&mut opening.open, open) != open);
    }

    /// Offers the connection that proved the backend ready to the first client through.
    pub fn offer_scout(&self, scout: Option<Socket>) {
        *self.scout.lock().unwrap_or_else(PoisonError::into_inner) =
            scout.map(|socket| (socket, clock::now()));
    }

    /// Resets everybody who waits now.
    pub fn turn_away(&self) {
        self.opening.send_modify(|opening| opening.epoch += 1);
    }

    fn take_scout(&self) -> Option<Socket> {
        let (socket, since) = self.scout.lock().unwrap_or_else(PoisonError::into_inner).take()?;
        (clock::now().saturating_sub(since) < SCOUT_TIME).then_some(socket)
    }
}

/// Holds `client` from this moment until the gate opens, then connects it to the backend.
pub fn hold(
    client: Socket,
    seat: Seat,
    gate: Arc<Gate>,
    run: Arc<RunArgs>,
) -> impl Future<Output = Outcome> + use<> {
    let mut opening = gate.opening.subscribe();
    // Taken now, not when the future is first polled: whoever is turned away meanwhile must hear of it.
    let epoch = opening.borrow().epoch;
    async move {
        if opening.borrow_and_update().waits(epoch) {
            let watched = match sys::watch(client, Interest::ERROR) {
                Ok(watched) => watched,
                Err(error) => {
                    let (client, cause) = error.into_parts();
                    tokio::time::sleep(NO_EPOLL_PAUSE).await;
                    return Outcome::Refused(client, seat, cause);
                }
            };
            tokio::select! {
                biased;
                _ = opening.wait_for(|now| !now.waits(epoch)) => {}
                _ = watched.ready(Interest::ERROR) => return Outcome::Left,
            }
            return pair(watched.into_inner(), seat, &gate, &opening, epoch, &run).await;
        }
        pair(client, seat, &gate, &opening, epoch, &run).await
    }
}

async fn pair(
    client: Socket,
    seat: Seat,
    gate: &Gate,
    opening: &watch::Receiver<Opening>,
    epoch: u64,
    run: &RunArgs,
) -> Outcome {
    if opening.borrow().epoch != epoch {
        reset(client);
        return Outcome::TurnedAway;
    }
    let connected = match gate.take_scout() {
        Some(scout) => Ok(scout),
        None => connect(&run.backend).await,
    };
    if opening.borrow().epoch != epoch {
        reset(client);
        return Outcome::TurnedAway;
    }
    match connected.and_then(|socket| introduce(socket, Some(&client), run.proxy_protocol)) {
        Ok(socket) => Outcome::Paired(Flow { client: client.into(), backend: socket.into(), seat }),
        Err(error) => Outcome::Refused(client, seat, error),
    }
}

/// Ends a connection with a reset, so that the client knows that nobody served it (unix sockets just close).
pub fn reset(socket: Socket) {
    let _unix_sockets_have_none = socket.set_linger(Some(Duration::ZERO));
    drop(socket);
}

/// Connects to the backend: every address that its name has, in order, until one accepts. Non-blocking.
///
/// # Errors
/// The last address's error, or the resolver's.
pub async fn connect(backend: &Address) -> io::Result<Socket> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for address in backend.resolve().await? {
        match tokio::time::timeout(CONNECT_TIME, connect_to(&address)).await {
            Ok(Ok(socket)) => return Ok(socket),
            Ok(Err(error)) => last = error,
            Err(_elapsed) => last = io::ErrorKind::TimedOut.into(),
        }
    }
    Err(last)
}

async fn connect_to(address: &SockAddr) -> io::Result<Socket> {
    let socket = Socket::new(address.domain(), Type::STREAM.nonblocking(), None)?;
    if address.domain() != Domain::UNIX {
        sys::limit_by_send_buffer_alone(socket.as_fd())?;
    }
    match socket.connect(address) {
        Ok(()) => {}
        Err(error) if error.raw_os_error() == Some(Errno::INPROGRESS.raw_os_error()) => {
            // On loopback the handshake is over before connect(2) returns: no need to wait for an event.
            if !is_writable(&socket)? {
                let watched = sys::watch(socket, Interest::WRITABLE)?;
                watched.writable().await?.retain_ready();
                return checked(watched.into_inner());
            }
            return checked(socket);
        }
        Err(error) => return Err(error),
    }
    checked(socket)
}

fn is_writable(socket: &Socket) -> io::Result<bool> {
    let mut fds = [PollFd::new(socket, PollFlags::OUT)];
    Ok(poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }))? > 0)
}

/// A finished connect: its error, if it has one; and no connection of a socket to itself, which TCP makes when an
/// ephemeral port happens to be the backend's and nobody listens there (simultaneous open, RFC 9293 3.5).
fn checked(socket: Socket) -> io::Result<Socket> {
    if let Some(error) = socket.take_error()? {
        return Err(error);
    }
    let local = socket.local_addr()?;
    if local.domain() != Domain::UNIX && local.as_socket() == socket.peer_addr()?.as_socket() {
        return Err(io::ErrorKind::ConnectionRefused.into());
    }
    Ok(socket)
}

/// Writes the PROXY protocol header, if one is wanted; without a client it says that the connection is our own. A
/// fresh socket's send buffer takes it whole.
///
/// # Errors
/// The backend is gone, or the buffer did not take it.
pub fn introduce(
    backend: Socket,
    client: Option<&Socket>,
    header: Option<ProxyProtocol>,
) -> io::Result<Socket> {
    let Some(version) = header else { return Ok(backend) };
    let source = client.and_then(|client| client.peer_addr().ok()?.as_socket());
    let destination = client.and_then(|client| client.local_addr().ok()?.as_socket());
    let ends = source.zip(destination);
    let header = match version {
        ProxyProtocol::V1 => {
            let addresses = ends.map_or(v1::Addresses::Unknown, |(from, to)| (from, to).into());
            addresses.to_string().into_bytes()
        }
        ProxyProtocol::V2 => {
            let addresses = ends.map_or(v2::Addresses::Unspecified, |(from, to)| (from, to).into());
            let command = if ends.is_some() { v2::Command::Proxy } else { v2::Command::Local };
            v2::Builder::with_addresses(v2::Version::Two | command, v2::Protocol::Stream, addresses)
                .build()?
        }
    };
    match send(&backend, &header, SendFlags::NOSIGNAL)? {
        sent if sent == header.len() => Ok(backend),
        _ => Err(io::Error::new(io::ErrorKind::WriteZero, "no room for the PROXY protocol header")),
    }
}
