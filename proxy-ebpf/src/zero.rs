//! A zero that the compiler does not know.
//!
//! Owns: the way around `memset`. Sixteen zero bytes in a row become a call of it, and its loop adds to a pointer, which
//! the verifier allows only those who have `CAP_PERFMON`.

use core::ptr;

/// Zero.
#[inline(always)]
pub fn zero() -> u32 {
    let zero = 0_u32;
    // SAFETY: a read of a local variable.
    unsafe { ptr::addr_of!(zero).read_volatile() }
}
