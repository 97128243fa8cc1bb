//! Removes all that a container has outside of its processes. Whatever is missing is as good as removed, so it can be
//! done twice, and for a container that was never finished.

use super::making::internal;
use crate::cgroup::{Cgroup, events};
use crate::failure::{Failure, Kind};
use nix::mount::{MntFlags, umount2};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A killed process is gone at once unless the kernel holds it in an I/O that does not end.
const DEATH_DEADLINE: Duration = Duration::from_secs(10);

/// How long a power-off waits for killed processes.
const FAREWELL: Duration = Duration::from_secs(2);

/// Kills what is left, removes the cgroup, unmounts and removes the directory; on a thread that may block.
pub async fn remove(directory: PathBuf, cgroup: PathBuf) -> Result<(), Failure> {
    tokio::task::spawn_blocking(move || {
        remove_cgroup(&cgroup)?;
        unmount_below(&directory)
            .map_err(|error| internal("unmount the container's file systems", &error))?;
        match fs::remove_dir_all(&directory) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(internal("remove the container's directory", &error))
            }
            _ => Ok(()),
        }
    })
    .await
    .unwrap_or_else(|_| Err(Failure::new(Kind::Internal, "the agent is shutting down")))
}

/// Unmounts what containers have mounted, once their processes, which have been killed, are gone.
pub async fn release(directory: PathBuf, cgroups: PathBuf) {
    let work = move || {
        // Best effort: the machine ends in any case, and a disk in use is still consistent by its journal.
        if let Ok(parent) = Cgroup::open(&cgroups) {
            let _ = events::wait_for(&parent, "cgroup.events", "populated", 0, FAREWELL);
        }
        let _ = unmount_below(&directory);
    };
    let _ = tokio::task::spawn_blocking(work).await;
}

fn remove_cgroup(path: &Path) -> Result<(), Failure> {
    let doing = |error: io::Error| internal("remove the container's cgroup", &error);
    let cgroup = match Cgroup::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other.map_err(doing)?,
    };
    if cgroup.is_populated().map_err(doing)? {
        cgroup.kill().map_err(doing)?;
        if !events::wait_for(&cgroup, "cgroup.events", "populated", 0, DEATH_DEADLINE).map_err(doing)? {
            return Err(Failure::new(
                Kind::DeadlineExceeded,
                "a process of the container does not die; it is held by an I/O that does not end",
            ));
        }
    }
    Cgroup::remove(path).map_err(doing)
}

/// Unmounts everything at and below a directory, last mounted first.
fn unmount_below(directory: &Path) -> io::Result<()> {
    let table = fs::read_to_string("/proc/self/mountinfo")?;
    for target in mount_points(&table, directory).iter().rev() {
        let result = match umount2(target, MntFlags::UMOUNT_NOFOLLOW) {
            // Somebody still looks at it; it goes when that one goes.
            Err(nix::Error::EBUSY) => umount2(target, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW),
            other => other,
        };
        match result {
            Err(nix::Error::EINVAL | nix::Error::ENOENT) | Ok(()) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn mount_points(table: &str, directory: &Path) -> Vec<PathBuf> {
    table
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(|field| PathBuf::from(unescape(field)))
        .filter(|target| target.starts_with(directory))
        .collect()
}

/// The kernel writes space, tab, newline and backslash as three octal digits.
fn unescape(field: &str) -> String {
    let mut text = String::with_capacity(field.len());
    let mut rest = field;
    while let Some(at) = rest.find('\\') {
        let (plain, escaped) = rest.split_at(at);
        text.push_str(plain);
        let code = escaped.get(1..4).and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match code.zip(escaped.get(4..)) {
            Some((code, after)) => {
                text.push(char::from(code));
                rest = after;
            }
            None => {
                text.push_str(escaped);
                return text;
            }
        }
    }
    text.push_str(rest);
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn only_what_is_below_is_found() {
        let table = "30 1 0:27 / /run/c/a/rootfs rw shared:1 - ext4 x rw\n\
                     31 1 0:27 / /run/c/ab rw - ext4 x rw\n\
                     32 1 0:27 / /run/c/a/low\\040er rw - ext4 x rw\n";
        assert_eq!(
            mount_points(table, Path::new("/run/c/a")),
            [PathBuf::from("/run/c/a/rootfs"), PathBuf::from("/run/c/a/low er")]
        );
    }

    proptest! {
        #[test]
        fn any_table_is_survived(table in "[a-z0-9 \\\\/\n]{0,100}") {
            let _ = mount_points(&table, Path::new("/"));
        }
    }
}
