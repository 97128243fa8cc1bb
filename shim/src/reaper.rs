//! Collecting the exit statuses of children: the VMM's, loggers', and whatever orphans the shim has adopted.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use tokio::sync::oneshot;

/// Who waits for which child.
#[derive(Debug, Clone, Default)]
pub struct Reaper(Arc<Mutex<HashMap<i32, oneshot::Sender<WaitStatus>>>>);

impl Reaper {
    /// Asks for the exit status of a child. To be called before the event loop runs again after the child was started.
    pub fn watch(&self, pid: u32) -> oneshot::Receiver<WaitStatus> {
        let (sender, receiver) = oneshot::channel();
        if let Ok(pid) = i32::try_from(pid) {
            self.table().insert(pid, sender);
        }
        receiver
    }

    /// Collects every child that has exited. To be called on SIGCHLD.
    pub fn reap(&self) {
        loop {
            match waitpid(None::<Pid>, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::StillAlive) => return,
                Ok(status) => {
                    let sender = status.pid().and_then(|pid| self.table().remove(&pid.as_raw()));
                    if let Some(sender) = sender {
                        let _ = sender.send(status);
                    }
                }
                Err(Errno::EINTR) => {}
                Err(_) => return,
            }
        }
    }

    fn table(&self) -> MutexGuard<'_, HashMap<i32, oneshot::Sender<WaitStatus>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
