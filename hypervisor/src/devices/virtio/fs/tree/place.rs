//! How long the guest may remember what it was told, by where in the shared directory it is.
//!
//! A container's [`ROOTFS_DIRECTORY`] is its root file system, which only this guest changes: it may remember
//! everything, names that do not exist included. Everywhere else the host and other pods write too, and what they write
//! is to be seen at once: names and attributes are asked for anew each time, and cached data is dropped when a file is
//! opened or found changed. What is mounted at a name may change at any time, so the names above a root file system are
//! asked for anew too, and what is mounted inside of one counts as elsewhere.

use std::ffi::CStr;
use std::time::Duration;

use vmshim_protocol::shared::ROOTFS_DIRECTORY;

use super::names::has_set_id;
use super::sys::Stat;
use crate::devices::virtio::fs::wire::fopen;

/// Where an inode was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// The shared directory itself.
    Root,
    /// What belongs to one container.
    Container,
    /// In a container's root file system.
    Rootfs,
    /// Anywhere else.
    Live,
}

/// As good as for ever, in a pod's life.
const LONG: Duration = Duration::from_secs(24 * 60 * 60);

impl Place {
    /// Where something of this name is that is found in a directory which is here, on the same mount or not.
    pub fn of_child(self, name: &CStr, same_mount: bool) -> Self {
        match self {
            Self::Root => Self::Container,
            Self::Container if name.to_bytes() == ROOTFS_DIRECTORY.as_bytes() => Self::Rootfs,
            Self::Rootfs if same_mount => Self::Rootfs,
            Self::Container | Self::Rootfs | Self::Live => Self::Live,
        }
    }

    /// How long the names in a directory which is here are good.
    pub fn names_last(self) -> Duration {
        if self == Self::Rootfs { LONG } else { Duration::ZERO }
    }

    /// How long the attributes of an inode which is here are good. The host takes set-id bits away when a file is
    /// written, which the guest's kernel only learns when it asks, as it must before it runs a program.
    pub fn attributes_last(self, stat: &Stat) -> Duration {
        if self == Self::Rootfs && !has_set_id(stat.mode()) { LONG } else { Duration::ZERO }
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
        path.iter().fold(Place::Root, |place, name| place.of_child(name, true))
    }

    #[test]
    fn only_what_lies_in_a_root_file_system_is_remembered() {
        assert_eq!(walk(&[c"c1", c"rootfs"]), Place::Rootfs);
        assert_eq!(walk(&[c"c1", c"rootfs", c"a"]), Place::Rootfs);
        for elsewhere in [&[c"rootfs"][..], &[c"c1", c"mounts", c"0"], &[c"c1", c"mounts", c"rootfs"]] {
            assert_ne!(walk(elsewhere), Place::Rootfs, "{elsewhere:?}");
            assert_eq!(walk(elsewhere).names_last(), Duration::ZERO);
            assert_eq!(walk(elsewhere).file_flags(), 0);
        }
        // What is mounted there is found in a directory that knows nothing of it.
        assert_eq!(walk(&[c"c1"]).of_child(c"rootfs", false), Place::Rootfs);
        assert_eq!(walk(&[c"c1", c"rootfs"]).of_child(c"etc", false), Place::Live);
    }
}
