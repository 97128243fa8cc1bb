//! The process's terminal, made in the container's own devpts so that its name means something there.

use crate::engine::error::{Context, Error, Result};
use crate::engine::rootfs::mounts::open_location;
use crate::engine::rootfs::tree::Tree;
use crate::engine::wire::Size;
use crate::sys::{check, check_fd, mountfd};
use nix::fcntl::{OFlag, open};
use nix::sys::stat::{Mode, SFlag, fstat, major, minor};
use nix::sys::statfs::{DEVPTS_SUPER_MAGIC, fstatfs};
use oci_spec::runtime::Process;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

/// A pseudoterminal.
pub struct Terminal {
    /// The side that the agent copies.
    pub master: OwnedFd,
    slave: OwnedFd,
}

impl Terminal {
    /// Opens one in this process's root. A size of nothing is the process object's, where it has one.
    pub fn open(size: Size, process: &Process) -> Result<Self> {
        let doing = || "open a terminal in the container's /dev/pts";
        let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
        let master = open("/dev/pts/ptmx", flags, Mode::empty()).doing(doing)?;
        check_multiplexer(master.as_fd())?;
        let unlocked: libc::c_int = 0;
        // SAFETY: the request takes a pointer to an integer.
        check(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSPTLCK, &raw const unlocked) }.into())
            .doing(doing)?;
        // SAFETY: the request takes open flags as its argument and gives a new descriptor.
        let slave = check_fd(
            unsafe {
                libc::ioctl(
                    master.as_raw_fd(),
                    libc::TIOCGPTPEER,
                    libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC,
                )
            }
            .into(),
        )
        .doing(doing)?;
        resize(master.as_fd(), given_or_own(size, process)).doing(|| "set the terminal's size")?;
        Ok(Self { master, slave })
    }

    /// Puts the terminal at `/dev/console`, as containers expect.
    pub fn bind_console(&self) -> Result<()> {
        let doing = || "bind the terminal to /dev/console";
        let tree = Tree::new(open_location(Path::new("/")).doing(doing)?);
        let console = tree.file(Path::new("/dev/console")).doing(doing)?;
        let detached = mountfd::clone_tree(self.slave.as_fd(), Path::new(""), false).doing(doing)?;
        mountfd::attach(detached.as_fd(), console.as_fd()).doing(doing)
    }

    /// Gives the terminal to the process's user.
    pub fn give_to(&self, uid: u32) -> Result<()> {
        let uid = nix::unistd::Uid::from_raw(uid);
        match nix::unistd::fchown(&self.slave, Some(uid), None) {
            Err(nix::Error::EINVAL | nix::Error::EPERM) => Ok(()),
            other => other.doing(|| "give the terminal to the user"),
        }
    }

    /// Makes it stdin, stdout, stderr and the session's terminal.
    pub fn take(self) -> Result<()> {
        let doing = || "take the terminal";
        // SAFETY: the request takes an integer.
        check(unsafe { libc::ioctl(self.slave.as_raw_fd(), libc::TIOCSCTTY, 0) }.into()).doing(doing)?;
        super::set_stdio([self.slave.as_fd(); 3])
    }
}

fn given_or_own(given: Size, process: &Process) -> Size {
    let own = process.console_size().filter(|_| given.width == 0 && given.height == 0);
    own.map_or(given, |own| Size {
        width: u16::try_from(own.width()).unwrap_or(u16::MAX),
        height: u16::try_from(own.height()).unwrap_or(u16::MAX),
    })
}

/// Sets a terminal's size.
pub fn resize(terminal: BorrowedFd<'_>, size: Size) -> std::io::Result<()> {
    let size = libc::winsize { ws_row: size.height, ws_col: size.width, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: the request takes a pointer to this structure.
    check(unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) }.into()).map(drop)
}

/// An image can put anything at /dev/pts.
fn check_multiplexer(master: BorrowedFd<'_>) -> Result<()> {
    let doing = || "look at the container's /dev/pts/ptmx";
    let stat = fstat(master).doing(doing)?;
    let file_system = fstatfs(master).doing(doing)?.filesystem_type();
    let genuine = crate::engine::rootfs::tree::kind(&stat) == SFlag::S_IFCHR
        && (major(stat.st_rdev), minor(stat.st_rdev)) == (5, 2)
        && file_system == DEVPTS_SUPER_MAGIC;
    if genuine {
        return Ok(());
    }
    Err(Error::invalid(
        "process.terminal",
        "the container's /dev/pts is no devpts; the spec must mount one there",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_process_objects_size_stands_in_for_none() {
        let json = r#"{"user":{"uid":0,"gid":0},"cwd":"/","consoleSize":{"width":132,"height":40}}"#;
        let process: Process = serde_json::from_str(json).unwrap();
        let nothing = Size { width: 0, height: 0 };
        assert_eq!(given_or_own(nothing, &process), Size { width: 132, height: 40 });
        assert_eq!(given_or_own(Size { width: 80, height: 24 }, &process), Size { width: 80, height: 24 });
    }
}
