//! Moving bytes through a buffer: one `recv`, one `send`.
//!
//! Owns: what the answers of `recv` and `send` mean for a flow. Must never: block, loop, or allocate.
//! Rests on: recv(2) delivers what is queued before it reports a reset, and reports the reset only once; every
//! caller keeps it (`End::mark_reset`). `MSG_NOSIGNAL` keeps a send to a dead peer from raising `SIGPIPE`.

use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};

/// What one attempt to receive came to.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Received {
    /// So many bytes, at least one.
    Bytes(usize),
    /// Nothing is queued now.
    Nothing,
    /// The peer sent its FIN and everything before it has been received.
    Finished,
    /// The connection is dead, and what came before has been received.
    Reset,
}

/// What one attempt to send came to.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Sent {
    /// So many bytes, perhaps fewer than there were.
    Bytes(usize),
    /// The socket has no room now.
    NoRoom,
    /// The peer can take no more bytes, ever.
    Reset,
}

/// Receives once into `buffer`.
pub(super) fn receive(from: &OwnedFd, buffer: &mut [u8]) -> Received {
    match rustix::io::retry_on_intr(|| rustix::net::recv(from, &mut *buffer, RecvFlags::DONTWAIT)) {
        Ok((0, _)) => Received::Finished,
        Ok((bytes, _)) => Received::Bytes(bytes),
        Err(Errno::AGAIN) => Received::Nothing,
        Err(_) => Received::Reset,
    }
}

/// Sends once from `bytes`.
pub(super) fn send(to: &OwnedFd, bytes: &[u8]) -> Sent {
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    match rustix::io::retry_on_intr(|| rustix::net::send(to, bytes, flags)) {
        Ok(sent) => Sent::Bytes(sent),
        Err(Errno::AGAIN) => Sent::NoRoom,
        Err(_) => Sent::Reset,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn every_answer_of_a_socket_has_its_meaning() {
        let (near, far) = UnixStream::pair().unwrap();
        let (near, far) = (OwnedFd::from(near), OwnedFd::from(far));
        let mut buffer = [0; 8];
        assert_eq!(receive(&near, &mut buffer), Received::Nothing);
        assert_eq!(send(&far, b"abc"), Sent::Bytes(3));
        assert_eq!(receive(&near, &mut buffer), Received::Bytes(3));
        let block = vec![0; 1 << 20];
        let full = (0..100).map(|_| send(&near, &block)).any(|sent| sent == Sent::NoRoom);
        assert!(full, "a peer that does not read fills the socket");
        drop(far);
        assert_eq!(receive(&near, &mut buffer), Received::Reset, "the peer closed with unread data");
        assert_eq!(receive(&near, &mut buffer), Received::Finished, "a reset is reported once");
        assert_eq!(send(&near, b"abc"), Sent::Reset);
    }
}
