//! Paths inside a container's root file system, resolved without ever leaving it.
//!
//! The tree's content is hostile: any component may be a symbolic link to anywhere. Every step opens one component
//! without following links, and a link's target is walked in the same way, absolute ones from the container's root
//! and `..` never above it. What comes out is a descriptor, so nothing is resolved twice.

use nix::fcntl::{OFlag, openat, readlinkat};
use nix::sys::stat::{FileStat, Mode, SFlag, fstat, mkdirat};
use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path};

/// As the kernel limits a path.
const MOST_LINKS: usize = 40;
const LOCATION: OFlag = OFlag::O_PATH.union(OFlag::O_NOFOLLOW).union(OFlag::O_CLOEXEC);

/// A container's root directory.
pub struct Tree {
    root: OwnedFd,
}

/// What to do where a path ends.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Missing {
    Fail,
    Directory,
    File,
}

impl Tree {
    /// The tree below an open directory.
    pub fn new(root: OwnedFd) -> Self {
        Self { root }
    }

    /// The root directory itself.
    pub fn root(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }

    /// Opens the location of an existing file or directory, links followed.
    pub fn open(&self, path: &Path) -> io::Result<OwnedFd> {
        self.walk(path, Missing::Fail)
    }

    /// Opens a directory, made with its parents (mode 0755) where missing.
    pub fn directory(&self, path: &Path) -> io::Result<OwnedFd> {
        self.walk(path, Missing::Directory)
    }

    /// Opens a file, made empty with its parents where missing.
    pub fn file(&self, path: &Path) -> io::Result<OwnedFd> {
        self.walk(path, Missing::File)
    }

    /// Opens the directory that shall hold `path`, made where missing, and says the last name.
    pub fn parent<'p>(&self, path: &'p Path) -> io::Result<(OwnedFd, &'p OsStr)> {
        let name = path.file_name().ok_or_else(|| io::Error::from_raw_os_error(libc::EINVAL))?;
        let parent = self.directory(path.parent().unwrap_or_else(|| Path::new("/")))?;
        Ok((parent, name))
    }

    fn walk(&self, path: &Path, missing: Missing) -> io::Result<OwnedFd> {
        let mut ahead = components(path);
        let mut behind: Vec<OwnedFd> = Vec::new();
        let mut links = 0;
        while let Some(name) = ahead.pop_front() {
            match name.as_bytes() {
                b"/" => behind.clear(),
                b".." => drop(behind.pop()),
                _ => {
                    let here = behind.last().map_or(self.root.as_fd(), AsFd::as_fd);
                    let next = step(here, &name, missing, ahead.is_empty())?;
                    if kind(&fstat(&next)?) != SFlag::S_IFLNK {
                        behind.push(next);
                        continue;
                    }
                    links += 1;
                    if links > MOST_LINKS {
                        return Err(io::Error::from_raw_os_error(libc::ELOOP));
                    }
                    let target = readlinkat(here, name.as_os_str())?;
                    for component in components(Path::new(&target)).into_iter().rev() {
                        ahead.push_front(component);
                    }
                }
            }
        }
        match behind.pop() {
            Some(end) => Ok(end),
            None => self.root.try_clone(),
        }
    }
}

/// The file type of a `stat`.
pub fn kind(stat: &FileStat) -> SFlag {
    SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT
}

fn components(path: &Path) -> VecDeque<OsString> {
    path.components()
        .filter_map(|component| match component {
            Component::RootDir => Some(OsString::from("/")),
            Component::ParentDir => Some(OsString::from("..")),
            Component::Normal(name) => Some(name.to_owned()),
            Component::CurDir | Component::Prefix(_) => None,
        })
        .collect()
}

fn step(here: BorrowedFd<'_>, name: &OsStr, missing: Missing, last: bool) -> io::Result<OwnedFd> {
    match openat(here, name, LOCATION, Mode::empty()) {
        Err(nix::Error::ENOENT) if missing != Missing::Fail => {}
        other => return Ok(other?),
    }
    if last && missing == Missing::File {
        let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC | OFlag::O_WRONLY;
        match openat(here, name, flags, Mode::from_bits_truncate(0o644)) {
            Ok(_) | Err(nix::Error::EEXIST) => {}
            Err(error) => return Err(error.into()),
        }
    } else {
        match mkdirat(here, name, Mode::from_bits_truncate(0o755)) {
            Ok(()) | Err(nix::Error::EEXIST) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(openat(here, name, LOCATION, Mode::empty())?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::fs;
    use std::os::unix::fs::symlink;
    use std::path::PathBuf;
    use tempfile::TempDir;

    fn tree() -> (TempDir, Tree) {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("root")).unwrap();
        let root = fs::File::open(dir.path().join("root")).unwrap();
        (dir, Tree::new(root.into()))
    }

    fn place(fd: &OwnedFd) -> PathBuf {
        use std::os::fd::AsRawFd;
        fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).unwrap()
    }

    #[test]
    fn parents_are_made() {
        let (dir, tree) = tree();
        tree.file(Path::new("/a/b/c")).unwrap();
        assert!(dir.path().join("root/a/b/c").is_file());
        tree.directory(Path::new("d/e")).unwrap();
        assert!(dir.path().join("root/d/e").is_dir());
    }

    #[test]
    fn links_stay_inside() {
        let (dir, tree) = tree();
        fs::create_dir(dir.path().join("outside")).unwrap();
        symlink(dir.path().join("outside"), dir.path().join("root/absolute")).unwrap();
        symlink("../../../outside", dir.path().join("root/relative")).unwrap();
        tree.file(Path::new("/relative/x")).unwrap();
        tree.file(Path::new("/absolute/x")).unwrap();
        assert!(!dir.path().join("outside/x").exists());
        assert!(dir.path().join("root/outside/x").is_file());
    }

    #[test]
    fn a_dangling_link_makes_its_target() {
        let (dir, tree) = tree();
        fs::create_dir(dir.path().join("root/var")).unwrap();
        symlink("/run", dir.path().join("root/var/run")).unwrap();
        tree.directory(Path::new("/var/run/secrets")).unwrap();
        assert!(dir.path().join("root/run/secrets").is_dir());
    }

    #[test]
    fn dots_do_not_climb_out() {
        let (dir, tree) = tree();
        assert_eq!(place(&tree.open(Path::new("../../..")).unwrap()), dir.path().join("root"));
        assert!(tree.open(Path::new("/missing")).is_err());
    }

    #[test]
    fn a_circle_of_links_ends() {
        let (dir, tree) = tree();
        symlink("b", dir.path().join("root/a")).unwrap();
        symlink("a", dir.path().join("root/b")).unwrap();
        assert_eq!(tree.open(Path::new("a")).unwrap_err().raw_os_error(), Some(libc::ELOOP));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn nothing_is_ever_made_outside(
            links in prop::collection::vec(("[ab]", "(/|\\.\\./|\\.\\./\\.\\./)?[abc](/[abc])?"), 0..4),
            path in "(/|\\.\\./)*[abc](/(\\.\\.|[abc])){0,4}",
        ) {
            let (dir, tree) = tree();
            for (name, target) in links {
                let _ = symlink(target, dir.path().join("root").join(name));
            }
            if let Ok(end) = tree.directory(Path::new(&path)) {
                prop_assert!(place(&end).starts_with(dir.path().join("root")));
            }
            let around: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
            prop_assert_eq!(around, vec![OsString::from("root")]);
        }
    }
}
