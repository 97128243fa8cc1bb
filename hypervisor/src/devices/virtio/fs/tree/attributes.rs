//! Requests about an inode's attributes.

use std::os::fd::AsRawFd;
use std::time::Duration;

use nix::errno::Errno;
use nix::libc;

use super::Tree;
use super::handles::HandleId;
use super::inodes::NodeId;
use super::names::{PERMISSIONS, has_set_id};
use super::place::Place;
use super::sys::{self, Stat};
use super::worker::Worker;
use crate::devices::virtio::fs::wire;

/// A time to set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NewTime {
    /// As it is.
    Keep,
    /// The host's time.
    Now,
    /// Seconds and nanoseconds.
    At(i64, u32),
}

/// What to change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NewAttributes {
    /// Permission bits.
    pub mode: Option<u32>,
    /// Owner.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
    /// Size of a regular file.
    pub size: Option<u64>,
    /// Last access.
    pub atime: NewTime,
    /// Last modification.
    pub mtime: NewTime,
}

impl Tree {
    /// An inode's attributes, and how long the guest may remember them.
    pub fn getattr(
        &mut self,
        node: NodeId,
        handle: Option<HandleId>,
    ) -> Result<(wire::Attr, Duration), Errno> {
        let fd = self.open_fd(node, handle)?;
        let inode = self.inodes.get(node);
        let place = inode.map_or(Place::Live, |inode| inode.place);
        let stat = match fd {
            Some(fd) => sys::stat(fd)?,
            None => sys::stat(inode?.fd())?,
        };
        Ok((self.attr(&stat), place.attributes_last(&stat)))
    }

    /// Changes attributes, in an order in which none undoes another, and tells the new ones.
    pub fn setattr(
        &mut self,
        worker: &Worker,
        node: NodeId,
        handle: Option<HandleId>,
        new: &NewAttributes,
    ) -> Result<(wire::Attr, Duration), Errno> {
        self.change(worker, node, handle, new)?;
        let stat = sys::stat(self.inodes.get(node)?.fd())?;
        self.inodes.set_mode(node, &stat);
        let lasts = self.inodes.get(node)?.place.attributes_last(&stat);
        Ok((self.attr(&stat), lasts))
    }

    fn change(
        &self,
        worker: &Worker,
        node: NodeId,
        handle: Option<HandleId>,
        new: &NewAttributes,
    ) -> Result<(), Errno> {
        let inode = self.inodes.get(node)?;
        if new.uid.is_some() || new.gid.is_some() {
            sys::chown(inode.fd(), new.uid, new.gid)?;
        }
        if let Some(mode) = new.mode {
            let mode = mode & PERMISSIONS;
            worker.keeping_set_id(has_set_id(mode), || sys::chmod(inode.fd(), mode))?;
        }
        if let Some(size) = new.size {
            let size = i64::try_from(size).map_err(|_| Errno::EFBIG)?;
            let open = self.open_fd(node, handle)?;
            match open {
                // SAFETY: the call touches no memory.
                Some(fd) => Errno::result(unsafe { libc::ftruncate(fd.as_raw_fd(), size) }).map(drop)?,
                None if inode.is_regular() => sys::truncate(inode.fd(), size)?,
                None => return Err(Errno::EINVAL),
            }
        }
        if new.atime != NewTime::Keep || new.mtime != NewTime::Keep {
            sys::set_times(inode.fd(), &[new.atime.to_kernel(), new.mtime.to_kernel()])?;
        }
        Ok(())
    }

    /// The figures of the file system that an inode is on.
    pub fn statfs(&mut self, node: NodeId) -> Result<wire::StatfsOut, Errno> {
        let figures = sys::stat_fs(self.inodes.get(node)?.fd())?;
        let narrow = |value: u64| u32::try_from(value).unwrap_or(u32::MAX);
        Ok(wire::StatfsOut {
            blocks: figures.f_blocks,
            bfree: figures.f_bfree,
            bavail: figures.f_bavail,
            files: figures.f_files,
            ffree: figures.f_ffree,
            bsize: narrow(figures.f_bsize),
            namelen: narrow(figures.f_namemax),
            frsize: narrow(figures.f_frsize),
            ..Default::default()
        })
    }
}

impl NewTime {
    fn to_kernel(self) -> libc::timespec {
        let (tv_sec, tv_nsec) = match self {
            Self::Keep => (0, libc::UTIME_OMIT),
            Self::Now => (0, libc::UTIME_NOW),
            Self::At(seconds, nanoseconds) => (seconds, i64::from(nanoseconds)),
        };
        libc::timespec { tv_sec, tv_nsec }
    }
}

/// Attributes as the guest is told them, with the inode number it is told.
pub fn encode(stat: &Stat, ino: u64) -> wire::Attr {
    let raw = stat.raw();
    wire::Attr {
        ino,
        size: raw.stx_size,
        blocks: raw.stx_blocks,
        atime: raw.stx_atime.tv_sec.cast_unsigned(),
        mtime: raw.stx_mtime.tv_sec.cast_unsigned(),
        ctime: raw.stx_ctime.tv_sec.cast_unsigned(),
        atimensec: raw.stx_atime.tv_nsec,
        mtimensec: raw.stx_mtime.tv_nsec,
        ctimensec: raw.stx_ctime.tv_nsec,
        mode: stat.mode(),
        nlink: raw.stx_nlink,
        uid: raw.stx_uid,
        gid: raw.stx_gid,
        rdev: device_number(raw.stx_rdev_major, raw.stx_rdev_minor),
        blksize: raw.stx_blksize,
        flags: 0,
    }
}

/// Linux' 32-bit form of a device number.
fn device_number(major: u32, minor: u32) -> u32 {
    (minor & 0xff) | (major & 0xfff) << 8 | (minor & 0xf_ff00) << 12
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_numbers_are_in_the_kernels_form() {
        assert_eq!(device_number(1, 3), 0x103);
        assert_eq!(device_number(259, 0x1_2345), 0x1231_0345);
    }
}
