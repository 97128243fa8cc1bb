//! Who may run: vCPUs pass while the gate is open, and are called back when it closes.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use super::kick::KickThread;
use crate::sync::lock;

/// Stops and starts all vCPUs of a machine.
#[derive(Default)]
pub struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    open: bool,
    /// vCPUs that wait here.
    waiting: usize,
    /// One for each vCPU that has not left for good.
    vcpus: Vec<KickThread>,
    /// vCPUs that have left.
    left: usize,
}

impl Gate {
    /// Adds a vCPU's thread, which may or may not wait already.
    pub(super) fn register(&self, thread: KickThread) {
        lock(&self.state).vcpus.push(thread);
    }

    /// Lets the vCPUs run.
    pub fn open(&self) {
        lock(&self.state).open = true;
        self.changed.notify_all();
    }

    /// Calls all vCPUs back, and returns when none runs. They need no lock that the caller may hold.
    pub fn close(&self) {
        let mut state = lock(&self.state);
        state.open = false;
        for vcpu in &state.vcpus {
            vcpu.kick();
        }
        while state.waiting + state.left < state.vcpus.len() {
            state = self.wait(state);
        }
    }

    /// Waits until the gate is open; true when it was not.
    pub(super) fn pass(&self) -> bool {
        let mut state = lock(&self.state);
        if state.open {
            return false;
        }
        state.waiting += 1;
        self.changed.notify_all();
        while !state.open {
            state = self.wait(state);
        }
        state.waiting -= 1;
        true
    }

    /// A vCPU will never run again.
    pub(super) fn leave(&self) {
        lock(&self.state).left += 1;
        self.changed.notify_all();
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed.wait(state).unwrap_or_else(PoisonError::into_inner)
    }
}
