//! Entering a network namespace.

use std::fs::File;
use std::io::ErrorKind;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use nix::sched::{CloneFlags, setns};
use serde::{Deserialize, Serialize};

use super::NetworkError;

/// `NS_GET_NSTYPE`: the flag by which a namespace of the file's kind is made.
const NAMESPACE_KIND: libc::c_ulong = 0xb703;

/// What tells a namespace from one that later has the same path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inode {
    device: u64,
    number: u64,
}

/// A network namespace.
pub struct Netns {
    file: File,
    inode: Inode,
}

impl Netns {
    /// Opens the namespace at `path`.
    pub fn open(path: &Path) -> Result<Self, NetworkError> {
        let failed = |source: std::io::Error| match source.kind() {
            ErrorKind::NotFound | ErrorKind::NotADirectory => NetworkError::Missing(path.to_owned()),
            _ => NetworkError::Host { what: format!("open network namespace {}", path.display()), source },
        };
        // Whatever it may be, opening it must not wait for a peer.
        let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(failed)?;
        // SAFETY: the request takes no argument and answers a number.
        let kind = unsafe { libc::ioctl(file.as_raw_fd(), NAMESPACE_KIND) };
        if kind != libc::CLONE_NEWNET {
            return Err(NetworkError::NotNetns(path.to_owned()));
        }
        let metadata = file.metadata().map_err(failed)?;
        let inode = Inode { device: metadata.dev(), number: metadata.ino() };
        Ok(Self { file, inode })
    }

    /// Which namespace it is.
    pub fn inode(&self) -> Inode {
        self.inode
    }

    /// Runs `act` in the namespace, on a thread that ends with it, and waits for that.
    pub fn run<T: Send>(&self, act: impl FnOnce() -> T + Send) -> Result<T, NetworkError> {
        let inside = || {
            setns(&self.file, CloneFlags::CLONE_NEWNET).map_err(|errno| NetworkError::Host {
                what: "enter the pod's network namespace".to_owned(),
                source: errno.into(),
            })?;
            Ok(act())
        };
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().name("netns".to_owned()).spawn_scoped(scope, inside);
            let thread = thread.map_err(NetworkError::host("start a thread"))?;
            thread.join().unwrap_or(Err(NetworkError::Internal))
        })
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_network_namespace_is_told_apart() {
        let missing = Path::new("/proc/self/ns/no-such");
        assert!(matches!(Netns::open(missing), Err(NetworkError::Missing(_))));
        let below_a_file = Path::new("/proc/version/net");
        assert!(matches!(Netns::open(below_a_file), Err(NetworkError::Missing(_))));
        for other in ["/proc/self/ns/mnt", "/dev/null", "/"] {
            assert!(matches!(Netns::open(Path::new(other)), Err(NetworkError::NotNetns(_))), "{other}");
        }
        assert!(Netns::open(Path::new("/proc/self/ns/net")).is_ok());
    }

    #[test]
    fn an_inode_names_one_namespace() {
        let own = || Netns::open(Path::new("/proc/self/ns/net")).unwrap().inode();
        assert_eq!(own(), own());
        let written = serde_json::to_string(&own()).unwrap();
        assert_eq!(serde_json::from_str::<Inode>(&written).unwrap(), own());
    }
}
