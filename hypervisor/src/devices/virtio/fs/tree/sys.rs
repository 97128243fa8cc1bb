//! System calls on inodes that are held by an `O_PATH` descriptor.
//!
//! Such a descriptor names an inode without opening it: it cannot be read, it runs no driver's `open`, and nothing can
//! be swapped under it. What it cannot do itself is done through its entry in `/proc/self/fd`, which leads to that very
//! inode and follows no name of the guest's. The `fs` thread has that directory as its working directory
//! ([`super::worker`]), since neither `/proc` nor any other path exists in the jail.
//!
//! Some calls are made by number. The standard library refers to glibc's `statx` and `copy_file_range` weakly, and in a
//! static binary with link-time optimisation a weak reference that is the only one resolves to null. And glibc's
//! `renameat2` makes another call where there are no flags, while the thread may make only those that
//! [`crate::devices::virtio::fs::needs`] lists.

use std::ffi::CStr;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::libc;

use crate::devices::virtio::fs::chain::Buffers;

/// The name of a descriptor's entry in `/proc/self/fd`.
pub struct ProcName([u8; 12]);

impl ProcName {
    /// The entry of `fd`.
    pub fn of(fd: BorrowedFd<'_>) -> Self {
        let mut text = [0; 12];
        let mut rest = fd.as_raw_fd().unsigned_abs();
        let mut start = text.len() - 1;
        loop {
            start -= 1;
            // A remainder of 10 fits.
            text[start] = b'0' + u8::try_from(rest % 10).unwrap_or(0);
            rest /= 10;
            if rest == 0 {
                break;
            }
        }
        text.rotate_left(start);
        Self(text)
    }

    /// As a path relative to the working directory.
    pub fn as_c_str(&self) -> &CStr {
        CStr::from_bytes_until_nul(&self.0).unwrap_or(c"")
    }
}

/// What identifies an inode among all that can be reached: file systems number their inodes independently, and one
/// file system may be mounted at several places with different rights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct InodeKey {
    /// The file system.
    pub device: u64,
    /// The inode's number in it.
    pub inode: u64,
    /// The mount it was reached through.
    pub mount: u64,
}

/// An inode's attributes.
#[derive(Debug, Clone, Copy)]
pub struct Stat(libc::statx);

impl Stat {
    /// What identifies the inode.
    pub fn key(&self) -> InodeKey {
        InodeKey { device: self.device(), inode: self.0.stx_ino, mount: self.0.stx_mnt_id }
    }

    /// The file system's device number.
    pub fn device(&self) -> u64 {
        libc::makedev(self.0.stx_dev_major, self.0.stx_dev_minor)
    }

    /// Type and permission bits.
    pub fn mode(&self) -> u32 {
        u32::from(self.0.stx_mode)
    }

    /// The fields as the kernel gives them.
    pub fn raw(&self) -> &libc::statx {
        &self.0
    }
}

fn check(result: libc::c_int) -> Result<libc::c_int, Errno> {
    Errno::result(result)
}

fn check_size(result: libc::ssize_t) -> Result<usize, Errno> {
    usize::try_from(Errno::result(result)?).map_err(|_| Errno::EIO)
}

fn owned(result: RawFd) -> Result<OwnedFd, Errno> {
    let fd = Errno::result(result)?;
    // SAFETY: the kernel has just made this descriptor and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Opens one name below a directory. `flags` must include `O_NOFOLLOW` or `O_EXCL`, so that no link is followed.
pub fn open_at(dir: BorrowedFd<'_>, name: &CStr, flags: i32, mode: u32) -> Result<OwnedFd, Errno> {
    // SAFETY: `name` is terminated; the call touches no other memory.
    owned(unsafe { libc::openat(dir.as_raw_fd(), name.as_ptr(), flags | libc::O_CLOEXEC, mode) })
}

/// Opens the inode that `fd` holds. The caller has made sure that it is a regular file or a directory.
pub fn reopen(fd: BorrowedFd<'_>, flags: i32) -> Result<OwnedFd, Errno> {
    let name = ProcName::of(fd);
    // SAFETY: as in `open_at`.
    owned(unsafe { libc::open(name.as_c_str().as_ptr(), flags | libc::O_CLOEXEC) })
}

/// The attributes of the inode that `fd` holds.
pub fn stat(fd: BorrowedFd<'_>) -> Result<Stat, Errno> {
    stat_at(fd, c"")
}

/// The attributes of a name below a directory, or of the directory where the name is empty.
pub fn stat_at(dir: BorrowedFd<'_>, name: &CStr) -> Result<Stat, Errno> {
    // SAFETY: an all-zero statx is a value of that type.
    let mut out: libc::statx = unsafe { std::mem::zeroed() };
    let flags = libc::AT_EMPTY_PATH | libc::AT_SYMLINK_NOFOLLOW | libc::AT_NO_AUTOMOUNT;
    let mask = libc::STATX_BASIC_STATS | libc::STATX_MNT_ID;
    // SAFETY: `name` is terminated, `out` is ours to write.
    Errno::result(unsafe {
        libc::syscall(libc::SYS_statx, dir.as_raw_fd(), name.as_ptr(), flags, mask, &raw mut out)
    })?;
    Ok(Stat(out))
}

/// Sets the permission bits of the inode that `fd` holds.
pub fn chmod(fd: BorrowedFd<'_>, mode: u32) -> Result<(), Errno> {
    let name = ProcName::of(fd);
    // SAFETY: `name` is terminated.
    check(unsafe { libc::chmod(name.as_c_str().as_ptr(), mode) }).map(drop)
}

/// Sets owner and group of the inode that `fd` holds; `None` leaves one as it is.
pub fn chown(fd: BorrowedFd<'_>, uid: Option<u32>, gid: Option<u32>) -> Result<(), Errno> {
    let flags = libc::AT_EMPTY_PATH | libc::AT_SYMLINK_NOFOLLOW;
    let (uid, gid) = (uid.unwrap_or(u32::MAX), gid.unwrap_or(u32::MAX));
    // SAFETY: the name is a terminated constant.
    check(unsafe { libc::fchownat(fd.as_raw_fd(), c"".as_ptr(), uid, gid, flags) }).map(drop)
}

/// Sets the size of the regular file that `fd` holds.
pub fn truncate(fd: BorrowedFd<'_>, size: i64) -> Result<(), Errno> {
    let name = ProcName::of(fd);
    // SAFETY: `name` is terminated.
    check(unsafe { libc::truncate(name.as_c_str().as_ptr(), size) }).map(drop)
}

/// Sets access and modification time of the inode that `fd` holds.
pub fn set_times(fd: BorrowedFd<'_>, times: &[libc::timespec; 2]) -> Result<(), Errno> {
    let name = ProcName::of(fd);
    // SAFETY: `name` is terminated and `times` has the two elements that are read.
    check(unsafe { libc::utimensat(libc::AT_FDCWD, name.as_c_str().as_ptr(), times.as_ptr(), 0) }).map(drop)
}

/// Gives the inode that `fd` holds one more name. (`AT_EMPTY_PATH` would need a capability in the host's own user
/// namespace before Linux 6.10.)
pub fn link(fd: BorrowedFd<'_>, dir: BorrowedFd<'_>, name: &CStr) -> Result<(), Errno> {
    let source = ProcName::of(fd);
    let (source, follow) = (source.as_c_str().as_ptr(), libc::AT_SYMLINK_FOLLOW);
    // SAFETY: both names are terminated.
    check(unsafe { libc::linkat(libc::AT_FDCWD, source, dir.as_raw_fd(), name.as_ptr(), follow) }).map(drop)
}

/// Makes a directory.
pub fn mkdir(dir: BorrowedFd<'_>, name: &CStr, mode: u32) -> Result<(), Errno> {
    // SAFETY: `name` is terminated.
    check(unsafe { libc::mkdirat(dir.as_raw_fd(), name.as_ptr(), mode) }).map(drop)
}

/// Makes a FIFO, a socket or an empty regular file; never a device node.
pub fn mknod(dir: BorrowedFd<'_>, name: &CStr, mode: u32) -> Result<(), Errno> {
    // SAFETY: `name` is terminated.
    check(unsafe { libc::mknodat(dir.as_raw_fd(), name.as_ptr(), mode, 0) }).map(drop)
}

/// Makes a symbolic link.
pub fn symlink(target: &CStr, dir: BorrowedFd<'_>, name: &CStr) -> Result<(), Errno> {
    // SAFETY: both strings are terminated.
    check(unsafe { libc::symlinkat(target.as_ptr(), dir.as_raw_fd(), name.as_ptr()) }).map(drop)
}

/// Removes a name; `flags` is 0 or `AT_REMOVEDIR`.
pub fn unlink(dir: BorrowedFd<'_>, name: &CStr, flags: i32) -> Result<(), Errno> {
    // SAFETY: `name` is terminated.
    check(unsafe { libc::unlinkat(dir.as_raw_fd(), name.as_ptr(), flags) }).map(drop)
}

/// Moves a name.
pub fn rename(from: (BorrowedFd<'_>, &CStr), to: (BorrowedFd<'_>, &CStr), flags: u32) -> Result<(), Errno> {
    let (from_dir, to_dir) = (from.0.as_raw_fd(), to.0.as_raw_fd());
    let (from_name, to_name) = (from.1.as_ptr(), to.1.as_ptr());
    // SAFETY: both names are terminated.
    Errno::result(unsafe { libc::syscall(libc::SYS_renameat2, from_dir, from_name, to_dir, to_name, flags) })
        .map(drop)
}

/// The target of the symbolic link that `fd` holds.
pub fn read_link(fd: BorrowedFd<'_>, target: &mut Vec<u8>) -> Result<(), Errno> {
    fill(target, PATH_MAX, |buffer, size| {
        // SAFETY: the kernel writes at most `size` bytes to `buffer`, which has that room.
        unsafe { libc::readlinkat(fd.as_raw_fd(), c"".as_ptr(), buffer.cast(), size) }
    })
}

/// The longest target of a symbolic link, without a terminator.
const PATH_MAX: usize = 4095;

/// Appends directory entries in the kernel's format, `linux_dirent64`.
pub fn read_dir(fd: BorrowedFd<'_>, entries: &mut Vec<u8>, size: usize) -> Result<(), Errno> {
    fill(entries, size, |buffer, size| {
        // SAFETY: the kernel writes at most `size` bytes to `buffer`, which has that room.
        let result = unsafe { libc::syscall(libc::SYS_getdents64, fd.as_raw_fd(), buffer, size) };
        libc::ssize_t::try_from(result).unwrap_or(-1)
    })
}

/// One attribute's value into `value`, or its length where `size` is 0.
pub fn get_xattr(fd: BorrowedFd<'_>, name: &CStr, value: &mut Vec<u8>, size: usize) -> Result<usize, Errno> {
    let path = ProcName::of(fd);
    sized(value, size, |buffer, size| {
        // SAFETY: both strings are terminated; the kernel writes at most `size` bytes to `buffer`.
        unsafe { libc::getxattr(path.as_c_str().as_ptr(), name.as_ptr(), buffer.cast(), size) }
    })
}

/// The attributes' names into `names`, or their length where `size` is 0.
pub fn list_xattr(fd: BorrowedFd<'_>, names: &mut Vec<u8>, size: usize) -> Result<usize, Errno> {
    let path = ProcName::of(fd);
    sized(names, size, |buffer, size| {
        // SAFETY: the path is terminated; the kernel writes at most `size` bytes to `buffer`.
        unsafe { libc::listxattr(path.as_c_str().as_ptr(), buffer.cast(), size) }
    })
}

/// Sets an attribute.
pub fn set_xattr(fd: BorrowedFd<'_>, name: &CStr, value: &[u8], flags: i32) -> Result<(), Errno> {
    let path = ProcName::of(fd);
    let (bytes, size) = (value.as_ptr().cast(), value.len());
    // SAFETY: both strings are terminated; the kernel reads `value` only.
    check(unsafe { libc::setxattr(path.as_c_str().as_ptr(), name.as_ptr(), bytes, size, flags) }).map(drop)
}

/// Removes an attribute.
pub fn remove_xattr(fd: BorrowedFd<'_>, name: &CStr) -> Result<(), Errno> {
    let path = ProcName::of(fd);
    // SAFETY: both strings are terminated.
    check(unsafe { libc::removexattr(path.as_c_str().as_ptr(), name.as_ptr()) }).map(drop)
}

/// Reads a file into guest memory, with no copy in between.
pub fn read_into(fd: BorrowedFd<'_>, buffers: &Buffers<'_>, offset: i64) -> Result<usize, Errno> {
    let vectors = buffers.io_vectors();
    let count = libc::c_int::try_from(vectors.len()).map_err(|_| Errno::EINVAL)?;
    // SAFETY: the vectors name guest memory that stays mapped while `buffers` lives, and which holds no Rust object.
    check_size(unsafe { libc::preadv(fd.as_raw_fd(), vectors.as_ptr(), count, offset) })
}

/// Writes a file from guest memory, with no copy in between; `flags` as in `pwritev2`.
pub fn write_from(
    fd: BorrowedFd<'_>,
    buffers: &Buffers<'_>,
    offset: i64,
    flags: i32,
) -> Result<usize, Errno> {
    let vectors = buffers.io_vectors();
    let count = libc::c_int::try_from(vectors.len()).map_err(|_| Errno::EINVAL)?;
    // SAFETY: as in `read_into`.
    check_size(unsafe { libc::pwritev2(fd.as_raw_fd(), vectors.as_ptr(), count, offset, flags) })
}

/// Copies at most `length` bytes from one open file's offset to another's.
pub fn copy(
    (source, mut read_at): (BorrowedFd<'_>, i64),
    (target, mut write_at): (BorrowedFd<'_>, i64),
    length: usize,
) -> Result<usize, Errno> {
    let (source, target) = (source.as_raw_fd(), target.as_raw_fd());
    let (read_at, write_at) = (&raw mut read_at, &raw mut write_at);
    // SAFETY: the kernel reads and writes the two offsets, which are ours.
    let result = Errno::result(unsafe {
        libc::syscall(libc::SYS_copy_file_range, source, read_at, target, write_at, length, 0)
    })?;
    usize::try_from(result).map_err(|_| Errno::EIO)
}

/// The file system's figures.
pub fn stat_fs(fd: BorrowedFd<'_>) -> Result<libc::statvfs, Errno> {
    // SAFETY: an all-zero statvfs is a value of that type.
    let mut out: libc::statvfs = unsafe { std::mem::zeroed() };
    // SAFETY: `out` is ours to write.
    check(unsafe { libc::fstatvfs(fd.as_raw_fd(), &raw mut out) })?;
    Ok(out)
}

/// Writes the file system of an open file to disk.
pub fn sync_fs(fd: BorrowedFd<'_>) -> Result<(), Errno> {
    // SAFETY: the call touches no memory of ours.
    check(unsafe { libc::syncfs(fd.as_raw_fd()) }).map(drop)
}

/// Reports errors that were kept for `close`, which a duplicate brings out without closing the file.
pub fn flush(fd: BorrowedFd<'_>) -> Result<(), Errno> {
    // SAFETY: the call touches no memory of ours.
    let copy = check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, 0) })?;
    // SAFETY: the copy was made one line above and is used nowhere else.
    check(unsafe { libc::close(copy) }).map(drop)
}

/// As [`fill`] where there is room, and the plain result of the call where there is none.
fn sized(
    bytes: &mut Vec<u8>,
    size: usize,
    call: impl Fn(*mut u8, usize) -> libc::ssize_t,
) -> Result<usize, Errno> {
    if size == 0 {
        return check_size(call(std::ptr::null_mut(), 0));
    }
    fill(bytes, size, call)?;
    Ok(bytes.len())
}

/// Replaces `bytes` by what `call` writes to a buffer of `size` bytes.
fn fill(
    bytes: &mut Vec<u8>,
    size: usize,
    call: impl Fn(*mut u8, usize) -> libc::ssize_t,
) -> Result<(), Errno> {
    bytes.clear();
    bytes.reserve(size);
    let written = check_size(call(bytes.as_mut_ptr(), size))?;
    // SAFETY: the kernel has initialised so many bytes, within the room reserved.
    unsafe { bytes.set_len(written.min(size)) };
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn proc_names_are_decimal() {
        for fd in [0, 9, 10, 4711, RawFd::MAX] {
            // SAFETY: only the number is looked at.
            let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
            assert_eq!(ProcName::of(borrowed).as_c_str().to_str().unwrap(), fd.to_string());
        }
    }
}
