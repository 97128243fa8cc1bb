//! The root of what a pod's guest can reach by virtio-fs.

use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

use nix::mount::MsFlags;

use super::StorageError;
use super::mount::mount;
use crate::state::{Entry, Journal, PodDir, StateError};

/// Room for mount points and nothing else: what a guest could write here costs the host memory.
const OPTIONS: &str = "mode=0755,size=1m,nr_inodes=16k";

/// Why the shared directory could not be made.
#[derive(Debug, thiserror::Error)]
pub enum SharedError {
    /// The state directory failed.
    #[error(transparent)]
    State(#[from] StateError),
    /// The mount failed.
    #[error(transparent)]
    Storage(#[from] StorageError),
}

/// Mounts the pod's shared directory: a file system of its own, so that detaching it undoes whatever was mounted or
/// made below, and shared, so that later mounts reach the VMM's mount namespace.
///
/// # Errors
/// When the host refuses.
pub fn mount_shared(pod: &PodDir, journal: &Journal) -> Result<(), SharedError> {
    let path = pod.shared();
    DirBuilder::new()
        .mode(0o700)
        .create(&path)
        .map_err(|source| StateError { path: path.clone(), source })?;
    journal.intend(&Entry::Mount(path.clone()))?;
    let failed = |source| StorageError::Mount { path: path.clone(), source };
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some(Path::new("vmshim")), &path, Some("tmpfs"), flags, Some(OPTIONS)).map_err(failed)?;
    mount(None, &path, None, MsFlags::MS_SHARED, None).map_err(failed)?;
    Ok(())
}
