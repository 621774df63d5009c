//! Listeners: adopted from systemd or bound by ourselves, and polled only while there is room.
//!
//! Owns: the listening sockets. Must never: accept a client that there is no room for; it waits in the backlog.
//! systemd passes listeners as descriptors 3 and up, see `sd_listen_fds(3)`.

use std::future::Future;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use anyhow::{Context as _, bail};
use rustix::net::{SocketFlags, SocketType, sockopt};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::address::{self, Address};
use crate::plane::choose::{ListenerFacts, Peculiarity};
use crate::sys;

/// How long accepting pauses when the system is out of descriptors or memory.
const PAUSE: Duration = Duration::from_millis(100);
/// The backlog of sockets that we bind: as large as the system allows (`net.core.somaxconn`).
const BACKLOG: i32 = i32::MAX;
/// How long handshakes that are under way when a listener is sealed may take to complete.
pub const SEAL_TIME: Duration = Duration::from_millis(250);
/// What the name of a unix listener's file ends in while it is sealed.
const SEALED: &str = "sealed";

/// A client's connection, as accept(2) returns it.
#[derive(Debug)]
pub struct Accepted {
    /// The connection, non-blocking.
    pub socket: Socket,
    /// The client's address; `None`: it has none, as those of a unix socket.
    pub from: Option<IpAddr>,
}

/// All listeners of one service.
#[derive(Debug)]
pub struct Listeners {
    all: Vec<Listener>,
    /// The listener to ask first, so that a busy one does not starve the others.
    next: usize,
    /// Out of descriptors: no accept before this timer fires.
    pause: Option<Pin<Box<tokio::time::Sleep>>>,
}

#[derive(Debug)]
struct Listener {
    socket: AsyncFd<Socket>,
    /// How people know it: the address, and systemd's name for it.
    name: String,
    /// systemd holds it too.
    passed: bool,
    /// The socket file that we made and remove again.
    made: Option<PathBuf>,
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Some(path) = &self.made {
            let _gone_already = std::fs::remove_file(path);
        }
    }
}

impl Listeners {
    /// Takes over the listeners that systemd passed (see [`passed`]) and binds `addresses`.
    ///
    /// # Errors
    /// A descriptor is no listening stream socket, an address cannot be bound.
    pub async fn open(passed: Vec<Passed>, addresses: &[Address]) -> anyhow::Result<Self> {
        let mut listeners =
            passed.into_iter().map(|(fd, name)| Listener::adopt(fd, &name)).collect::<Result<Vec<_>, _>>()?;
        listeners.extend(bind_all(addresses, BACKLOG).await?);
        Ok(Self { all: listeners, next: 0, pause: None })
    }

    /// Binds `addresses` for other peers than clients; `backlog` of them may wait.
    ///
    /// # Errors
    /// An address cannot be bound.
    pub async fn bind(addresses: &[Address], backlog: i32) -> anyhow::Result<Self> {
        Ok(Self { all: bind_all(addresses, backlog).await?, next: 0, pause: None })
    }

    /// What is listened on, for people.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.all.iter().map(|listener| listener.name.as_str())
    }

    /// What a hand-off must know of each listener.
    ///
    /// # Errors
    /// A socket cannot be asked.
    pub fn facts(&self) -> io::Result<Vec<ListenerFacts>> {
        let here = sys::own_netns_cookie().ok();
        self.all.iter().map(|listener| listener.facts(here)).collect()
    }

    /// Duplicates of the TCP listeners' descriptors, to be closed soon: while one is open, its listener is.
    ///
    /// # Errors
    /// Out of descriptors.
    pub fn tcp_sockets(&self) -> io::Result<Vec<OwnedFd>> {
        let tcp = self.all.iter().filter(|listener| listener.is_tcp());
        tcp.map(|listener| listener.socket.as_fd().try_clone_to_owned()).collect()
    }

    /// Whether one of the listeners is at `address`: a proxy that connects to itself never ends.
    #[must_use]
    pub fn is_at(&self, address: &SockAddr) -> bool {
        self.all.iter().filter_map(|listener| listener.socket.get_ref().local_addr().ok()).any(
            |local| match (local.as_socket(), address.as_socket()) {
                (Some(local), Some(address)) => {
                    let any = local.ip().is_unspecified() && address.ip().to_canonical().is_loopback();
                    local.port() == address.port() && (any || local.ip() == address.ip())
                }
                (None, None) => local.as_pathname().is_some() && local.as_pathname() == address.as_pathname(),
                (Some(_), None) | (None, Some(_)) => false,
            },
        )
    }

    /// The next client's connection. Cancel safe.
    ///
    /// # Errors
    /// Accepting is not possible just now (no descriptors, no memory) and pauses; reported once per pause.
    pub async fn accept(&mut self) -> io::Result<Accepted> {
        std::future::poll_fn(|context| self.poll_accept(context)).await
    }

    /// A client that waits in a backlog right now.
    #[must_use]
    pub fn try_accept(&self) -> Option<Accepted> {
        self.all.iter().find_map(|listener| listener.accept_now().ok())
    }

    /// Begins to close listeners of our own so that nobody is lost: nobody new gets in from now on, and for
    /// [`SEAL_TIME`] those can be accepted whose handshake was under way. [`Listeners::unseal`] undoes it. Returns
    /// whether there is such a listener; those of systemd's are left alone, whoever waits there wakes the next drowse.
    pub fn seal(&mut self) -> bool {
        self.set_sealed(true)
    }

    /// Undoes [`Listeners::seal`].
    pub fn unseal(&mut self) {
        self.set_sealed(false);
    }

    /// Lets go of the listeners that systemd holds, too.
    pub fn release_passed(&mut self) {
        self.all.retain(|listener| !listener.passed);
    }

    fn set_sealed(&mut self, sealed: bool) -> bool {
        let ours = self.all.iter_mut().filter(|listener| !listener.passed);
        ours.map(|listener| listener.set_sealed(sealed)).count() > 0
    }

    fn poll_accept(&mut self, context: &mut Context<'_>) -> Poll<io::Result<Accepted>> {
        if let Some(pause) = &mut self.pause {
            ready!(pause.as_mut().poll(context));
            self.pause = None;
        }
        let count = self.all.len();
        for offset in 0..count {
            let index = (self.next + offset) % count;
            let Some(listener) = self.all.get(index) else { continue };
            match listener.poll_accept(context) {
                Poll::Pending => {}
                Poll::Ready(Ok(client)) => {
                    self.next = index + 1;
                    return Poll::Ready(Ok(client));
                }
                Poll::Ready(Err(error)) => {
                    self.pause = Some(Box::pin(tokio::time::sleep(PAUSE)));
                    return Poll::Ready(Err(error));
                }
            }
        }
        Poll::Pending
    }
}

impl Listener {
    fn adopt(fd: OwnedFd, name: &str) -> anyhow::Result<Self> {
        let listens = sockopt::socket_acceptconn(&fd).unwrap_or(false);
        if !listens || sockopt::socket_type(&fd).ok() != Some(SocketType::STREAM) {
            bail!(
                "descriptor {} ({name}) is no listening stream socket: the .socket unit needs ListenStream= and Accept=no",
                fd.as_raw_fd()
            );
        }
        let socket = Socket::from(fd);
        let local = socket.local_addr().context("read the address of a listener")?;
        let name = match name {
            "" | "unknown" => address::display(&local),
            _ => format!("{} ({name})", address::display(&local)),
        };
        Self::new(socket, name, true, None)
    }

    fn bind(address: &SockAddr, name: &str, backlog: i32) -> anyhow::Result<Self> {
        let socket = Socket::new(address.domain(), Type::STREAM, None).context("create a listener")?;
        if address.domain() != Domain::UNIX {
            socket.set_reuse_address(true).context("set SO_REUSEADDR")?;
        }
        if address.domain() == Domain::IPV6 {
            let both_families = address.as_socket_ipv6().is_some_and(|v6| v6.ip().is_unspecified());
            socket.set_only_v6(!both_families).context("set IPV6_V6ONLY")?;
        }
        let made = address.as_pathname();
        if let Some(path) = made {
            remove_stale(path)?;
        }
        if let Err(error) = socket.bind(address) {
            bail!("cannot listen on {name}: {}", bind_advice(&error));
        }
        socket.listen(backlog).with_context(|| format!("listen on {name}"))?;
        Self::new(socket, name.to_owned(), false, made.map(Path::to_owned))
    }

    fn new(socket: Socket, name: String, passed: bool, made: Option<PathBuf>) -> anyhow::Result<Self> {
        socket.set_nonblocking(true).context("set a listener to non-blocking")?;
        // Connections inherit it. Neither unix sockets nor MPTCP have it.
        let _ = sys::limit_by_send_buffer_alone(socket.as_fd());
        Ok(Self {
            socket: sys::watch(socket, Interest::READABLE).context("watch a listener")?,
            name,
            passed,
            made,
        })
    }

    fn is_tcp(&self) -> bool {
        self.socket.get_ref().local_addr().is_ok_and(|address| address.as_socket().is_some())
    }

    /// `here`: the cookie of our own network namespace, if the kernel tells it.
    fn facts(&self, here: Option<u64>) -> io::Result<ListenerFacts> {
        let socket = self.socket.get_ref();
        let address = socket.local_addr()?.as_socket();
        let peculiarity = if address.is_none() {
            None
        } else if socket.protocol()? != Some(Protocol::TCP) {
            Some(Peculiarity::NotPlainTcp)
        } else if here.is_none() {
            Some(Peculiarity::UnknownNetns)
        } else if sys::netns_cookie(socket.as_fd()).ok() != here {
            Some(Peculiarity::OtherNetns)
        } else if socket.reuse_port()? {
            Some(Peculiarity::SharesPort)
        } else {
            socket.device()?.map(|_| Peculiarity::BoundToDevice)
        };
        let only_v6 = address.is_some_and(|address| address.is_ipv6()) && socket.only_v6()?;
        Ok(ListenerFacts { name: self.name.clone(), address, only_v6, peculiarity })
    }

    /// A TCP listener drops SYNs, so that a client retries as after any loss; the file of a unix listener is hidden
    /// under another name. (An abstract name cannot be hidden.)
    fn set_sealed(&mut self, sealed: bool) {
        let Some(path) = &mut self.made else {
            let _unix_sockets_have_no_packets = sys::drop_new_connections(self.socket.as_fd(), sealed);
            return;
        };
        let other = if sealed { path.with_added_extension(SEALED) } else { path.with_extension("") };
        if std::fs::rename(&*path, &other).is_ok() {
            *path = other;
        }
    }

    fn poll_accept(&self, context: &mut Context<'_>) -> Poll<io::Result<Accepted>> {
        loop {
            let mut guard = ready!(self.socket.poll_read_ready(context))?;
            match guard.try_io(|_| self.accept_now()) {
                Ok(Ok(client)) => return Poll::Ready(Ok(client)),
                Ok(Err(error)) if is_clients_fault(&error) => {}
                Ok(Err(error)) => return Poll::Ready(Err(error)),
                Err(_would_block) => {}
            }
        }
    }

    fn accept_now(&self) -> io::Result<Accepted> {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        // The address as accept(2) has it: a client that reset its connection has none any more.
        let (socket, from) = rustix::net::acceptfrom_with(self.socket.get_ref(), flags)?;
        let from = from.and_then(|address| SocketAddr::try_from(address).ok()).map(|address| address.ip());
        Ok(Accepted { socket: socket.into(), from })
    }
}

async fn bind_all(addresses: &[Address], backlog: i32) -> anyhow::Result<Vec<Listener>> {
    let mut listeners = Vec::new();
    for address in addresses {
        let resolved = address
            .resolve_to_listen()
            .await
            .with_context(|| format!("resolve {address}, to listen there"))?;
        for one in &resolved {
            listeners.push(Listener::bind(one, &address::display(one), backlog)?);
        }
    }
    Ok(listeners)
}

/// A descriptor that systemd passed, with its name.
pub type Passed = (OwnedFd, String);

/// The descriptors that systemd passed. They are made close-on-exec, so that no child gets them. To be called before
/// anything else is opened: a wrong `LISTEN_FDS` would else give us our own descriptors a second time.
///
/// # Errors
/// `LISTEN_FDS` is no number, or names a descriptor that is not open.
pub fn passed() -> anyhow::Result<Vec<Passed>> {
    let passed =
        sd_notify::listen_fds_with_names().context("adopt the descriptors that LISTEN_FDS promises")?;
    let adopt = |(fd, name)| Ok((sys::adopt_descriptor(fd).context("adopt a descriptor")?, name));
    passed.map(adopt).collect()
}

/// Removes a socket file that nobody listens on any more; leaves everything else for `bind` to complain about.
fn remove_stale(path: &Path) -> anyhow::Result<()> {
    use std::os::unix::fs::FileTypeExt;
    let Ok(found) = std::fs::symlink_metadata(path) else { return Ok(()) };
    if !found.file_type().is_socket() {
        bail!(
            "cannot listen on {}: the path exists and is no socket; remove it or choose another",
            path.display()
        );
    }
    match std::os::unix::net::UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path).with_context(|| format!("remove the stale socket {}", path.display()))
        }
        Ok(_) | Err(_) => Ok(()),
    }
}

fn bind_advice(error: &io::Error) -> String {
    let advice = [
        (io::ErrorKind::AddrInUse, "another process listens there; stop it or choose another address"),
        (io::ErrorKind::AddrNotAvailable, "this machine does not have that address"),
        (
            io::ErrorKind::PermissionDenied,
            "not permitted; ports below 1024 need CAP_NET_BIND_SERVICE, a path needs a writable directory",
        ),
        (io::ErrorKind::NotFound, "the directory does not exist; make it first"),
    ];
    match advice.iter().find(|(kind, _)| *kind == error.kind()) {
        Some((_, advice)) => format!("{error}: {advice}"),
        None => error.to_string(),
    }
}

/// Errors of accept(2) that concern one client only: the next accept may succeed at once. See "Error handling" in
/// accept(2): Linux passes pending network errors of the new socket on.
fn is_clients_fault(error: &io::Error) -> bool {
    use rustix::io::Errno;
    matches!(
        error.raw_os_error().map(Errno::from_raw_os_error),
        Some(
            Errno::CONNABORTED
                | Errno::INTR
                | Errno::PERM
                | Errno::PROTO
                | Errno::NETDOWN
                | Errno::NETUNREACH
                | Errno::NOPROTOOPT
                | Errno::HOSTDOWN
                | Errno::HOSTUNREACH
                | Errno::NONET
        )
    )
}
