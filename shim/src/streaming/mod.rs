//! Byte streams of clients, on the same connection as the Task service: containerd's Streaming service.
//!
//! A client opens a stream under a name, and another call says what it is for: a process's standard stream
//! (`io_type = "streaming"` of CRI) or a transfer of files. Until then it waits here. The shim's clients are on this host
//! and root; they are trusted to mean well, not to take part.

mod bytes;
mod pump;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use tokio::sync::Notify;
use ttrpc::asynchronous::{ServerStream, Service as Dispatch, TtrpcContext};
use vmshim_protocol::containerd::{StreamInit, Streaming, create_streaming};

pub use bytes::{ByteStream, Output};
pub use pump::{Held, receive, send};

/// Streams that nobody has asked for; more than any client opens in advance.
const MOST_WAITING: usize = 512;

/// Bytes of the longest name.
const LONGEST_NAME: usize = 512;

const EMPTY_TYPE: &str = "google.protobuf.Empty";

/// Streams that are open and not asked for yet.
#[derive(Debug, Default)]
pub struct Waiting {
    streams: Mutex<HashMap<String, ByteStream>>,
    arrived: Notify,
}

/// Why a stream is not taken in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum StreamError {
    /// Too long, or missing.
    #[error("a stream's id must have from 1 to {LONGEST_NAME} bytes")]
    Name,
    /// The client does not begin as it should.
    #[error("a stream must begin with a StreamInit")]
    NoInit,
    /// The table is full.
    #[error("{MOST_WAITING} streams are open already and unused")]
    TooMany,
}

impl From<StreamError> for ttrpc::Error {
    fn from(error: StreamError) -> Self {
        let code = match error {
            StreamError::Name | StreamError::NoInit => ttrpc::Code::INVALID_ARGUMENT,
            StreamError::TooMany => ttrpc::Code::RESOURCE_EXHAUSTED,
        };
        Self::RpcStatus(ttrpc::get_status(code, error))
    }
}

impl Waiting {
    /// The stream of a name, if it is open.
    pub fn take(&self, name: &str) -> Option<ByteStream> {
        self.table().remove(name)
    }

    /// The stream of a name, when it is open.
    pub async fn next(&self, name: &str) -> ByteStream {
        loop {
            let arrived = self.arrived.notified();
            tokio::pin!(arrived);
            arrived.as_mut().enable();
            if let Some(stream) = self.take(name) {
                return stream;
            }
            arrived.await;
        }
    }

    fn check(&self, name: &str) -> Result<(), StreamError> {
        if name.is_empty() || name.len() > LONGEST_NAME {
            return Err(StreamError::Name);
        }
        let table = self.table();
        if table.len() >= MOST_WAITING && !table.contains_key(name) {
            return Err(StreamError::TooMany);
        }
        Ok(())
    }

    /// One of the same name has been forgotten by its client.
    fn add(&self, name: String, stream: ByteStream) {
        self.table().insert(name, stream);
        self.arrived.notify_waiters();
    }

    fn table(&self) -> MutexGuard<'_, HashMap<String, ByteStream>> {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The method, to be registered with a server.
pub fn services(waiting: &Arc<Waiting>) -> HashMap<String, Dispatch> {
    create_streaming(Arc::new(Service(waiting.clone())))
}

struct Service(Arc<Waiting>);

#[async_trait]
impl Streaming for Service {
    async fn stream(&self, _: &TtrpcContext, mut stream: ServerStream<Any, Any>) -> ttrpc::Result<()> {
        let mut first = stream.recv().await?.ok_or(StreamError::NoInit)?;
        if first == Any::default() {
            // Go's client opens a stream with a request of no content, which the library takes for a message.
            first = stream.recv().await?.ok_or(StreamError::NoInit)?;
        }
        if !is(&first, StreamInit::NAME, "containerd.services.streaming.v1") {
            return Err(StreamError::NoInit.into());
        }
        let init = StreamInit::parse_from_bytes(&first.value).map_err(|_| StreamError::NoInit)?;
        self.0.check(&init.id)?;
        // A client names its stream once it has read this. That call is read by the same thread, after this task has gone
        // on: what the write has woken runs before sockets are looked at again.
        stream.send(&Any { type_url: EMPTY_TYPE.to_owned(), ..Any::default() }).await?;
        let (stream, over) = ByteStream::new(stream);
        self.0.add(init.id, stream);
        // The call lasts as long as the stream.
        let _ = over.await;
        Ok(())
    }
}

/// Whether a message is of a type, by its name with or without an authority in front.
fn is(message: &Any, name: &str, package: &str) -> bool {
    let full = message.type_url.rsplit_once('/').map_or(message.type_url.as_str(), |(_, name)| name);
    full.strip_prefix(package).and_then(|rest| rest.strip_prefix('.')) == Some(name)
}
