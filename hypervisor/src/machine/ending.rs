//! The end of a machine: said once, by whichever thread knows first.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use nix::sys::eventfd::{EfdFlags, EventFd};
use vmshim_protocol::control::Outcome;

use crate::sync::lock;

/// Where any thread says that the machine is over. The `io` thread waits for its descriptor, tells the shim and exits.
#[derive(Debug, Clone)]
pub struct Ending(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    outcome: Mutex<Option<Outcome>>,
    declared: AtomicBool,
    event: EventFd,
}

impl Ending {
    /// A machine that is not over.
    ///
    /// # Errors
    /// When the process has no descriptors left.
    pub fn new() -> io::Result<Self> {
        let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        Ok(Self(Arc::new(Inner { outcome: Mutex::new(None), declared: AtomicBool::new(false), event })))
    }

    /// The machine is over. What was declared first stands.
    pub fn declare(&self, outcome: Outcome) {
        let mut slot = lock(&self.0.outcome);
        if slot.is_none() {
            *slot = Some(outcome);
            self.0.declared.store(true, Ordering::Release);
            // The counter is written once, so it cannot be full.
            let _ = self.0.event.write(1);
        }
    }

    /// Whether the machine is over.
    pub fn is_declared(&self) -> bool {
        self.0.declared.load(Ordering::Acquire)
    }

    /// What was declared.
    pub fn outcome(&self) -> Option<Outcome> {
        lock(&self.0.outcome).clone()
    }
}

impl AsFd for Ending {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.event.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_outcome_stands() {
        let ending = Ending::new().unwrap();
        assert_eq!(ending.outcome(), None);
        ending.clone().declare(Outcome::TripleFault);
        ending.declare(Outcome::PoweredOff);
        assert_eq!(ending.outcome(), Some(Outcome::TripleFault));
        assert_eq!(ending.0.event.read().unwrap(), 1);
    }
}
