//! A reader that sleeps first, and writers of every habit.

use std::io::{ErrorKind, Write};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::thread;
use std::time::Duration;

use rustix::event::{PollFlags, epoll};
use rustix::io::Errno;
use rustix::net::{self, SendFlags};
use rustix::time::Timespec;
use socket2::Socket;

use super::MakePlane;
use super::fixture::{Bed, Endless, MIB, PATIENCE, expect_end, finish, is_ready, voluntary_switches};
use crate::deadline::pause;

const STREAM: usize = 200 * MIB;
const ASLEEP: Duration = Duration::from_secs(2);
/// What nobody has read is in kernel buffers: the bound of kernel memory per direction of a flow.
const HELD_AT_MOST: usize = 16 * MIB;
/// How often a writer may be woken, or told that there is no room, per MiB. A spinning one needs thousands, a
/// good one less than one.
const WAITS_PER_MIB: usize = 4;

/// How a program waits for room.
#[derive(Clone, Copy, Debug)]
enum Writer {
    /// In write(2).
    Blocking,
    /// In poll(2), as often as there is no room.
    LevelTriggered,
    /// In epoll, which says once that there is room again: nginx, tokio, Go.
    EdgeTriggered,
}

impl Writer {
    /// Writes the whole stream and its end, and tells how often it had to wait.
    fn write(self, socket: &Socket, stream: &Endless, sent: &AtomicUsize) -> usize {
        let waits = match self {
            Self::Blocking => Self::write_blocking(socket, stream, sent),
            Self::LevelTriggered => Self::write_when_told(socket, stream, sent, || {
                assert!(is_ready(socket, PollFlags::OUT, PATIENCE), "no room for ever");
            }),
            Self::EdgeTriggered => {
                let epoll = edges_of(socket);
                Self::write_when_told(socket, stream, sent, || await_edge(&epoll))
            }
        };
        finish(socket);
        waits
    }

    fn write_blocking(mut socket: &Socket, stream: &Endless, sent: &AtomicUsize) -> usize {
        let is_this = |thread: &str| thread == "writer";
        let before = voluntary_switches(is_this);
        while sent.load(Relaxed) < STREAM {
            let count = socket.write(stream.up_to(sent.load(Relaxed), STREAM)).unwrap();
            sent.fetch_add(count, Relaxed);
        }
        voluntary_switches(is_this) - before
    }

    fn write_when_told(
        mut socket: &Socket,
        stream: &Endless,
        sent: &AtomicUsize,
        mut wait: impl FnMut(),
    ) -> usize {
        socket.set_nonblocking(true).unwrap();
        let mut refused = 0;
        while sent.load(Relaxed) < STREAM {
            match socket.write(stream.up_to(sent.load(Relaxed), STREAM)) {
                Ok(count) => {
                    sent.fetch_add(count, Relaxed);
                }
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::WouldBlock, "{error}");
                    refused += 1;
                    wait();
                }
            }
        }
        refused
    }
}

fn edges_of(socket: &Socket) -> OwnedFd {
    let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
    let flags = epoll::EventFlags::OUT | epoll::EventFlags::ET;
    epoll::add(&epoll, socket, epoll::EventData::new_u64(0), flags).unwrap();
    epoll
}

fn await_edge(epoll: &OwnedFd) {
    let mut events = [epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(0) }];
    let patience = Timespec::try_from(PATIENCE).unwrap();
    let told = epoll::wait(epoll, &mut events, Some(&patience)).unwrap();
    assert_eq!(told, 1, "no edge ever came");
}

/// Sends all that comes before `end`, in messages of at most so many bytes.
pub(super) fn send_at_edges(socket: &Socket, stream: &Endless, end: usize, message: usize) {
    let edges = edges_of(socket);
    let mut sent = 0;
    while sent < end {
        match net::send(socket, stream.up_to(sent, end.min(sent + message)), SendFlags::DONTWAIT) {
            Ok(count) => sent += count,
            Err(Errno::AGAIN) => await_edge(&edges),
            Err(error) => panic!("{error}"),
        }
    }
}

fn sleeping_reader(make: MakePlane, writer: Writer, to_backend: bool) {
    let waits = waits_for_a_sleeping_reader(make, writer, to_backend);
    assert!(waits <= STREAM / MIB * WAITS_PER_MIB, "{waits} waits for room");
}

fn waits_for_a_sleeping_reader(make: MakePlane, writer: Writer, to_backend: bool) -> usize {
    let bed = Bed::new(make);
    let stream = Endless::new(20);
    let sent = AtomicUsize::new(0);
    let (client, backend) = bed.tcp();
    let (sender, reader) = if to_backend { (&client, &backend) } else { (&backend, &client) };
    let waits = thread::scope(|scope| {
        let write = || writer.write(sender, &stream, &sent);
        let writing = thread::Builder::new().name("writer".into()).spawn_scoped(scope, write).unwrap();
        pause(ASLEEP);
        let held = sent.load(Relaxed);
        stream.expect(reader, 0..STREAM);
        expect_end(reader);
        assert!(held > 0 && held < HELD_AT_MOST, "{held} bytes were taken for a reader that sleeps");
        writing.join().unwrap()
    });
    drop((client, backend));
    let totals = bed.all_closed();
    let expected = if to_backend { (STREAM as u64, 0) } else { (0, STREAM as u64) };
    assert_eq!((totals.bytes_to_backend, totals.bytes_to_client), expected);
    waits
}

/// What may wait to be sent is limited for the whole machine, as some advise: a full send buffer is not what stops a
/// writer then. It waits more often, but not for ever.
pub fn sleepers_where_unsent_bytes_are_limited(make: MakePlane) {
    std::fs::write("/proc/sys/net/ipv4/tcp_notsent_lowat", "16384").unwrap();
    for to_backend in [false, true] {
        waits_for_a_sleeping_reader(make, Writer::EdgeTriggered, to_backend);
    }
}

/// A client sleeps, then takes a download from a backend that blocks in write(2).
pub fn sleeping_client_and_a_blocking_writer(make: MakePlane) {
    sleeping_reader(make, Writer::Blocking, false);
}

/// A client sleeps, then takes a download from a level-triggered backend.
pub fn sleeping_client_and_a_level_triggered_writer(make: MakePlane) {
    sleeping_reader(make, Writer::LevelTriggered, false);
}

/// A client sleeps, then takes a download from an edge-triggered backend.
pub fn sleeping_client_and_an_edge_triggered_writer(make: MakePlane) {
    sleeping_reader(make, Writer::EdgeTriggered, false);
}

/// A backend sleeps, then takes an upload from a client that blocks in write(2).
pub fn sleeping_backend_and_a_blocking_writer(make: MakePlane) {
    sleeping_reader(make, Writer::Blocking, true);
}

/// A backend sleeps, then takes an upload from a level-triggered client.
pub fn sleeping_backend_and_a_level_triggered_writer(make: MakePlane) {
    sleeping_reader(make, Writer::LevelTriggered, true);
}

/// A backend sleeps, then takes an upload from an edge-triggered client.
pub fn sleeping_backend_and_an_edge_triggered_writer(make: MakePlane) {
    sleeping_reader(make, Writer::EdgeTriggered, true);
}
