//! Backends that tell whom they see, and clients that can tell from it which way they went.
//!
//! A client that is handed off talks to the backend itself, so the backend sees the client's own address, and as its
//! own the public one. Of one that is proxied it sees a connection of drowse's to the backend's address. The port of
//! that may happen to be the client's: both addresses are needed to tell.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result, bail, ensure};
use rustix::event::{PollFd, PollFlags, poll};

use crate::deadline::eventually;
use crate::process::{SOON, connect_to, echo};

/// A connection as one of its ends tells it: the client's address and the address that was connected to.
fn told(client: SocketAddr, connected_to: SocketAddr) -> String {
    format!("{} {}", canonical(client), canonical(connected_to))
}

/// Greets, then sends back what comes until its end.
///
/// # Errors
/// The connection breaks.
pub fn serve(mut stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let greeting = told(stream.peer_addr()?, stream.local_addr()?);
    stream.write_all(format!("{greeting}\n").as_bytes())?;
    io::copy(&mut stream.try_clone()?, &mut stream)?;
    stream.shutdown(Shutdown::Write)
}

/// A listener of the test process itself, with a thread for each connection. It is closed when dropped; what it
/// accepted lives on.
#[derive(Debug)]
pub struct Backend {
    address: SocketAddr,
    served: Arc<AtomicUsize>,
    /// Closed to end the thread.
    stop: Option<UnixStream>,
    accepting: Option<JoinHandle<()>>,
}

impl Backend {
    /// [`serve`]s whoever connects to `address`.
    ///
    /// # Errors
    /// The address cannot be listened on.
    pub fn at(address: &str) -> Result<Self> {
        let listener = TcpListener::bind(address).with_context(|| format!("listen on {address}"))?;
        // A client that breaks its connection off is its own affair.
        Self::on(listener, |stream| drop(serve(stream)))
    }

    /// Gives whoever connects to `listener` to `serve`, on a thread of its own.
    ///
    /// # Errors
    /// The listener has no address.
    pub fn on(listener: TcpListener, serve: impl Fn(TcpStream) + Clone + Send + 'static) -> Result<Self> {
        let address = listener.local_addr()?;
        let (stop, stopped) = UnixStream::pair().context("make a pair of sockets")?;
        listener.set_nonblocking(true)?;
        let served = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&served);
        let accepting = thread::spawn(move || {
            while let Some(stream) = next(&listener, &stopped) {
                count.fetch_add(1, Relaxed);
                let serve = serve.clone();
                thread::spawn(move || serve(stream));
            }
        });
        Ok(Self { address, served, stop: Some(stop), accepting: Some(accepting) })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// How many connections it has accepted.
    #[must_use]
    pub fn served(&self) -> usize {
        self.served.load(Relaxed)
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        drop(self.stop.take());
        // It has nothing to fail with but a panic, which it has told already.
        let _told = self.accepting.take().map(JoinHandle::join);
    }
}

/// The next connection, or `None` when the listener is to be closed.
fn next(listener: &TcpListener, stopped: &UnixStream) -> Option<TcpStream> {
    loop {
        let mut fds = [PollFd::new(listener, PollFlags::IN), PollFd::new(stopped, PollFlags::IN)];
        poll(&mut fds, None).ok()?;
        let [_, stop] = fds.map(|fd| !fd.revents().is_empty());
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false).ok()?;
                return Some(stream);
            }
            Err(_) if stop => return None,
            // It went away again, or there was nothing.
            Err(_) => {}
        }
    }
}

/// A connection to a backend that greets.
#[derive(Debug)]
pub struct Client {
    /// The connection, behind the greeting.
    pub stream: TcpStream,
    /// What the backend has said that it sees: the client's address, then its own.
    pub seen: String,
}

impl Client {
    /// Connects and waits for the greeting.
    ///
    /// # Errors
    /// The connection is refused or reset, or nothing is said.
    pub fn connect(address: &str) -> Result<Self> {
        Self::greeted(connect_to(address)?).with_context(|| format!("a client of {address}"))
    }

    /// Waits for the greeting on a connection.
    ///
    /// # Errors
    /// It is reset, or nothing is said.
    pub fn greeted(mut stream: TcpStream) -> Result<Self> {
        stream.set_read_timeout(Some(SOON))?;
        let seen = read_line(&mut stream).context("wait for the backend's greeting")?;
        Ok(Self { stream, seen })
    }

    /// Whether the backend sees the client itself, and not drowse.
    ///
    /// # Errors
    /// The connection has no address any more.
    pub fn is_handed_off(&self) -> Result<bool> {
        Ok(self.seen == told(self.stream.local_addr()?, self.stream.peer_addr()?))
    }

    /// Sends `request` and compares what comes back.
    ///
    /// # Errors
    /// Something else comes back, or nothing.
    pub fn echo(&mut self, request: &[u8]) -> Result<()> {
        echo(&mut self.stream, request)
    }

    /// Half-closes and waits for the backend's FIN.
    ///
    /// # Errors
    /// Something else comes.
    pub fn end(mut self) -> Result<()> {
        self.stream.shutdown(Shutdown::Write).context("half-close")?;
        let rest = self.stream.read(&mut [0]).context("wait for the end")?;
        ensure!(rest == 0, "a byte from nowhere");
        Ok(())
    }
}

/// One request on a connection of its own, with a clean end. Tells whether it was handed off.
///
/// # Errors
/// Anything but a whole echo and a clean end.
pub fn ask(address: &str) -> Result<bool> {
    let mut client = Client::connect(address)?;
    client.echo(b"how are you\n")?;
    let handed_off = client.is_handed_off()?;
    client.end()?;
    Ok(handed_off)
}

/// Connects again and again until a connection is handed off, and gives that one. None may fail.
///
/// # Errors
/// A client was not served, or none was handed off in time.
pub fn handed_off(address: &str) -> Result<Client> {
    eventually(&format!("a client of {address} to be handed off"), SOON, || {
        let client = Client::connect(address)?;
        Ok(client.is_handed_off()?.then_some(client))
    })
}

/// A line without its end, read byte by byte, so that nothing behind it is taken.
fn read_line(stream: &mut impl Read) -> Result<String> {
    const LINE_MAX: usize = 100;
    let mut line = Vec::new();
    while line.len() < LINE_MAX {
        let mut byte = [0];
        let [byte] = match stream.read(&mut byte)? {
            0 => bail!("the end came after {:?}", line.escape_ascii().to_string()),
            _ => byte,
        };
        if byte == b'\n' {
            return String::from_utf8(line).context("understand the line");
        }
        line.push(byte);
    }
    bail!("no end of line in {:?}", line.escape_ascii().to_string())
}

/// An IPv4 address as such, also when an IPv6 socket has it.
fn canonical(address: SocketAddr) -> SocketAddr {
    let ip: IpAddr = address.ip().to_canonical();
    SocketAddr::new(ip, address.port())
}
