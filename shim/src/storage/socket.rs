//! Sockets of the host that a container's mounts name.

use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use super::StorageError;

/// Permission bits.
const MODE: u32 = 0o777;

/// Whose a socket is, and who may connect to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SocketOwner {
    /// Permission bits.
    pub mode: u32,
    /// Its owner.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
}

impl SocketOwner {
    /// Looks at a socket.
    ///
    /// # Errors
    /// When it is not there, or something else.
    pub fn of(path: &Path) -> Result<Self, StorageError> {
        let metadata = std::fs::metadata(path)
            .map_err(|source| StorageError::Source { path: path.to_owned(), source })?;
        if !metadata.file_type().is_socket() {
            return Err(StorageError::NotASocket(PathBuf::from(path)));
        }
        Ok(Self { mode: metadata.mode() & MODE, uid: metadata.uid(), gid: metadata.gid() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_socket_is_one() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        assert!(matches!(SocketOwner::of(&path), Err(StorageError::Source { .. })));
        let _listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        assert!(SocketOwner::of(&path).unwrap().mode & 0o200 != 0);
        assert!(matches!(SocketOwner::of(directory.path()), Err(StorageError::NotASocket(_))));
    }
}
