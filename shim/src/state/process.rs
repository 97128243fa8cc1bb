//! Naming a process so that a recycled pid is not mistaken for it.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout};
use serde::{Deserialize, Serialize};

/// A pid with the process's start time in clock ticks since boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    /// The pid.
    pub pid: u32,
    /// Field 22 of `/proc/<pid>/stat`.
    start_time: u64,
}

impl ProcessId {
    /// The calling process.
    ///
    /// # Errors
    /// When `/proc` cannot be read.
    pub fn of_self() -> io::Result<Self> {
        Self::of(std::process::id())
    }

    /// The process that has the pid now.
    ///
    /// # Errors
    /// When there is none.
    pub fn of(pid: u32) -> io::Result<Self> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
        let start_time = start_time(&stat).ok_or(io::ErrorKind::InvalidData)?;
        Ok(Self { pid, start_time })
    }

    /// A descriptor of the process; none when it is gone.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn open(&self) -> io::Result<Option<OwnedFd>> {
        let Some(descriptor) = pidfd_open(self.pid)? else { return Ok(None) };
        // The pid may have been recycled before the descriptor was taken, never after.
        Ok(Self::of(self.pid).is_ok_and(|now| now == *self).then_some(descriptor))
    }
}

fn pidfd_open(pid: u32) -> io::Result<Option<OwnedFd>> {
    // SAFETY: pidfd_open takes two integers and returns a descriptor or -1.
    let raw = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    match Errno::result(raw) {
        Ok(raw) => {
            let raw = i32::try_from(raw).map_err(io::Error::other)?;
            // SAFETY: the kernel has just made this descriptor for us.
            Ok(Some(unsafe { OwnedFd::from_raw_fd(raw) }))
        }
        Err(Errno::ESRCH | Errno::EINVAL) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

/// Sends a signal through a pidfd; a process that is gone already is fine.
///
/// # Errors
/// When the kernel refuses.
pub fn signal(process: &impl AsFd, signal: i32) -> io::Result<()> {
    let info = std::ptr::null::<libc::siginfo_t>();
    // SAFETY: the descriptor is valid for the call, and a null siginfo means kill(2)'s.
    let result =
        unsafe { libc::syscall(libc::SYS_pidfd_send_signal, process.as_fd().as_raw_fd(), signal, info, 0) };
    match Errno::result(result) {
        Ok(_) | Err(Errno::ESRCH) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

/// Waits until the process is gone; false when it is not within `limit`.
///
/// # Errors
/// When the kernel refuses.
pub fn wait_gone(process: &impl AsFd, limit: Duration) -> io::Result<bool> {
    let timeout = PollTimeout::try_from(limit).unwrap_or(PollTimeout::MAX);
    let mut descriptors = [PollFd::new(process.as_fd(), PollFlags::POLLIN)];
    loop {
        match nix::poll::poll(&mut descriptors, timeout) {
            Ok(ready) => return Ok(ready > 0),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Field 22, counted from behind the command's name, which may hold anything.
fn start_time(stat: &str) -> Option<u64> {
    let (_, fields) = stat.rsplit_once(')')?;
    fields.split_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_commands_name_does_not_confuse() {
        let stat = "7 (a) b (c)) S 1 7 7 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 4242 99";
        assert_eq!(start_time(stat), Some(4242));
        assert_eq!(start_time("7 (x"), None);
    }

    #[test]
    fn own_process_is_found_and_another_start_time_is_not() {
        let own = ProcessId::of_self().unwrap();
        assert!(own.open().unwrap().is_some());
        let recycled = ProcessId { start_time: own.start_time + 1, ..own };
        assert!(recycled.open().unwrap().is_none());
    }

    #[test]
    fn a_child_is_killed_and_waited_for() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let process = ProcessId::of(child.id()).unwrap().open().unwrap().unwrap();
        assert!(!wait_gone(&process, Duration::ZERO).unwrap());
        signal(&process, libc::SIGKILL).unwrap();
        assert!(wait_gone(&process, Duration::from_secs(5)).unwrap());
        child.wait().unwrap();
        signal(&process, libc::SIGKILL).unwrap();
    }

    proptest! {
        #[test]
        fn any_stat_is_parsed_or_refused(stat in ".{0,200}") {
            let _ = start_time(&stat);
        }
    }
}
