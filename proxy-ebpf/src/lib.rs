//! The ABI between the eBPF programs and user space: map names, keys, values, limits.
#![no_std]
