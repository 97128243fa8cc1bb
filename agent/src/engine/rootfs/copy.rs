//! Copies what a mount point holds into the tmpfs that is about to cover it (the mount option `tmpcopyup`).

use nix::dir::Dir;
use nix::fcntl::{AtFlags, OFlag, openat, readlinkat};
use nix::sys::stat::{FchmodatFlags, Mode, SFlag, fchmodat, fstatat, mkdirat, mknodat};
use nix::unistd::{Gid, Uid, fchownat, symlinkat};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Copies everything below one directory into another.
pub fn tree(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> io::Result<()> {
    let mut pending: Vec<(OwnedFd, OwnedFd)> = vec![(directory(from, c".")?, directory(to, c".")?)];
    while let Some((from, to)) = pending.pop() {
        let mut listing = Dir::openat(&from, c".", OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())?;
        for entry in listing.iter() {
            let entry = entry?;
            let name = entry.file_name();
            if name == c"." || name == c".." {
                continue;
            }
            if let Some(deeper) = one(from.as_fd(), to.as_fd(), name)? {
                pending.push(deeper);
            }
        }
    }
    Ok(())
}

fn directory(at: BorrowedFd<'_>, name: &std::ffi::CStr) -> io::Result<OwnedFd> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    Ok(openat(at, name, flags, Mode::empty())?)
}

/// Copies one entry; a directory is answered with its two sides, to be copied next.
fn one(
    from: BorrowedFd<'_>,
    to: BorrowedFd<'_>,
    name: &std::ffi::CStr,
) -> io::Result<Option<(OwnedFd, OwnedFd)>> {
    let stat = fstatat(from, name, AtFlags::AT_SYMLINK_NOFOLLOW)?;
    let mode = Mode::from_bits_truncate(stat.st_mode);
    let kind = super::tree::kind(&stat);
    let mut deeper = None;
    match kind {
        SFlag::S_IFDIR => {
            mkdirat(to, name, mode)?;
            deeper = Some((directory(from, name)?, directory(to, name)?));
        }
        SFlag::S_IFREG => {
            let source =
                openat(from, name, OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC, Mode::empty())?;
            let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_CLOEXEC;
            let goal = openat(to, name, flags, mode)?;
            io::copy(&mut File::from(source), &mut File::from(goal))?;
        }
        SFlag::S_IFLNK => symlinkat(readlinkat(from, name)?.as_os_str(), to, name)?,
        _ => mknodat(to, name, kind, mode, stat.st_rdev)?,
    }
    let (uid, gid) = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
    fchownat(to, name, Some(uid), Some(gid), AtFlags::AT_SYMLINK_NOFOLLOW)?;
    if kind != SFlag::S_IFLNK {
        fchmodat(to, name, mode, FchmodatFlags::FollowSymlink)?;
    }
    Ok(deeper)
}
