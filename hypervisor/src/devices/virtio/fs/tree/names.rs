//! Requests that look up, make, move and remove names.

use std::ffi::CStr;
use std::os::fd::AsFd;
use std::time::Duration;

use nix::errno::Errno;
use nix::libc;

use super::inodes::NodeId;
use super::place::Place;
use super::worker::{Caller, Worker};
use super::{Entry, Name, Tree, sys};
use crate::devices::virtio::fs::wire;

impl Tree {
    /// Looks a name up. Where the guest may remember that there is nothing, that is an answer of its own.
    pub fn lookup(&mut self, parent: NodeId, name: Name<'_>) -> Result<wire::EntryOut, Errno> {
        match self.look_up(parent, name) {
            Ok(entry) => Ok(self.entry_out(&entry)),
            Err(Errno::ENOENT) => match self.inodes.get(parent)?.place.names_last() {
                Duration::ZERO => Err(Errno::ENOENT),
                lasts => Ok(wire::EntryOut { entry_valid: lasts.as_secs(), ..Default::default() }),
            },
            Err(errno) => Err(errno),
        }
    }

    /// Looks up a name that ought to be there.
    pub(super) fn look_up(&mut self, parent: NodeId, name: Name<'_>) -> Result<Entry, Errno> {
        let dir = self.inodes.get(parent)?;
        let name_lasts = dir.place.names_last();
        if dir.place != Place::Rootfs {
            // Names that the guest asks for again and again are mostly known already: one call instead of three.
            let stat = sys::stat_at(dir.fd(), name.as_c_str())?;
            if let Some((node, place)) = self.inodes.recall(&stat) {
                return Ok(Entry { node, stat, name_lasts, attributes_last: place.attributes_last(&stat) });
            }
        }
        let dir = self.inodes.get(parent)?;
        let fd = sys::open_at(dir.fd(), name.as_c_str(), libc::O_PATH | libc::O_NOFOLLOW, 0)?;
        let stat = sys::stat(fd.as_fd())?;
        let place = dir.place.of_child(name.as_c_str(), stat.key().mount == dir.key().mount);
        self.mounts.note(dir.key().mount, dir.fd(), name, &stat)?;
        let node = self.inodes.remember(fd, &stat, place)?;
        Ok(Entry { node, stat, name_lasts, attributes_last: place.attributes_last(&stat) })
    }

    /// Makes a directory.
    pub fn mkdir(
        &mut self,
        worker: &mut Worker,
        caller: Caller,
        parent: NodeId,
        name: Name<'_>,
        mode: u32,
        umask: u32,
    ) -> Result<Entry, Errno> {
        let dir = self.inodes.get(parent)?;
        let mode = mode & PERMISSIONS;
        worker.make(caller, umask, has_set_id(mode), || sys::mkdir(dir.fd(), name.as_c_str(), mode))?;
        self.look_up(parent, name)
    }

    /// Makes a FIFO, a socket or an empty file. Device nodes are refused: on the host they would name the host's
    /// devices.
    pub fn mknod(
        &mut self,
        worker: &mut Worker,
        caller: Caller,
        parent: NodeId,
        name: Name<'_>,
        mode: u32,
        umask: u32,
    ) -> Result<Entry, Errno> {
        match mode & libc::S_IFMT {
            libc::S_IFIFO | libc::S_IFSOCK | libc::S_IFREG => {}
            libc::S_IFCHR | libc::S_IFBLK => return Err(Errno::EPERM),
            _ => return Err(Errno::EINVAL),
        }
        let dir = self.inodes.get(parent)?;
        let mode = mode & (libc::S_IFMT | PERMISSIONS);
        worker.make(caller, umask, has_set_id(mode), || sys::mknod(dir.fd(), name.as_c_str(), mode))?;
        self.look_up(parent, name)
    }

    /// Makes a symbolic link. Its target is the guest's business: it is never followed here.
    pub fn symlink(
        &mut self,
        worker: &mut Worker,
        caller: Caller,
        parent: NodeId,
        name: Name<'_>,
        target: &CStr,
    ) -> Result<Entry, Errno> {
        let dir = self.inodes.get(parent)?;
        worker.make(caller, 0, false, || sys::symlink(target, dir.fd(), name.as_c_str()))?;
        self.look_up(parent, name)
    }

    /// Gives an inode one more name.
    pub fn link(&mut self, node: NodeId, parent: NodeId, name: Name<'_>) -> Result<Entry, Errno> {
        let (inode, dir) = (self.inodes.get(node)?, self.inodes.get(parent)?);
        sys::link(inode.fd(), dir.fd(), name.as_c_str())?;
        self.look_up(parent, name)
    }

    /// Removes a name of anything but a directory.
    pub fn unlink(&mut self, parent: NodeId, name: Name<'_>) -> Result<(), Errno> {
        sys::unlink(self.inodes.get(parent)?.fd(), name.as_c_str(), 0)
    }

    /// Removes an empty directory.
    pub fn rmdir(&mut self, parent: NodeId, name: Name<'_>) -> Result<(), Errno> {
        sys::unlink(self.inodes.get(parent)?.fd(), name.as_c_str(), libc::AT_REMOVEDIR)
    }

    /// Moves a name. `RENAME_WHITEOUT` would make a device node.
    pub fn rename(
        &mut self,
        from: (NodeId, Name<'_>),
        to: (NodeId, Name<'_>),
        flags: u32,
    ) -> Result<(), Errno> {
        if flags & !(libc::RENAME_NOREPLACE | libc::RENAME_EXCHANGE) != 0 {
            return Err(Errno::EINVAL);
        }
        let (from_dir, to_dir) = (self.inodes.get(from.0)?, self.inodes.get(to.0)?);
        sys::rename((from_dir.fd(), from.1.as_c_str()), (to_dir.fd(), to.1.as_c_str()), flags)
    }

    /// The target of a symbolic link.
    pub fn readlink(&mut self, node: NodeId, target: &mut Vec<u8>) -> Result<(), Errno> {
        sys::read_link(self.inodes.get(node)?.fd(), target)
    }
}

/// Permission, set-id and sticky bits.
pub(super) const PERMISSIONS: u32 = 0o7777;

/// Whether a mode has a bit that only a privileged caller may set; the guest's kernel has taken it out for others.
pub(super) fn has_set_id(mode: u32) -> bool {
    mode & (libc::S_ISUID | libc::S_ISGID) != 0
}
