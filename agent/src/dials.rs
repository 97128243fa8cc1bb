//! Connections that only the host can complete: the shim is told of each, makes its end on the host, and names a port on
//! which the agent reaches it.
//!
//! How many there are at once is bounded by those who ask. Runs on the agent's one thread; the lock is held for a
//! look-up, never over an await.

use crate::link::{Dialer, Stream};
use std::collections::HashMap;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::time::timeout;

/// Longer than the host gives a server to accept a connection.
const LIMIT: Duration = Duration::from_secs(90);

/// The connections that wait for the host.
#[derive(Default)]
pub struct Dials(Mutex<Waiting>);

#[derive(Default)]
struct Waiting {
    last: u64,
    streams: HashMap<u64, oneshot::Sender<Stream>>,
}

impl Dials {
    /// Has the host make its end of a connection, of which it is told by `tell` with the number that the connection
    /// gets. None where it cannot, or does not answer.
    pub async fn request(&self, tell: impl FnOnce(u64)) -> Option<Stream> {
        let (sender, stream) = oneshot::channel();
        let number = {
            let mut waiting = self.lock();
            waiting.last += 1;
            let number = waiting.last;
            waiting.streams.insert(number, sender);
            number
        };
        tell(number);
        let answer = timeout(LIMIT, stream).await;
        self.lock().streams.remove(&number);
        answer.ok()?.ok()
    }

    /// Completes a connection by the host's port, or refuses it where that is 0. One that nobody waits for any more is
    /// nobody's loss.
    pub async fn answer(&self, number: u64, port: u32, dialer: &dyn Dialer) -> io::Result<()> {
        let waiting = self.lock().streams.remove(&number);
        let Some(waiting) = waiting.filter(|_| port != 0) else { return Ok(()) };
        let stream = dialer.dial(port).await?;
        // Dropped, and so closed, where nobody takes it.
        let _ = waiting.send(stream);
        Ok(())
    }

    /// How many wait.
    #[cfg(test)]
    pub fn waiting(&self) -> usize {
        self.lock().streams.len()
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        // Nothing that holds the lock can panic half-way.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::link::Nowhere;
    use std::sync::Arc;

    #[tokio::test]
    async fn what_the_host_refuses_or_cannot_be_reached_for_is_none() {
        let dials = Arc::new(Dials::default());
        for port in [0, 9] {
            let (told, number) = oneshot::channel();
            let asking = dials.clone();
            let asked = tokio::spawn(async move {
                asking.request(|number| told.send(number).unwrap_or_default()).await.is_none()
            });
            let answered = dials.answer(number.await.unwrap(), port, &Nowhere).await;
            assert_eq!(answered.is_ok(), port == 0);
            assert!(asked.await.unwrap());
        }
        assert!(dials.answer(77, 9, &Nowhere).await.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn a_host_that_does_not_answer_is_not_waited_for_for_ever() {
        let dials = Dials::default();
        assert!(dials.request(|_| {}).await.is_none());
        assert_eq!(dials.waiting(), 0);
    }
}
