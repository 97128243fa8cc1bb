//! The inodes that the guest's kernel knows, by node id.
//!
//! Each costs a descriptor, which keeps the inode and its mount. The guest's kernel counts how often it was told about
//! one and gives that count back with `FORGET`; a hostile guest gives back what it likes, so counts saturate and the
//! root stays.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::libc;

use super::place::Place;
use super::sys::{InodeKey, Stat};
use crate::devices::virtio::fs::wire::ROOT_ID;

/// An inode as the guest's kernel names it. Ids are never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct NodeId(pub u64);

impl NodeId {
    /// The shared directory.
    pub const ROOT: Self = Self(ROOT_ID);
}

/// One inode.
#[derive(Debug)]
pub struct Inode {
    key: InodeKey,
    fd: OwnedFd,
    mode: u32,
    /// Where it was found first, which decides how long the guest may remember things about it.
    pub place: Place,
    lookups: u64,
}

impl Inode {
    /// An `O_PATH` descriptor.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// What identifies it.
    pub fn key(&self) -> InodeKey {
        self.key
    }

    /// Whether opening it runs no driver and waits for no peer.
    pub fn may_be_opened(&self) -> bool {
        self.is_regular() || self.is_directory()
    }

    /// Whether it is a regular file.
    pub fn is_regular(&self) -> bool {
        self.mode & libc::S_IFMT == libc::S_IFREG
    }

    /// Whether it is a directory.
    pub fn is_directory(&self) -> bool {
        self.mode & libc::S_IFMT == libc::S_IFDIR
    }

    /// Whether it had set-user-id or set-group-id bits when its mode was last seen.
    pub fn has_set_id(&self) -> bool {
        self.mode & (libc::S_ISUID | libc::S_ISGID) != 0
    }
}

/// All known inodes.
#[derive(Debug)]
pub struct Inodes {
    nodes: HashMap<NodeId, Inode>,
    by_key: HashMap<InodeKey, NodeId>,
    next: u64,
    limit: usize,
}

impl Inodes {
    /// Only the root is known.
    pub fn new(root: OwnedFd, stat: &Stat, limit: usize) -> Self {
        let mut inodes =
            Self { nodes: HashMap::new(), by_key: HashMap::new(), next: ROOT_ID, limit: limit.max(1) };
        inodes.insert(root, stat, Place::Root);
        inodes
    }

    /// Back to the root alone.
    pub fn clear(&mut self) {
        self.nodes.retain(|id, _| *id == NodeId::ROOT);
        self.by_key.retain(|_, id| *id == NodeId::ROOT);
        self.nodes.shrink_to_fit();
        self.by_key.shrink_to_fit();
    }

    /// Remembers no more than so many.
    pub fn lower_limit(&mut self, limit: usize) {
        self.limit = self.limit.min(limit);
    }

    /// The inode of a node id.
    ///
    /// # Errors
    /// `ESTALE` for an id that is not known, which makes an honest guest look the name up again.
    pub fn get(&self, id: NodeId) -> Result<&Inode, Errno> {
        self.nodes.get(&id).ok_or(Errno::ESTALE)
    }

    /// Counts one more lookup of an inode that is known. Its descriptor keeps its number from being used again, so
    /// what has the same key is the same inode.
    pub fn recall(&mut self, stat: &Stat) -> Option<(NodeId, Place)> {
        let id = *self.by_key.get(&stat.key())?;
        let inode = self.nodes.get_mut(&id)?;
        inode.lookups = inode.lookups.saturating_add(1);
        inode.mode = stat.mode();
        Some((id, inode.place))
    }

    /// Counts one more lookup of what `fd` holds.
    ///
    /// # Errors
    /// `ENFILE` when so many inodes are known that the guest has to forget some first.
    pub fn remember(&mut self, fd: OwnedFd, stat: &Stat, place: Place) -> Result<NodeId, Errno> {
        if let Some((id, _)) = self.recall(stat) {
            return Ok(id);
        }
        if self.nodes.len() >= self.limit {
            return Err(Errno::ENFILE);
        }
        Ok(self.insert(fd, stat, place))
    }

    fn insert(&mut self, fd: OwnedFd, stat: &Stat, place: Place) -> NodeId {
        let id = NodeId(self.next);
        self.next += 1;
        let (key, mode) = (stat.key(), stat.mode());
        self.by_key.insert(key, id);
        self.nodes.insert(id, Inode { key, fd, mode, place, lookups: 1 });
        id
    }

    /// Takes lookups back.
    pub fn forget(&mut self, id: NodeId, lookups: u64) {
        if id == NodeId::ROOT {
            return;
        }
        let Some(inode) = self.nodes.get_mut(&id) else { return };
        inode.lookups = inode.lookups.saturating_sub(lookups);
        if inode.lookups == 0 {
            self.by_key.remove(&inode.key);
            self.nodes.remove(&id);
        }
    }

    /// Notes the mode that a file has been given.
    pub fn set_mode(&mut self, id: NodeId, stat: &Stat) {
        if let Some(inode) = self.nodes.get_mut(&id) {
            inode.mode = stat.mode();
        }
    }

    /// Forgets all inodes of one mount, whatever the guest says. Its later requests about them get `ESTALE`.
    pub fn release_mount(&mut self, mount: u64) {
        self.nodes.retain(|id, inode| *id == NodeId::ROOT || inode.key.mount != mount);
        self.by_key.retain(|key, id| *id == NodeId::ROOT || key.mount != mount);
    }

    /// One inode of each file system that can be opened.
    pub fn one_per_device(&self) -> impl Iterator<Item = &Inode> {
        let mut seen = std::collections::HashSet::new();
        self.nodes.values().filter(move |inode| inode.may_be_opened() && seen.insert(inode.key.device))
    }

    /// How many are known.
    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.nodes.len()
    }
}
