//! Blocking reads of client and backend, of sockets that may be in a sockmap.

use std::io::{self, ErrorKind, Read};
use std::net::TcpStream;
use std::time::Duration;

/// Receives from a socket that blocks, with a read timeout. One that is in a sockmap may say that there is nothing before its
/// time is up: when another thread has room to send, or at the end of what is sent (`tcp_msg_wait_data`).
#[derive(Debug)]
pub struct Patient<'a>(pub &'a TcpStream);

impl Read for Patient<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let patience = self.0.read_timeout()?.unwrap_or(Duration::MAX);
        let began = drowse::clock::now();
        loop {
            match self.0.read(buffer) {
                Err(err)
                    if err.kind() == ErrorKind::WouldBlock
                        && drowse::clock::now().saturating_sub(began) < patience => {}
                read => return read,
            }
        }
    }
}
