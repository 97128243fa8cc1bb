//! The vsock ports of a VM, each used once, and word of their streams' end.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;
use vmshim_protocol::vsock::FIRST_STREAM_PORT;

use super::ControlError;

/// A host port that the guest dials.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Port(pub u32);

/// Comes true when a stream is over and all it carried has been written.
#[derive(Debug, Clone)]
pub struct Closed(watch::Receiver<()>);

impl Closed {
    /// What completes when the sender is dropped.
    pub fn pair() -> (watch::Sender<()>, Self) {
        let (sender, receiver) = watch::channel(());
        (sender, Self(receiver))
    }

    /// Whether it is.
    pub fn is_over(&self) -> bool {
        self.0.has_changed().is_err()
    }

    /// Waits for it.
    pub async fn wait(&mut self) {
        // The sender sends nothing; that it is dropped is the message.
        while self.0.changed().await.is_ok() {}
    }
}

/// Ports handed out and streams not closed yet.
#[derive(Debug)]
pub struct Streams(Mutex<Table>);

#[derive(Debug)]
struct Table {
    next: Option<u32>,
    open: HashMap<Port, watch::Sender<()>>,
}

impl Default for Streams {
    fn default() -> Self {
        Self(Mutex::new(Table { next: Some(FIRST_STREAM_PORT), open: HashMap::new() }))
    }
}

impl Streams {
    /// Hands out a port.
    ///
    /// # Errors
    /// When the last one has been handed out, or the VM has ended.
    pub fn open(&self) -> Result<(Port, Closed), ControlError> {
        let mut table = self.table();
        let number = table.next.ok_or(ControlError::OutOfPorts)?;
        // u32::MAX is VMADDR_PORT_ANY.
        table.next = number.checked_add(1).filter(|next| *next != u32::MAX);
        let (sender, closed) = Closed::pair();
        let port = Port(number);
        table.open.insert(port, sender);
        Ok((port, closed))
    }

    /// The stream of a port is over. Ports that were never handed out are not worth a word.
    pub fn close(&self, port: Port) {
        self.table().open.remove(&port);
    }

    /// All streams are over.
    pub fn close_all(&self) {
        self.table().open.clear();
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn ports_are_fresh_and_their_end_is_told() {
        let streams = Streams::default();
        let (first, mut first_closed) = streams.open().unwrap();
        let (second, mut second_closed) = streams.open().unwrap();
        assert_eq!((first.0, second.0), (FIRST_STREAM_PORT, FIRST_STREAM_PORT + 1));
        streams.close(first);
        first_closed.wait().await;
        streams.close(Port(7));
        streams.close_all();
        second_closed.wait().await;
        assert_ne!(streams.open().unwrap().0, first);
    }

    #[test]
    fn ports_run_out_rather_than_repeat() {
        let streams = Streams::default();
        streams.table().next = Some(u32::MAX - 1);
        assert_eq!(streams.open().unwrap().0, Port(u32::MAX - 1));
        assert!(matches!(streams.open(), Err(ControlError::OutOfPorts)));
    }
}
