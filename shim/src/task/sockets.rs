//! Sockets of the host that containers reach: each connection in the guest becomes one on the host.
//!
//! The guest says which of a container's sockets somebody has connected to. It is hostile: it names nothing but a
//! number, and how many connections are being made at once is bounded.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::UnixStream;
use tokio::time::{Instant, timeout};
use vmshim_protocol::agent as api;
use vmshim_protocol::control::FdRole;

use super::TaskError;
use super::pod::Pod;
use crate::vm::{Port, Vm};

/// Connections that are being made for one guest; further ones are refused.
pub const MOST_PENDING: usize = 64;

/// How long a host's socket and the VMM may take.
const LIMIT: Duration = Duration::from_secs(10);

/// Follows a connection that somebody in a container has made.
pub fn follow(pod: &Arc<Pod>, vm: &Arc<Vm>, dialled: api::SocketDialled) {
    let Ok(permit) = pod.pending_sockets.clone().try_acquire_owned() else {
        log::warn!("the guest makes more connections at once than are followed; one is refused");
        return;
    };
    let (pod, vm) = (pod.clone(), vm.clone());
    tokio::spawn(async move {
        let deadline = Instant::now() + LIMIT;
        let port = match connect(&pod, &vm, &dialled, deadline).await {
            Ok(port) => Some(port),
            Err(error) => {
                log::warn!("a connection of container {:?} is refused: {error}", dialled.container_id);
                None
            }
        };
        let request = api::ConnectSocketRequest {
            connection: dialled.connection,
            port: port.as_ref().map_or(0, |port| port.0),
            ..Default::default()
        };
        let joined = vm.agent().connect_socket(&request, deadline).await;
        if let (Err(error), Some(port)) = (joined, port) {
            log::warn!("the guest does not take a connection: {error}");
            vm.forget(port, deadline).await;
        }
        drop(permit);
    });
}

async fn connect(
    pod: &Pod,
    vm: &Vm,
    dialled: &api::SocketDialled,
    deadline: Instant,
) -> Result<Port, TaskError> {
    let container = pod.container(&dialled.container_id)?;
    let path = usize::try_from(dialled.number).ok().and_then(|number| container.socket(number));
    let path = path.ok_or_else(|| TaskError::Request(format!("there is no socket {}", dialled.number)))?;
    let stream = dial(&path).await.map_err(|error| {
        TaskError::Request(format!("the socket {} cannot be connected to: {error}", path.display()))
    })?;
    let (port, _) = vm.expect(&[(FdRole::StreamSocket, stream.as_fd())], deadline).await?;
    Ok(port)
}

async fn dial(path: &Path) -> std::io::Result<OwnedFd> {
    let stream = timeout(LIMIT, UnixStream::connect(path)).await??;
    Ok(stream.into_std()?.into())
}
