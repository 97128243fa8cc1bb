//! One container's part of the shared directory: `<container>/rootfs` and `<container>/mounts/<n>`.

use std::fs::{DirBuilder, File};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use super::mount::{Attributes, Bind, detach, has_mounts_below};
use super::{MountRequest, Rootfs, StorageError};
use crate::ids::Name;
use crate::oci::HostBind;

/// What is mounted for a container. Undone by [`Staging::remove`]; the pod's end undoes it too.
#[derive(Debug)]
pub struct Staging {
    directory: PathBuf,
    mounted: Vec<PathBuf>,
    made: Vec<PathBuf>,
    partly_read_only: Vec<String>,
}

impl Staging {
    /// The container's part of `shared`; nothing is made yet.
    pub fn new(shared: &Path, id: &Name) -> Self {
        Self {
            directory: shared.join(id.as_str()),
            mounted: Vec::new(),
            made: Vec::new(),
            partly_read_only: Vec::new(),
        }
    }

    /// The names of read-only volumes that have other mounts below, which are not.
    pub fn partly_read_only(&self) -> &[String] {
        &self.partly_read_only
    }

    /// Makes the root file system and stages the volumes. `root` is the directory to use where containerd gave no
    /// mount.
    ///
    /// # Errors
    /// What was made until then stays for [`Staging::remove`].
    pub fn stage(
        &mut self,
        request: Option<MountRequest>,
        root: &Path,
        binds: &[HostBind],
    ) -> Result<Rootfs, StorageError> {
        self.make_directory(self.directory.clone())?;
        let target = self.make_directory(self.directory.join("rootfs"))?;
        let request = request.unwrap_or_else(|| MountRequest::Bind {
            source: root.to_owned(),
            recursive: true,
            read_only: false,
            id_map: None,
        });
        let rootfs = request.realize(&target)?;
        if matches!(rootfs, Rootfs::Shared) {
            self.mounted.push(target);
        }
        if !binds.is_empty() {
            let mounts = self.make_directory(self.directory.join("mounts"))?;
            binds.iter().try_for_each(|bind| self.stage_bind(&mounts, bind))?;
        }
        Ok(rootfs)
    }

    fn stage_bind(&mut self, mounts: &Path, request: &HostBind) -> Result<(), StorageError> {
        let source = &request.source;
        let kind = std::fs::metadata(source)
            .map_err(|error| StorageError::Source { path: source.clone(), source: error })?
            .file_type();
        let target = mounts.join(&request.name);
        let target = if kind.is_dir() { self.make_directory(target)? } else { self.make_file(target)? };
        let attributes = Attributes {
            read_only: request.read_only,
            no_exec: request.no_exec,
            recursive: request.recursive_read_only,
        };
        let recursive = request.recursive;
        let bind = Bind { recursive, attributes, id_map: request.id_map.as_ref() };
        let mount = bind.make(source, &target)?;
        self.mounted.push(target.clone());
        if recursive && attributes.read_only && !attributes.recursive && kind.is_dir() {
            let below = has_mounts_below(&mount);
            if below.map_err(|source| StorageError::Mount { path: target, source })? {
                self.partly_read_only.push(request.name.clone());
            }
        }
        Ok(())
    }

    /// Unmounts and removes everything, the last made first.
    ///
    /// # Errors
    /// The first failure; what is still there goes with the pod.
    pub fn remove(&mut self) -> Result<(), StorageError> {
        while let Some(path) = self.mounted.last() {
            detach(path).map_err(|source| StorageError::Mount { path: path.clone(), source })?;
            self.mounted.pop();
        }
        while let Some(path) = self.made.pop() {
            // The guest may have put something there; it goes with the pod's shared directory.
            let _ = if path.is_dir() { std::fs::remove_dir(&path) } else { std::fs::remove_file(&path) };
        }
        Ok(())
    }

    fn make_directory(&mut self, path: PathBuf) -> Result<PathBuf, StorageError> {
        let made = DirBuilder::new().mode(0o755).create(&path);
        self.made(path, made)
    }

    fn make_file(&mut self, path: PathBuf) -> Result<PathBuf, StorageError> {
        let made = File::create_new(&path).map(drop);
        self.made(path, made)
    }

    fn made(&mut self, path: PathBuf, result: std::io::Result<()>) -> Result<PathBuf, StorageError> {
        match result {
            Ok(()) => {
                self.made.push(path.clone());
                Ok(path)
            }
            Err(source) => Err(StorageError::Mount { path, source }),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;
    use crate::storage::{IdMap, Mapping};

    fn mounts_below(path: &Path) -> usize {
        let table = std::fs::read_to_string("/proc/self/mounts").unwrap();
        table.lines().filter(|line| line.contains(path.to_str().unwrap())).count()
    }

    /// Needs root, as the shim itself does.
    #[test]
    fn what_is_staged_is_seen_and_removed() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let host = tempfile::tempdir().unwrap();
        let shared = tempfile::tempdir().unwrap();
        for name in ["root", "volume"] {
            std::fs::create_dir(host.path().join(name)).unwrap();
        }
        std::fs::write(host.path().join("file"), "text").unwrap();
        let bind = |name: &str, source: &str, read_only| HostBind {
            source: host.path().join(source),
            name: name.to_owned(),
            recursive: true,
            read_only,
            recursive_read_only: false,
            no_exec: false,
            id_map: None,
        };
        let mut staging = Staging::new(shared.path(), &Name::new("c").unwrap());
        let mapping = |host| vec![Mapping { container: 0, host, size: 10 }];
        let mapped = IdMap { uids: mapping(1000), gids: mapping(2000) };
        let mapped = HostBind { id_map: Some(mapped), ..bind("2", "file", false) };
        let binds = [bind("0", "volume", true), bind("1", "file", false), mapped];
        match staging.stage(None, &host.path().join("root"), &binds) {
            // A sandbox may not let even root mount.
            Err(StorageError::Mount { source, .. }) if source.raw_os_error() == Some(libc::EPERM) => return,
            result => assert!(matches!(result.unwrap(), Rootfs::Shared)),
        }
        assert_eq!(std::fs::read_to_string(shared.path().join("c/mounts/1")).unwrap(), "text");
        let mapped = std::fs::metadata(shared.path().join("c/mounts/2")).unwrap();
        assert_eq!((mapped.uid(), mapped.gid()), (1000, 2000));
        assert!(std::fs::write(shared.path().join("c/mounts/0/x"), "").is_err());
        assert!(std::fs::write(shared.path().join("c/rootfs/x"), "").is_ok());
        staging.remove().unwrap();
        assert_eq!(mounts_below(shared.path()), 0);
        assert!(!shared.path().join("c").exists());
        assert!(host.path().join("root/x").exists());
    }

    #[test]
    fn a_volume_that_does_not_exist_is_named() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let shared = tempfile::tempdir().unwrap();
        let mut staging = Staging::new(shared.path(), &Name::new("c").unwrap());
        let bind = HostBind {
            source: "/nonexistent/volume".into(),
            name: "0".into(),
            recursive: true,
            read_only: false,
            recursive_read_only: false,
            no_exec: false,
            id_map: None,
        };
        let error = staging.stage(None, Path::new("/tmp"), &[bind]).unwrap_err();
        let expected = matches!(&error, StorageError::Mount { source, .. } if source.raw_os_error() == Some(libc::EPERM))
            || error.to_string().contains("/nonexistent/volume");
        assert!(expected, "{error}");
        staging.remove().unwrap();
    }
}
