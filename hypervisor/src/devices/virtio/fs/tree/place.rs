//! How long the guest may remember what it was told, by where in the shared directory it is.
//!
//! Below [`ROOTFS_DIRECTORY`] lie root file systems that only this guest changes: it may remember everything, names
//! that do not exist included. Everywhere else the host and other pods write too, and what they write is to be seen at
//! once: names and attributes are asked for anew each time, and cached data is dropped when a file is opened or found
//! changed. What is mounted at a name may change at any time, so the two levels above a root file system are asked
//! for anew too.

use std::ffi::CStr;
use std::time::Duration;

use vmshim_protocol::shared::ROOTFS_DIRECTORY;

use crate::devices::virtio::fs::wire::fopen;

/// Where an inode was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// The shared directory itself.
    Root,
    /// The directory whose entries are the roots of containers.
    RootfsParent,
    /// In a container's root file system.
    Rootfs,
    /// Anywhere else.
    Live,
}

/// As good as for ever, in a pod's life.
const LONG: Duration = Duration::from_secs(24 * 60 * 60);

impl Place {
    /// Where something of this name is that is found in a directory which is here.
    pub fn of_child(self, name: &CStr) -> Self {
        match self {
            Self::Root if name.to_bytes() == ROOTFS_DIRECTORY.as_bytes() => Self::RootfsParent,
            Self::Root | Self::Live => Self::Live,
            Self::RootfsParent | Self::Rootfs => Self::Rootfs,
        }
    }

    /// How long the names in a directory which is here are good.
    pub fn names_last(self) -> Duration {
        if self == Self::Rootfs { LONG } else { Duration::ZERO }
    }

    /// How long the attributes of an inode which is here are good.
    pub fn attributes_last(self) -> Duration {
        if self == Self::Rootfs { LONG } else { Duration::ZERO }
    }

    /// What the guest does with the data of a file which is here.
    pub fn file_flags(self) -> u32 {
        // Data reach the host with each write. What is left to flush is what processes have written to shared
        // mappings; in a root file system nobody else waits for it at the moment of closing.
        if self == Self::Rootfs { fopen::KEEP_CACHE | fopen::NOFLUSH } else { 0 }
    }

    /// What the guest does with the entries of a directory which is here.
    pub fn directory_flags(self) -> u32 {
        if self == Self::Rootfs { fopen::KEEP_CACHE | fopen::CACHE_DIR } else { 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn walk(path: &[&CStr]) -> Place {
        path.iter().fold(Place::Root, |place, name| place.of_child(name))
    }

    #[test]
    fn only_what_lies_in_a_root_file_system_is_remembered() {
        assert_eq!(walk(&[c"rootfs"]), Place::RootfsParent);
        assert_eq!(walk(&[c"rootfs", c"a"]), Place::Rootfs);
        assert_eq!(walk(&[c"rootfs", c"a", c"rootfs"]), Place::Rootfs);
        assert_eq!(walk(&[c"volumes", c"rootfs", c"a"]), Place::Live);
        assert_eq!(walk(&[c"rootfs"]).names_last(), Duration::ZERO);
        assert_eq!(walk(&[c"rootfs", c"a"]).names_last(), LONG);
        assert_eq!(walk(&[c"rootfs", c"a"]).attributes_last(), LONG);
        assert_eq!(walk(&[c"volumes", c"a"]).attributes_last(), Duration::ZERO);
        assert_eq!(walk(&[c"volumes", c"a"]).file_flags(), 0);
    }
}
