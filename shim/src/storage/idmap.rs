//! Owners of files as a mount shows them: idmapped mounts, whose maps are those of a user namespace.
//!
//! The namespace is made by a child that does nothing else, so that no process of the shim's is ever in it.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use serde::{Deserialize, Serialize};

/// The kernel's limit on lines of a map.
const MOST_MAPPINGS: usize = 340;

/// A range of ids.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mapping {
    /// The first on disk.
    #[serde(rename = "containerID")]
    pub container: u32,
    /// The first in the mount.
    #[serde(rename = "hostID")]
    pub host: u32,
    /// How many.
    pub size: u32,
}

impl Mapping {
    /// Those of an option, behind its equals sign.
    fn list(option: &str) -> Option<Vec<Self>> {
        let (_, list) = option.split_once('=')?;
        list.split(',').map(Self::parse).collect()
    }

    fn parse(text: &str) -> Option<Self> {
        let numbers = text.split(':').map(str::parse).collect::<Result<Vec<u32>, _>>().ok()?;
        match numbers.as_slice() {
            [container, host, size] => Some(Self { container: *container, host: *host, size: *size }),
            _ => None,
        }
    }
}

/// What a mount's owners become.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct IdMap {
    /// Users.
    pub uids: Vec<Mapping>,
    /// Groups.
    pub gids: Vec<Mapping>,
}

impl IdMap {
    /// Whether the kernel could take it.
    pub fn is_valid(&self) -> bool {
        [&self.uids, &self.gids].into_iter().all(|maps| (1..=MOST_MAPPINGS).contains(&maps.len()))
    }

    /// What root, user and group, of a user namespace with these maps is outside of it; None where it is nobody.
    pub fn root(&self) -> (Option<u32>, Option<u32>) {
        let root = |maps: &[Mapping]| Some(maps.iter().find(|map| map.container == 0 && map.size > 0)?.host);
        (root(&self.uids), root(&self.gids))
    }

    /// Takes the maps out of a mount's options, where containerd writes them for a snapshotter's mount as
    /// `uidmap=<container>:<host>:<size>,…` and `gidmap=…`; None where there are none.
    ///
    /// # Errors
    /// The option that says no map, or the one that the other is missing for.
    pub fn take(options: &mut Vec<String>) -> Result<Option<Self>, String> {
        let mut take = |name: &str| {
            let place = options.iter().position(|option| option.starts_with(name));
            place.map(|place| options.remove(place))
        };
        let (uids, gids) = match (take("uidmap="), take("gidmap=")) {
            (None, None) => return Ok(None),
            (Some(uids), Some(gids)) => (uids, gids),
            (uids, gids) => return Err(uids.or(gids).unwrap_or_default()),
        };
        let read = |option: String| Mapping::list(&option).ok_or(option);
        let map = Self { uids: read(uids.clone())?, gids: read(gids)? };
        if map.is_valid() { Ok(Some(map)) } else { Err(uids) }
    }

    /// A user namespace with these maps, which lives as long as the descriptor.
    ///
    /// # Errors
    /// When the host refuses the maps, or has no user namespaces.
    pub fn namespace(&self) -> io::Result<OwnedFd> {
        let (mut ready, child_ready) = io::pipe()?;
        let (child_go, go) = io::pipe()?;
        let child = fork_idle(child_ready.as_raw_fd(), child_go.as_raw_fd(), go.as_raw_fd())?;
        drop((child_ready, child_go));
        let mut byte = [0];
        let made = match ready.read(&mut byte) {
            Ok(1) => self.write(child),
            Ok(_) => Err(io::Error::other("no user namespace can be made")),
            Err(error) => Err(error),
        };
        let namespace = made.and_then(|()| File::open(format!("/proc/{child}/ns/user"))).map(OwnedFd::from);
        drop(go);
        // The event loop may have reaped it already.
        let _ = nix::sys::wait::waitpid(nix::unistd::Pid::from_raw(child), None);
        namespace
    }

    fn write(&self, pid: i32) -> io::Result<()> {
        for (file, maps) in [("uid_map", &self.uids), ("gid_map", &self.gids)] {
            let lines: String =
                maps.iter().map(|map| format!("{} {} {}\n", map.container, map.host, map.size)).collect();
            File::options().write(true).open(format!("/proc/{pid}/{file}"))?.write_all(lines.as_bytes())?;
        }
        Ok(())
    }
}

/// A child in a user namespace of its own, which says so by a byte and ends when the other pipe is closed.
fn fork_idle(ready: i32, go: i32, parents_end: i32) -> io::Result<i32> {
    // SAFETY: between fork and _exit the child makes system calls on integers and a byte of its own only, which is all
    // that the child of a process with threads may do.
    unsafe {
        match Errno::result(libc::fork())? {
            0 => {
                let mut byte = 1u8;
                // It would wait for itself.
                libc::close(parents_end);
                if libc::unshare(libc::CLONE_NEWUSER) == 0 {
                    libc::write(ready, (&raw const byte).cast(), 1);
                    libc::read(go, (&raw mut byte).cast(), 1);
                }
                libc::_exit(0)
            }
            child => Ok(child),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(container: u32, host: u32, size: u32) -> Vec<Mapping> {
        vec![Mapping { container, host, size }]
    }

    #[test]
    fn maps_are_taken_out_of_options() {
        let take = |options: &[&str]| {
            let mut options: Vec<String> = options.iter().map(|option| (*option).to_owned()).collect();
            IdMap::take(&mut options).map(|map| (map, options.join(" ")))
        };
        let two = [map(0, 1000, 5), map(5, 70_000, 1)].concat();
        let expected = IdMap { uids: two, gids: map(0, 2000, 9) };
        let (found, rest) = take(&["ro", "uidmap=0:1000:5,5:70000:1", "gidmap=0:2000:9", "x=y"]).unwrap();
        assert_eq!((found, rest.as_str()), (Some(expected.clone()), "ro x=y"));
        assert_eq!(IdMap { gids: map(1, 2000, 9), ..expected.clone() }.root(), (Some(1000), None));
        assert_eq!(take(&["ro"]).unwrap(), (None, "ro".to_owned()));
        for bad in ["uidmap=0:1", "uidmap=", "uidmap=0:1:2:3", "uidmap=-1:0:1", "uidmap=0:5000000000:1"] {
            assert_eq!(take(&[bad, "gidmap=0:1:2"]).unwrap_err(), bad);
            assert_eq!(take(&[bad]).unwrap_err(), bad);
        }
    }

    #[test]
    fn a_namespace_has_the_maps_and_bad_ones_are_refused() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let good = IdMap { uids: map(0, 1000, 10), gids: map(0, 2000, 10) };
        assert!(good.is_valid() && good.namespace().is_ok());
        assert!(IdMap { uids: map(0, 1, 0), ..good.clone() }.namespace().is_err());
        assert!(!IdMap { gids: Vec::new(), ..good.clone() }.is_valid());
        assert!(!IdMap { uids: map(0, 1, 1).repeat(341), ..good }.is_valid());
    }
}
