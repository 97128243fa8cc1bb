//! The calls.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use h2::client::SendRequest;
use http::{HeaderMap, Request};
use protobuf::Message;
use tokio::net::UnixStream;
use tokio::runtime::Runtime;

/// No call takes longer, also where KVM itself is emulated.
const LIMIT: Duration = Duration::from_secs(180);

/// A call that was answered with an error.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// The gRPC status code.
    pub code: u32,
    /// Its sentence, percent-encoded as gRPC sends it.
    pub message: String,
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "gRPC status {}: {}", self.code, self.message)
    }
}

impl std::error::Error for Refusal {}

/// A connection to the runtime service.
#[derive(Debug)]
pub struct Cri {
    runtime: Runtime,
    sender: SendRequest<Bytes>,
}

impl Cri {
    /// Connects to a daemon's socket.
    ///
    /// # Errors
    /// When nobody answers there in HTTP/2.
    pub fn connect(socket: &Path) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let sender = runtime.block_on(async {
            let stream = UnixStream::connect(socket).await?;
            let (sender, connection) = h2::client::handshake(stream).await?;
            // A connection that breaks is told by the call that is made on it.
            tokio::spawn(async move { drop(connection.await) });
            anyhow::Ok(sender)
        })?;
        Ok(Self { runtime, sender })
    }

    /// Calls a method of the runtime service.
    ///
    /// # Errors
    /// A [`Refusal`], or what is wrong with the connection.
    pub fn call<T: Message>(&self, method: &str, request: &impl Message) -> Result<T> {
        self.call_within(LIMIT, method, request)
    }

    /// Calls a method of the runtime service that is given up after `limit`.
    ///
    /// # Errors
    /// As of [`Cri::call`]; [`is_unanswered`] tells a call that was given up.
    pub fn call_within<T: Message>(
        &self,
        limit: Duration,
        method: &str,
        request: &impl Message,
    ) -> Result<T> {
        let call = async { tokio::time::timeout(limit, self.exchange(method, request)).await };
        let answered = self.runtime.block_on(call).with_context(|| format!("{method} is not answered"))?;
        Ok(T::parse_from_bytes(&answered.with_context(|| method.to_owned())?)?)
    }

    async fn exchange(&self, method: &str, request: &impl Message) -> Result<Vec<u8>> {
        let mut sender = self.sender.clone().ready().await?;
        let head = Request::post(format!("http://localhost/runtime.v1.RuntimeService/{method}"))
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .body(())?;
        let (response, mut body) = sender.send_request(head, false)?;
        body.send_data(frame(&request.write_to_bytes()?)?.into(), true)?;
        let (head, mut body) = response.await?.into_parts();
        let mut answer = Vec::new();
        while let Some(chunk) = body.data().await {
            let chunk = chunk?;
            body.flow_control().release_capacity(chunk.len())?;
            answer.extend_from_slice(&chunk);
        }
        // An error without a body has its status in the head.
        let trailers = body.trailers().await?.unwrap_or(head.headers);
        check(&trailers)?;
        match answer.get(5..) {
            Some(message) if answer[0] == 0 => Ok(message.to_vec()),
            _ => bail!("the answer is cut short or compressed"),
        }
    }
}

/// Whether a call failed because nobody answered it in time.
pub fn is_unanswered(error: &anyhow::Error) -> bool {
    error.is::<tokio::time::error::Elapsed>()
}

/// A message as gRPC frames it: not compressed, its length, itself.
fn frame(message: &[u8]) -> Result<Vec<u8>> {
    let length = u32::try_from(message.len())?.to_be_bytes();
    Ok([&[0], &length[..], message].concat())
}

fn check(trailers: &HeaderMap) -> Result<()> {
    let text = |name| trailers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
    match text("grpc-status").parse().context("the answer has no status")? {
        0 => Ok(()),
        code => Err(Refusal { code, message: text("grpc-message").to_owned() }.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cri::Empty;

    #[test]
    fn messages_are_framed() {
        assert_eq!(frame(b"ab").unwrap(), b"\0\0\0\0\x02ab");
    }

    #[test]
    fn a_call_without_an_answer_is_told_from_one_that_failed() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("silent");
        let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        let silent = Cri::connect(&socket).unwrap();
        let unanswered = silent.call_within::<Empty>(Duration::ZERO, "Version", &Empty::new()).unwrap_err();
        assert!(is_unanswered(&unanswered));
        drop(listener);
        let failed = silent.call::<Empty>("Version", &Empty::new()).unwrap_err();
        assert!(!is_unanswered(&failed));
    }

    #[test]
    fn a_status_is_a_refusal_unless_it_is_0() {
        let trailers = |code: &str| {
            let mut map = HeaderMap::new();
            map.insert("grpc-status", code.parse().unwrap());
            map
        };
        assert!(check(&trailers("0")).is_ok());
        let refusal = check(&trailers("5")).unwrap_err();
        assert_eq!(refusal.downcast_ref::<Refusal>().unwrap().code, 5);
        assert!(check(&HeaderMap::new()).is_err());
    }
}
