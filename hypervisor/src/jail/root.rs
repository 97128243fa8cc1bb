//! The root of the process's file system.
//!
//! The new mount namespace belongs to the new user namespace, so the kernel has made every mount in it a slave of the
//! host's: mounts arrive from there and none goes back. What becomes the root is a copy of such a mount, since the ones
//! that came with the namespace are locked in their place.

use std::os::fd::{AsFd, OwnedFd};

use nix::fcntl::{OFlag, open};
use nix::mount::{MntFlags, umount2};
use nix::sys::stat::Mode;
use nix::unistd::{chdir, fchdir, pivot_root};

use super::{JailError, Tried, sys};
use crate::devices::virtio::fs::SharedDirectory;

/// The working directory, which is the shared one, becomes the root.
pub fn become_shared_directory() -> Result<SharedDirectory, JailError> {
    // While /proc can be seen.
    let proc_self_fd = sys::clone_mounts(c"/proc/self/fd", false).tried("keep /proc/self/fd")?;
    let read = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
    let mount_table = open("/proc/self/mountinfo", read, Mode::empty()).tried("watch its mounts")?;
    let mounts = sys::clone_mounts(c".", true).tried("copy the shared directory's mounts")?;
    pivot_into(&mounts)?;
    let path = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let root = open("/", path, Mode::empty()).tried("open its root")?;
    Ok(SharedDirectory { root, proc_self_fd, mount_table: Some(mount_table) })
}

/// A directory in which nothing is, nor can be made, becomes the root.
pub fn become_empty() -> Result<(), JailError> {
    let mounts = sys::empty_file_system().tried("make an empty file system")?;
    chdir("/").tried("leave its working directory")?;
    pivot_into(&mounts)
}

/// Attaches `mounts` over the working directory and makes them the root; the old one is detached.
fn pivot_into(mounts: &OwnedFd) -> Result<(), JailError> {
    sys::attach_here(mounts.as_fd()).tried("attach its root")?;
    fchdir(mounts).tried("enter its root")?;
    // Puts the old root on top of the new one, from where it is taken away.
    pivot_root(".", ".").tried("change its root")?;
    umount2(".", MntFlags::MNT_DETACH).tried("detach the host's root")?;
    chdir("/").tried("enter its root")
}
