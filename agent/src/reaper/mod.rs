//! Reaps every child: the agent is the first process of its pid namespace, so all orphans are its children.
//!
//! A process that the agent has made is a sibling of the engine that made it, and its id arrives in a message. It may
//! be dead before that is read; as long as such a message may come, the statuses of unknown children are kept.
//! There is one entry for each id, so what is kept is bounded by the number of ids.

use crate::sys::register;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::io::Interest;

/// The size of what a signal's descriptor is read in.
const SIGNAL: usize = size_of::<libc::signalfd_siginfo>();

/// Called once with the status of a process, when it is dead.
type OnExit = Box<dyn FnOnce(u32) + Send>;

/// Who waits for whom.
#[derive(Default)]
pub struct Reaper {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    waiting: HashMap<u32, OnExit>,
    /// Exits of children that nobody has claimed, while somebody may.
    unclaimed: HashMap<u32, u32>,
    expecting: usize,
}

/// While it exists, exits of unknown children are kept.
pub struct Expectation(Arc<Reaper>);

impl Reaper {
    /// A process is about to be made.
    pub fn expect(self: &Arc<Self>) -> Expectation {
        self.lock().expecting += 1;
        Expectation(self.clone())
    }

    /// Takes in all children that are dead by now.
    pub fn reap(&self) {
        while let Some((pid, status)) = next_dead_child() {
            let on_exit = {
                let mut state = self.lock();
                let on_exit = state.waiting.remove(&pid);
                if on_exit.is_none() && state.expecting > 0 {
                    state.unclaimed.insert(pid, status);
                }
                on_exit
            };
            if let Some(on_exit) = on_exit {
                on_exit(status);
            }
        }
    }

    /// Reaps whenever a child dies. SIGCHLD must be blocked in all threads.
    pub async fn run(&self) -> io::Result<()> {
        let mut mask = SigSet::empty();
        mask.add(Signal::SIGCHLD);
        let signals: OwnedFd =
            SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?.into();
        let signals = register(signals, Interest::READABLE)?;
        // Children may have died before the descriptor was there.
        self.reap();
        loop {
            signals
                // Which child it was is for waitpid to say: one signal may stand for several.
                .async_io(Interest::READABLE, |signals| Ok(nix::unistd::read(signals, &mut [0; SIGNAL])?))
                .await?;
            self.reap();
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing that holds the lock can panic half-way.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Expectation {
    /// The process has this id. `on_exit` is called when it dies, or now if it is dead already.
    pub fn claim(&self, pid: u32, on_exit: impl FnOnce(u32) + Send + 'static) {
        let dead = {
            let mut state = self.0.lock();
            match state.unclaimed.remove(&pid) {
                Some(status) => status,
                None => {
                    state.waiting.insert(pid, Box::new(on_exit));
                    return;
                }
            }
        };
        on_exit(dead);
    }
}

impl Drop for Expectation {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.expecting -= 1;
        if state.expecting == 0 {
            state.unclaimed = HashMap::new();
        }
    }
}

/// Blocks SIGCHLD in this thread and those it will make, so that it arrives by descriptor only.
pub fn block_signal() -> io::Result<()> {
    let mut mask = SigSet::empty();
    mask.add(Signal::SIGCHLD);
    Ok(mask.thread_block()?)
}

/// The id and the status, as a shell would say it, of a dead child.
fn next_dead_child() -> Option<(u32, u32)> {
    let mut status = 0;
    // SAFETY: `status` is a valid place for an integer.
    let pid = unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG) };
    let pid = u32::try_from(pid).ok().filter(|pid| *pid != 0)?;
    Some((pid, exit_status(status)))
}

fn exit_status(status: libc::c_int) -> u32 {
    let said =
        if libc::WIFSIGNALED(status) { 128 + libc::WTERMSIG(status) } else { libc::WEXITSTATUS(status) };
    said.cast_unsigned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};

    #[test]
    fn statuses_are_a_shells() {
        assert_eq!(exit_status(0), 0);
        assert_eq!(exit_status(42 << 8), 42);
        assert_eq!(exit_status(9), 137);
        assert_eq!(exit_status(11 | 0x80), 139);
    }

    #[test]
    fn an_early_death_is_kept_while_expected() {
        let reaper = Arc::new(Reaper::default());
        let expectation = reaper.expect();
        reaper.lock().unclaimed.insert(7, 3);
        let seen = Arc::new(AtomicU32::new(u32::MAX));
        let place = seen.clone();
        expectation.claim(7, move |status| place.store(status, Ordering::Relaxed));
        assert_eq!(seen.load(Ordering::Relaxed), 3);
        reaper.lock().unclaimed.insert(8, 3);
        drop(expectation);
        assert!(reaper.lock().unclaimed.is_empty());
    }
}
