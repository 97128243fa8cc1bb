//! Paths that a container must not see (masked) or change (read-only). A missing one is nothing to hide.

use crate::engine::error::{Context, Error, Result};
use crate::sys::mountfd::{self, Attributes, FsContext};
use nix::sys::stat::{SFlag, fstat, major, minor};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use super::mounts::open_location;

const READ_ONLY: Attributes = Attributes { set: libc::MOUNT_ATTR_RDONLY, clear: 0 };

/// Hides files behind `/dev/null` and directories behind an empty read-only tmpfs. Runs in the container's root.
pub fn mask(paths: &[String]) -> Result<()> {
    for path in paths {
        let doing = || format!("linux.maskedPaths: hide {path}");
        let Some(target) = existing(path).doing(doing)? else { continue };
        let cover = match super::tree::kind(&fstat(&target).doing(doing)?) {
            SFlag::S_IFDIR => empty_directory().doing(doing)?,
            _ => null_device()?,
        };
        mountfd::attach(cover.as_fd(), target.as_fd()).doing(doing)?;
    }
    Ok(())
}

/// Makes paths read-only. Runs in the container's root.
pub fn protect(paths: &[String]) -> Result<()> {
    for path in paths {
        let doing = || format!("linux.readonlyPaths: protect {path}");
        let Some(target) = existing(path).doing(doing)? else { continue };
        let copy = mountfd::clone_tree(target.as_fd(), Path::new(""), true).doing(doing)?;
        mountfd::set_attributes(copy.as_fd(), READ_ONLY, 0, false).doing(doing)?;
        mountfd::attach(copy.as_fd(), target.as_fd()).doing(doing)?;
    }
    Ok(())
}

/// Makes the container's root itself read-only, not what is mounted in it.
pub fn protect_root() -> Result<()> {
    let root = open_location(Path::new("/")).doing(|| "open the container's root")?;
    mountfd::set_attributes(root.as_fd(), READ_ONLY, 0, false).doing(|| "make the container's root read-only")
}

fn existing(path: &str) -> io::Result<Option<OwnedFd>> {
    match open_location(Path::new(path)) {
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR)) => Ok(None),
        other => other.map(Some),
    }
}

fn empty_directory() -> io::Result<OwnedFd> {
    let context = FsContext::open("tmpfs")?;
    context.set_flag("ro")?;
    context.set_string("size", "0")?;
    context.set_string("mode", "0555")?;
    context.mount(libc::MOUNT_ATTR_RDONLY)
}

/// The image could have put anything at `/dev/null`, and mounting that over a path would open what shall be hidden.
fn null_device() -> Result<OwnedFd> {
    let null = open_location(Path::new("/dev/null")).doing(|| "open /dev/null of the container")?;
    let stat = fstat(&null).doing(|| "look at /dev/null of the container")?;
    let is_null =
        super::tree::kind(&stat) == SFlag::S_IFCHR && (major(stat.st_rdev), minor(stat.st_rdev)) == (1, 3);
    if !is_null {
        return Err(Error::invalid("/dev/null", "is not the null device in this image"));
    }
    mountfd::clone_tree(null.as_fd(), Path::new(""), false).doing(|| "bind /dev/null of the container")
}
