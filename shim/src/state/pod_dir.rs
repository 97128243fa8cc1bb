//! The directory that holds everything of one pod: `<state_dir>/<namespace>/<group>/`.

use std::fs::DirBuilder;
use std::io::ErrorKind;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use super::StateError;
use crate::ids::Name;

/// How often the directory is tried again when its parent vanishes in between, because the last pod of the
/// namespace is just being removed.
const RACES: usize = 16;

/// Paths of one pod's state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodDir(PathBuf);

impl PodDir {
    /// Names the directory; nothing is created.
    pub fn new(state_dir: &Path, namespace: &Name, group: &Name) -> Self {
        Self(state_dir.join(namespace.as_str()).join(group.as_str()))
    }

    /// Creates the directory and its parents.
    ///
    /// # Errors
    /// When it exists already, or cannot be made.
    pub fn create(&self) -> Result<(), StateError> {
        let mut builder = DirBuilder::new();
        builder.mode(0o700);
        let mut last = Ok(());
        for _ in 0..RACES {
            if let Some(parent) = self.0.parent() {
                DirBuilder::new()
                    .recursive(true)
                    .mode(0o711)
                    .create(parent)
                    .map_err(|source| StateError { path: parent.to_owned(), source })?;
            }
            last = builder.create(&self.0);
            if !matches!(&last, Err(error) if error.kind() == ErrorKind::NotFound) {
                break;
            }
        }
        last.map_err(|source| StateError { path: self.0.clone(), source })
    }

    /// The directory itself.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// The journal.
    pub fn journal(&self) -> PathBuf {
        self.0.join("journal")
    }

    /// The root of what the guest shares with the host, a mount of its own.
    pub fn shared(&self) -> PathBuf {
        self.0.join("shared")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_has_one_directory_at_a_time() {
        let root = tempfile::tempdir().unwrap();
        let dir = PodDir::new(root.path(), &Name::new("ns").unwrap(), &Name::new("pod").unwrap());
        dir.create().unwrap();
        assert!(dir.path().ends_with("ns/pod"));
        assert!(dir.create().is_err());
    }
}
