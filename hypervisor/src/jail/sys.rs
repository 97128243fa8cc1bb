//! System calls that have no safe wrapper.

use std::ffi::CStr;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use nix::libc::{self, c_int, c_long, c_uint};

/// Turns a result of `syscall` that is a descriptor into one.
fn descriptor(result: c_long) -> Result<OwnedFd, Errno> {
    let fd = c_int::try_from(Errno::result(result)?).map_err(|_| Errno::EBADF)?;
    // SAFETY: the kernel has just made it for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// `close_range(2)`.
pub fn close_range(first: c_uint, last: c_uint) -> Result<(), Errno> {
    // SAFETY: touches no memory. That nobody uses the descriptors is the caller's business, and is not about memory.
    Errno::result(unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) }).map(drop)
}

/// A copy of the mounts at and below `path`, attached nowhere.
pub fn clone_mounts(path: &CStr, recursive: bool) -> Result<OwnedFd, Errno> {
    let recursive = if recursive { libc::AT_RECURSIVE.unsigned_abs() } else { 0 };
    let flags = libc::OPEN_TREE_CLONE | libc::O_CLOEXEC.unsigned_abs() | recursive;
    // SAFETY: the path is a string that outlives the call.
    descriptor(unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, path.as_ptr(), flags) })
}

/// An empty file system in memory which holds nothing but its root, attached nowhere.
pub fn empty_file_system() -> Result<OwnedFd, Errno> {
    let set = |context: &OwnedFd, key: &CStr, value: &CStr| {
        let (context, key, value) = (context.as_raw_fd(), key.as_ptr(), value.as_ptr());
        // SAFETY: key and value are strings that outlive the call.
        let result =
            unsafe { libc::syscall(libc::SYS_fsconfig, context, libc::FSCONFIG_SET_STRING, key, value, 0) };
        Errno::result(result)
    };
    // SAFETY: the name is a string that outlives the call.
    let context =
        descriptor(unsafe { libc::syscall(libc::SYS_fsopen, c"tmpfs".as_ptr(), libc::FSOPEN_CLOEXEC) })?;
    set(&context, c"mode", c"0555")?;
    set(&context, c"nr_inodes", c"1")?;
    let null = std::ptr::null::<libc::c_char>();
    // SAFETY: this command takes neither key nor value.
    let made = unsafe {
        libc::syscall(libc::SYS_fsconfig, context.as_raw_fd(), libc::FSCONFIG_CMD_CREATE, null, null, 0)
    };
    Errno::result(made)?;
    let attributes =
        libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC;
    // SAFETY: touches no memory.
    descriptor(unsafe {
        libc::syscall(libc::SYS_fsmount, context.as_raw_fd(), libc::FSMOUNT_CLOEXEC, attributes)
    })
}

/// Attaches mounts over the working directory.
pub fn attach_here(mounts: BorrowedFd<'_>) -> Result<(), Errno> {
    let flags = libc::MOVE_MOUNT_F_EMPTY_PATH;
    let (from, here) = (mounts.as_raw_fd(), c".".as_ptr());
    // SAFETY: the paths are strings that outlive the call.
    let result =
        unsafe { libc::syscall(libc::SYS_move_mount, from, c"".as_ptr(), libc::AT_FDCWD, here, flags) };
    Errno::result(result).map(drop)
}
