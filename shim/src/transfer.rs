//! Files into a container and out of it, as tar streams: containerd's Transfer service.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::well_known_types::empty::Empty;
use containerd_shim_protos::protobuf::{Message, MessageField};
use nix::fcntl::OFlag;
use nix::unistd::pipe2;
use tokio::net::unix::pipe;
use tokio::time::{Instant, timeout_at};
use ttrpc::asynchronous::{Service as Dispatch, TtrpcContext};
use vmshim_protocol::agent as api;
use vmshim_protocol::agent::transfer_files_request::Direction;
use vmshim_protocol::containerd::{
    ContainerPath, ReadStream, Transfer, TransferRequest, WriteStream, create_transfer,
};
use vmshim_protocol::control::FdRole;

use crate::streaming::{ByteStream, Output};
use crate::task::{Pod, TaskError};

/// How long a transfer may take whose caller sets no limit: as much as a disk's worth of files may need, and not for
/// ever, since the guest has a part in it.
const LIMIT: Duration = Duration::from_secs(3600);

/// The one form of stream there is.
const TAR: &str = "application/x-tar";

/// The method, to be registered with a server.
pub fn services(pod: &Arc<Pod>) -> HashMap<String, Dispatch> {
    create_transfer(Arc::new(Service(pod.clone())))
}

struct Service(Arc<Pod>);

/// One end of a transfer.
#[derive(Debug, PartialEq)]
enum Endpoint {
    Container(ContainerPath),
    FromClient(ReadStream),
    ToClient(WriteStream),
}

impl Endpoint {
    fn parse(end: &str, message: &MessageField<Any>) -> Result<Self, TaskError> {
        let Some(message) = message.as_ref() else {
            return Err(TaskError::Request(format!("the transfer has no {end}")));
        };
        let malformed = |_| TaskError::Request(format!("the transfer's {end} is malformed"));
        let name = message.type_url.rsplit(['/', '.']).next().unwrap_or_default();
        match name {
            "ContainerPath" => {
                ContainerPath::parse_from_bytes(&message.value).map(Self::Container).map_err(malformed)
            }
            "ReadStream" => {
                ReadStream::parse_from_bytes(&message.value).map(Self::FromClient).map_err(malformed)
            }
            "WriteStream" => {
                WriteStream::parse_from_bytes(&message.value).map(Self::ToClient).map_err(malformed)
            }
            _ => Err(TaskError::Request(format!(
                "the transfer's {end} is neither a path of a container nor a stream"
            ))),
        }
    }
}

#[async_trait]
impl Transfer for Service {
    async fn transfer(&self, context: &TtrpcContext, request: TransferRequest) -> ttrpc::Result<Empty> {
        let source = Endpoint::parse("source", &request.source)?;
        let destination = Endpoint::parse("destination", &request.destination)?;
        let deadline = match context.timeout_nano {
            0 => Instant::now() + LIMIT,
            nanos => self.0.deadline(nanos),
        };
        match (source, destination) {
            (Endpoint::FromClient(stream), Endpoint::Container(path)) => {
                self.import(&stream, path, deadline).await?;
            }
            (Endpoint::Container(path), Endpoint::ToClient(stream)) => {
                self.export(path, &stream, deadline).await?;
            }
            _ => {
                return Err(TaskError::Request(
                    "a transfer goes from a stream to a container's path, or from there to a stream"
                        .to_owned(),
                )
                .into());
            }
        }
        Ok(Empty::default())
    }
}

impl Service {
    async fn import(
        &self,
        from: &ReadStream,
        path: ContainerPath,
        deadline: Instant,
    ) -> Result<(), TaskError> {
        let mut stream = self.stream(&from.stream, &from.media_type)?;
        let (read, write) = new_pipe()?;
        let import = api::Import { preserve_ownership: path.preserve_ownership, ..Default::default() };
        let mut write =
            pipe::Sender::from_owned_fd(write).map_err(|_| TaskError::Internal("write a pipe"))?;
        let carrying = tokio::spawn(async move { stream.receive_into(&mut write).await });
        let result =
            self.in_guest((FdRole::StreamSource, read), path, Direction::Import(import), deadline).await;
        // All has been read, or nothing more will be.
        carrying.abort();
        result
    }

    async fn export(
        &self,
        path: ContainerPath,
        to: &WriteStream,
        deadline: Instant,
    ) -> Result<(), TaskError> {
        let mut stream = self.stream(&to.stream, &to.media_type)?;
        let (read, write) = new_pipe()?;
        let read = pipe::Receiver::from_owned_fd(read).map_err(|_| TaskError::Internal("read a pipe"))?;
        let mut output = Output::new(read);
        let export = api::Export { no_walk: path.no_walk, ..Default::default() };
        let mut carrying = tokio::spawn(async move { stream.send_from(&mut output).await });
        let result =
            self.in_guest((FdRole::StreamSink, write), path, Direction::Export(export), deadline).await;
        let carried = timeout_at(deadline, &mut carrying).await;
        carrying.abort();
        result?;
        carried.map(drop).map_err(|_| TaskError::Deadline("the transfer"))
    }

    fn stream(&self, name: &str, media_type: &str) -> Result<ByteStream, TaskError> {
        if !matches!(media_type, TAR | "") {
            return Err(TaskError::Request(format!("a transfer's stream is {TAR}, not {media_type:?}")));
        }
        let stream = self.0.streams.take(name);
        stream.ok_or_else(|| TaskError::Request("the transfer's stream is not open".to_owned()))
    }

    /// Has the agent carry the files, by way of a stream that ends in the descriptor.
    async fn in_guest(
        &self,
        (role, fd): (FdRole, OwnedFd),
        path: ContainerPath,
        direction: Direction,
        deadline: Instant,
    ) -> Result<(), TaskError> {
        let container = self.0.container(&path.container_id)?;
        let vm = self.0.vm()?;
        let (port, mut closed) = vm.expect(&[(role, fd.as_fd())], deadline).await?;
        drop(fd);
        let request = api::TransferFilesRequest {
            container_id: container.id.to_string(),
            path: path.path,
            stream: port.0,
            direction: Some(direction),
            ..Default::default()
        };
        let result = self.0.in_guest(vm, vm.agent().transfer_files(&request, deadline)).await;
        if result.is_ok() && role == FdRole::StreamSink {
            // The guest has written all; some of it may still be on its way here.
            let _ = timeout_at(deadline, closed.wait()).await;
        }
        vm.forget(port, deadline).await;
        result.map(drop)
    }
}

fn new_pipe() -> Result<(OwnedFd, OwnedFd), TaskError> {
    pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).map_err(|_| TaskError::Internal("make a pipe"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn any(name: &str, value: Vec<u8>) -> MessageField<Any> {
        let type_url = format!("containerd.types.transfer.{name}");
        MessageField::some(Any { type_url, value, ..Any::default() })
    }

    #[test]
    fn ends_are_told_by_their_types() {
        let path = ContainerPath { path: "/tmp".to_owned(), ..ContainerPath::default() };
        let message = any("ContainerPath", path.write_to_bytes().unwrap());
        assert_eq!(Endpoint::parse("source", &message).unwrap(), Endpoint::Container(path));
        assert!(matches!(Endpoint::parse("source", &any("ReadStream", vec![])), Ok(Endpoint::FromClient(_))));
        assert!(matches!(Endpoint::parse("source", &any("WriteStream", vec![])), Ok(Endpoint::ToClient(_))));
    }

    #[test]
    fn what_is_no_end_is_refused_by_name() {
        let sentence = |message| Endpoint::parse("source", &message).unwrap_err().to_string();
        assert_eq!(sentence(MessageField::none()), "the transfer has no source");
        assert_eq!(sentence(any("ReadStream", vec![0xff])), "the transfer's source is malformed");
        let other = sentence(any("OCIRegistry", vec![]));
        assert_eq!(other, "the transfer's source is neither a path of a container nor a stream");
    }
}
