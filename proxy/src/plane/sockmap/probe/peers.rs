//! Probes: whether a program notices that its socket is in a sockmap.
//!
//! Owns: what is known to go wrong, each tried on connections of drowse with itself. Must never: touch another socket.

use std::fs;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::{RecvFlags, recv, sockopt};
use rustix::thread::{Pid, gettid};

use super::loopback::{Deadline, Loopback, give, wait_for};
use super::{WITHIN, fill};
use crate::plane::copy::{self, Received};
use crate::plane::sockmap::ends::Ends;

/// What is sent at once.
const BYTES: usize = 1000;

/// What goes wrong with a blocking read.
const READ_FAILS: &str =
    "a blocking read fails with EAGAIN at any other event (room to send, the end of what it sends)";

/// `Ok` if programs whose sockets are in the map of peers notice nothing of it. What they can notice:
///
/// - `FIONREAD` (tcp(7)) tells of no queued bytes: Linux 6.6.128, 6.12.75 and 6.18.14 to 7.1. Many programs ask before they
///   read (nginx, Java, .NET), and stall.
/// - A blocking read ends with `EAGAIN` at whatever else wakes it (`tcp_msg_wait_data`, all versions to 6.18): room to send, if
///   another thread sends; or the acknowledged end of what the program itself sends.
pub(in crate::plane::sockmap) fn notice_nothing(ends: &Ends) -> Result<(), String> {
    let faults = try_all(ends).map_err(|error| format!("{error:#}"))?;
    if faults.is_empty() { Ok(()) } else { Err(format!("on a socket in a sockmap {}", faults.join(" and "))) }
}

fn try_all(ends: &Ends) -> anyhow::Result<Vec<String>> {
    let loopback = Loopback::open(WITHIN)?;
    let mut renewer = ends.renewer()?;
    let mut faults = Vec::new();
    for probe in [queued_bytes_are_told, reading_goes_on] {
        let (near, far) = loopback.pair()?;
        let cookie = sockopt::socket_cookie(&far).context("learn a socket's cookie")?;
        renewer.enter(cookie, far.as_raw_fd()).context("put a socket into the map of peers")?;
        let found = probe(&near, &far, loopback.deadline);
        renewer.leave(cookie);
        faults.extend(found?);
    }
    Ok(faults)
}

/// What is wrong with `FIONREAD` on `far`.
fn queued_bytes_are_told(
    near: &OwnedFd,
    far: &OwnedFd,
    deadline: Deadline,
) -> anyhow::Result<Option<String>> {
    give(near, 0, BYTES)?;
    ensure!(deadline.wait(&[(far, PollFlags::IN)]), "bytes do not arrive on the loopback");
    let told = rustix::io::ioctl_fionread(far).context("ask how many bytes are queued")?;
    let fault = || format!("FIONREAD tells {told} of {BYTES} queued bytes (who asks before reading stalls)");
    Ok((told != BYTES as u64).then(fault))
}

/// What is wrong with a blocking read of `far`.
fn reading_goes_on(near: &OwnedFd, far: &OwnedFd, deadline: Deadline) -> anyhow::Result<Option<String>> {
    // The thread ends, whatever comes.
    sockopt::set_socket_timeout(far, sockopt::Timeout::Recv, Some(WITHIN)).context("limit a read's time")?;
    fill(far)?;
    thread::scope(|scope| {
        let (tell, told) = mpsc::channel();
        let reader = scope.spawn(move || {
            let _ = tell.send(gettid());
            recv(far, &mut [0; 1], RecvFlags::empty())
        });
        let reader_id = told.recv().context("start a thread")?;
        let mut naps = 0;
        let sleeps = deadline.until(|| {
            let slept = naps_of(reader_id);
            naps = slept.unwrap_or(0);
            slept.is_some()
        });
        ensure!(sleeps, "a thread that reads does not wait");
        let mut drained = Ok(());
        let has_room = deadline.until(|| {
            drained = drain(near);
            drained.is_err() || wait_for(&[(far, PollFlags::OUT)], Duration::ZERO)
        });
        drained?;
        ensure!(has_room, "a full socket does not get room again");
        // It looks, and waits again if all is well.
        let has_looked =
            deadline.until(|| reader.is_finished() || naps_of(reader_id).is_some_and(|slept| slept > naps));
        ensure!(has_looked, "a thread that reads is not woken");
        let ends_early = reader.is_finished();
        give(near, 0, 1)?;
        match reader.join() {
            Ok(Ok(_)) if !ends_early => Ok(None),
            Ok(Err(Errno::AGAIN)) => Ok(Some(READ_FAILS.to_owned())),
            Ok(read) => bail!("a blocking read is over, though nothing came: {read:?}"),
            Err(_) => bail!("a thread that reads panicked"),
        }
    })
}

/// How often this thread of ours has gone to sleep, if it sleeps (`proc_pid_status(5)`).
fn naps_of(thread: Pid) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/self/task/{thread}/status")).ok()?;
    let field = |name| status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
    field("State:")?.starts_with('S').then_some(())?;
    field("voluntary_ctxt_switches:")?.parse().ok()
}

/// Receives what is there.
fn drain(socket: &OwnedFd) -> anyhow::Result<()> {
    let mut buffer = vec![0; BYTES];
    loop {
        match copy::receive(socket, &mut buffer) {
            Received::Bytes(_) => {}
            Received::Nothing => return Ok(()),
            Received::Finished | Received::Reset => bail!("a connection over the loopback failed"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sockets that are in no map.
    #[test]
    fn plain_sockets_have_no_fault() -> anyhow::Result<()> {
        let loopback = Loopback::open(Duration::from_secs(10))?;
        for probe in [queued_bytes_are_told, reading_goes_on] {
            let (near, far) = loopback.pair()?;
            assert_eq!(probe(&near, &far, loopback.deadline)?, None);
        }
        Ok(())
    }
}
