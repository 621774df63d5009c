//! The eBPF object of drowse: gathers the programs, one file each, and holds none itself.
//!
//! Built for `bpfel-unknown-none` by `cargo xtask build-ebpf`. On any other architecture it is an empty program, so
//! that one clippy run with stable Rust covers the eBPF code, too.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]
#![cfg_attr(target_arch = "bpf", feature(asm_experimental_arch))]
#![expect(unsafe_code, reason = "eBPF programs live on pointers that the kernel's verifier checks")]
#![expect(
    clippy::inline_always,
    reason = "a call is a verifier state of its own; bodies this small are inlined"
)]

mod atomic;
mod ends;
mod find;
mod flows;
mod listen_hook;
mod observe;
mod redirect;
mod steer;
mod storage;
mod zero;

/// The licence that the kernel sees: some helpers are for GPL-compatible programs only.
// SAFETY: the kernel's loader reads this section by name; nothing else defines a symbol of this name.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
#[used]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

#[cfg(not(target_arch = "bpf"))]
fn main() {}
