//! The backend of every benchmark: one program for echo, bulk and cold starts.
//!
//! Owns: answering the commands of [`crate::wire`], and checking every byte it is sent. Must never: be the
//! bottleneck; echoes are served by one thread over epoll, bulk transfers by blocking threads of their own.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::io::Errno;
use rustix::net::sockopt::set_tcp_nodelay;
use rustix::net::{SocketFlags, accept_with};

use crate::patient::Patient;
use crate::wire::{CHUNK_LEN, COMMAND_LEN, Command, Pattern, Receipt, Stamp};

/// A bulk transfer that moves nothing for this long has failed.
const STALL_MAX: Duration = Duration::from_secs(10);

/// Connections accepted before others get their turn.
const ACCEPTED_AT_ONCE_MAX: usize = 64;

/// Arguments of the backend.
#[derive(Debug, Clone, clap::Args)]
pub struct BackendArgs {
    /// Address to listen on; port 0 takes a free one. The line `listening ADDR NS` on stdout tells it, with the
    /// monotonic time.
    #[arg(long)]
    pub listen: SocketAddr,
    /// How long to take before listening, as a slow backend does.
    #[arg(long, default_value = "0ms", value_parser = humantime::parse_duration)]
    pub listen_delay: Duration,
}

/// Serves until it is killed.
///
/// # Errors
/// When it cannot listen, or the kernel refuses epoll.
pub fn run(args: &BackendArgs) -> Result<()> {
    crate::process::raise_file_limit()?;
    #[expect(
        clippy::disallowed_methods,
        reason = "being late is what this backend is asked for, it waits for nothing"
    )]
    thread::sleep(args.listen_delay);
    let listener = TcpListener::bind(args.listen).with_context(|| format!("listen on {}", args.listen))?;
    let listened_at_ns = drowse::clock::as_nanos(drowse::clock::now());
    let address = listener.local_addr().context("read the listener's address")?;
    writeln!(std::io::stdout(), "listening {address} {listened_at_ns}").context("tell the address")?;
    let stamp = Stamp { listened_at_ns, pid: u64::from(std::process::id()) };
    Backend::new(listener, stamp)?.serve()
}

/// One connection that the epoll thread serves.
#[derive(Debug)]
struct Connection {
    stream: TcpStream,
    phase: Phase,
}

#[derive(Debug)]
enum Phase {
    /// The command has not arrived in whole.
    Command(Vec<u8>),
    /// Everything is sent back; what the socket has not taken yet is kept here.
    Echo(Vec<u8>),
}

/// What becomes of a connection after an event.
#[derive(Debug)]
enum Next {
    Keep,
    Close,
    Bulk(Command),
}

#[derive(Debug)]
struct Backend {
    listener: TcpListener,
    epoll: OwnedFd,
    /// By descriptor: small, dense, and unique while open.
    connections: Vec<Option<Connection>>,
    buffer: Vec<u8>,
    pattern: Arc<Pattern>,
    stamp: Stamp,
}

impl Backend {
    fn new(listener: TcpListener, stamp: Stamp) -> Result<Self> {
        listener.set_nonblocking(true).context("make the listener non-blocking")?;
        // Accepted sockets inherit it.
        set_tcp_nodelay(&listener, true).context("set TCP_NODELAY")?;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).context("create an epoll instance")?;
        epoll::add(&epoll, &listener, token(&listener)?, EventFlags::IN).context("watch the listener")?;
        let pattern = Arc::new(Pattern::default());
        Ok(Self { listener, epoll, connections: Vec::new(), buffer: vec![0; 64 * 1024], pattern, stamp })
    }

    fn serve(mut self) -> Result<()> {
        let listener_token = token(&self.listener)?;
        let mut events = Vec::with_capacity(1024);
        loop {
            events.clear();
            match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(err) => return Err(err).context("wait for events"),
            }
            for event in &events {
                if event.data.u64() == listener_token.u64() {
                    self.accept_all()?;
                } else {
                    self.advance(event.data)?;
                }
            }
        }
    }

    fn accept_all(&mut self) -> Result<()> {
        for _ in 0..ACCEPTED_AT_ONCE_MAX {
            match accept_with(&self.listener, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC) {
                Ok(socket) => self.add(TcpStream::from(socket))?,
                Err(Errno::AGAIN) => break,
                Err(Errno::CONNABORTED | Errno::INTR) => {}
                Err(err) => return Err(err).context("accept a connection"),
            }
        }
        Ok(())
    }

    fn add(&mut self, stream: TcpStream) -> Result<()> {
        let token = token(&stream)?;
        epoll::add(&self.epoll, &stream, token, EventFlags::IN).context("watch a connection")?;
        let index = usize::try_from(token.u64()).context("index a connection")?;
        if self.connections.len() <= index {
            self.connections.resize_with(index + 1, || None);
        }
        if let Some(place) = self.connections.get_mut(index) {
            *place = Some(Connection { stream, phase: Phase::Command(Vec::new()) });
        }
        Ok(())
    }

    fn advance(&mut self, token: EventData) -> Result<()> {
        let index = usize::try_from(token.u64()).context("index a connection")?;
        let Some(place) = self.connections.get_mut(index) else { return Ok(()) };
        let Some(connection) = place else { return Ok(()) };
        // A peer that goes away ends its own connection only.
        let waited_for = connection.waits_for();
        let next = connection.advance(&mut self.buffer, self.stamp).unwrap_or(Next::Close);
        if let Next::Keep = next {
            let waits_for = connection.waits_for();
            if waits_for != waited_for {
                epoll::modify(&self.epoll, &connection.stream, token, waits_for)
                    .context("watch a connection")?;
            }
            return Ok(());
        }
        let Some(connection) = place.take() else { return Ok(()) };
        if let Next::Bulk(command) = next {
            epoll::delete(&self.epoll, &connection.stream).context("forget a connection")?;
            let pattern = Arc::clone(&self.pattern);
            thread::Builder::new()
                .name("bulk".to_owned())
                .spawn(move || {
                    if let Err(err) = bulk(&connection.stream, command, &pattern) {
                        eprintln!("bulk transfer: {err:#}");
                    }
                })
                .context("start a thread for a bulk transfer")?;
        }
        Ok(())
    }
}

impl Connection {
    fn waits_for(&self) -> EventFlags {
        match &self.phase {
            Phase::Echo(kept) if !kept.is_empty() => EventFlags::OUT,
            Phase::Echo(_) | Phase::Command(_) => EventFlags::IN,
        }
    }

    fn advance(&mut self, buffer: &mut [u8], stamp: Stamp) -> Result<Next> {
        match &mut self.phase {
            Phase::Command(got) => {
                let wanted = buffer.get_mut(..COMMAND_LEN - got.len()).context("size a read")?;
                let Some(read) = read_some(&mut self.stream, wanted)? else { return Ok(Next::Keep) };
                if read.is_empty() {
                    return Ok(Next::Close);
                }
                got.extend_from_slice(read);
                let Ok(bytes) = <[u8; COMMAND_LEN]>::try_from(got.as_slice()) else { return Ok(Next::Keep) };
                let next = self.obey(Command::decode(bytes)?, stamp);
                // The first request often comes with the command.
                if let (Next::Keep, Phase::Echo(kept)) = (&next, &self.phase)
                    && kept.is_empty()
                {
                    return self.advance(buffer, stamp);
                }
                Ok(next)
            }
            Phase::Echo(kept) if !kept.is_empty() => {
                let written = write_some(&mut self.stream, kept)?;
                kept.drain(..written);
                Ok(Next::Keep)
            }
            Phase::Echo(kept) => {
                let Some(read) = read_some(&mut self.stream, buffer)? else { return Ok(Next::Keep) };
                if read.is_empty() {
                    return Ok(Next::Close);
                }
                let written = write_some(&mut self.stream, read)?;
                kept.extend_from_slice(read.get(written..).unwrap_or_default());
                Ok(Next::Keep)
            }
        }
    }

    fn obey(&mut self, command: Command, stamp: Stamp) -> Next {
        match command {
            Command::Echo => self.phase = Phase::Echo(Vec::new()),
            Command::Stamp => self.phase = Phase::Echo(stamp.encode().to_vec()),
            Command::Upload(_) | Command::Download(_) | Command::Both(_) => return Next::Bulk(command),
        }
        Next::Keep
    }
}

/// Reads what is there: none when there is nothing yet, an empty slice at the end of the stream.
fn read_some<'buffer>(stream: &mut TcpStream, buffer: &'buffer mut [u8]) -> Result<Option<&'buffer [u8]>> {
    match stream.read(buffer) {
        Ok(len) => Ok(buffer.get(..len)),
        Err(err) if matches!(err.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(None),
        Err(err) => Err(err).context("read from a connection"),
    }
}

fn write_some(stream: &mut TcpStream, bytes: &[u8]) -> Result<usize> {
    match stream.write(bytes) {
        Ok(len) => Ok(len),
        Err(err) if matches!(err.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(0),
        Err(err) => Err(err).context("write to a connection"),
    }
}

fn bulk(stream: &TcpStream, command: Command, pattern: &Pattern) -> Result<()> {
    stream.set_nonblocking(false).context("make a connection blocking")?;
    stream.set_read_timeout(Some(STALL_MAX)).context("set a read timeout")?;
    stream.set_write_timeout(Some(STALL_MAX)).context("set a write timeout")?;
    match command {
        Command::Upload(bytes) => answer(stream, receive(stream, pattern, bytes)?)?,
        Command::Download(bytes) => send(stream, pattern, bytes)?,
        Command::Both(bytes) => {
            let receipt = thread::scope(|scope| {
                let sender = scope.spawn(|| send(stream, pattern, bytes));
                let receipt = receive(stream, pattern, bytes);
                sender.join().unwrap_or_else(|_| bail!("the sending thread panicked"))?;
                receipt
            })?;
            answer(stream, receipt)?;
        }
        Command::Echo | Command::Stamp => bail!("{command:?} is no bulk transfer"),
    }
    stream.shutdown(Shutdown::Write).context("end a bulk transfer")
}

fn answer(mut stream: &TcpStream, receipt: Receipt) -> Result<()> {
    stream.write_all(&receipt.encode()).context("send a receipt")
}

/// Sends `bytes` bytes of the pattern.
///
/// # Errors
/// When the connection breaks or stalls.
pub fn send(mut stream: &TcpStream, pattern: &Pattern, bytes: u64) -> Result<()> {
    let mut position = 0;
    while position < bytes {
        let chunk = pattern.at(position, piece_len(bytes - position))?;
        stream.write_all(chunk).with_context(|| format!("send after {position} of {bytes} bytes"))?;
        position += chunk.len() as u64;
    }
    Ok(())
}

/// Receives `bytes` bytes and compares them with the pattern. Ends early, with a receipt that says so, at the first
/// wrong piece or at the end of the stream.
///
/// # Errors
/// When the connection breaks or stalls.
pub fn receive(stream: &TcpStream, pattern: &Pattern, bytes: u64) -> Result<Receipt> {
    let mut buffer = vec![0; CHUNK_LEN];
    let mut position = 0;
    while position < bytes {
        let room = buffer.get_mut(..piece_len(bytes - position)).context("size a read")?;
        let read = Patient(stream).read(room);
        let len = read.with_context(|| format!("receive after {position} of {bytes} bytes"))?;
        let got = room.get(..len).unwrap_or_default();
        if got.is_empty() {
            break;
        }
        if got != pattern.at(position, got.len())? {
            return Ok(Receipt { bytes: position, right: false });
        }
        position += got.len() as u64;
    }
    Ok(Receipt { bytes: position, right: true })
}

fn piece_len(left: u64) -> usize {
    usize::try_from(left).unwrap_or(CHUNK_LEN).min(CHUNK_LEN)
}

fn token(fd: &impl AsRawFd) -> Result<EventData> {
    Ok(EventData::new_u64(u64::try_from(fd.as_raw_fd()).context("name a descriptor")?))
}
