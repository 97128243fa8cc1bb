//! How this process uses memory.

use nix::libc;

/// Keeps the process, and the RAM of its guest, small. To be called before the first thread is started.
///
/// * One heap for all threads: a heap each would cost each a few pages and a reservation of 64 MiB, and the threads
///   here allocate too rarely to get in each other's way.
pub fn keep_small() {
    // SAFETY: sets a number in the C library's allocator.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}
