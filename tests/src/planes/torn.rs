//! Streams at full speed that one side tears off.

use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use drowse::clock;
use rustix::event::PollFlags;
use rustix::process::{Pid, Signal, kill_process};
use socket2::Socket;

use super::MakePlane;
use super::fixture::{Bed, Endless, KIB, MIB, PATIENCE, Patient, elapsed, eventually, is_ready, reset};
use crate::deadline::pause;

/// In what time the other side must hear.
const SOON: Duration = Duration::from_secs(1);

/// Receives the stream until its end and checks every byte. Tells how many there were.
pub(super) fn receive(socket: &Socket, stream: &Endless) -> io::Result<usize> {
    let mut buffer = vec![0; 64 * KIB];
    let mut position = 0;
    loop {
        let count = Patient(socket).read(&mut buffer)?;
        if count == 0 {
            return Ok(position);
        }
        stream.check(position, &buffer[..count]);
        position += count;
    }
}

/// Sends the stream until that fails.
pub(super) fn send(mut socket: &Socket, stream: &Endless) -> io::Error {
    let mut position = 0;
    loop {
        match socket.write(stream.at(position)) {
            Ok(count) => position += count,
            Err(error) => return error,
        }
    }
}

/// Moves bytes both ways in one thread until so many were sent and so many received.
fn exchange(mut socket: &Socket, stream: &Endless, to_send: usize, to_receive: usize) {
    socket.set_nonblocking(true).unwrap();
    let mut buffer = vec![0; 64 * KIB];
    let (mut sent, mut received) = (0, 0);
    let moved = |result: io::Result<usize>| match result {
        Err(error) if error.kind() == ErrorKind::WouldBlock => 0,
        result => result.unwrap(),
    };
    while sent < to_send || received < to_receive {
        assert!(is_ready(socket, PollFlags::IN | PollFlags::OUT, PATIENCE), "nothing moves");
        sent += moved(socket.write(stream.at(sent)));
        let count = moved(socket.read(&mut buffer));
        stream.check(received, &buffer[..count]);
        received += count;
    }
}

fn reset_at_full_speed(make: MakePlane, by_client: bool) {
    let bed = Bed::new(make);
    let stream = Endless::new(50);
    for round in 0..20 {
        let (client, backend) = bed.tcp();
        let (dying, other) = if by_client { (client, backend) } else { (backend, client) };
        let both_ways = round % 2 == 0;
        let enough = (round % 5 + 1) * MIB;
        let (reading, writing, took) = thread::scope(|scope| {
            let reading = scope.spawn(|| receive(&other, &stream));
            let writing = both_ways.then(|| scope.spawn(|| send(&other, &stream)));
            exchange(&dying, &stream, enough, if both_ways { enough } else { 0 });
            let since = clock::now();
            reset(dying);
            (reading.join().unwrap(), writing.map(|thread| thread.join().unwrap()), elapsed(since))
        });
        assert!(took < SOON, "the other side heard after {took:?}");
        // A socket tells of its reset once, to whoever asks first.
        let is_reset = |error: io::Error| error.kind() == ErrorKind::ConnectionReset;
        // A send that a reset interrupts on a socket in a sockmap swallows its error if it has sent anything
        // (`tcp_bpf_sendmsg`). The next one finds a broken pipe.
        let is_swallowed = both_ways
            && bed.plane.name() == "sockmap-ends"
            && writing.as_ref().is_some_and(|error| error.kind() == ErrorKind::BrokenPipe);
        let is_told = reading.is_err_and(is_reset) || writing.is_some_and(is_reset);
        assert!(is_told || is_swallowed, "a reset, not an end");
        bed.all_closed();
    }
}

/// A reset by the client while bytes move as fast as they can, one way or both.
pub fn reset_by_the_client_at_full_speed(make: MakePlane) {
    reset_at_full_speed(make, true);
}

/// A reset by the backend while bytes move as fast as they can, one way or both.
pub fn reset_by_the_backend_at_full_speed(make: MakePlane) {
    reset_at_full_speed(make, false);
}

/// A receiver closes its socket in the middle of a stream that it has not read to the end.
fn receiver_closes(make: MakePlane, is_client: bool) {
    let bed = Bed::new(make);
    let stream = Endless::new(51);
    for round in 0..20 {
        let (client, backend) = bed.tcp();
        let (receiver, sender) = if is_client { (client, backend) } else { (backend, client) };
        let (error, took) = thread::scope(|scope| {
            let sending = scope.spawn(|| send(&sender, &stream));
            stream.expect(&receiver, 0..(round % 5 + 1) * MIB);
            assert!(is_ready(&receiver, PollFlags::IN, PATIENCE), "there is more");
            let since = clock::now();
            drop(receiver);
            (sending.join().unwrap(), elapsed(since))
        });
        assert!(took < SOON, "the sender heard after {took:?}");
        assert!([ErrorKind::ConnectionReset, ErrorKind::BrokenPipe].contains(&error.kind()), "{error}");
        bed.all_closed();
    }
}

/// A client closes in the middle of a download.
pub fn client_closes_in_mid_download(make: MakePlane) {
    receiver_closes(make, true);
}

/// A backend closes in the middle of an upload.
pub fn backend_closes_in_mid_upload(make: MakePlane) {
    receiver_closes(make, false);
}

/// A process, killed when it is dropped.
struct Process(Child);

impl Process {
    fn start(command: &mut Command) -> Self {
        Self(command.spawn().unwrap())
    }

    fn stop(&self) {
        kill_process(Pid::from_child(&self.0), Signal::STOP).unwrap();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// `stalled`: the process had stopped before, so that its socket was congested.
fn killed_in_mid_upload(make: MakePlane, stalled: bool) {
    let bed = Bed::new(make);
    let stream = Endless::new(52);
    for _ in 0..5 {
        let (client, backend) = bed.tcp();
        let backend = Process::start(Command::new("cat").stdin(OwnedFd::from(backend)).stdout(Stdio::null()));
        let before = bed.accounting.totals().bytes_to_backend;
        let moved = || bed.accounting.totals().bytes_to_backend - before;
        let (error, took) = thread::scope(|scope| {
            let sending = scope.spawn(|| send(&client, &stream));
            eventually("bytes move", || moved() > 8 * MIB as u64);
            if stalled {
                backend.stop();
                eventually("it stalls", || {
                    let so_far = moved();
                    pause(Duration::from_millis(20));
                    moved() == so_far
                });
            }
            let since = clock::now();
            drop(backend);
            (sending.join().unwrap(), elapsed(since))
        });
        assert!(took < SOON, "the client heard after {took:?}");
        assert!([ErrorKind::ConnectionReset, ErrorKind::BrokenPipe].contains(&error.kind()), "{error}");
        bed.all_closed();
    }
}

/// A backend process is killed in the middle of an upload.
pub fn backend_killed_in_mid_upload(make: MakePlane) {
    killed_in_mid_upload(make, false);
}

/// A backend process is killed in the middle of an upload that it had stopped to read.
pub fn stalled_backend_killed_in_mid_upload(make: MakePlane) {
    killed_in_mid_upload(make, true);
}

/// A backend process is killed in the middle of a download. The kernel ends its stream as if it had closed.
pub fn backend_killed_in_mid_download(make: MakePlane) {
    let bed = Bed::new(make);
    for _ in 0..5 {
        let (client, backend) = bed.tcp();
        let before = bed.accounting.totals().bytes_to_client;
        let backend = Process::start(
            Command::new("cat").arg("/dev/zero").stdin(Stdio::null()).stdout(OwnedFd::from(backend)),
        );
        let moved = || bed.accounting.totals().bytes_to_client - before;
        let (received, took) = thread::scope(|scope| {
            let receiving = scope.spawn(|| io::copy(&mut &client, &mut io::sink()).unwrap());
            eventually("bytes move", || moved() > 8 * MIB as u64);
            let since = clock::now();
            drop(backend);
            (receiving.join().unwrap(), elapsed(since))
        });
        assert!(took < SOON, "the client heard after {took:?}");
        drop(client);
        bed.all_closed();
        assert_eq!(received, moved(), "what was sent is what arrived");
    }
}
