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
    let mut output = Output::new(pipe::Receiver::from_owned_fd(pipe)?);
    let (held, mut released) = oneshot::channel();
    let (open, closed) = Closed::pair();
    tokio::spawn(async move {
        let mut client = first;
        let mut open = Some(open);
        loop {
            let carried = tokio::select! {
                biased;
                newer = clients.next(&name) => {
                    client = newer;
                    continue;
                }
                carried = client.send_from(&mut output) => carried,
            };
            // Nobody has to wait for what nobody takes.
            drop(open.take());
            match carried {
                Carried::All => return,
                Carried::ClientGone => match next(&clients, &name, &mut released).await {
                    Some(newer) => client = newer,
                    None => return,
                },
            }
        }
    });
    Ok((Held { _held: held }, closed))
}

/// Writes what the clients of a name send to a pipe, until one of them ends the stream.
///
/// # Errors
/// When the pipe cannot be put on the event loop.
pub fn receive(clients: Arc<Waiting>, name: String, first: ByteStream, pipe: OwnedFd) -> io::Result<Held> {
    let mut pipe = pipe::Sender::from_owned_fd(pipe)?;
    let (held, mut released) = oneshot::channel();
    tokio::spawn(async move {
        let mut client = first;
        loop {
            let carried = tokio::select! {
                biased;
                newer = clients.next(&name) => {
                    client = newer;
                    continue;
                }
                carried = client.receive_into(&mut pipe) => carried,
            };
            match carried {
                Carried::All => return,
                Carried::ClientGone => match next(&clients, &name, &mut released).await {
                    Some(newer) => client = newer,
                    None => return,
                },
            }
        }
    });
    Ok(Held { _held: held })
}

async fn next(clients: &Waiting, name: &str, released: &mut oneshot::Receiver<()>) -> Option<ByteStream> {
    tokio::select! {
        biased;
        stream = clients.next(name) => Some(stream),
        _ = released => None,
    }
}
