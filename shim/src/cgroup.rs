//! Host cgroups: where they are, and moving processes there.
//!
//! Both layouts are served: one unified hierarchy (v2), or one per controller (v1). A cgroup is named as the OCI spec
//! names it: by path, or as `slice:prefix:name` for systemd.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::{Component, Path, PathBuf};

const ROOT: &str = "/sys/fs/cgroup";

/// How often a directory is tried again when its parent vanishes in between, because another pod's end has just left
/// it empty.
const RACES: usize = 16;

/// A cgroup's name is not usable.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("linux.cgroupsPath {0:?} is not a path below the cgroup root")]
pub struct InvalidPath(String);

/// One cgroup, as its directories in every hierarchy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cgroup {
    directories: Vec<PathBuf>,
}

impl Cgroup {
    /// Finds where the cgroup called `name` is, or would be.
    ///
    /// # Errors
    /// When the name leads out of the hierarchy.
    pub fn locate(name: &str) -> Result<Self, InvalidPath> {
        let relative = relative_path(name).ok_or_else(|| InvalidPath(name.to_owned()))?;
        let directories = hierarchies(Path::new(ROOT)).into_iter().map(|root| root.join(&relative)).collect();
        Ok(Self { directories })
    }

    /// Its directories.
    pub fn directories(&self) -> &[PathBuf] {
        &self.directories
    }

    /// The parents that [`Cgroup::create`] would have to make, outermost first.
    pub fn missing_parents(&self) -> Vec<PathBuf> {
        let parents = self.directories.iter().flat_map(|directory| {
            let mut missing: Vec<_> =
                directory.ancestors().skip(1).take_while(|path| !path.exists()).collect();
            missing.reverse();
            missing
        });
        parents.map(Path::to_owned).collect()
    }

    /// Makes the directories; existing ones are fine.
    ///
    /// # Errors
    /// When one cannot be made.
    pub fn create(&self) -> io::Result<()> {
        self.directories.iter().try_for_each(|directory| {
            let mut last = Ok(());
            for _ in 0..RACES {
                last = std::fs::create_dir_all(directory);
                if !matches!(&last, Err(error) if error.kind() == io::ErrorKind::NotFound) {
                    break;
                }
            }
            last
        })
    }

    /// The files through which processes enter.
    ///
    /// # Errors
    /// When one cannot be opened.
    pub fn entrances(&self) -> io::Result<Vec<File>> {
        self.directories
            .iter()
            .map(|directory| OpenOptions::new().write(true).open(directory.join("cgroup.procs")))
            .collect()
    }

    /// Moves the calling process into the cgroup, which is made if need be.
    ///
    /// # Errors
    /// When it cannot be made or entered.
    pub fn enter(&self) -> io::Result<()> {
        self.create()?;
        self.entrances()?.iter_mut().try_for_each(|procs| procs.write_all(b"0"))
    }
}

/// The root itself where it is the unified hierarchy, otherwise the controllers' own.
fn hierarchies(root: &Path) -> Vec<PathBuf> {
    if root.join("cgroup.controllers").exists() {
        return vec![root.to_owned()];
    }
    let Ok(entries) = std::fs::read_dir(root) else { return Vec::new() };
    let mut found: Vec<PathBuf> = entries
        .filter_map(Result::ok)
        // A link is another name of a hierarchy that is listed too.
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
        .filter(|path| path.join("cgroup.procs").exists())
        .collect();
    found.sort();
    found
}

/// The path of a named cgroup relative to its hierarchy.
fn relative_path(name: &str) -> Option<PathBuf> {
    let parts: Vec<&str> = name.split(':').collect();
    let path = match parts.as_slice() {
        [slice, prefix, unit] => systemd_path(slice, prefix, unit)?,
        _ => PathBuf::from(name.trim_start_matches('/')),
    };
    let plain = path.components().all(|component| matches!(component, Component::Normal(_)));
    (plain && path.components().next().is_some()).then_some(path)
}

fn systemd_path(slice: &str, prefix: &str, unit: &str) -> Option<PathBuf> {
    let slice = if slice.is_empty() { "system.slice" } else { slice };
    let stem = slice.strip_suffix(".slice")?;
    let mut path = PathBuf::new();
    if stem != "-" {
        let mut name = String::new();
        for part in stem.split('-') {
            if part.is_empty() || part.contains('/') {
                return None;
            }
            if !name.is_empty() {
                name.push('-');
            }
            name.push_str(part);
            path.push(format!("{name}.slice"));
        }
    }
    path.push(if prefix.is_empty() { format!("{unit}.scope") } else { format!("{prefix}-{unit}.scope") });
    Some(path)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn relative(name: &str) -> Option<String> {
        relative_path(name).map(|path| path.to_string_lossy().into_owned())
    }

    #[test]
    fn both_notations_are_understood() {
        assert_eq!(relative("/default/x").as_deref(), Some("default/x"));
        assert_eq!(
            relative("kubepods-burstable-pod7.slice:cri-containerd:abc").as_deref(),
            Some(
                "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod7.slice/cri-containerd-abc.scope"
            )
        );
        assert_eq!(relative("-.slice:p:n").as_deref(), Some("p-n.scope"));
        assert_eq!(relative(":p:n").as_deref(), Some("system.slice/p-n.scope"));
    }

    #[test]
    fn ways_out_are_refused() {
        for name in ["", "/", "/a/../../b", "..", "a--b.slice:p:n", "x:p:n", "s.slice:..:/../n"] {
            assert_eq!(relative(name), None, "{name}");
        }
    }

    #[test]
    fn the_unified_hierarchy_is_told_from_the_others() {
        let root = tempfile::tempdir().unwrap();
        for controller in ["memory", "pids"] {
            std::fs::create_dir(root.path().join(controller)).unwrap();
            std::fs::write(root.path().join(controller).join("cgroup.procs"), "").unwrap();
        }
        std::os::unix::fs::symlink("memory", root.path().join("mem")).unwrap();
        assert_eq!(hierarchies(root.path()), [root.path().join("memory"), root.path().join("pids")]);
        std::fs::write(root.path().join("cgroup.controllers"), "").unwrap();
        assert_eq!(hierarchies(root.path()), [root.path()]);
    }

    proptest! {
        #[test]
        fn a_path_stays_below_its_root(name in "[a-z./:-]{0,30}") {
            if let Some(path) = relative_path(&name) {
                prop_assert!(path.components().all(|part| matches!(part, Component::Normal(_))));
            }
        }
    }
}
