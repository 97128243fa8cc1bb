//! Task events for containerd: one queue, one sender, first in first out.
//!
//! An event that cannot be delivered is tried again, before any that came later, until containerd is back or the
//! event is too old. containerd may be away for as long as an upgrade takes; a pod must not notice.

mod messages;

use std::time::{Duration, SystemTime};

use containerd_shim_protos::api::ForwardRequest;
use containerd_shim_protos::protobuf::MessageField;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim_async::EventsClient;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep, timeout};
use ttrpc::asynchronous::Client;
use ttrpc::context::with_duration;

pub use messages::TaskEvent;

/// Events that may wait for containerd. A pod makes a handful, so this is a bound on memory, not on patience.
const QUEUE: usize = 4096;

/// How long one delivery may take.
const DELIVERY_LIMIT: Duration = Duration::from_secs(5);

/// How long an event is worth delivering.
const PATIENCE: Duration = Duration::from_secs(600);

/// Pauses between two attempts: the first, and the longest.
const PAUSES: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(5));

enum Item {
    Event(Box<Envelope>),
    Flush(oneshot::Sender<()>),
}

/// Where the pod's events go in.
#[derive(Clone)]
pub struct Publisher {
    namespace: String,
    queue: mpsc::Sender<Item>,
}

impl Publisher {
    /// Begins to deliver events to containerd's ttrpc address; without one they are dropped.
    pub fn new(namespace: &str, address: Option<String>) -> Self {
        let (queue, items) = mpsc::channel(QUEUE);
        match address {
            Some(address) => {
                let address = if address.contains("://") { address } else { format!("unix://{address}") };
                tokio::spawn(deliver_all(address, items));
            }
            None => log::warn!("containerd gave no TTRPC_ADDRESS, so no events are published"),
        }
        Self { namespace: namespace.to_owned(), queue }
    }

    /// Puts an event into the queue.
    pub fn publish(&self, event: &impl TaskEvent) {
        let value = match event.write_to_bytes() {
            Ok(value) => value,
            Err(error) => return log::error!("the event {} cannot be encoded: {error}", event.topic()),
        };
        let envelope = Envelope {
            timestamp: MessageField::some(SystemTime::now().into()),
            namespace: self.namespace.clone(),
            topic: event.topic().to_owned(),
            event: MessageField::some(Any { type_url: event.type_url().to_owned(), value, ..Any::default() }),
            ..Envelope::default()
        };
        if self.queue.try_send(Item::Event(Box::new(envelope))).is_err() {
            log::warn!("the event {} is lost", event.topic());
        }
    }

    /// Waits until everything published so far is delivered, at most for `limit`.
    pub async fn flush(&self, limit: Duration) {
        let (done, flushed) = oneshot::channel();
        let _ = timeout(limit, async {
            if self.queue.send(Item::Flush(done)).await.is_ok() {
                let _ = flushed.await;
            }
        })
        .await;
    }
}

async fn deliver_all(address: String, mut items: mpsc::Receiver<Item>) {
    let mut connection = None;
    while let Some(item) = items.recv().await {
        match item {
            Item::Event(envelope) => deliver(&address, &mut connection, *envelope).await,
            Item::Flush(done) => {
                let _ = done.send(());
            }
        }
    }
}

async fn deliver(address: &str, connection: &mut Option<EventsClient>, envelope: Envelope) {
    let since = Instant::now();
    let mut pause = PAUSES.0;
    let request = ForwardRequest { envelope: MessageField::some(envelope), ..ForwardRequest::default() };
    loop {
        match timeout(DELIVERY_LIMIT, attempt(address, connection, &request)).await {
            Ok(Ok(())) => return,
            Ok(Err(ttrpc::Error::RpcStatus(status))) => {
                return log::warn!(
                    "containerd refuses the event {}: {}",
                    request.envelope.topic,
                    status.message
                );
            }
            Ok(Err(_)) | Err(_) => *connection = None,
        }
        if since.elapsed() > PATIENCE {
            return log::warn!(
                "containerd does not take the event {}, which is dropped",
                request.envelope.topic
            );
        }
        sleep(pause).await;
        pause = (pause * 2).min(PAUSES.1);
    }
}

async fn attempt(
    address: &str,
    connection: &mut Option<EventsClient>,
    request: &ForwardRequest,
) -> ttrpc::Result<()> {
    let client = match connection {
        Some(client) => client,
        None => connection.insert(EventsClient::new(Client::connect(address).await?)),
    };
    client.forward(with_duration(DELIVERY_LIMIT), request).await.map(drop)
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use async_trait::async_trait;
    use containerd_shim_protos::api::Empty;
    use containerd_shim_protos::events::task::{TaskExit, TaskStart};
    use containerd_shim_protos::shim_async::{Events, create_events};
    use ttrpc::asynchronous::{Server, TtrpcContext};

    use super::*;

    #[derive(Clone, Default)]
    struct Daemon(Arc<Mutex<Vec<String>>>);

    #[async_trait]
    impl Events for Daemon {
        async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
            let event = format!("{} {}", request.envelope.topic, request.envelope.event.type_url);
            self.0.lock().unwrap().push(event);
            Ok(Empty::default())
        }
    }

    #[tokio::test]
    async fn events_wait_for_the_daemon_and_keep_their_order() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("sock");
        let address = format!("unix://{}", path.display());
        let publisher = Publisher::new("ns", Some(path.to_str().unwrap().to_owned()));
        publisher.publish(&TaskStart::default());
        publisher.publish(&TaskExit::default());
        // Nobody listens yet.
        publisher.flush(Duration::from_millis(100)).await;
        let daemon = Daemon::default();
        let mut server =
            Server::new().bind(&address).unwrap().register_service(create_events(Arc::new(daemon.clone())));
        server.start().await.unwrap();
        publisher.flush(Duration::from_secs(20)).await;
        let seen = daemon.0.lock().unwrap().clone();
        assert_eq!(
            seen,
            ["/tasks/start containerd.events.TaskStart", "/tasks/exit containerd.events.TaskExit"]
        );
        server.shutdown().await.unwrap();
    }

    #[tokio::test]
    async fn without_an_address_nothing_is_awaited() {
        let publisher = Publisher::new("ns", None);
        publisher.publish(&TaskStart::default());
        publisher.flush(Duration::from_secs(60)).await;
    }
}
