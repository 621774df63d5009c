//! Moving bytes through a pipe inside the kernel: `splice` in, `splice` out, and the pool of pipes.
//!
//! Owns: pipes, and what the answers of splice(2) mean for a flow. Must never: fail for want of a pipe (the caller
//! then copies), or put a pipe back that is not empty.
//! Rests on: `splice` says `EAGAIN` both for an empty socket and for a full pipe, so only an empty pipe is ever
//! filled. It says 0 at the end of the stream, but at urgent data too, so only `recv` is trusted with the end.
//! Splicing into a dead socket raises `SIGPIPE`, which Rust's runtime ignores from the start of the process on.

use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_getpipe_size, fcntl_setpipe_size, pipe_with, splice};

use super::copy::Sent;

/// The wanted capacity of a pipe in bytes. The kernel may give less: beyond `fs.pipe-user-pages-soft` pages an
/// unprivileged user gets two pages a pipe, pipe(7). Each fragment of a packet takes a page's place, so a pipe is
/// full long before it holds this much; measured on loopback, a GiB costs 174 ms of CPU with 64 KiB, 116 ms with
/// 256 KiB and 77 ms with 1 MiB.
const PIPE_CAPACITY: usize = 1024 * 1024;

/// Pipes that one worker has at most, in use and idle together: congested flows beyond it are copied.
pub const PIPES_MAX: usize = 32;

/// Idle pipes that one worker keeps.
const PIPES_IDLE_MAX: usize = 16;

/// What one attempt to fill a pipe came to.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Filled {
    /// So many bytes, at least one.
    Bytes(usize),
    /// Nothing is queued in the socket now.
    Nothing,
    /// `recv` must tell: the end of the stream, urgent data, or a socket that cannot be spliced.
    Unclear,
    /// The connection is dead, and what came before has been taken.
    Reset,
}

/// A pipe, and how many bytes are in it.
#[derive(Debug)]
pub(super) struct Pipe {
    read: OwnedFd,
    write: OwnedFd,
    capacity: usize,
    fill: usize,
}

impl Pipe {
    fn open() -> Option<Self> {
        let (read, write) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).ok()?;
        let capacity =
            fcntl_setpipe_size(&write, PIPE_CAPACITY).or_else(|_| fcntl_getpipe_size(&write)).ok()?;
        Some(Self { read, write, capacity, fill: 0 })
    }

    /// Whether nothing is in it.
    pub(super) fn is_empty(&self) -> bool {
        self.fill == 0
    }

    /// Takes bytes out of a socket. The pipe must be empty.
    pub(super) fn fill_from(&mut self, from: &OwnedFd) -> Filled {
        let flags = SpliceFlags::NONBLOCK | SpliceFlags::MOVE;
        match rustix::io::retry_on_intr(|| splice(from, None, &self.write, None, self.capacity, flags)) {
            Err(Errno::AGAIN) => Filled::Nothing,
            Ok(0) | Err(Errno::INVAL | Errno::NOMEM | Errno::NOSYS | Errno::OPNOTSUPP | Errno::PERM) => {
                Filled::Unclear
            }
            Ok(bytes) => {
                self.fill = bytes;
                Filled::Bytes(bytes)
            }
            Err(_) => Filled::Reset,
        }
    }

    /// Sends what is in the pipe, once.
    pub(super) fn flush_to(&mut self, to: &OwnedFd) -> Sent {
        let flags = SpliceFlags::NONBLOCK | SpliceFlags::MOVE;
        match rustix::io::retry_on_intr(|| splice(&self.read, None, to, None, self.fill, flags)) {
            Err(Errno::AGAIN) => Sent::NoRoom,
            Ok(0) | Err(_) => Sent::Reset,
            Ok(bytes) => {
                self.fill = self.fill.saturating_sub(bytes);
                Sent::Bytes(bytes)
            }
        }
    }
}

/// The pipes of one worker.
#[derive(Debug, Default)]
pub(super) struct PipePool {
    idle: Vec<Pipe>,
    lent: usize,
}

impl PipePool {
    /// An empty pipe, if one can be had.
    pub(super) fn take(&mut self) -> Option<Pipe> {
        if self.lent >= PIPES_MAX {
            return None;
        }
        let pipe = self.idle.pop().or_else(Pipe::open)?;
        self.lent += 1;
        Some(pipe)
    }

    /// Takes a pipe back. One that is not empty is closed.
    pub(super) fn put(&mut self, pipe: Pipe) {
        self.lent = self.lent.saturating_sub(1);
        if pipe.is_empty() && self.idle.len() < PIPES_IDLE_MAX {
            self.idle.push(pipe);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn the_pool_is_bounded_and_never_lends_a_dirty_pipe() {
        let mut pool = PipePool::default();
        let mut lent: Vec<Pipe> = std::iter::from_fn(|| pool.take()).take(PIPES_MAX * 2).collect();
        assert_eq!(lent.len(), PIPES_MAX);
        if let Some(dirty) = lent.last_mut() {
            dirty.fill = 1;
        }
        while let Some(pipe) = lent.pop() {
            pool.put(pipe);
        }
        assert_eq!(pool.idle.len(), PIPES_IDLE_MAX);
        assert!(pool.idle.iter().all(Pipe::is_empty));
        assert!(pool.take().is_some());
    }

    #[test]
    fn every_answer_of_splice_has_its_meaning() {
        let (near, far) = UnixStream::pair().unwrap();
        let (near, far) = (OwnedFd::from(near), OwnedFd::from(far));
        let mut pipe = Pipe::open().unwrap();
        assert_eq!(pipe.fill_from(&near), Filled::Nothing);
        assert_eq!(rustix::net::send(&far, b"abc", rustix::net::SendFlags::empty()), Ok(3));
        assert_eq!(pipe.fill_from(&near), Filled::Bytes(3));
        assert!(!pipe.is_empty());
        assert_eq!(pipe.flush_to(&near), Sent::Bytes(3));
        assert!(pipe.is_empty());
        drop(far);
        assert_eq!(pipe.fill_from(&near), Filled::Reset, "the peer closed with unread data");
        assert_eq!(pipe.fill_from(&near), Filled::Unclear, "a reset is reported once");
        let (reader, _writer) = UnixStream::pair().unwrap();
        reader.shutdown(std::net::Shutdown::Read).unwrap();
        assert_eq!(pipe.fill_from(&reader.into()), Filled::Unclear, "the end of the stream");
        let epoll = rustix::event::epoll::create(rustix::event::epoll::CreateFlags::CLOEXEC).unwrap();
        assert_eq!(pipe.fill_from(&epoll), Filled::Unclear, "what cannot be spliced");
        assert_eq!(pipe.fill_from(&File::open("/dev/null").unwrap().into()), Filled::Unclear);
    }
}
