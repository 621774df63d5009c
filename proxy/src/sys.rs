//! The only `unsafe` of user space: system calls that no library offers safely.
