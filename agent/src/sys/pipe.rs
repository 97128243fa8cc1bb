//! Moving bytes between descriptors without taking them through this process's memory.

use super::check;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Moves up to `most` bytes from one descriptor to the other, one of them a pipe, and never waits. 0 is the end.
pub fn splice(from: BorrowedFd<'_>, to: BorrowedFd<'_>, most: usize) -> io::Result<usize> {
    let flags = libc::SPLICE_F_MOVE | libc::SPLICE_F_NONBLOCK;
    // SAFETY: null offsets mean the descriptors' own positions.
    let moved = unsafe {
        libc::splice(
            from.as_raw_fd(),
            std::ptr::null_mut(),
            to.as_raw_fd(),
            std::ptr::null_mut(),
            most,
            flags,
        )
    };
    check(moved as libc::c_long)?;
    usize::try_from(moved).map_err(|_| io::Error::from_raw_os_error(libc::EIO))
}
