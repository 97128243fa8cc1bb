//! Collecting the exit statuses of children: the VMM's, loggers', and whatever orphans the shim has adopted.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::process::ExitStatus;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use tokio::sync::oneshot;

/// Exit statuses kept of children that nobody has asked for yet.
const MOST_UNCLAIMED: usize = 64;

/// While it lives, the status of a child that ends before it is watched is kept. Not for longer: its pid may come again.
#[derive(Debug)]
pub struct Expectation(Reaper);

impl Drop for Expectation {
    fn drop(&mut self) {
        let mut table = self.0.table();
        table.expected = table.expected.saturating_sub(1);
        if table.expected == 0 {
            table.unclaimed.clear();
        }
    }
}

/// Who waits for which child.
#[derive(Debug, Clone, Default)]
pub struct Reaper(Arc<Mutex<Table>>);

#[derive(Debug, Default)]
struct Table {
    watched: HashMap<i32, oneshot::Sender<WaitStatus>>,
    /// Of children that ended before they were asked for, the latest last.
    unclaimed: VecDeque<(i32, WaitStatus)>,
    /// How many children may be started on other threads at the moment.
    expected: usize,
}

impl Reaper {
    /// To be called before a child is started on another thread than the event loop's.
    pub fn expect(&self) -> Expectation {
        self.table().expected += 1;
        Expectation(self.clone())
    }

    /// Asks for the exit status of a child. To be called before the event loop runs again after the child was started,
    /// or while it is expected.
    pub fn watch(&self, pid: u32) -> oneshot::Receiver<WaitStatus> {
        let (sender, receiver) = oneshot::channel();
        let Ok(pid) = i32::try_from(pid) else { return receiver };
        let mut table = self.table();
        match table.unclaimed.iter().position(|(ended, _)| *ended == pid) {
            Some(index) => {
                let status = table.unclaimed.remove(index).map(|(_, status)| status);
                status.map(|status| sender.send(status));
            }
            None => drop(table.watched.insert(pid, sender)),
        }
        receiver
    }

    /// Waits for the exit status of a child, on a thread that may wait.
    ///
    /// # Errors
    /// When it is lost.
    pub fn wait(&self, pid: u32) -> io::Result<ExitStatus> {
        use std::os::unix::process::ExitStatusExt;
        let lost = || io::Error::other("its exit status is lost");
        match self.watch(pid).blocking_recv() {
            Ok(WaitStatus::Exited(_, code)) => Ok(ExitStatus::from_raw((code & 0xff) << 8)),
            Ok(WaitStatus::Signaled(_, signal, _)) => Ok(ExitStatus::from_raw(signal as i32)),
            _ => Err(lost()),
        }
    }

    /// Collects every child that has exited. To be called on SIGCHLD.
    pub fn reap(&self) {
        loop {
            match waitpid(None::<Pid>, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::StillAlive) => return,
                Ok(status) => self.ended(status),
                Err(Errno::EINTR) => {}
                Err(_) => return,
            }
        }
    }

    fn ended(&self, status: WaitStatus) {
        let Some(pid) = status.pid().map(Pid::as_raw) else { return };
        let mut table = self.table();
        match table.watched.remove(&pid) {
            Some(sender) => drop(sender.send(status)),
            None if table.expected == 0 => {}
            None => {
                if table.unclaimed.len() == MOST_UNCLAIMED {
                    table.unclaimed.pop_front();
                }
                table.unclaimed.push_back((pid, status));
            }
        }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_that_ended_before_it_is_asked_for_is_not_lost() {
        let reaper = Reaper::default();
        let pid = |pid| Pid::from_raw(pid);
        reaper.ended(WaitStatus::Exited(pid(7), 1));
        let expectation = reaper.expect();
        reaper.ended(WaitStatus::Exited(pid(7), 3));
        let other = reaper.clone();
        let waiting = std::thread::spawn(move || other.wait(8));
        assert_eq!(reaper.wait(7).unwrap().code(), Some(3));
        while !reaper.table().watched.contains_key(&8) {
            std::thread::yield_now();
        }
        reaper.ended(WaitStatus::Signaled(pid(8), nix::sys::signal::Signal::SIGKILL, false));
        assert_eq!(waiting.join().unwrap().unwrap().code(), None);
        reaper.ended(WaitStatus::Exited(pid(9), 3));
        drop(expectation);
        assert!(reaper.table().unclaimed.is_empty());
    }

    #[test]
    fn orphans_are_remembered_within_bounds() {
        let reaper = Reaper::default();
        let _expectation = reaper.expect();
        (1..1000).for_each(|pid| reaper.ended(WaitStatus::Exited(Pid::from_raw(pid), 0)));
        assert_eq!(reaper.table().unclaimed.len(), MOST_UNCLAIMED);
    }
}
