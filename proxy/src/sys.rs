//! The only `unsafe` of user space: system calls that no library offers safely.
#![expect(unsafe_code, reason = "this is the place for it")]

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

use tokio::io::Interest;
use tokio::io::unix::{AsyncFd, AsyncFdReadyGuard};

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
