//! The shim's view of the device: which host ports lead where.
//!
//! Any thread may use a [`Streams`]. Lock order: the device's lock, then the one in here, which is never held while
//! the observer runs or a descriptor is closed.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex};

use nix::sys::eventfd::{EfdFlags, EventFd};

use super::ends::StreamEnds;
use super::slots::MAX_SLOTS;
use crate::sync::lock;

/// What the device tells about its streams, from its worker thread and with its lock held: the observer must not wait,
/// nor call a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StreamEvent {
    /// The guest has dialled an expected port.
    Dialled {
        /// The host port.
        port: u32,
    },
    /// A stream that was dialled is over and its descriptors are closed. All that the guest has sent was written
    /// before, unless the sink failed, or the stream was forgotten or lost in a reset of the device.
    Closed {
        /// The host port.
        port: u32,
    },
}

/// Why a port cannot be expected.
#[derive(Debug, thiserror::Error)]
pub enum ExpectError {
    /// It is expected already.
    #[error("host port {0} is already expected")]
    Taken(u32),
    /// As many ports are expected as there can be connections.
    #[error("no more than {MAX_SLOTS} host ports can be expected at a time")]
    TooMany,
}

type Observer = Box<dyn Fn(StreamEvent) + Send + Sync>;

/// A handle on the streams of one device. Clones are the same.
#[derive(Clone)]
pub struct Streams(Arc<Shared>);

struct Shared {
    ports: Mutex<Ports>,
    wake: EventFd,
    observer: Observer,
}

#[derive(Default)]
struct Ports {
    expected: HashMap<u32, StreamEnds>,
    forgotten: Vec<u32>,
}

impl Streams {
    /// No port is expected yet. `observer` is called for each [`StreamEvent`].
    ///
    /// # Errors
    /// When the process has no descriptors left.
    pub fn new(observer: impl Fn(StreamEvent) + Send + Sync + 'static) -> io::Result<Self> {
        let wake = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        Ok(Self(Arc::new(Shared { ports: Mutex::default(), wake, observer: Box::new(observer) })))
    }

    /// Connects the guest's next connection to `port` to `ends`. It may be called at any time, before the guest runs
    /// too.
    ///
    /// # Errors
    /// See [`ExpectError`]; `ends` are closed then.
    pub fn expect(&self, port: u32, ends: StreamEnds) -> Result<(), ExpectError> {
        let mut ports = lock(&self.0.ports);
        if ports.expected.len() >= MAX_SLOTS {
            return Err(ExpectError::TooMany);
        }
        match ports.expected.entry(port) {
            Entry::Occupied(_) => Err(ExpectError::Taken(port)),
            Entry::Vacant(place) => {
                place.insert(ends);
                Ok(())
            }
        }
    }

    /// Takes [`Streams::expect`] back. Where the guest has dialled already, the connection is reset soon after, which
    /// [`StreamEvent::Closed`] reports.
    pub fn forget(&self, port: u32) {
        let waiting = {
            let mut ports = lock(&self.0.ports);
            let waiting = ports.expected.remove(&port);
            if waiting.is_none() && !ports.forgotten.contains(&port) {
                ports.forgotten.push(port);
            }
            waiting
        };
        if waiting.is_none() {
            self.wake();
        }
    }

    /// Makes the device's worker run.
    pub(super) fn wake(&self) {
        // Fails only when the counter is at its end, and then the worker is awake.
        let _ = self.0.wake.write(1);
    }

    /// The worker runs.
    pub(super) fn awake(&self) {
        // Fails only when nobody has called `wake` since.
        let _ = self.0.wake.read();
    }

    /// What [`Streams::wake`] makes readable.
    pub(super) fn wake_fd(&self) -> BorrowedFd<'_> {
        self.0.wake.as_fd()
    }

    /// The ends that wait for `port`.
    pub(super) fn take(&self, port: u32) -> Option<StreamEnds> {
        lock(&self.0.ports).expected.remove(&port)
    }

    /// The ports that were forgotten since the last call.
    pub(super) fn take_forgotten(&self) -> Vec<u32> {
        std::mem::take(&mut lock(&self.0.ports).forgotten)
    }

    pub(super) fn notify(&self, event: StreamEvent) {
        (self.0.observer)(event);
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixStream;

    use super::*;

    fn ends() -> StreamEnds {
        StreamEnds::Socket(OwnedFd::from(UnixStream::pair().unwrap().0))
    }

    #[test]
    fn a_port_is_taken_once() {
        let streams = Streams::new(|_| ()).unwrap();
        streams.expect(7, ends()).unwrap();
        assert!(matches!(streams.expect(7, ends()), Err(ExpectError::Taken(7))));
        assert!(streams.take(7).is_some());
        assert!(streams.take(7).is_none());
        streams.expect(7, ends()).unwrap();
    }

    #[test]
    fn a_port_is_forgotten_where_it_is() {
        let streams = Streams::new(|_| ()).unwrap();
        streams.expect(7, ends()).unwrap();
        streams.forget(7);
        assert!(streams.take(7).is_none());
        assert!(streams.take_forgotten().is_empty());
        streams.forget(8);
        streams.forget(8);
        assert_eq!(streams.take_forgotten(), [8]);
        assert!(streams.take_forgotten().is_empty());
    }

    #[test]
    fn expectations_are_bounded() {
        let streams = Streams::new(|_| ()).unwrap();
        let (end, _peer) = UnixStream::pair().unwrap();
        for port in 0..u32::try_from(MAX_SLOTS).unwrap() {
            let copy = OwnedFd::from(end.try_clone().unwrap());
            streams.expect(port, StreamEnds::Socket(copy)).unwrap();
        }
        assert!(matches!(streams.expect(5000, ends()), Err(ExpectError::TooMany)));
    }
}
