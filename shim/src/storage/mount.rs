//! The system calls of mounting.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, umount2};

use super::StorageError;
use super::idmap::IdMap;

/// Attributes that a mount can get after it is made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Attributes {
    /// Not writable.
    pub read_only: bool,
    /// No programs run from it.
    pub no_exec: bool,
    /// Also for everything mounted below it.
    pub recursive: bool,
}

/// A bind mount to be made.
#[derive(Debug, Default)]
pub struct Bind<'a> {
    /// With everything mounted below the source.
    pub recursive: bool,
    /// What may not be done through it.
    pub attributes: Attributes,
    /// Other owners than the source's.
    pub id_map: Option<&'a IdMap>,
}

impl Bind<'_> {
    /// Bind-mounts `source` on `target` and returns the mount. Neither device nodes nor set-uid bits of what is shared
    /// with a guest mean anything to the host.
    ///
    /// # Errors
    /// Nothing stays mounted.
    pub fn make(&self, source: &Path, target: &Path) -> Result<OwnedFd, StorageError> {
        let failed = |path: &Path, source| StorageError::Mount { path: path.to_owned(), source };
        let tree = clone_tree(source, self.recursive).map_err(|error| failed(source, error))?;
        self.isolate(&tree).map_err(|error| failed(target, error))?;
        if let Some(map) = self.id_map {
            let mapped = map.namespace().and_then(|namespace| map_owners(&tree, &namespace, self.recursive));
            mapped.map_err(|error| StorageError::IdMap { path: source.to_owned(), source: error })?;
        }
        attach(&tree, target).map_err(|error| failed(target, error))?;
        Ok(tree)
    }

    /// A copy of a shared mount is its peer: were it detached as such, all that is mounted below the source would be
    /// unmounted on the host. As a slave, also where the container asked for a private one, it still lets go of what
    /// the host unmounts, which could not remove the directory otherwise.
    fn isolate(&self, tree: &OwnedFd) -> io::Result<()> {
        let attr_set = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV;
        let request = libc::mount_attr { attr_set, attr_clr: 0, propagation: libc::MS_SLAVE, userns_fd: 0 };
        set(tree, request, self.recursive)?;
        let mut attr_set = 0;
        if self.attributes.read_only {
            attr_set |= libc::MOUNT_ATTR_RDONLY;
        }
        if self.attributes.no_exec {
            attr_set |= libc::MOUNT_ATTR_NOEXEC;
        }
        let request = libc::mount_attr { attr_set, attr_clr: 0, propagation: 0, userns_fd: 0 };
        set(tree, request, self.recursive && self.attributes.recursive)
    }
}

/// Gives what a mount without a place shows other owners, those of a user namespace; with everything mounted below where
/// `recursive`.
pub fn map_owners(tree: &OwnedFd, namespace: &OwnedFd, recursive: bool) -> io::Result<()> {
    let userns_fd = u64::try_from(namespace.as_raw_fd()).map_err(io::Error::other)?;
    let attr_set = libc::MOUNT_ATTR_IDMAP;
    set(tree, libc::mount_attr { attr_set, attr_clr: 0, propagation: 0, userns_fd }, recursive)
}

/// Changes a mount, with everything mounted below where `recursive`.
fn set(tree: &OwnedFd, request: libc::mount_attr, recursive: bool) -> io::Result<()> {
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the descriptor is open, and the request is a mount_attr of the size given, alive during the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const request,
            size_of::<libc::mount_attr>(),
        )
    };
    Errno::result(result).map(drop).map_err(Into::into)
}

/// A mount without a place, a copy of the one at `path`, with everything mounted below where `recursive`.
pub fn clone_tree(path: &Path, recursive: bool) -> io::Result<OwnedFd> {
    const CLONE: libc::c_uint = 1;
    let path = CString::new(path.as_os_str().as_bytes())?;
    let depth = if recursive { libc::AT_RECURSIVE.cast_unsigned() } else { 0 };
    let flags = CLONE | libc::O_CLOEXEC.cast_unsigned() | depth;
    // SAFETY: the path is a C string that outlives the call.
    let fd = unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, path.as_ptr(), flags) };
    let fd = i32::try_from(Errno::result(fd)?).map_err(|_| io::Error::from(Errno::EBADF))?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Whether anything is mounted directly below a mount.
pub fn has_mounts_below(mount: &OwnedFd) -> io::Result<bool> {
    let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", mount.as_raw_fd()))?;
    let id = info.lines().find_map(|line| line.strip_prefix("mnt_id:")).map(str::trim);
    let id = id.ok_or_else(|| io::Error::other("the kernel tells no mount's number"))?;
    let table = std::fs::read_to_string("/proc/self/mountinfo")?;
    // Its own number and its parent's come first.
    Ok(table.lines().any(|line| line.split(' ').nth(1) == Some(id)))
}

/// Gives a mount without a place one.
pub fn attach(mount: &OwnedFd, target: &Path) -> io::Result<()> {
    const FROM_DESCRIPTOR: libc::c_uint = 4;
    let target = CString::new(target.as_os_str().as_bytes())?;
    // SAFETY: both paths are C strings that outlive the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_FDCWD,
            target.as_ptr(),
            FROM_DESCRIPTOR,
        )
    };
    Errno::result(result).map(drop).map_err(Into::into)
}

/// Calls mount(2).
pub fn mount(
    source: Option<&Path>,
    target: &Path,
    kind: Option<&str>,
    flags: MsFlags,
    data: Option<&str>,
) -> io::Result<()> {
    nix::mount::mount(source, target, kind, flags, data).map_err(Into::into)
}

/// Takes a mount and all below it out of sight; it ends when nobody uses it any more. No mount there is fine.
pub fn detach(target: &Path) -> io::Result<()> {
    match umount2(target, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
        Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

/// Runs `action` on a thread that has a working directory of its own, `directory`.
pub fn in_directory<T: Send>(
    directory: &Path,
    action: impl FnOnce() -> io::Result<T> + Send,
) -> io::Result<T> {
    let opened = std::fs::File::open(directory)?;
    let body = || {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_FS)?;
        // SAFETY: the descriptor is open for the call.
        Errno::result(unsafe { libc::fchdir(opened.as_raw_fd()) })?;
        action()
    };
    std::thread::scope(|scope| scope.spawn(body).join())
        .unwrap_or_else(|_| Err(io::Error::other("the mounting thread failed")))
}
