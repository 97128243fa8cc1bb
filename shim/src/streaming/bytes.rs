//! Bytes in a stream: pieces of data against a window, which the receiving side opens.

use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::pipe;
use tokio::sync::oneshot;
use ttrpc::asynchronous::{SSReceiver, SSSender, ServerStream};
use vmshim_protocol::containerd::{Data, WindowUpdate};

use super::is;

const PACKAGE: &str = "containerd.types.transfer";

/// Bytes that the other side may have on their way to here.
const WINDOW: usize = 64 * 1024;

/// The most that one message carries.
const PIECE: usize = 32 * 1024;

/// An open stream. Its call ends when it is dropped.
#[derive(Debug)]
pub struct ByteStream {
    sender: SSSender<Any>,
    receiver: SSReceiver<Any>,
    /// What the client still lets be sent.
    window: usize,
    _open: oneshot::Sender<()>,
}

/// What is to be sent, whoever the client is.
#[derive(Debug)]
pub struct Output {
    pipe: pipe::Receiver,
    /// Read and not sent yet.
    piece: Vec<u8>,
}

impl Output {
    /// What comes out of a pipe.
    pub fn new(pipe: pipe::Receiver) -> Self {
        Self { pipe, piece: Vec::with_capacity(PIECE) }
    }
}

/// How carrying bytes came to its end.
#[derive(Debug, PartialEq, Eq)]
pub enum Carried {
    /// There are no more.
    All,
    /// The client is gone.
    ClientGone,
}

impl ByteStream {
    /// A stream, and what completes when it is over.
    pub fn new(stream: ServerStream<Any, Any>) -> (Self, oneshot::Receiver<()>) {
        let (sender, receiver) = stream.split();
        let (open, over) = oneshot::channel();
        (Self { sender, receiver, window: 0, _open: open }, over)
    }

    /// Writes what the client sends to a pipe, until either has its end.
    pub async fn receive_into(&mut self, pipe: &mut pipe::Sender) -> Carried {
        let mut taken = WINDOW;
        loop {
            if taken >= WINDOW / 2 {
                let update = i32::try_from(taken).unwrap_or(i32::MAX);
                if self
                    .send("WindowUpdate", &WindowUpdate { update, ..WindowUpdate::default() })
                    .await
                    .is_err()
                {
                    return Carried::ClientGone;
                }
                taken = 0;
            }
            let message = match self.receiver.recv().await {
                Ok(Some(message)) => message,
                Ok(None) => return Carried::All,
                Err(_) => return Carried::ClientGone,
            };
            if !is(&message, Data::NAME, PACKAGE) {
                continue;
            }
            let Ok(data) = Data::parse_from_bytes(&message.value) else { return Carried::All };
            // Nobody reads any more: the process is gone, or has closed its end.
            if pipe.write_all(&data.data).await.is_err() {
                return Carried::All;
            }
            taken += data.data.len();
        }
    }

    /// Sends what comes out of a pipe.
    pub async fn send_from(&mut self, output: &mut Output) -> Carried {
        loop {
            if !output.piece.is_empty() && self.window > 0 {
                let length = output.piece.len().min(self.window);
                let data = Data { data: output.piece[..length].to_vec(), ..Data::default() };
                if self.send("Data", &data).await.is_err() {
                    return Carried::ClientGone;
                }
                output.piece.drain(..length);
                self.window -= length;
                continue;
            }
            tokio::select! {
                biased;
                message = self.receiver.recv() => match message {
                    Ok(Some(message)) => self.window = self.window.saturating_add(granted(&message)),
                    Ok(None) | Err(_) => return Carried::ClientGone,
                },
                length = output.pipe.read_buf(&mut output.piece), if output.piece.is_empty() => {
                    if !matches!(length, Ok(1..)) {
                        return Carried::All;
                    }
                }
            }
        }
    }

    async fn send(&self, name: &str, message: &impl Message) -> ttrpc::Result<()> {
        let value = message.write_to_bytes().map_err(|error| ttrpc::Error::Others(error.to_string()))?;
        self.sender.send(&Any { type_url: format!("{PACKAGE}.{name}"), value, ..Any::default() }).await
    }
}

/// By how much a message opens the window.
pub(super) fn granted(message: &Any) -> usize {
    if !is(message, WindowUpdate::NAME, PACKAGE) {
        return 0;
    }
    let update = WindowUpdate::parse_from_bytes(&message.value).map_or(0, |message| message.update);
    usize::try_from(update).unwrap_or(0)
}
