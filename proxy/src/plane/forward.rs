//! The planes of flows that drowse accepted: worker threads that move the bytes (`copy`, `splice`), or have the kernel move
//! them and move the rest (`sockmap`, `sockmap-ends`).
//!
//! Owns: the threads, and which of them gets a flow. Must never: block its caller, or lose count of a flow.
//! A worker shares nothing with another but the inbox: an mpsc channel and an eventfd, used when a flow opens and
//! for the rare commands, so no lock is on the path of a byte. A worker's time is the kernel's TCP, so one worker for
//! each CPU is the right number: with two CPUs, two serve nearly twice the requests of one.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::mpsc::{self, Sender};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};

use self::announcer::Announcer;
use self::flow::{LiveFlow, Ticket};
use self::worker::Worker;
use super::sockmap::{Announcements, Sockmap};
use super::{Flow, Plane};
use crate::accounting::Accounting;

mod announcer;
mod direction;
mod flow;
mod redirected;
mod short_cut;
mod worker;

/// How the bytes are moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Through a buffer of the worker, always.
    Copy,
    /// Small bursts through the buffer, bulk through a pipe inside the kernel.
    Splice,
}

/// Which of a flow's two sockets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    Client,
    Backend,
}

/// What a socket of a flow is called in events: its worker, its flow, its side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Token(u64);

impl Token {
    const WORKER_SHIFT: u32 = 48;

    fn new(worker: usize, flow: u64, side: Side) -> Self {
        let side = match side {
            Side::Client => 0,
            Side::Backend => 1,
        };
        Self((worker as u64) << Self::WORKER_SHIFT | flow << 1 | side)
    }

    fn worker(self) -> usize {
        usize::try_from(self.0 >> Self::WORKER_SHIFT).unwrap_or(usize::MAX)
    }

    fn flow(self) -> u64 {
        (self.0 & ((1 << Self::WORKER_SHIFT) - 1)) >> 1
    }

    fn side(self) -> Side {
        if self.0 & 1 == 0 { Side::Client } else { Side::Backend }
    }
}

/// What a worker is asked to do.
#[derive(Debug)]
enum Command {
    Open(Box<LiveFlow>),
    ResetAll,
    BackendGone,
    CloseSilent(Duration),
    /// There is a way into the kernel.
    Sockmap(Arc<Sockmap>),
    /// The kernel began to pass bytes of a direction.
    Passing(Token),
    #[cfg(test)]
    Panic,
}

/// The way to a worker thread.
#[derive(Debug)]
struct Inbox {
    /// Taken away to end the thread.
    commands: Option<Sender<Command>>,
    wake: Arc<OwnedFd>,
    /// Flows that the worker has, to give the next one to the least loaded.
    load: Arc<AtomicUsize>,
    thread: Option<JoinHandle<()>>,
}

impl Inbox {
    /// A command that the worker can no longer take is dropped, and a flow in it is reset and counted.
    fn send(&self, command: Command) {
        if let Some(commands) = &self.commands
            && commands.send(command).is_ok()
        {
            self.wake();
        }
    }

    fn wake(&self) {
        wake(&self.wake);
    }
}

fn wake(eventfd: &OwnedFd) {
    // It fails only when 2^64 - 2 wake-ups were counted.
    let _ = rustix::io::write(eventfd, &1_u64.to_ne_bytes());
}

/// A plane made of worker threads. When it is dropped, the threads end and open flows are reset.
#[derive(Debug)]
pub struct Forward {
    mode: Mode,
    accounting: Arc<Accounting>,
    workers: Vec<Inbox>,
    /// Once the kernel moves flows. Dropped before the workers.
    announcer: Option<Announcer>,
    /// Peers send straight to the other side.
    cuts_short: bool,
}

impl Forward {
    /// Starts `workers` threads. `accounting` must have counters for as many.
    ///
    /// # Errors
    /// No worker or too few counters were asked for, or the threads, their epoll or eventfd cannot be had.
    pub fn new(mode: Mode, workers: usize, accounting: Arc<Accounting>) -> io::Result<Self> {
        if workers == 0 || accounting.worker(workers - 1).is_none() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!(
                    "{workers} forwarding workers asked for, at least one and as many counters are needed"
                ),
            ));
        }
        let mut plane = Self {
            mode,
            accounting,
            workers: Vec::with_capacity(workers),
            announcer: None,
            cuts_short: false,
        };
        for index in 0..workers {
            let (commands, receiver) = mpsc::channel();
            let wake = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
            let worker = Worker::new(&wake, receiver, mode, index)?;
            let thread =
                std::thread::Builder::new().name(format!("forward-{index}")).spawn(move || worker.run())?;
            plane.workers.push(Inbox {
                commands: Some(commands),
                wake,
                load: Arc::default(),
                thread: Some(thread),
            });
        }
        Ok(plane)
    }

    /// From now on flows are moved by the kernel where it takes them, those that are open as soon as they are calm.
    ///
    /// # Errors
    /// The thread that listens to the kernel cannot be started; then nothing has changed.
    pub fn use_sockmap(&mut self, sockmap: Sockmap, announcements: Announcements) -> io::Result<()> {
        let workers =
            self.workers.iter().filter_map(|inbox| Some((inbox.commands.clone()?, Arc::clone(&inbox.wake))));
        self.announcer = Some(Announcer::start(announcements, workers.collect())?);
        self.cuts_short = sockmap.cuts_short();
        self.accounting.count_redirected(sockmap.counters());
        let sockmap = Arc::new(sockmap);
        for inbox in &self.workers {
            inbox.send(Command::Sockmap(Arc::clone(&sockmap)));
        }
        Ok(())
    }
}

impl Plane for Forward {
    fn name(&self) -> &'static str {
        match self.mode {
            _ if self.announcer.is_some() && self.cuts_short => "sockmap-ends",
            _ if self.announcer.is_some() => "sockmap",
            Mode::Copy => "copy",
            Mode::Splice => "splice",
        }
    }

    fn open(&self, flow: Flow) {
        let least = self.workers.iter().enumerate().min_by_key(|(_, inbox)| inbox.load.load(Relaxed));
        if let Some((index, inbox)) = least {
            let ticket = Ticket::new(Arc::clone(&self.accounting), index, Arc::clone(&inbox.load));
            inbox.send(Command::Open(Box::new(LiveFlow::new(flow, ticket))));
        }
    }

    fn reset_all(&self) {
        for inbox in &self.workers {
            inbox.send(Command::ResetAll);
        }
    }

    fn backend_gone(&self) {
        for inbox in &self.workers {
            inbox.send(Command::BackendGone);
        }
    }

    fn close_silent(&self, silent_for: Duration) {
        for inbox in &self.workers {
            inbox.send(Command::CloseSilent(silent_for));
        }
    }
}

impl Drop for Forward {
    fn drop(&mut self) {
        self.announcer = None;
        for inbox in &mut self.workers {
            inbox.commands = None;
            inbox.wake();
        }
        for inbox in &mut self.workers {
            if let Some(thread) = inbox.thread.take() {
                // A worker catches its own panics.
                let _ = thread.join();
            }
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::io::{ErrorKind, Read, Write};
    use std::net::{TcpListener, TcpStream};

    use super::*;
    use crate::admission::Seat;

    pub fn tcp_pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (near, listener.accept().unwrap().0)
    }

    fn open(plane: &Forward) -> (TcpStream, TcpStream) {
        let (client, accepted) = tcp_pair();
        let (connected, backend) = tcp_pair();
        for socket in [&client, &backend] {
            socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        }
        plane.open(Flow { client: accepted.into(), backend: connected.into(), seat: Seat::default() });
        (client, backend)
    }

    #[test]
    fn a_panic_resets_the_workers_flows_and_the_next_flow_works() {
        let accounting = Accounting::new(1);
        let plane = Forward::new(Mode::Splice, 1, Arc::clone(&accounting)).unwrap();
        let (mut client, mut backend) = open(&plane);
        client.write_all(b"a").unwrap();
        backend.read_exact(&mut [0]).unwrap();
        plane.workers[0].send(Command::Panic);
        assert_eq!(client.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
        assert_eq!(backend.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
        let (mut client, mut backend) = open(&plane);
        client.write_all(b"b").unwrap();
        backend.read_exact(&mut [0]).unwrap();
        assert_eq!(accounting.totals().flows_total, 2);
        assert_eq!(accounting.totals().flows_open, 1);
    }

    #[test]
    fn a_dead_worker_resets_what_it_is_given() {
        let accounting = Accounting::new(1);
        let mut plane = Forward::new(Mode::Copy, 1, Arc::clone(&accounting)).unwrap();
        plane.workers[0].commands = Some(mpsc::channel().0);
        plane.workers[0].wake();
        let (mut client, _backend) = open(&plane);
        assert_eq!(client.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
        assert_eq!(accounting.totals().flows_open, 0);
        assert_eq!(accounting.totals().flows_total, 1);
    }

    #[test]
    fn counters_for_every_worker_are_asked_for() {
        assert!(Forward::new(Mode::Copy, 0, Accounting::new(1)).is_err());
        assert!(Forward::new(Mode::Copy, 2, Accounting::new(1)).is_err());
    }
}
