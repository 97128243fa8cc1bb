//! Connections as ttrpc's listener sees them.

use super::Service;
use crate::link::Stream;
use futures_core::Stream as Incoming;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::{mpsc, oneshot};
use ttrpc::r#async::Server;
use ttrpc::asynchronous::transport::Listener;
use vmshim_protocol::agent::create_agent;

/// Where connections are handed to the server.
#[derive(Clone)]
pub struct Connections(mpsc::UnboundedSender<Connection>);

/// A connection that tells when its peer has gone.
struct Connection {
    stream: Stream,
    gone: Option<oneshot::Sender<()>>,
}

struct Accepted(mpsc::UnboundedReceiver<Connection>);

/// Starts to serve, and says where connections are to be handed in.
pub async fn serve(service: Service) -> ttrpc::Result<(Server, Connections)> {
    let (sender, receiver) = mpsc::unbounded_channel();
    let mut server = Server::new()
        .add_listener(Listener::new(Accepted(receiver)))
        .register_service(create_agent(Arc::new(service)));
    server.start().await?;
    Ok((server, Connections(sender)))
}

impl Connections {
    /// Serves a stream. The receiver hears when it has come to its end.
    pub fn add(&self, stream: Stream) -> oneshot::Receiver<()> {
        let (gone, end) = oneshot::channel();
        // A server that no longer listens drops the connection, which is heard as its end.
        let _ = self.0.send(Connection { stream, gone: Some(gone) });
        end
    }
}

impl Incoming for Accepted {
    type Item = io::Result<Connection>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.poll_recv(cx).map(|connection| connection.map(Ok))
    }
}

impl Connection {
    fn stream(self: Pin<&mut Self>) -> Pin<&mut Stream> {
        Pin::new(&mut self.get_mut().stream)
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let result = self.as_mut().stream().poll_read(cx, buf);
        let ended = match &result {
            Poll::Ready(Ok(())) => buf.filled().len() == before && buf.remaining() > 0,
            Poll::Ready(Err(_)) => true,
            Poll::Pending => false,
        };
        if ended {
            // The sender's end is the message.
            self.get_mut().gone = None;
        }
        result
    }
}

impl AsyncWrite for Connection {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.stream().poll_write(cx, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stream().poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stream().poll_shutdown(cx)
    }
}
