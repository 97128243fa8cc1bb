//! What is mounted below the shared directory, as far as the guest has seen it.
//!
//! A descriptor keeps the mount it was opened on, so after the shim has unmounted a container's root file system the
//! inodes that the guest remembers would keep it, and the disk below it, for as long as the guest likes. The kernel
//! tells when the mount table changes; then each mount point is looked at again, and what is no longer mounted there
//! is let go.

use std::collections::HashMap;
use std::ffi::CString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;

use super::name::Name;
use super::sys::{self, Stat};

/// Where a mount was found.
#[derive(Debug)]
struct MountPoint {
    directory: OwnedFd,
    name: CString,
    parent: u64,
}

/// The mounts that have been entered.
#[derive(Debug, Default)]
pub struct Mounts {
    points: HashMap<u64, MountPoint>,
    /// Numbers the file systems for [`Mounts::inode_number`].
    devices: HashMap<u64, u64>,
}

impl Mounts {
    /// Notes that `name` in `directory`, which is on the mount `parent`, is where the mount of `stat` begins.
    ///
    /// # Errors
    /// When there is no descriptor left to remember it by.
    pub fn note(
        &mut self,
        parent: u64,
        directory: BorrowedFd<'_>,
        name: Name<'_>,
        stat: &Stat,
    ) -> Result<(), Errno> {
        let mount = stat.key().mount;
        if mount == parent || self.points.contains_key(&mount) {
            return Ok(());
        }
        let directory = directory.try_clone_to_owned().map_err(|_| Errno::ENFILE)?;
        let name = name.as_c_str().to_owned();
        self.points.insert(mount, MountPoint { directory, name, parent });
        Ok(())
    }

    /// Takes out the mounts that are no longer where they were, and those that were below them.
    pub fn take_gone(&mut self) -> Vec<u64> {
        let is_gone = |mount: u64, point: &MountPoint| {
            // A mount point that has been removed since is none.
            !sys::stat_at(point.directory.as_fd(), &point.name).is_ok_and(|stat| stat.key().mount == mount)
        };
        let mut gone: Vec<u64> = self
            .points
            .iter()
            .filter(|&(&mount, point)| is_gone(mount, point))
            .map(|(&mount, _)| mount)
            .collect();
        let mut done = 0;
        while let Some(&mount) = gone.get(done) {
            self.points.remove(&mount);
            gone.extend(
                self.points.iter().filter(|(_, point)| point.parent == mount).map(|(&child, _)| child),
            );
            done += 1;
        }
        gone
    }

    /// The number that the guest sees for an inode. To the guest all is one file system, so inodes of different file
    /// systems are kept apart by their upper bits: programs take two files for one when device and number are equal.
    pub fn inode_number(&mut self, device: u64, inode: u64) -> u64 {
        const SHIFT: u32 = 48;
        let next = u64::try_from(self.devices.len()).unwrap_or(u64::MAX);
        let number = *self.devices.entry(device).or_insert(next);
        inode ^ number.wrapping_shl(SHIFT)
    }
}
