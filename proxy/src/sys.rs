//! The only `unsafe` of user space: system calls that no library offers safely.
#![expect(unsafe_code, reason = "this is the one file for it; each block says why it is sound")]

use std::ffi::c_int;
use std::io;
use std::os::fd::BorrowedFd;

use rustix::ioctl::{Getter, Opcode, ioctl};

/// `SIOCOUTQ`, which the kernel defines as `TIOCOUTQ` (`include/uapi/linux/sockios.h`).
#[expect(clippy::cast_possible_truncation, reason = "request numbers have 32 bits")]
const SIOCOUTQ: Opcode = libc::TIOCOUTQ as Opcode;

/// How many bytes of `socket` were sent by us and not yet acknowledged by the peer's kernel, tcp(7).
///
/// # Errors
/// `socket` is no socket, or is one that listens.
pub fn send_queue_bytes(socket: BorrowedFd<'_>) -> io::Result<usize> {
    // SAFETY: SIOCOUTQ is a valid opcode and writes exactly one `int`, tcp(7).
    let request = unsafe { Getter::<SIOCOUTQ, c_int>::new() };
    // SAFETY: a getter touches no memory but its own output, and `socket` is open for as long as it is borrowed.
    let bytes = unsafe { ioctl(socket, request) }?;
    Ok(usize::try_from(bytes).unwrap_or(0))
}
