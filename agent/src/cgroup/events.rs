//! Waiting for what a cgroup says about itself, by the kernel's notifications.

use super::Cgroup;
use crate::sys::check;
use crate::sys::register;
use nix::fcntl::OFlag;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// The number after a key in a file of lines "key number".
pub fn value(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|line| {
        let (name, value) = line.split_once(' ')?;
        (name == key).then(|| value.trim().parse().ok())?
    })
}

/// A file of "key number" lines that the kernel says has changed.
pub struct Watch {
    file: AsyncFd<OwnedFd>,
}

impl Watch {
    /// Watches `memory.events`, `cgroup.events` and the like.
    pub fn new(cgroup: &Cgroup, name: &str) -> io::Result<Self> {
        let file = cgroup.file(name, OFlag::O_RDONLY)?;
        Ok(Self { file: register(file, Interest::PRIORITY)? })
    }

    /// The file's content now. A notification tells of changes since the last reading.
    pub fn read(&self) -> io::Result<String> {
        read_again(self.file.get_ref())
    }

    /// Waits until it has changed.
    pub async fn changed(&self) -> io::Result<()> {
        let mut ready = self.file.ready(Interest::PRIORITY).await?;
        ready.clear_ready();
        Ok(())
    }

    /// Waits until a key has a value.
    pub async fn until(&self, key: &str, wanted: u64) -> io::Result<()> {
        loop {
            if value(&self.read()?, key) == Some(wanted) {
                return Ok(());
            }
            self.changed().await?;
        }
    }
}

/// The same without an event loop, for threads that may block. False when the time is over.
pub fn wait_for(cgroup: &Cgroup, name: &str, key: &str, wanted: u64, most: Duration) -> io::Result<bool> {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    let file = cgroup.file(name, OFlag::O_RDONLY)?;
    let end = Instant::now() + most;
    loop {
        if value(&read_again(&file)?, key) == Some(wanted) {
            return Ok(true);
        }
        let left = end.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        if poll(&mut [PollFd::new(file.as_fd(), PollFlags::POLLPRI)], timeout)? == 0 {
            return Ok(false);
        }
    }
}

fn read_again(file: &OwnedFd) -> io::Result<String> {
    let mut bytes = [0u8; 1024];
    // SAFETY: the buffer is valid for its length.
    let length =
        check(unsafe { libc::pread(file.as_raw_fd(), bytes.as_mut_ptr().cast(), bytes.len(), 0) }
            as libc::c_long)?;
    let length = usize::try_from(length).unwrap_or(0);
    Ok(String::from_utf8_lossy(bytes.get(..length).unwrap_or_default()).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn values_are_found_by_whole_key() {
        let text = "low 0\nhigh 1\nmax 2\noom 3\noom_kill 4\noom_group_kill 5\n";
        assert_eq!(value(text, "oom"), Some(3));
        assert_eq!(value(text, "oom_kill"), Some(4));
        assert_eq!(value(text, "kill"), None);
    }

    proptest! {
        #[test]
        fn any_text_is_survived(text in ".{0,200}", key in "[a-z_]{0,10}") {
            let _ = value(&text, &key);
        }
    }
}
