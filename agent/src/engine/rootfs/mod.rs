//! The container's view of files: its mounts, devices and hidden paths, and the step into it.
//!
//! Runs in the new process, in its own mount namespace. The tree is hostile ([`tree`]); after [`enter`] it is all there
//! is, and what is then named by path is resolved inside it by the kernel.

pub mod copy;
mod devices;
pub mod mounts;
pub mod options;
mod paths;
pub mod tree;

use super::error::{Context, Error, Result};
use crate::sys::mountfd::{self, Attributes};
use mounts::{Later, Surroundings};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use oci_spec::runtime::{Linux, Spec};
use options::Propagation;
use std::os::fd::AsFd;
use std::path::Path;
use tree::Tree;

/// Makes everything below `root` and moves this process there. `root` is mounted already.
pub fn enter(spec: &Spec, linux: &Linux, root: &Path, around: &Surroundings<'_>) -> Result<Later> {
    let propagation = match linux.rootfs_propagation().as_deref() {
        None | Some("") => Propagation { kind: libc::MS_SLAVE, recursive: true },
        Some(name) => Propagation::named(name)
            .ok_or_else(|| Error::invalid("linux.rootfsPropagation", format!("\"{name}\" is unknown")))?,
    };
    // What the container mounts must not reach the guest, whatever the spec says about the other direction.
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_SLAVE, None::<&str>)
        .doing(|| "separate the container's mounts from the guest's")?;
    // pivot_root wants a mount point, and the copy makes sure that attributes set here are the container's own.
    let location = mounts::open_location(root).doing(|| "open the root file system")?;
    let copy =
        mountfd::clone_tree(location.as_fd(), Path::new(""), true).doing(|| "bind the root file system")?;
    mountfd::attach(copy.as_fd(), location.as_fd()).doing(|| "bind the root file system")?;
    let tree = Tree::new(copy);

    let mut later = Later::default();
    let all = spec.mounts().as_deref().unwrap_or_default();
    for mount in all {
        mounts::make(mount, &tree, around, &mut later)?;
    }
    let whole_dev = all.iter().any(|mount| {
        let bound = mount.options().iter().flatten().any(|option| option == "bind" || option == "rbind");
        (bound || mount.typ().as_deref() == Some("bind")) && mount.destination() == Path::new("/dev")
    });
    if !whole_dev {
        let extra = linux.devices().as_deref().unwrap_or_default();
        devices::make(&tree, extra, around.user_namespace)?;
    }
    if let Some(process) = spec.process() {
        tree.directory(process.cwd()).doing(|| format!("make process.cwd {}", process.cwd().display()))?;
    }
    pivot(&tree)?;
    if propagation.kind != libc::MS_SLAVE {
        let root = mounts::open_location(Path::new("/")).doing(|| "open the container's root")?;
        mountfd::set_attributes(root.as_fd(), Attributes::default(), propagation.kind, propagation.recursive)
            .doing(|| "set linux.rootfsPropagation")?;
    }
    Ok(later)
}

/// What is done last, when nothing needs to be written any more.
pub fn seal(spec: &Spec, linux: &Linux, later: Later) -> Result<()> {
    later.seal()?;
    if spec.root().as_ref().and_then(|root| root.readonly()).unwrap_or(false) {
        paths::protect_root()?;
    }
    paths::protect(linux.readonly_paths().as_deref().unwrap_or_default())?;
    paths::mask(linux.masked_paths().as_deref().unwrap_or_default())
}

/// Makes the tree this process's root, and lets go of the guest's.
pub fn pivot(tree: &Tree) -> Result<()> {
    let doing = || "enter the root file system";
    nix::unistd::fchdir(tree.root()).doing(doing)?;
    nix::unistd::pivot_root(".", ".").doing(doing)?;
    // The old root now lies on top of the new one; nothing done to it may reach the guest.
    mount(None::<&str>, ".", None::<&str>, MsFlags::MS_REC | MsFlags::MS_SLAVE, None::<&str>).doing(doing)?;
    umount2(".", MntFlags::MNT_DETACH).doing(doing)?;
    nix::unistd::chdir("/").doing(doing)
}
