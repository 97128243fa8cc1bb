//! Between a pipe, whose other end the VMM has, and whichever client has opened the stream of a name last. A client that
//! goes may come back and open it again, as containerd does when it is restarted; that the old one is gone is known by
//! the new one at the latest.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use tokio::net::unix::pipe;
use tokio::sync::oneshot;

use super::Waiting;
use super::bytes::{ByteStream, Carried, Output};
use crate::vm::Closed;

/// While it is kept, a client that went is waited for.
#[derive(Debug)]
pub struct Held {
    _held: oneshot::Sender<()>,
}

/// The shim's end of a pipe.
trait End: Send + 'static {
    /// Carries bytes between the pipe and a client for as long as there are any. May be dropped at any point, for another
    /// client to go on.
    fn carry(&mut self, client: &mut ByteStream) -> impl Future<Output = Carried> + Send;
}

impl End for Output {
    fn carry(&mut self, client: &mut ByteStream) -> impl Future<Output = Carried> + Send {
        client.send_from(self)
    }
}

impl End for pipe::Sender {
    fn carry(&mut self, client: &mut ByteStream) -> impl Future<Output = Carried> + Send {
        client.receive_into(self)
    }
}

/// Sends what comes out of a pipe to the clients of a name, from `first` on. What completes says that all is sent, or that
/// a client went.
///
/// # Errors
/// When the pipe cannot be put on the event loop.
pub fn send(
    clients: Arc<Waiting>,
    name: String,
    first: ByteStream,
    pipe: OwnedFd,
) -> io::Result<(Held, Closed)> {
    Ok(follow(Output::new(pipe::Receiver::from_owned_fd(pipe)?), clients, name, first))
}

/// Writes what the clients of a name send to a pipe, until one of them ends the stream.
///
/// # Errors
/// When the pipe cannot be put on the event loop.
pub fn receive(clients: Arc<Waiting>, name: String, first: ByteStream, pipe: OwnedFd) -> io::Result<Held> {
    let (held, _) = follow(pipe::Sender::from_owned_fd(pipe)?, clients, name, first);
    Ok(held)
}

/// Serves one client after the other in the background.
fn follow(mut end: impl End, clients: Arc<Waiting>, name: String, first: ByteStream) -> (Held, Closed) {
    let (held, mut released) = oneshot::channel::<()>();
    let (open, closed) = Closed::pair();
    tokio::spawn(async move {
        let (mut client, mut open) = (first, Some(open));
        loop {
            let carried = tokio::select! {
                biased;
                newer = clients.next(&name) => {
                    client = newer;
                    continue;
                }
                carried = end.carry(&mut client) => carried,
            };
            // Nobody has to wait for what nobody takes.
            drop(open.take());
            if carried == Carried::All {
                return;
            }
            client = tokio::select! {
                biased;
                newer = clients.next(&name) => newer,
                _ = &mut released => return,
            };
        }
    });
    (Held { _held: held }, closed)
}
