//! The shared directory and what the guest knows of it.
//!
//! Hostile input: every number and name in a request. Nothing here walks a path: a request names an inode by an id
//! that was handed out, and at most one more component, which is looked up without following links. So there is no way
//! up or out, whatever the guest makes of symbolic links. What is mounted below is followed.
//!
//! All of it runs on the `fs` thread.

mod attributes;
mod directories;
mod files;
mod handles;
mod inodes;
mod mounts;
mod name;
mod names;
mod place;
mod sys;
mod worker;
mod xattrs;

use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use nix::errno::Errno;

pub use attributes::{NewAttributes, NewTime};
pub use directories::Listing;
pub use files::{Opened, Write};
pub use handles::HandleId;
pub use inodes::NodeId;
pub use name::Name;
pub use sys::Stat;
pub use worker::{Caller, Worker};

use handles::Handles;
use inodes::Inodes;
use mounts::Mounts;

use super::wire;

/// How much of the process the guest may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Inodes remembered, a descriptor each.
    pub inodes: usize,
    /// Files open.
    pub handles: usize,
}

/// A directory, and what the guest knows and has open of it.
#[derive(Debug)]
pub struct Tree {
    inodes: Inodes,
    handles: Handles,
    mounts: Mounts,
    /// Where the kernel puts directory entries before they are translated.
    scratch: Vec<u8>,
}

/// A name that was looked up.
#[derive(Debug, Clone, Copy)]
pub struct Entry {
    /// The inode, one lookup of which the guest now holds.
    pub node: NodeId,
    /// Its attributes.
    pub stat: Stat,
    /// How long the guest may remember the name.
    pub name_lasts: Duration,
    /// How long it may remember the attributes.
    pub attributes_last: Duration,
}

impl Tree {
    /// The directory that `root` holds, an `O_PATH` descriptor.
    ///
    /// # Errors
    /// `ENOTDIR` when it is none.
    pub fn new(root: OwnedFd, limits: Limits) -> Result<Self, Errno> {
        let stat = sys::stat(root.as_fd())?;
        let mut mounts = Mounts::default();
        // The first file system keeps its inode numbers.
        mounts.inode_number(stat.device(), 0);
        let inodes = Inodes::new(root, &stat, limits.inodes);
        if !inodes.get(NodeId::ROOT)?.is_directory() {
            return Err(Errno::ENOTDIR);
        }
        Ok(Self { inodes, handles: Handles::new(limits.handles), mounts, scratch: Vec::new() })
    }

    /// Back to a guest that knows nothing.
    pub fn clear(&mut self) {
        self.inodes.clear();
        self.handles.clear();
        self.mounts = Mounts::default();
        if let Ok(root) = self.inodes.get(NodeId::ROOT) {
            self.mounts.inode_number(root.key().device, 0);
        }
        self.scratch = Vec::new();
    }

    /// Lowers the number of inodes that are remembered.
    pub fn limit_inodes(&mut self, limit: usize) {
        self.inodes.lower_limit(limit);
    }

    /// Takes lookups back.
    pub fn forget(&mut self, node: NodeId, lookups: u64) {
        self.inodes.forget(node, lookups);
    }

    /// Lets go of what is no longer mounted.
    pub fn release_unmounted(&mut self) {
        for mount in self.mounts.take_gone() {
            self.handles.release_mount(mount);
            self.inodes.release_mount(mount);
        }
    }

    /// Inodes and open files that the guest holds, a descriptor each.
    #[cfg(test)]
    pub fn descriptors(&self) -> usize {
        self.inodes.len() + self.handles.len()
    }

    /// Attributes as the guest is told them.
    pub fn attr(&mut self, stat: &Stat) -> wire::Attr {
        attributes::encode(stat, self.mounts.inode_number(stat.device(), stat.raw().stx_ino))
    }
}
