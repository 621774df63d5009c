//! Whether a program notices that its socket is in a sockmap, tried on a pair of our own.
//!
//! Owns: the probe. Must never: touch a socket that it did not make, or take longer than [`PATIENCE`].

use std::io::Write as _;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::AsRawFd as _;
use std::time::Duration;

use anyhow::{Context as _, bail};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::sockopt;
use rustix::time::Timespec;

use super::ends::Ends;

/// How long bytes may take on the loopback.
const PATIENCE: Duration = Duration::from_millis(50);

/// What is sent.
const BYTES: &[u8] = b"so many";

/// `Ok` if a socket in the map of peers tells by `FIONREAD` how many bytes are queued (tcp(7)). Many programs ask before they
/// read (nginx, Java, .NET), and stall if the answer is none. Linux 6.6.128, 6.12.75 and 6.18.14 to 7.1 fail.
pub(super) fn queued_bytes_are_told(ends: &Ends) -> Result<(), String> {
    let told = probe(ends).map_err(|error| format!("{error:#}"))?;
    if told == BYTES.len() as u64 {
        return Ok(());
    }
    Err(format!(
        "the kernel's FIONREAD tells {told} of {} queued bytes on a socket in a sockmap: programs that ask for it stall",
        BYTES.len()
    ))
}

fn probe(ends: &Ends) -> anyhow::Result<u64> {
    let (mut near, far) = loopback_pair().context("connect two sockets on the loopback")?;
    let cookie = sockopt::socket_cookie(&far).context("learn a socket's cookie")?;
    let mut renewer = ends.renewer()?;
    renewer.enter(cookie, far.as_raw_fd()).context("put a socket into the map of peers")?;
    near.write_all(BYTES).context("send on the loopback")?;
    let timeout = Timespec::try_from(PATIENCE)?;
    let arrived = poll(&mut [PollFd::new(&far, PollFlags::IN)], Some(&timeout)).context("wait for bytes")?;
    if arrived == 0 {
        bail!("bytes do not arrive on the loopback within {} ms", PATIENCE.as_millis());
    }
    let told = rustix::io::ioctl_fionread(&far).context("ask how many bytes are queued");
    renewer.leave(cookie);
    told
}

fn loopback_pair() -> std::io::Result<(TcpStream, TcpStream)> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let near = TcpStream::connect(listener.local_addr()?)?;
    loop {
        let (far, peer) = listener.accept()?;
        // Anybody may connect.
        if near.local_addr()? == peer {
            return Ok((near, far));
        }
    }
}
