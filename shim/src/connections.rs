//! The shim's connections, which can be waited for.
//!
//! containerd's client takes a call for cut off, now and then, when the end of its connection follows the answer at once:
//! it looks at both, in no order. So the shim leaves it to the client to close the connection.

use std::io;
use std::os::unix::net::UnixListener as Bound;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use futures_core::Stream;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use ttrpc::asynchronous::transport::Listener;

/// The connections that have been accepted: each holds a receiver, and no value is ever sent.
#[derive(Debug, Default)]
pub struct Connections(Arc<watch::Sender<()>>);

/// Connections as they come in.
struct Incoming {
    listener: UnixListener,
    open: Arc<watch::Sender<()>>,
}

/// A connection that is missed when it ends.
struct Connection {
    stream: UnixStream,
    _open: watch::Receiver<()>,
}

impl Connections {
    /// A listener for a server, which counts what it accepts.
    ///
    /// # Errors
    /// When the socket is none.
    pub fn listener(&self, socket: Bound) -> io::Result<Listener> {
        Ok(Listener::new(self.incoming(socket)?))
    }

    fn incoming(&self, socket: Bound) -> io::Result<Incoming> {
        socket.set_nonblocking(true)?;
        Ok(Incoming { listener: UnixListener::from_std(socket)?, open: self.0.clone() })
    }

    /// Waits until no connection is open.
    pub async fn all_closed(&self) {
        self.0.closed().await;
    }
}

impl Stream for Incoming {
    type Item = io::Result<Connection>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let accepted = self.listener.poll_accept(cx);
        accepted.map_ok(|(stream, _)| Connection { stream, _open: self.open.subscribe() }).map(Some)
    }
}

impl Connection {
    fn stream(self: Pin<&mut Self>) -> Pin<&mut UnixStream> {
        Pin::new(&mut self.get_mut().stream)
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.stream().poll_read(cx, buffer)
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

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    #[tokio::test]
    async fn connections_are_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let connections = Connections::default();
        connections.all_closed().await;
        let mut incoming = connections.incoming(Bound::bind(&path).unwrap()).unwrap();
        let _client = UnixStream::connect(&path).await.unwrap();
        let accepted = std::future::poll_fn(|cx| Pin::new(&mut incoming).poll_next(cx)).await;
        assert!(timeout(Duration::from_millis(20), connections.all_closed()).await.is_err());
        drop(accepted);
        connections.all_closed().await;
    }
}
