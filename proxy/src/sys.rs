//! The only `unsafe` of user space: system calls that no library offers safely.
#![expect(unsafe_code, reason = "this is the one place for it")]

use std::ffi::c_int;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt as _;
use std::process::Command;

use rustix::ioctl::{Getter, Opcode, ioctl};
use rustix::process::{Resource, Rlimit, Signal};
use socket2::{Domain, Socket, Type};
use tokio::io::Interest;
use tokio::io::unix::{AsyncFd, AsyncFdReadyGuard, AsyncFdRegisterError};

/// `SIOCOUTQ`, which the kernel defines as `TIOCOUTQ` (`include/uapi/linux/sockios.h`).
#[expect(clippy::cast_possible_truncation, reason = "request numbers have 32 bits")]
const SIOCOUTQ: Opcode = libc::TIOCOUTQ as Opcode;

/// Takes ownership of a descriptor that our parent passed to us by number, and makes it close-on-exec.
///
/// # Errors
/// There is no such descriptor.
pub fn adopt_descriptor(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: fcntl(F_SETFD) on any number is sound; it fails with EBADF when nothing is open there.
    if unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is open, and nobody else in this process owns a number that the parent passed.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Makes a listener drop every SYN before the TCP state machine sees it (classic BPF, `SO_ATTACH_FILTER`), or undoes
/// it. Handshakes that are under way complete, and whoever sends a SYN retries, as after any lost packet.
///
/// # Errors
/// As `setsockopt(2)`.
pub fn drop_new_connections(listener: BorrowedFd<'_>, drop: bool) -> io::Result<()> {
    const FLAGS_OFFSET: u32 = 13;
    const SYN: u32 = 0x02;
    /// `BPF_LD | BPF_B | BPF_ABS`
    const LOAD_BYTE: u16 = 0x30;
    /// `BPF_JMP | BPF_JSET | BPF_K`
    const SKIP_UNLESS: u16 = 0x45;
    /// `BPF_RET | BPF_K`: with 0 the packet is dropped, else kept.
    const END: u16 = 0x06;
    // The filter of a TCP socket sees the packet from the TCP header on.
    let step = |code, jf, k| libc::sock_filter { code, jt: 0, jf, k };
    let mut steps = [
        step(LOAD_BYTE, 0, FLAGS_OFFSET),
        step(SKIP_UNLESS, 1, SYN),
        step(END, 0, 0),
        step(END, 0, u32::MAX),
    ];
    let program = libc::sock_fprog { len: 4, filter: steps.as_mut_ptr() };
    let option = if drop { libc::SO_ATTACH_FILTER } else { libc::SO_DETACH_FILTER };
    let size = libc::socklen_t::try_from(size_of::<libc::sock_fprog>()).unwrap_or(0);
    // SAFETY: `program` and the steps it points to live until the call returns; the kernel copies both.
    let result = unsafe {
        libc::setsockopt(listener.as_raw_fd(), libc::SOL_SOCKET, option, (&raw const program).cast(), size)
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Registers a socket with the runtime's epoll.
///
/// # Errors
/// As `epoll_ctl(2)`; the socket comes back with the error.
pub fn watch(socket: Socket, interest: Interest) -> Result<AsyncFd<Socket>, AsyncFdRegisterError<Socket>> {
    // SAFETY: a `Socket` owns its descriptor and returns the same one for as long as it lives.
    unsafe { AsyncFd::register_with_interest(socket, interest) }
}

/// Gives a child the limit on open files that we had before we raised ours, and ends it when we are killed.
pub fn prepare_child(command: &mut Command, open_files: Rlimit) {
    let prepare = move || {
        rustix::process::setrlimit(Resource::Nofile, open_files)?;
        rustix::process::set_parent_process_death_signal(Some(Signal::TERM))?;
        Ok(())
    };
    // SAFETY: between fork and exec only two system calls are made; nothing is allocated and no lock is taken.
    unsafe { command.pre_exec(prepare) };
}

/// Tells when a file that somebody else reads is readable.
#[derive(Debug)]
pub struct Readable(AsyncFd<OwnedFd>);

impl Readable {
    /// Watches a duplicate of `fd`, so that the reader keeps its own.
    ///
    /// # Errors
    /// There is no tokio runtime here, no file descriptor left, or `fd` cannot be polled.
    pub fn new(fd: BorrowedFd<'_>) -> io::Result<Self> {
        // Registering panics outside of a runtime.
        tokio::runtime::Handle::try_current().map_err(io::Error::other)?;
        let fd = fd.try_clone_to_owned()?;
        // SAFETY: an `OwnedFd` is open as long as it lives and always gives the same number; nobody gets at this one
        // other than by shared reference.
        let fd = unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }?;
        Ok(Self(fd))
    }

    /// Waits until the file is readable. Edge-triggered: read until it is empty, then clear the readiness. Cancel safe.
    ///
    /// # Errors
    /// The runtime is shutting down.
    pub async fn readable(&self) -> io::Result<AsyncFdReadyGuard<'_, OwnedFd>> {
        self.0.readable().await
    }
}

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

/// The cookie of the network namespace that this thread is in.
///
/// # Errors
/// Out of descriptors, or the kernel is older than Linux 5.14.
pub fn own_netns_cookie() -> io::Result<u64> {
    netns_cookie(Socket::new(Domain::UNIX, Type::STREAM, None)?.as_fd())
}

/// The cookie of the network namespace that `socket` belongs to, socket(7) `SO_NETNS_COOKIE` (Linux 5.14).
///
/// # Errors
/// `socket` is no socket, or the kernel is older.
pub fn netns_cookie(socket: BorrowedFd<'_>) -> io::Result<u64> {
    let mut cookie = 0_u64;
    let mut size = libc::socklen_t::try_from(size_of::<u64>()).unwrap_or(0);
    // SAFETY: the kernel writes at most `size` bytes to `cookie`, which lives until the call returns.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut size,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(cookie) }
}
