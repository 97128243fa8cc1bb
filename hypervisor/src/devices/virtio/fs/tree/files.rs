//! Requests on open files.
//!
//! The host's descriptor never has `O_APPEND`: the guest's kernel writes back what processes have written to shared
//! mappings through any handle that is open for writing, and the host would append that. Each write says itself
//! whether it appends. Nor does it have `O_DIRECT`: a guest that asks for it bypasses its own cache, and the host's
//! stays coherent with everybody else.
//!
//! Whoever writes, a file's set-user-id and set-group-id bits and capabilities go. Linux would let a privileged writer
//! keep the bits, but only one of the host's own user namespace.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::libc;

use super::handles::HandleId;
use super::inodes::{Inode, NodeId};
use super::names::{PERMISSIONS, has_set_id};
use super::worker::{Caller, Worker};
use super::{Entry, Name, Tree, sys};
use crate::devices::virtio::fs::chain::Buffers;

/// A file that was opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Opened {
    /// What the guest names it by.
    pub handle: HandleId,
    /// What the guest's kernel does with its cache ([`crate::devices::virtio::fs::wire::fopen`]).
    pub flags: u32,
}

/// A write, without its data.
#[derive(Debug, Clone, Copy)]
pub struct Write {
    /// The inode.
    pub node: NodeId,
    /// Open for writing.
    pub handle: HandleId,
    /// Where, unless it appends.
    pub offset: u64,
    /// At the end of the file, wherever that is.
    pub append: bool,
}

impl Tree {
    /// Opens a regular file.
    pub fn open(&mut self, node: NodeId, flags: u32) -> Result<Opened, Errno> {
        self.handles.check_room()?;
        let inode = self.inodes.get(node)?;
        let fd = open_regular(inode, host_flags(flags)?)?;
        Ok(Opened { handle: self.handles.insert(fd, node, inode), flags: inode.place.file_flags() })
    }

    /// Makes a regular file and opens it, or opens the one that is there.
    pub fn create(
        &mut self,
        worker: &mut Worker,
        caller: Caller,
        parent: NodeId,
        name: Name<'_>,
        (flags, mode, umask): (u32, u32, u32),
    ) -> Result<(Entry, Opened), Errno> {
        self.handles.check_room()?;
        let dir = self.inodes.get(parent)?;
        let host_flags = host_flags(flags)?;
        let mode = mode & PERMISSIONS;
        let made = worker.make(caller, umask, has_set_id(mode), || {
            let exclusive = libc::O_CREAT | libc::O_EXCL | libc::O_NOFOLLOW;
            sys::open_at(dir.fd(), name.as_c_str(), host_flags | exclusive, mode)
        });
        let made = match made {
            Ok(fd) => Some(fd),
            Err(Errno::EEXIST) if flags & O_EXCL == 0 => None,
            Err(errno) => return Err(errno),
        };
        let entry = self.look_up(parent, name)?;
        let opened = self.open_made(entry.node, made, host_flags);
        if opened.is_err() {
            self.inodes.forget(entry.node, 1);
        }
        Ok((entry, opened?))
    }

    fn open_made(&mut self, node: NodeId, made: Option<OwnedFd>, host_flags: i32) -> Result<Opened, Errno> {
        let inode = self.inodes.get(node)?;
        let fd = match made {
            Some(fd) => fd,
            None if inode.is_regular() => open_regular(inode, host_flags)?,
            // The guest believed that there is nothing of this name: let it look again.
            None => return Err(Errno::ESTALE),
        };
        Ok(Opened { handle: self.handles.insert(fd, node, inode), flags: inode.place.file_flags() })
    }

    /// Makes a regular file without a name and opens it.
    pub fn tmpfile(
        &mut self,
        worker: &mut Worker,
        caller: Caller,
        parent: NodeId,
        (flags, mode, umask): (u32, u32, u32),
    ) -> Result<(Entry, Opened), Errno> {
        self.handles.check_room()?;
        let dir = self.inodes.get(parent)?;
        let host_flags = host_flags(flags)? | libc::O_TMPFILE | (flags_i32(flags)? & libc::O_EXCL);
        let mode = mode & PERMISSIONS;
        let file = worker
            .make(caller, umask, has_set_id(mode), || sys::open_at(dir.fd(), c".", host_flags, mode))?;
        let place = dir.place.of_child(c"", true);
        let held = sys::reopen(file.as_fd(), libc::O_PATH)?;
        let stat = sys::stat(held.as_fd())?;
        let node = self.inodes.remember(held, &stat, place)?;
        let inode = self.inodes.get(node)?;
        let opened = Opened { handle: self.handles.insert(file, node, inode), flags: place.file_flags() };
        let (name_lasts, attributes_last) = (std::time::Duration::ZERO, place.attributes_last(&stat));
        Ok((Entry { node, stat, name_lasts, attributes_last }, opened))
    }

    /// Closes a file or directory.
    pub fn release(&mut self, node: NodeId, handle: HandleId) -> Result<(), Errno> {
        self.handles.close(handle, node)
    }

    /// Reads into the guest's buffers; fewer bytes than they hold only at the end of the file.
    pub fn read(
        &mut self,
        node: NodeId,
        handle: HandleId,
        buffers: &Buffers<'_>,
        offset: u64,
    ) -> Result<usize, Errno> {
        sys::read_into(self.handles.get(handle, node)?.fd(), buffers, position(offset)?)
    }

    /// Writes from the guest's buffers.
    pub fn write(&mut self, write: Write, buffers: &Buffers<'_>) -> Result<usize, Errno> {
        let fd = self.handles.get(write.handle, write.node)?.fd();
        let flags = if write.append { libc::RWF_APPEND } else { 0 };
        sys::write_from(fd, buffers, position(write.offset)?, flags)
    }

    /// Allocates or frees space.
    pub fn fallocate(
        &mut self,
        node: NodeId,
        handle: HandleId,
        mode: u32,
        offset: u64,
        length: u64,
    ) -> Result<(), Errno> {
        let allowed = libc::FALLOC_FL_KEEP_SIZE | libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_ZERO_RANGE;
        let mode = i32::try_from(mode).map_err(|_| Errno::EINVAL)?;
        if mode & !allowed != 0 {
            return Err(Errno::EOPNOTSUPP);
        }
        let fd = self.handles.get(handle, node)?.fd();
        let flags = nix::fcntl::FallocateFlags::from_bits_retain(mode);
        nix::fcntl::fallocate(fd, flags, position(offset)?, position(length)?)
    }

    /// Finds data or a hole.
    pub fn lseek(&mut self, node: NodeId, handle: HandleId, offset: u64, whence: u32) -> Result<u64, Errno> {
        use nix::unistd::Whence;
        let whence = match i32::try_from(whence) {
            Ok(libc::SEEK_DATA) => Whence::SeekData,
            Ok(libc::SEEK_HOLE) => Whence::SeekHole,
            _ => return Err(Errno::EINVAL),
        };
        // Nothing else uses the descriptor's own position.
        let found = nix::unistd::lseek(self.handles.get(handle, node)?.fd(), position(offset)?, whence)?;
        u64::try_from(found).map_err(|_| Errno::EIO)
    }

    /// Copies from file to file on the host; at most so much at once that others get their turn.
    pub fn copy(
        &mut self,
        from: (NodeId, HandleId, u64),
        to: (NodeId, HandleId, u64),
        length: u64,
    ) -> Result<usize, Errno> {
        const AT_ONCE: usize = 16 << 20;
        let length = usize::try_from(length).unwrap_or(AT_ONCE).min(AT_ONCE);
        let source = self.handles.get(from.1, from.0)?.fd();
        let target = self.handles.get(to.1, to.0)?.fd();
        sys::copy((source, position(from.2)?), (target, position(to.2)?), length)
    }

    /// Writes a file or directory to disk.
    pub fn fsync(&mut self, node: NodeId, handle: HandleId, data_only: bool) -> Result<(), Errno> {
        let fd = self.handles.get(handle, node)?.fd();
        if data_only { nix::unistd::fdatasync(fd) } else { nix::unistd::fsync(fd) }
    }

    /// Brings out errors that the host keeps for `close`.
    pub fn flush(&mut self, node: NodeId, handle: HandleId) -> Result<(), Errno> {
        sys::flush(self.handles.get(handle, node)?.fd())
    }

    /// Writes all file systems to disk that the guest knows inodes of.
    pub fn sync_all(&mut self) -> Result<(), Errno> {
        let mut result = Ok(());
        for inode in self.inodes.one_per_device() {
            let synced = sys::reopen(inode.fd(), libc::O_RDONLY | libc::O_NONBLOCK)
                .and_then(|fd| sys::sync_fs(fd.as_fd()));
            result = result.and(synced);
        }
        result
    }

    /// The descriptor of a file that is open, or none where the guest names no handle.
    pub(super) fn open_fd(
        &self,
        node: NodeId,
        handle: Option<HandleId>,
    ) -> Result<Option<BorrowedFd<'_>>, Errno> {
        handle.map(|handle| Ok(self.handles.get(handle, node)?.fd())).transpose()
    }
}

fn open_regular(inode: &Inode, flags: i32) -> Result<OwnedFd, Errno> {
    if inode.is_directory() {
        return Err(Errno::EISDIR);
    }
    if !inode.is_regular() {
        return Err(Errno::ENXIO);
    }
    sys::reopen(inode.fd(), flags)
}

const O_EXCL: u32 = libc::O_EXCL.unsigned_abs();

fn flags_i32(flags: u32) -> Result<i32, Errno> {
    i32::try_from(flags).map_err(|_| Errno::EINVAL)
}

/// Those of the guest's flags that mean something to the host. What opens other things than a file's data, or follows
/// links, is not among them.
fn host_flags(flags: u32) -> Result<i32, Errno> {
    let flags = flags_i32(flags)?;
    let access = flags & libc::O_ACCMODE;
    if access == libc::O_ACCMODE {
        return Err(Errno::EINVAL);
    }
    let kept = libc::O_TRUNC | libc::O_SYNC | libc::O_DSYNC | libc::O_NOATIME;
    // Not to wait for the holder of a lease.
    Ok(access | flags & kept | libc::O_NONBLOCK)
}

/// An offset or a length, as the kernel takes it.
fn position(value: u64) -> Result<i64, Errno> {
    i64::try_from(value).map_err(|_| Errno::EINVAL)
}
