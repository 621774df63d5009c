//! The only `unsafe` of user space: system calls that no library offers safely.
#![expect(unsafe_code, reason = "this is the one place for it")]

use std::ffi::c_int;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt as _;
use std::process::Command;
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

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

/// Gives the memory that nobody uses any more back to the system (`malloc_trim(3)`, of all threads since glibc 2.8). Of
/// itself glibc gives back only what is at the end of a heap. With another C library nothing is done.
pub fn return_free_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it takes the allocator's own locks, and memory in use stays where it is.
    unsafe {
        libc::malloc_trim(0);
    }
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

/// How many bytes have been written to `socket`, counted from some fixed point: those that the peer has acknowledged
/// (`tcpi_bytes_acked`, Linux 4.2) and those that it has not, tcp(7).
///
/// # Errors
/// `socket` is no TCP socket, or so many acknowledgements come that no moment was without.
pub fn written_position(socket: BorrowedFd<'_>) -> io::Result<u64> {
    const ATTEMPTS_MAX: usize = 8;
    let mut acked = bytes_acked(socket)?;
    for _ in 0..ATTEMPTS_MAX {
        let queued = send_queue_bytes(socket)? as u64;
        let before = std::mem::replace(&mut acked, bytes_acked(socket)?);
        if before == acked {
            return Ok(acked + queued);
        }
    }
    Err(io::ErrorKind::WouldBlock.into())
}

/// Whether the TCP connection of `socket` is over: both FINs were acknowledged, or it was reset.
#[must_use]
pub fn is_closed(socket: BorrowedFd<'_>) -> bool {
    /// `TCP_CLOSE`, as `tcpi_state` has it.
    const CLOSED: u8 = 7;
    tcp_info(socket).map_or(true, |[state, ..]| state == CLOSED)
}

fn bytes_acked(socket: BorrowedFd<'_>) -> io::Result<u64> {
    Ok(tcp_info(socket)?.last_chunk().map_or(0, |bytes| u64::from_ne_bytes(*bytes)))
}

/// The first bytes of `struct tcp_info` (`include/uapi/linux/tcp.h`), from `tcpi_state` to `tcpi_bytes_acked`.
fn tcp_info(socket: BorrowedFd<'_>) -> io::Result<[u8; 128]> {
    let mut info = [0; 128];
    let mut size = libc::socklen_t::try_from(info.len()).unwrap_or(0);
    // SAFETY: the kernel writes at most `size` bytes to `info`, which lives until the call returns.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            info.as_mut_ptr().cast(),
            &raw mut size,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(info) }
}

/// Lets a verdict program see what is queued at `socket` already (`SO_RCVLOWAT`, socket(7), whose change makes the kernel
/// look at the queue: `tcp_set_rcvlowat`).
///
/// # Errors
/// As `setsockopt(2)`.
pub fn poke(socket: BorrowedFd<'_>) -> io::Result<()> {
    set_number(socket, libc::SOL_SOCKET, libc::SO_RCVLOWAT, 1)
}

/// Once nobody has the socket any more, a peer that has not ended its half is reset as soon as it has acknowledged
/// our FIN, and not kept waiting for a minute (`TCP_LINGER2` below zero, tcp(7)). It has received everything by then.
///
/// # Errors
/// As `setsockopt(2)`.
pub fn reset_when_orphaned(socket: BorrowedFd<'_>) -> io::Result<()> {
    set_number(socket, libc::IPPROTO_TCP, libc::TCP_LINGER2, -1)
}

/// How much may wait to be sent is limited by the send buffer alone, whatever `net.ipv4.tcp_notsent_lowat` says
/// (`TCP_NOTSENT_LOWAT`, tcp(7), Linux 3.12). It is also what another drowse knows our sockets by, so
/// they need it before they have a peer.
///
/// # Errors
/// As `setsockopt(2)`.
pub fn limit_by_send_buffer_alone(socket: BorrowedFd<'_>) -> io::Result<()> {
    let limit = drowse_ebpf::DROWSE_UNSENT_MAX.cast_signed();
    set_number(socket, libc::IPPROTO_TCP, libc::TCP_NOTSENT_LOWAT, limit)
}

fn set_number(socket: BorrowedFd<'_>, level: c_int, option: c_int, number: c_int) -> io::Result<()> {
    let size = libc::socklen_t::try_from(size_of::<c_int>()).unwrap_or(0);
    // SAFETY: the kernel reads `size` bytes of `number`, which lives until the call returns.
    let result =
        unsafe { libc::setsockopt(socket.as_raw_fd(), level, option, (&raw const number).cast(), size) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Runs a classifier once, in the network namespace of this thread, with `frame` for a packet. Gives its answer.
///
/// # Errors
/// As bpf(2), `BPF_PROG_TEST_RUN`.
pub fn run_classifier(program: BorrowedFd<'_>, frame: &[u8]) -> io::Result<u32> {
    /// `BPF_PROG_TEST_RUN` (`include/uapi/linux/bpf.h`).
    const TEST_RUN: c_int = 10;
    /// The member `test` of `union bpf_attr`, up to `batch_size`.
    #[repr(C)]
    #[derive(Default)]
    struct Test {
        program: c_int,
        answer: u32,
        data_size_in: u32,
        data_size_out: u32,
        data_in: u64,
        data_out: u64,
        repeat: u32,
        duration: u32,
        context_size_in: u32,
        context_size_out: u32,
        context_in: u64,
        context_out: u64,
        flags: u32,
        cpu: u32,
        batch_size: u32,
        reserved: u32,
    }
    let mut test = Test {
        program: program.as_raw_fd(),
        data_size_in: u32::try_from(frame.len()).map_err(io::Error::other)?,
        data_in: frame.as_ptr().expose_provenance() as u64,
        repeat: 1,
        ..Test::default()
    };
    // SAFETY: the kernel reads and writes `test`, and reads `data_size_in` bytes of `frame`; both live until the call
    // returns.
    let result = unsafe { libc::syscall(libc::SYS_bpf, TEST_RUN, &raw mut test, size_of::<Test>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(test.answer) }
}

/// The entry of an eBPF array, as words that programs and this process read and add to.
#[derive(Debug)]
pub struct SharedWords {
    memory: NonNull<AtomicU64>,
    words: usize,
}

// SAFETY: the memory is of atomics, is mapped as long as this lives, and belongs to no thread.
unsafe impl Send for SharedWords {}
// SAFETY: as above.
unsafe impl Sync for SharedWords {}

impl SharedWords {
    /// Maps the first entry of the array `map`, which was made with `BPF_F_MMAPABLE` (Linux 5.5) and whose entries have
    /// `words` words, at most a page.
    ///
    /// # Errors
    /// As mmap(2).
    pub fn map(map: BorrowedFd<'_>, words: usize) -> io::Result<Self> {
        let flags = rustix::mm::MapFlags::SHARED;
        let access = rustix::mm::ProtFlags::READ | rustix::mm::ProtFlags::WRITE;
        // SAFETY: the kernel chooses a place that nobody uses; it refuses a length beyond the map.
        let memory = unsafe {
            rustix::mm::mmap(std::ptr::null_mut(), words * size_of::<AtomicU64>(), access, flags, map, 0)
        }?;
        let memory = NonNull::new(memory.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { memory, words })
    }

    /// The words.
    #[must_use]
    pub fn words(&self) -> &[AtomicU64] {
        // SAFETY: so many words are mapped, aligned to a page, as long as `self` lives; all bits are values.
        unsafe { std::slice::from_raw_parts(self.memory.as_ptr(), self.words) }
    }
}

impl Drop for SharedWords {
    fn drop(&mut self) {
        // SAFETY: it was mapped with this length, and nobody has a reference any more.
        let _ =
            unsafe { rustix::mm::munmap(self.memory.as_ptr().cast(), self.words * size_of::<AtomicU64>()) };
    }
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
