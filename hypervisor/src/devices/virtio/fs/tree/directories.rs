//! Requests on open directories.

use std::ffi::CStr;

use nix::errno::Errno;
use nix::libc;
use vm_memory::ByteValued;

use super::files::Opened;
use super::handles::HandleId;
use super::inodes::NodeId;
use super::place::Place;
use super::{Entry, Name, Tree, sys};
use crate::devices::virtio::fs::wire;

/// What part of a directory the guest wants.
#[derive(Debug, Clone, Copy)]
pub struct Listing {
    /// The directory.
    pub node: NodeId,
    /// Open for reading.
    pub handle: HandleId,
    /// 0, or what the last entry of an earlier answer said.
    pub offset: u64,
    /// Bytes of the answer.
    pub size: usize,
    /// With each entry's attributes.
    pub plus: bool,
}

/// Answers are no longer, whatever the guest asks for.
const MAX_ANSWER: usize = 64 * 1024;

/// Room for at least one entry of any name, in the kernel's format.
const MIN_KERNEL_BUFFER: usize = 512;

impl Tree {
    /// Opens a directory.
    pub fn opendir(&mut self, node: NodeId) -> Result<Opened, Errno> {
        self.handles.check_room()?;
        let inode = self.inodes.get(node)?;
        if !inode.is_directory() {
            return Err(Errno::ENOTDIR);
        }
        let fd = sys::reopen(inode.fd(), libc::O_RDONLY | libc::O_DIRECTORY)?;
        Ok(Opened { handle: self.handles.insert(fd, node, inode), flags: inode.place.directory_flags() })
    }

    /// Appends entries in FUSE's format to `answer`.
    pub fn list(&mut self, listing: Listing, answer: &mut Vec<u8>) -> Result<(), Errno> {
        let size = listing.size.min(MAX_ANSWER);
        let mut entries = std::mem::take(&mut self.scratch);
        let result = self
            .read_entries(listing, size, &mut entries)
            .and_then(|()| self.encode_entries(listing, size, &entries, answer));
        self.scratch = entries;
        let last = result?;
        if let Some(last) = last {
            self.handles.get_mut(listing.handle, listing.node)?.position = last;
        }
        Ok(())
    }

    fn read_entries(&mut self, listing: Listing, size: usize, entries: &mut Vec<u8>) -> Result<(), Errno> {
        let handle = self.handles.get_mut(listing.handle, listing.node)?;
        let offset = i64::try_from(listing.offset).map_err(|_| Errno::EINVAL)?;
        if handle.position != offset {
            nix::unistd::lseek(handle.fd(), offset, nix::unistd::Whence::SeekSet)?;
        }
        // Until it is known how many of the entries fit, the descriptor stands behind all that were read.
        handle.position = -1;
        // With attributes an answer takes some six times the room.
        let kernel_size = if listing.plus { size / 6 } else { size };
        sys::read_dir(handle.fd(), entries, kernel_size.max(MIN_KERNEL_BUFFER))
    }

    /// Returns where the directory stands when all that was read has been told.
    fn encode_entries(
        &mut self,
        listing: Listing,
        size: usize,
        entries: &[u8],
        answer: &mut Vec<u8>,
    ) -> Result<Option<i64>, Errno> {
        let start = answer.len();
        let device = self.inodes.get(listing.node)?.key().device;
        let mut last = Some(i64::try_from(listing.offset).map_err(|_| Errno::EINVAL)?);
        for entry in KernelEntries(entries) {
            let head = if listing.plus { size_of::<wire::EntryOut>() } else { 0 };
            let length = head + (size_of::<wire::Dirent>() + entry.name.count_bytes()).next_multiple_of(8);
            if answer.len() - start + length > size {
                last = None;
                break;
            }
            let mut ino = self.mounts.inode_number(device, entry.inode);
            if listing.plus {
                let found = self.entry_of_listing(listing.node, entry.name);
                if let Some(found) = &found {
                    ino = self.mounts.inode_number(found.stat.device(), found.stat.raw().stx_ino);
                }
                let entry = found.map(|found| self.entry_out(&found)).unwrap_or_default();
                answer.extend_from_slice(entry.as_slice());
            }
            let end = answer.len() - head + length;
            let namelen = u32::try_from(entry.name.count_bytes()).map_err(|_| Errno::EIO)?;
            let off = u64::try_from(entry.offset).map_err(|_| Errno::EIO)?;
            let dirent = wire::Dirent { ino, off, namelen, kind: entry.kind };
            answer.extend_from_slice(dirent.as_slice());
            answer.extend_from_slice(entry.name.to_bytes());
            answer.resize(end, 0);
            last = Some(entry.offset);
        }
        // Not one entry fits.
        if last.is_none() && answer.len() == start {
            return Err(Errno::EINVAL);
        }
        Ok(last)
    }

    /// Looks an entry up where the guest may remember what it is told. Node id 0 makes it look up itself what it needs;
    /// so it does for `.` and `..`, and for what has just gone or cannot be held any more.
    fn entry_of_listing(&mut self, node: NodeId, name: &CStr) -> Option<Entry> {
        if self.inodes.get(node).ok()?.place != Place::Rootfs {
            return None;
        }
        self.look_up(node, Name::new(name).ok()?).ok()
    }

    /// An entry as the guest is told it.
    pub fn entry_out(&mut self, entry: &Entry) -> wire::EntryOut {
        wire::EntryOut {
            nodeid: entry.node.0,
            generation: 0,
            entry_valid: entry.name_lasts.as_secs(),
            attr_valid: entry.attributes_last.as_secs(),
            entry_valid_nsec: 0,
            attr_valid_nsec: 0,
            attr: self.attr(&entry.stat),
        }
    }
}

/// One entry as the kernel gives it.
struct KernelEntry<'a> {
    inode: u64,
    offset: i64,
    kind: u32,
    name: &'a CStr,
}

/// The entries in what `getdents64` wrote.
struct KernelEntries<'a>(&'a [u8]);

impl<'a> Iterator for KernelEntries<'a> {
    type Item = KernelEntry<'a>;

    fn next(&mut self) -> Option<KernelEntry<'a>> {
        let (inode, rest) = self.0.split_first_chunk::<8>()?;
        let (offset, rest) = rest.split_first_chunk::<8>()?;
        let (length, rest) = rest.split_first_chunk::<2>()?;
        let (kind, rest) = rest.split_first()?;
        let name = CStr::from_bytes_until_nul(rest).ok()?;
        self.0 = self.0.get(usize::from(u16::from_ne_bytes(*length)).max(1)..)?;
        Some(KernelEntry {
            inode: u64::from_ne_bytes(*inode),
            offset: i64::from_ne_bytes(*offset),
            kind: u32::from(*kind),
            name,
        })
    }
}
