//! User namespaces: the id maps of a container, and namespaces that exist only to map a mount's owners.

use super::error::{Context, Error, Result};
use crate::sys::process::{CloneRequest, Cloned, clone3, wait};
use oci_spec::runtime::LinuxIdMapping;
use std::fs::{self, File};
use std::os::fd::OwnedFd;

/// The kernel's limit on lines of a map.
const MOST_MAPPINGS: usize = 340;

/// Writes the id maps of a process that is in a new user namespace.
pub fn write(pid: u32, uids: &[LinuxIdMapping], gids: &[LinuxIdMapping]) -> Result<()> {
    for (file, field, maps) in
        [("uid_map", "linux.uidMappings", uids), ("gid_map", "linux.gidMappings", gids)]
    {
        if maps.is_empty() || maps.len() > MOST_MAPPINGS {
            return Err(Error::invalid(
                field,
                format!("has {} entries; 1 to {MOST_MAPPINGS} work", maps.len()),
            ));
        }
        fs::write(format!("/proc/{pid}/{file}"), lines(maps)).doing(|| format!("set {field}"))?;
    }
    Ok(())
}

/// What an id inside of a user namespace with these maps is outside of it.
pub fn outside(maps: &[LinuxIdMapping], id: u32) -> Option<u32> {
    maps.iter().find_map(|map| {
        let offset = id.checked_sub(map.container_id()).filter(|offset| *offset < map.size())?;
        map.host_id().checked_add(offset)
    })
}

fn lines(maps: &[LinuxIdMapping]) -> String {
    use std::fmt::Write;
    maps.iter().fold(String::new(), |mut text, map| {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{} {} {}", map.container_id(), map.host_id(), map.size());
        text
    })
}

/// A user namespace with these maps, which lives as long as the descriptor.
pub fn namespace(uids: &[LinuxIdMapping], gids: &[LinuxIdMapping]) -> Result<OwnedFd> {
    let doing = || "make a user namespace for an idmapped mount";
    let (wait_here, let_go) = nix::unistd::pipe().doing(doing)?;
    let request =
        CloneRequest { namespaces: u64::from(libc::CLONE_NEWUSER.cast_unsigned()), ..Default::default() };
    // SAFETY: an engine process has one thread.
    let (pid, _pidfd) = match unsafe { clone3(&request) }.doing(doing)? {
        Cloned::Child => {
            drop(let_go);
            let _ = nix::unistd::read(&wait_here, &mut [0]);
            // SAFETY: ends the process without running what its parent has registered for its own end.
            unsafe { libc::_exit(0) }
        }
        Cloned::Parent(pid, pidfd) => (pid, pidfd),
    };
    let result = write(pid, uids, gids)
        .and_then(|()| File::open(format!("/proc/{pid}/ns/user")).doing(doing).map(OwnedFd::from));
    drop(let_go);
    wait(pid).doing(doing)?;
    result
}

#[cfg(test)]
mod tests {
    use super::*;
    use oci_spec::runtime::LinuxIdMappingBuilder;

    fn map(container: u32, host: u32, size: u32) -> LinuxIdMapping {
        LinuxIdMappingBuilder::default().container_id(container).host_id(host).size(size).build().unwrap()
    }

    #[test]
    fn an_id_is_found_outside() {
        let maps = [map(0, 1000, 1), map(5, 100_000, 10), map(50, u32::MAX, 2)];
        for (inside, expected) in
            [(0, Some(1000)), (1, None), (5, Some(100_000)), (14, Some(100_009)), (15, None), (51, None)]
        {
            assert_eq!(outside(&maps, inside), expected, "{inside}");
        }
    }

    #[test]
    fn a_map_is_written_as_the_kernel_reads_it() {
        assert_eq!(lines(&[map(0, 1000, 1), map(1, 100_000, 65_535)]), "0 1000 1\n1 100000 65535\n");
    }
}
