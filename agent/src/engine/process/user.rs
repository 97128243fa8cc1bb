//! Who the process is: user, groups, home.

use crate::engine::error::{Context, Error, Result};
use crate::sys::process::prctl;
use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};
use oci_spec::runtime::User;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::os::fd::{AsFd, BorrowedFd};

/// A passwd file is the image's; no more of it is read.
const LONGEST_PASSWD: u64 = 1 << 20;

/// Becomes the user, keeping capabilities for the moment.
pub fn become_user(user: &User) -> Result<()> {
    prctl(libc::PR_SET_KEEPCAPS, 1).doing(|| "keep capabilities")?;
    let groups: Vec<Gid> = user.additional_gids().iter().flatten().map(|gid| Gid::from_raw(*gid)).collect();
    let may_set_groups =
        std::fs::read_to_string("/proc/self/setgroups").is_ok_and(|text| text.trim() != "deny");
    if may_set_groups {
        setgroups(&groups).doing(|| "set process.user.additionalGids")?;
    } else if !groups.is_empty() {
        return Err(Error::invalid("process.user.additionalGids", "the user namespace denies setgroups"));
    }
    let (uid, gid) = (Uid::from_raw(user.uid()), Gid::from_raw(user.gid()));
    setresgid(gid, gid, gid).doing(|| format!("become process.user.gid {gid}"))?;
    setresuid(uid, uid, uid).doing(|| format!("become process.user.uid {uid}"))?;
    prctl(libc::PR_SET_KEEPCAPS, 0).doing(|| "let go of capabilities").map(drop)
}

/// Gives stdin, stdout and stderr to the user, so that it can open `/dev/stdout` anew.
pub fn own_stdio(user: &User) -> Result<()> {
    for stream in [std::io::stdin().as_fd(), std::io::stdout().as_fd(), std::io::stderr().as_fd()] {
        give_stream(stream, user.uid())?;
    }
    Ok(())
}

/// Gives a stream of stdio to a user.
pub fn give_stream(stream: BorrowedFd<'_>, uid: u32) -> Result<()> {
    let stat = nix::sys::stat::fstat(stream).doing(|| "look at stdio")?;
    let device = crate::engine::rootfs::tree::kind(&stat) == nix::sys::stat::SFlag::S_IFCHR
        && nix::sys::stat::major(stat.st_rdev) == 1;
    if device || stat.st_uid == uid {
        return Ok(());
    }
    match nix::unistd::fchown(stream, Some(Uid::from_raw(uid)), None) {
        // An owner that the user namespace does not map.
        Err(nix::Error::EINVAL | nix::Error::EPERM) => Ok(()),
        other => other.doing(|| "give stdio to the user"),
    }
}

/// The home directory that the container's passwd file names for the user, "/" where it does not.
pub fn home(uid: u32) -> String {
    let found = File::open("/etc/passwd")
        .ok()
        .and_then(|file| find_home(BufReader::new(file.take(LONGEST_PASSWD)), uid));
    found.unwrap_or_else(|| "/".to_owned())
}

fn find_home(passwd: impl BufRead, uid: u32) -> Option<String> {
    for line in passwd.split(b'\n') {
        let line = line.ok()?;
        let mut fields = line.split(|byte| *byte == b':');
        let (Some(number), Some(home)) = (fields.nth(2), fields.nth(2)) else { continue };
        let number = std::str::from_utf8(number).ok().and_then(|text| text.parse::<u32>().ok());
        if number == Some(uid) && !home.is_empty() {
            return String::from_utf8(home.to_vec()).ok();
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn home_is_found_by_number() {
        let passwd = b"root:x:0:0:root:/root:/bin/sh\nbroken\nweb:x:33:33::/var/www:/x\n" as &[u8];
        assert_eq!(find_home(passwd, 33).as_deref(), Some("/var/www"));
        assert_eq!(find_home(passwd, 0).as_deref(), Some("/root"));
        assert_eq!(find_home(passwd, 7), None);
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..300), uid: u32) {
            let _ = find_home(&bytes[..], uid);
        }
    }
}
