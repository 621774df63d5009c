//! Socket storage: a value that belongs to a socket and goes with it.
//!
//! Owns: the map type, because aya's has no flags and is for other contexts. Rests on: `BPF_MAP_TYPE_SK_STORAGE` (Linux
//! 5.2), which wants `BPF_F_NO_PREALLOC`.

use core::ptr;

use aya_ebpf::bindings::{bpf_map_type, bpf_sock};
use aya_ebpf::helpers::bpf_sk_storage_get;

/// Socket storage with these map flags.
#[repr(C)]
pub struct Storage<T, const FLAGS: usize> {
    r#type: *const [i32; bpf_map_type::BPF_MAP_TYPE_SK_STORAGE as usize],
    key: *const i32,
    value: *const T,
    max_entries: *const [i32; 0],
    map_flags: *const [i32; FLAGS],
}

// SAFETY: the pointers are placeholders for the loader and never followed.
unsafe impl<T, const FLAGS: usize> Sync for Storage<T, FLAGS> {}

impl<T, const FLAGS: usize> Storage<T, FLAGS> {
    /// The map, as the loader makes it.
    pub const fn new() -> Self {
        Self {
            r#type: ptr::null(),
            key: ptr::null(),
            value: ptr::null(),
            max_entries: ptr::null(),
            map_flags: ptr::null(),
        }
    }

    /// What is stored at `socket`; made first with `BPF_SK_STORAGE_GET_F_CREATE`. Null if there is nothing.
    ///
    /// # Safety
    /// `socket` is a full socket that the kernel gave to this program.
    #[inline(always)]
    pub unsafe fn get(&self, socket: *mut bpf_sock, flags: u32) -> *mut T {
        // SAFETY: the caller's promise; the verifier checks it again.
        unsafe {
            let map = ptr::from_ref(self).cast_mut().cast();
            bpf_sk_storage_get(map, socket.cast(), ptr::null_mut(), u64::from(flags)).cast()
        }
    }
}
