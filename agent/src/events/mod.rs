//! What has happened in the guest, kept until the shim has been told.
//!
//! Every process has at most one exit in the queue, every container at most one unsaid out-of-memory, every open
//! connection one dial and every server its beginning and its end, so the queue is bounded by what exists. An event leaves the queue only when it has been written to a stream; a newer stream takes
//! over from an older one.

use crate::host_network::Place;
use std::collections::VecDeque;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};
use tokio::sync::Notify;
use vmshim_protocol::agent::event;
use vmshim_protocol::agent::{
    Event, HostDialled, HostListen, HostUnlisten, OutOfMemory, ProcessExited, SocketDialled,
};

/// The queue.
#[derive(Default)]
pub struct Events {
    state: Mutex<State>,
    changed: Notify,
}

#[derive(Default)]
struct State {
    queue: VecDeque<Event>,
    listener: u64,
}

impl Events {
    /// A process has died.
    pub fn exited(&self, container_id: &str, exec_id: &str, status: u32) {
        let exited = ProcessExited {
            container_id: container_id.to_owned(),
            exec_id: exec_id.to_owned(),
            status,
            exited_at: now(),
            ..Default::default()
        };
        self.push(event::Event::Exited(exited));
    }

    /// The kernel has killed a process of a container for want of memory. Said once until it is heard.
    pub fn out_of_memory(&self, container_id: &str) {
        let unsaid = self.lock().queue.iter().any(|event| {
            matches!(&event.event, Some(event::Event::OutOfMemory(oom)) if oom.container_id == container_id)
        });
        if !unsaid {
            let oom = OutOfMemory { container_id: container_id.to_owned(), ..Default::default() };
            self.push(event::Event::OutOfMemory(oom));
        }
    }

    /// Somebody in a container has connected to one of its sockets.
    pub fn socket_dialled(&self, container_id: &str, number: u32, connection: u64) {
        let dialled =
            SocketDialled { container_id: container_id.to_owned(), number, connection, ..Default::default() };
        self.push(event::Event::SocketDialled(dialled));
    }

    /// Somebody in a container has connected, or sent a datagram, to what may be on the host.
    pub fn host_dialled(&self, connection: u64, to: SocketAddr, datagrams: bool) {
        let to = Some(to.into()).into();
        let dialled = HostDialled { connection, to, datagrams, ..Default::default() };
        self.push(event::Event::HostDialled(dialled));
    }

    /// Somebody in a container is about to listen.
    pub fn host_listen(&self, id: u64, place: Place) {
        let at = Some(place.at.into()).into();
        let listen = HostListen { id, at, ipv6_only: place.ipv6_only, ..Default::default() };
        self.push(event::Event::HostListen(listen));
    }

    /// Nobody listens there any more.
    pub fn host_unlisten(&self, place: Place) {
        let at = Some(place.at.into()).into();
        let unlisten = HostUnlisten { at, ipv6_only: place.ipv6_only, ..Default::default() };
        self.push(event::Event::HostUnlisten(unlisten));
    }

    /// How many events wait to be heard.
    #[cfg(test)]
    pub fn waiting(&self) -> usize {
        self.lock().queue.len()
    }

    /// Hands each event to `send`, oldest first, until that fails or another listener comes.
    pub async fn listen<F, R>(&self, mut send: F)
    where
        F: FnMut(Event) -> R,
        R: Future<Output = bool>,
    {
        let own = {
            let mut state = self.lock();
            state.listener += 1;
            state.listener
        };
        self.changed.notify_waiters();
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            // From here on no notification is missed.
            changed.as_mut().enable();
            let next = {
                let state = self.lock();
                if state.listener != own {
                    return;
                }
                state.queue.front().cloned()
            };
            let Some(event) = next else {
                changed.await;
                continue;
            };
            if !send(event.clone()).await {
                return;
            }
            let mut state = self.lock();
            if state.queue.front() == Some(&event) {
                state.queue.pop_front();
            }
        }
    }

    fn push(&self, event: event::Event) {
        self.lock().queue.push_back(Event { event: Some(event), ..Default::default() });
        self.changed.notify_waiters();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing that holds the lock can panic half-way.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn now() -> u64 {
    let elapsed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(elapsed.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    async fn take(events: &Events, count: usize) -> Vec<String> {
        let heard = Mutex::new(Vec::new());
        events
            .listen(|event| {
                let mut heard = heard.lock().unwrap();
                let enough = heard.len() == count;
                if !enough {
                    heard.push(match event.event.unwrap() {
                        event::Event::Exited(exited) => {
                            format!("exit {} {}", exited.container_id, exited.status)
                        }
                        event::Event::OutOfMemory(oom) => format!("oom {}", oom.container_id),
                        _ => unreachable!(),
                    });
                }
                std::future::ready(!enough)
            })
            .await;
        heard.into_inner().unwrap()
    }

    #[tokio::test]
    async fn events_wait_for_a_listener_and_survive_a_broken_one() {
        let events = Events::default();
        events.out_of_memory("a");
        events.out_of_memory("a");
        events.exited("a", "", 137);
        events.exited("b", "", 0);
        assert_eq!(take(&events, 2).await, ["oom a", "exit a 137"]);
        events.exited("c", "", 1);
        assert_eq!(take(&events, 1).await, ["exit b 0"]);
    }

    #[tokio::test]
    async fn a_newer_listener_takes_over() {
        let events = Arc::new(Events::default());
        let old = tokio::spawn({
            let events = events.clone();
            async move { events.listen(|_| std::future::ready(true)).await }
        });
        tokio::task::yield_now().await;
        let new = tokio::spawn({
            let events = events.clone();
            async move { events.listen(|_| std::future::ready(false)).await }
        });
        old.await.unwrap();
        events.exited("a", "", 0);
        new.await.unwrap();
    }
}
