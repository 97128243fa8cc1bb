//! The shim's socket: its name, which containerd can compute too, and how it is taken over from a dead shim.

use std::fmt::Write;
use std::fs::{DirBuilder, Permissions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

/// Where shims put their sockets unless told otherwise.
pub const DEFAULT_DIR: &str = "/run/containerd/s";

/// A socket is bound, or somebody else serves it.
#[derive(Debug)]
pub enum Bound {
    /// This process serves it.
    Ours(UnixListener),
    /// The shim of the same group answers there.
    Served,
}

/// The socket of a group of containers.
pub fn path(directory: &str, containerd_address: &str, namespace: &str, group: &str) -> PathBuf {
    let identity = format!("{}/{namespace}/{group}", containerd_address.trim_end_matches('/'));
    let mut name = String::with_capacity(64);
    for byte in Sha256::digest(identity.as_bytes()) {
        let _ = write!(name, "{byte:02x}");
    }
    Path::new(directory).join(name)
}

/// Binds the socket, unless somebody answers there. A socket that nobody answers is left over from a shim that was
/// killed, and is replaced.
///
/// # Errors
/// When the directory or the socket cannot be made.
pub fn bind(path: &Path) -> io::Result<Bound> {
    if let Some(directory) = path.parent() {
        DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
    }
    match UnixListener::bind(path) {
        Err(error) if error.kind() == ErrorKind::AddrInUse => {
            if UnixStream::connect(path).is_ok() {
                return Ok(Bound::Served);
            }
            std::fs::remove_file(path)?;
            protect(path, UnixListener::bind(path)?)
        }
        bound => protect(path, bound?),
    }
}

fn protect(path: &Path, listener: UnixListener) -> io::Result<Bound> {
    std::fs::set_permissions(path, Permissions::from_mode(0o600))?;
    Ok(Bound::Ours(listener))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn name_is_the_hash_that_containerd_expects() {
        // printf '%s' /run/containerd/containerd.sock/default/x | sha256sum
        let path = path(DEFAULT_DIR, "/run/containerd/containerd.sock", "default", "x");
        let hash = "5e250b13f984a15f73216d143af1bf3c64171aa56c781ba9d4040c75b2c1eee2";
        assert_eq!(path, Path::new(DEFAULT_DIR).join(hash));
        assert_eq!(path, super::path(DEFAULT_DIR, "/run/containerd/containerd.sock/", "default", "x"));
    }

    #[test]
    fn a_living_socket_is_joined_and_a_stale_one_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s").join("socket");
        let Bound::Ours(listener) = bind(&path).unwrap() else { panic!("nobody serves yet") };
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&path), mode(path.parent().unwrap())), (0o600, 0o700));
        assert!(matches!(bind(&path).unwrap(), Bound::Served));
        drop(listener);
        assert!(matches!(bind(&path).unwrap(), Bound::Ours(_)));
    }
}
