//! The mount API by descriptors: `fsopen`, `open_tree`, `mount_setattr`, `move_mount`.
//!
//! A mount is made detached, given its attributes, and then attached at a descriptor: no path is resolved twice, so
//! whoever can write to the tree cannot move the goal in between.

use super::{c_path, c_string, check, check_fd};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

const OPEN_TREE_CLONE: libc::c_uint = 1;
const OPEN_TREE_CLOEXEC: libc::c_uint = libc::O_CLOEXEC.cast_unsigned();
const MOVE_MOUNT_F_EMPTY_PATH: libc::c_uint = 0x04;
const MOVE_MOUNT_T_EMPTY_PATH: libc::c_uint = 0x40;
const FSOPEN_CLOEXEC: libc::c_uint = 1;
const FSMOUNT_CLOEXEC: libc::c_uint = 1;
const FSCONFIG_SET_FLAG: libc::c_uint = 0;
const FSCONFIG_SET_STRING: libc::c_uint = 1;
const FSCONFIG_CMD_CREATE: libc::c_uint = 6;

/// Attributes of a mount, as `mount_setattr(2)` takes them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Attributes {
    /// `MOUNT_ATTR_*` bits to set.
    pub set: u64,
    /// `MOUNT_ATTR_*` bits to clear first.
    pub clear: u64,
}

impl Attributes {
    /// Whether nothing would change.
    pub fn is_empty(self) -> bool {
        self == Self::default()
    }
}

/// A file system being configured.
pub struct FsContext(OwnedFd);

impl FsContext {
    /// Begins a mount of a file system of this type.
    pub fn open(fs_type: &str) -> io::Result<Self> {
        let name = c_string(fs_type)?;
        // SAFETY: the name is a valid C string that outlives the call.
        check_fd(unsafe { libc::syscall(libc::SYS_fsopen, name.as_ptr(), FSOPEN_CLOEXEC) }).map(Self)
    }

    /// Sets `key=value`.
    pub fn set_string(&self, key: &str, value: &str) -> io::Result<()> {
        let (key, value) = (c_string(key)?, c_string(value)?);
        self.config(FSCONFIG_SET_STRING, key.as_ptr(), value.as_ptr())
    }

    /// Sets an option that has no value.
    pub fn set_flag(&self, key: &str) -> io::Result<()> {
        let key = c_string(key)?;
        self.config(FSCONFIG_SET_FLAG, key.as_ptr(), std::ptr::null())
    }

    /// Makes the file system and a detached mount of it.
    pub fn mount(self, attributes: u64) -> io::Result<OwnedFd> {
        self.config(FSCONFIG_CMD_CREATE, std::ptr::null(), std::ptr::null())?;
        let attributes = u32::try_from(attributes).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
        // SAFETY: plain integers and a descriptor we own.
        check_fd(unsafe { libc::syscall(libc::SYS_fsmount, self.0.as_raw_fd(), FSMOUNT_CLOEXEC, attributes) })
    }

    /// What the file system says about its refusal, where it says something.
    pub fn complaint(&self) -> Option<String> {
        let mut text = [0u8; 512];
        let read = nix::unistd::read(self.0.as_fd(), &mut text).ok()?;
        let line = String::from_utf8_lossy(text.get(..read)?).trim().to_owned();
        line.strip_prefix("e ").map(str::to_owned)
    }

    fn config(
        &self,
        command: libc::c_uint,
        key: *const libc::c_char,
        value: *const libc::c_char,
    ) -> io::Result<()> {
        // SAFETY: key and value are null or valid C strings held by the caller during the call.
        let result = unsafe { libc::syscall(libc::SYS_fsconfig, self.0.as_raw_fd(), command, key, value, 0) };
        check(result).map(drop)
    }
}

/// A detached copy of the mount at `path` below `dir`, with everything mounted in it where `recursive`.
pub fn clone_tree(dir: BorrowedFd<'_>, path: &Path, recursive: bool) -> io::Result<OwnedFd> {
    let path = c_path(path)?;
    let depth = if recursive { libc::AT_RECURSIVE.cast_unsigned() } else { 0 };
    let flags = OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | depth | libc::AT_EMPTY_PATH.cast_unsigned();
    // SAFETY: the path is a valid C string that outlives the call.
    check_fd(unsafe { libc::syscall(libc::SYS_open_tree, dir.as_raw_fd(), path.as_ptr(), flags) })
}

/// Changes attributes and, where not 0, the propagation (`MS_PRIVATE`, …) of a mount.
pub fn set_attributes(
    mount: BorrowedFd<'_>,
    attributes: Attributes,
    propagation: u64,
    recursive: bool,
) -> io::Result<()> {
    let request =
        libc::mount_attr { attr_set: attributes.set, attr_clr: attributes.clear, propagation, userns_fd: 0 };
    set_attr(mount, &request, recursive)
}

/// Maps the owners of a detached mount's files by a user namespace.
pub fn map_ids(mount: BorrowedFd<'_>, user_namespace: BorrowedFd<'_>, recursive: bool) -> io::Result<()> {
    let request = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_IDMAP,
        attr_clr: 0,
        propagation: 0,
        userns_fd: u64::try_from(user_namespace.as_raw_fd())
            .map_err(|_| io::Error::from_raw_os_error(libc::EBADF))?,
    };
    set_attr(mount, &request, recursive)
}

fn set_attr(mount: BorrowedFd<'_>, request: &libc::mount_attr, recursive: bool) -> io::Result<()> {
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the structure is initialised, outlives the call, and its size is passed along.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            std::ptr::from_ref(request),
            size_of::<libc::mount_attr>(),
        )
    };
    check(result).map(drop)
}

/// Attaches a detached mount at a file or directory that is open as `target`.
pub fn attach(mount: BorrowedFd<'_>, target: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: both paths are empty C strings, both descriptors are open.
    let result = unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            mount.as_raw_fd(),
            c"".as_ptr(),
            target.as_raw_fd(),
            c"".as_ptr(),
            MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH,
        )
    };
    check(result).map(drop)
}

/// Opens `path` below `dir` as a location (`O_PATH`); nothing on the way may lead out of `dir`.
pub fn open_beneath(dir: BorrowedFd<'_>, path: &Path) -> io::Result<OwnedFd> {
    let path = c_path(path)?;
    // SAFETY: `open_how` is a plain structure of integers, all zero is a valid value of it.
    let mut how: libc::open_how = unsafe { std::mem::zeroed() };
    how.flags = u64::from((libc::O_PATH | libc::O_CLOEXEC).cast_unsigned());
    how.resolve = libc::RESOLVE_BENEATH | libc::RESOLVE_NO_MAGICLINKS;
    // SAFETY: path and structure are valid and outlive the call, the structure's size is passed along.
    let result = unsafe {
        libc::syscall(
            libc::SYS_openat2,
            dir.as_raw_fd(),
            path.as_ptr(),
            std::ptr::from_mut(&mut how),
            size_of::<libc::open_how>(),
        )
    };
    check_fd(result)
}

/// Closes every descriptor from `first` on when the process executes a program.
pub fn close_on_exec_from(first: u32) -> io::Result<()> {
    // SAFETY: plain integers; descriptors stay open for this process.
    check(unsafe {
        libc::syscall(libc::SYS_close_range, first, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC)
    })
    .map(drop)
}
