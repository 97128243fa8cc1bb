//! What a container sees of the host's storage: its root file system and its volumes.
//!
//! Directories and files are bind-mounted below the pod's shared directory, which the VMM serves by virtio-fs; block
//! devices and disk images are opened and given to the VMM. A block device comes only from a mount that containerd
//! names as such, or from the spec's own list of devices, by its number; never from what a path happens to be. Mounting may wait for a file system, so all of this runs on
//! a thread of its own, never on the shim's event loop.

mod block_device;
mod disk;
mod host_layers;
mod idmap;
mod layers;
mod loop_device;
mod mount;
mod overlay;
mod rootfs;
mod shared;
mod slots;
mod socket;
mod staging;

pub use block_device::OpenedDevice;
pub use disk::Disk;
pub use idmap::{IdMap, Mapping};
pub use layers::Directory;
pub use rootfs::{MountRequest, Rootfs, UpperDisk};
pub use shared::{SharedError, mount_shared};
pub use slots::{Slot, Slots};
pub use socket::SocketOwner;
pub use staging::Staging;

use std::io;
use std::path::PathBuf;

/// Why storage cannot be given to a container.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    /// A kind of mount that is not known.
    #[error(
        "root file system mounts of type {0:?} are not supported; use a snapshotter that gives overlay, bind, ext4 or \
         erofs mounts"
    )]
    UnknownType(String),
    /// A template that is not understood.
    #[error("the mount option or source {0:?} of the root file system is not supported")]
    Template(String),
    /// A layer of an overlay that is not one of the mounts before it.
    #[error("a layer of the root file system is not one of the disks that come with it")]
    LowerIsNoDisk,
    /// Upper and work directory that are not on one writable disk.
    #[error(
        "upperdir and workdir of the root file system are neither on one writable disk nor both on the host"
    )]
    UpperElsewhere,
    /// More layers than an overlay can have.
    #[error("the root file system has {0} layers; 500 are possible")]
    LayerCount(usize),
    /// An option that is not known.
    #[error("the mount option {0:?} of the root file system is not supported")]
    UnsupportedOption(String),
    /// An option that must be there.
    #[error("the overlay mount of the root file system has no lowerdir")]
    NoLowerdir,
    /// Overlay options that do not fit into a page.
    #[error(
        "the root file system has too many layers: their paths take {0} bytes where the kernel allows 4095"
    )]
    TooManyLayers(usize),
    /// A disk that is neither a file nor a block device.
    #[error("{} is neither a disk image nor a block device", .0.display())]
    NotADisk(PathBuf),
    /// A device number that the host has no block device of.
    #[error("linux.devices: the host has no block device {major}:{minor} for {path}: {source}")]
    NoDevice {
        /// Where the container was to find it.
        path: String,
        /// The major number.
        major: u32,
        /// The minor number.
        minor: u32,
        /// Why.
        source: io::Error,
    },
    /// Owners that cannot be mapped.
    #[error("the owners of {} cannot be mapped (uidMappings, gidMappings): {source}", path.display())]
    IdMap {
        /// What is mounted.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Something else than a socket.
    #[error("the source {} of a uds mount is not a Unix socket", .0.display())]
    NotASocket(PathBuf),
    /// A source that does not exist.
    #[error("the mount source {} cannot be used: {source}", path.display())]
    Source {
        /// The file or directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A mount that failed.
    #[error("{} cannot be mounted: {source}", path.display())]
    Mount {
        /// What was to be mounted, or where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// All disk slots are taken.
    #[error("the pod has no empty disk slot; raise hypervisor.disk_slots in the configuration")]
    NoSlot,
}
