//! System calls that nix does not wrap, each behind a safe function that takes and gives owned descriptors.
//!
//! Nothing here knows what a container is. Every function maps to one system call and returns [`std::io::Result`].

pub mod mountfd;
pub mod pipe;
pub mod process;
pub mod ring;
pub mod seccomp;
pub mod slots;

use std::ffi::CString;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// A path or string as the kernel takes it.
pub fn c_string(bytes: impl AsRef<[u8]>) -> io::Result<CString> {
    CString::new(bytes.as_ref()).map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "holds a NUL byte"))
}

/// A path as the kernel takes it.
pub fn c_path(path: &Path) -> io::Result<CString> {
    c_string(path.as_os_str().as_bytes())
}

/// Puts a descriptor on the event loop.
pub fn register(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an owned descriptor is the same one, and open, until it is dropped, which its registration precedes.
    unsafe { AsyncFd::register_with_interest(fd, interest) }.map_err(io::Error::from)
}

/// The result of a system call that answers 0 or more, or sets errno.
pub(crate) fn check(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// The descriptor that a system call has just made.
pub(crate) fn check_fd(result: libc::c_long) -> io::Result<OwnedFd> {
    let fd = check(result)?;
    let fd = i32::try_from(fd).map_err(|_| io::Error::from_raw_os_error(libc::EBADF))?;
    // SAFETY: the kernel has just made this descriptor for us, nobody else knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
