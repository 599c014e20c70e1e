//! How much freed memory a process keeps for itself.
//!
//! What glibc keeps, it keeps for each thread, and once a large block was freed it keeps blocks of up to 32 MB: with two copies
//! of a model that is as much again as they take. What goes back to the system, on the other hand, has to be filled with zeros
//! by it the next time, which is a quarter of what decoding an ordinary image takes.

/// Bytes of the largest block that is kept, and of all that is kept at the end of the heap.
#[derive(Debug, Clone, Copy)]
#[repr(i32)]
enum Kept {
    Little = 128 << 10,
    Much = 8 << 20,
}

/// From now on hardly any: for a worker, and for a decoder before an image that takes all the memory that it may have. What was
/// kept so far goes back.
pub fn keep_little() {
    keep(Kept::Little);
}

/// From now on up to 8 MiB: for a decoder of ordinary images, whose pixels are such a block.
pub fn keep_much() {
    keep(Kept::Much);
}

/// Bytes of pixels up to which an image is an ordinary one: a block that may be kept.
pub const ORDINARY: u64 = Kept::Much as u64;

#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn keep(kept: Kept) {
    #[expect(unsafe_code, reason = "the allocator has no other way to be told")]
    // SAFETY: settings, and a request, which may come at any time. A system that does not take them goes on without.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, kept as i32);
        libc::mallopt(libc::M_TRIM_THRESHOLD, kept as i32);
        if matches!(kept, Kept::Little) {
            libc::malloc_trim(0);
        }
    }
}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
fn keep(_: Kept) {}
