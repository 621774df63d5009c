//! Counters that several CPUs add to.
//!
//! Owns: the one instruction that `core` does not offer for eBPF (the target has atomic loads and stores only). Rests
//! on: `BPF_ATOMIC | BPF_ADD`, in every kernel that has maps.

/// Adds `amount` to `*counter` atomically, in no order with other memory.
///
/// # Safety
/// `counter` points to an aligned `u64` that nobody accesses other than atomically, such as a field of a map's value.
#[inline(always)]
pub unsafe fn add(counter: *mut u64, amount: u64) {
    #[cfg(target_arch = "bpf")]
    // SAFETY: the caller's promise; the verifier checks it again.
    unsafe {
        core::arch::asm!(
            "lock *(u64 *)({counter} + 0) += {amount}",
            counter = in(reg) counter,
            amount = in(reg) amount,
        );
    }
    #[cfg(not(target_arch = "bpf"))]
    // SAFETY: the caller's promise.
    unsafe {
        use core::sync::atomic::{AtomicU64, Ordering::Relaxed};
        AtomicU64::from_ptr(counter).fetch_add(amount, Relaxed);
    }
}

/// Adds `amount` to `*counter` and returns what was there before. Nothing before it in the program happens after it, and
/// nothing after it before (`BPF_ATOMIC | BPF_FETCH`, Linux 5.12).
///
/// # Safety
/// As for [`add`].
#[inline(always)]
pub unsafe fn fetch_add(counter: *mut u64, amount: u64) -> u64 {
    #[cfg(target_arch = "bpf")]
    // SAFETY: the caller's promise; the verifier checks it again.
    unsafe {
        let before: u64;
        core::arch::asm!(
            "{amount} = atomic_fetch_add((u64 *)({counter} + 0), {amount})",
            counter = in(reg) counter,
            amount = inout(reg) amount => before,
        );
        before
    }
    #[cfg(not(target_arch = "bpf"))]
    // SAFETY: the caller's promise.
    unsafe {
        use core::sync::atomic::{AtomicU64, Ordering::SeqCst};
        AtomicU64::from_ptr(counter).fetch_add(amount, SeqCst)
    }
}
