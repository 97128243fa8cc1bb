//! Files and directories that the guest has open.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;

use super::inodes::{Inode, NodeId};

/// An open file as the guest's kernel names it. Ids are never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct HandleId(pub u64);

/// One open file or directory.
#[derive(Debug)]
pub struct Handle {
    fd: OwnedFd,
    node: NodeId,
    mount: u64,
    /// Of a directory: where the descriptor stands.
    pub position: i64,
}

impl Handle {
    /// The descriptor, opened for reading, writing or both.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// All open files.
#[derive(Debug)]
pub struct Handles {
    open: HashMap<HandleId, Handle>,
    next: u64,
    limit: usize,
}

impl Handles {
    /// Nothing is open.
    pub fn new(limit: usize) -> Self {
        Self { open: HashMap::new(), next: 1, limit }
    }

    /// Closes everything.
    pub fn clear(&mut self) {
        self.open = HashMap::new();
    }

    /// Whether one more may be opened.
    ///
    /// # Errors
    /// `ENFILE` when the guest has to close some first.
    pub fn check_room(&self) -> Result<(), Errno> {
        if self.open.len() >= self.limit { Err(Errno::ENFILE) } else { Ok(()) }
    }

    /// Keeps an open file.
    pub fn insert(&mut self, fd: OwnedFd, node: NodeId, inode: &Inode) -> HandleId {
        let id = HandleId(self.next);
        self.next += 1;
        self.open.insert(id, Handle { fd, node, mount: inode.key().mount, position: 0 });
        id
    }

    /// An open file.
    ///
    /// # Errors
    /// `EBADF` when `id` is not open, or is open for another inode than the guest says.
    pub fn get(&self, id: HandleId, node: NodeId) -> Result<&Handle, Errno> {
        self.open.get(&id).filter(|handle| handle.node == node).ok_or(Errno::EBADF)
    }

    /// As [`Handles::get`].
    pub fn get_mut(&mut self, id: HandleId, node: NodeId) -> Result<&mut Handle, Errno> {
        self.open.get_mut(&id).filter(|handle| handle.node == node).ok_or(Errno::EBADF)
    }

    /// Closes one.
    ///
    /// # Errors
    /// As [`Handles::get`].
    pub fn close(&mut self, id: HandleId, node: NodeId) -> Result<(), Errno> {
        self.get(id, node)?;
        self.open.remove(&id);
        Ok(())
    }

    /// Closes all files of one mount, whatever the guest says.
    pub fn release_mount(&mut self, mount: u64) {
        self.open.retain(|_, handle| handle.mount != mount);
    }

    /// How many are open.
    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.open.len()
    }
}
