//! Events that wait to be sent, from whatever thread they come.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex};

use nix::sys::eventfd::{EfdFlags, EventFd};
use vmshim_protocol::control::Event;

use crate::sync::lock;

/// A queue and the descriptor that is readable while something is in it. Clones are the same queue. It holds at most one
/// event for each stream that the shim has asked for.
#[derive(Debug, Clone)]
pub struct Outbox(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    events: Mutex<Vec<Event>>,
    filled: EventFd,
}

impl Outbox {
    /// An empty queue.
    ///
    /// # Errors
    /// When the process has no descriptors left.
    pub fn new() -> io::Result<Self> {
        let filled = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        Ok(Self(Arc::new(Inner { events: Mutex::default(), filled })))
    }

    /// Adds an event.
    pub fn put(&self, event: Event) {
        lock(&self.0.events).push(event);
        // Fails when the counter is full, and then the descriptor is readable.
        let _ = self.0.filled.write(1);
    }

    /// Takes all events, oldest first.
    pub fn take(&self) -> Vec<Event> {
        // Fails when nothing was put in since.
        let _ = self.0.filled.read();
        std::mem::take(&mut lock(&self.0.events))
    }
}

impl AsFd for Outbox {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.filled.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_keep_their_order() {
        let outbox = Outbox::new().unwrap();
        assert!(outbox.take().is_empty());
        outbox.put(Event::StreamClosed { port: 1 });
        outbox.clone().put(Event::StreamClosed { port: 2 });
        assert_eq!(outbox.take(), [Event::StreamClosed { port: 1 }, Event::StreamClosed { port: 2 }]);
        assert!(outbox.take().is_empty());
    }
}
