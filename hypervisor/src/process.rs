//! How this process uses memory.

use nix::libc;
use nix::sys::prctl;

/// Keeps the process, and the RAM of its guest, small. To be called before the first thread is started.
///
/// * One heap for all threads: a heap each would cost each a few pages and a reservation of 64 MiB, and the threads
///   here allocate too rarely to get in each other's way.
/// * No huge pages, where the host would give them unasked: a guest touches RAM here and there, and each touch would be
///   backed, and zeroed, two MiB at a time.
pub fn keep_small() {
    // SAFETY: sets a number in the C library's allocator.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
    // A kernel without huge pages refuses, and has none.
    let _ = prctl::set_thp_disable(true);
}
