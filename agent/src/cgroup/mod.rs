//! A container's cgroup: version 2 only, by descriptor.
//!
//! The agent itself stays in the root cgroup. Containers' cgroups are children of [`parent`], each with every
//! controller that the kernel has. Files are read and written relative to the open directory, so a cgroup that is
//! removed and made again is never mistaken for the old one.

pub mod devices;
pub mod events;
pub mod limits;
pub mod stats;

use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

/// No file of a cgroup is larger, apart from lists of processes.
const LONGEST_FILE: u64 = 256 * 1024;
/// A pid namespace has no more processes.
const LONGEST_LIST: u64 = 4 << 20;
/// A container may divide its cgroup; no deeper tree than this is walked.
const DEEPEST: usize = 64;

/// Where cgroup2 is mounted.
pub fn root() -> PathBuf {
    PathBuf::from("/sys/fs/cgroup")
}

/// The cgroup that holds the containers'.
pub fn parent() -> PathBuf {
    root().join("vmshim")
}

/// An open cgroup.
#[derive(Debug)]
pub struct Cgroup {
    directory: OwnedFd,
    path: PathBuf,
}

impl Cgroup {
    /// Opens an existing one.
    pub fn open(path: &Path) -> io::Result<Self> {
        let directory = File::open(path)?.into();
        Ok(Self { directory, path: path.to_owned() })
    }

    /// Makes one.
    pub fn create(path: &Path) -> io::Result<Self> {
        fs::create_dir(path)?;
        Self::open(path)
    }

    /// The directory's descriptor, for `clone3`.
    pub fn directory(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }

    /// Whether controllers are handed down to children, so that processes may only be in those.
    pub fn is_divided(&self) -> io::Result<bool> {
        Ok(!self.read("cgroup.subtree_control")?.trim().is_empty())
    }

    /// Reads a file.
    pub fn read(&self, name: &str) -> io::Result<String> {
        let mut text = String::new();
        File::from(self.file(name, OFlag::O_RDONLY)?).take(LONGEST_FILE).read_to_string(&mut text)?;
        Ok(text)
    }

    /// Writes a value to a file that exists.
    pub fn write(&self, name: &str, value: &str) -> io::Result<()> {
        File::from(self.file(name, OFlag::O_WRONLY)?).write_all(value.as_bytes())
    }

    /// Whether there is such a file, which says whether the kernel has the controller.
    pub fn has(&self, name: &str) -> bool {
        nix::unistd::faccessat(
            &self.directory,
            name,
            nix::unistd::AccessFlags::F_OK,
            nix::fcntl::AtFlags::empty(),
        )
        .is_ok()
    }

    /// Opens a file.
    pub fn file(&self, name: &str, flags: OFlag) -> io::Result<OwnedFd> {
        Ok(openat(&self.directory, name, flags | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW, Mode::empty())?)
    }

    /// Kills every process in it and below.
    pub fn kill(&self) -> io::Result<()> {
        self.write("cgroup.kill", "1")
    }

    /// Whether a process is in it or below.
    pub fn is_populated(&self) -> io::Result<bool> {
        Ok(events::value(&self.read("cgroup.events")?, "populated") == Some(1))
    }

    /// The ids, in the caller's pid namespace, of the processes in it and below.
    pub fn processes(&self) -> io::Result<Vec<u32>> {
        let mut found = Vec::new();
        for directory in subtree(&self.path)? {
            let Ok(file) = File::open(directory.join("cgroup.procs")) else { continue };
            let mut text = String::new();
            match file.take(LONGEST_LIST).read_to_string(&mut text) {
                Ok(_) => {}
                // Threaded children list their processes at their domain's root, others are gone by now.
                Err(error) if matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENODEV)) => {
                    continue;
                }
                Err(error) => return Err(error),
            }
            // A 0 is a process of a pid namespace that the caller cannot see.
            found.extend(text.lines().filter_map(|line| line.parse::<u32>().ok()).filter(|pid| *pid != 0));
        }
        found.sort_unstable();
        found.dedup();
        Ok(found)
    }

    /// Removes it with its children; all must be empty.
    pub fn remove(path: &Path) -> io::Result<()> {
        let directories = match subtree(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            other => other?,
        };
        for directory in directories.iter().rev() {
            match fs::remove_dir(directory) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }
}

/// A cgroup and those below, parents first.
fn subtree(path: &Path) -> io::Result<Vec<PathBuf>> {
    fs::metadata(path)?;
    let mut found = Vec::new();
    let mut pending = vec![(path.to_owned(), 0)];
    while let Some((directory, depth)) = pending.pop() {
        if depth < DEEPEST
            && let Ok(entries) = fs::read_dir(&directory)
        {
            for entry in entries.flatten() {
                if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                    pending.push((entry.path(), depth + 1));
                }
            }
        }
        found.push(directory);
    }
    Ok(found)
}

/// Hands every controller of a cgroup down to its children.
pub fn delegate(path: &Path) -> io::Result<()> {
    let controllers = fs::read_to_string(path.join("cgroup.controllers"))?;
    let wanted: Vec<String> = controllers.split_whitespace().map(|name| format!("+{name}")).collect();
    if wanted.is_empty() {
        return Ok(());
    }
    fs::write(path.join("cgroup.subtree_control"), wanted.join(" "))
}
