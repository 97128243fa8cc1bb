//! The virtio-fs device and the layout of the directory it shares.
//!
//! The VMM lets the guest remember what lies in root file systems and makes it ask anew about everything else, by the
//! layout alone:
//!
//! ```text
//! /<container>/rootfs     a root file system that only this pod changes
//! /<anything else>/…      live: what the host changes is seen in the guest at once
//! ```
//!
//! The agent mounts the device once (`mount -t virtiofs -o nodev shared <dir>`; the device nodes of an image are not
//! the guest's) and bind-mounts what a container sees. The shim gives the VMM a directory that is a mount point with
//! shared propagation, and mounts below it at any time, before and after boot. When a container is gone it unmounts
//! what was the container's with `MNT_DETACH`; the VMM then lets go of what it held there, whatever the guest still
//! remembers.

/// The virtio-fs device's tag.
pub const TAG: &str = "shared";

/// The name of a container's root file system in the container's directory.
pub const ROOTFS_DIRECTORY: &str = "rootfs";

/// The source of a bind mount in a spec for the agent, followed by a path below the shared directory.
pub const SOURCE_PREFIX: &str = "vmshim-shared:";
