//! Calls to the guest's agent. Everything that comes back is from a guest that may be hostile: it is bounded, made
//! printable, and awaited only up to a deadline.

mod error;

use std::future::Future;
use std::io;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use tokio::net::UnixStream as AsyncUnixStream;
use tokio::time::{Instant, timeout_at};
use ttrpc::asynchronous::transport::Socket;
use ttrpc::asynchronous::{Client, ClientStreamReceiver};
use ttrpc::context::{Context, with_duration};
use vmshim_protocol::agent as api;

pub use error::{AgentError, GuestCode};

/// The connection to the agent. Usable before the guest is up: requests wait in the socket.
#[derive(Clone)]
pub struct AgentConnection(api::AgentClient);

macro_rules! calls {
    ($( $(#[$doc:meta])* $name:ident($request:ty) -> $response:ty; )+) => { $(
        $(#[$doc])*
        ///
        /// # Errors
        /// When the agent refuses, does not answer in time, or is gone.
        pub async fn $name(&self, request: &$request, deadline: Instant) -> Result<$response, AgentError> {
            bounded(deadline, |context| self.0.$name(context, request)).await
        }
    )+ };
}

impl AgentConnection {
    /// Takes over the shim's end of the agent's stream.
    ///
    /// # Errors
    /// When the event loop cannot take it.
    pub fn new(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        let socket = Socket::from(AsyncUnixStream::from_std(stream)?);
        Ok(Self(api::AgentClient::new(Client::new(socket))))
    }

    calls! {
        /// Lists the processes of a container.
        list_processes(api::ContainerRequest) -> api::ListProcessesResponse;
        /// Carries files into a container or out of it.
        transfer_files(api::TransferFilesRequest) -> api::Empty;
        /// Makes the pod's own namespaces.
        set_up_pod(api::SetUpPodRequest) -> api::Empty;
        /// Ends everything in the guest, and the guest.
        power_off(api::Empty) -> api::Empty;
        /// Configures network interfaces.
        configure_network(api::ConfigureNetworkRequest) -> api::Empty;
        /// Connects a stream to a TCP port of the guest.
        connect_tcp(api::ConnectTcpRequest) -> api::Empty;
        /// Shares the host's network.
        share_host_network(api::Empty) -> api::Empty;
        /// Says whether the host listens.
        host_listening(api::HostListeningRequest) -> api::Empty;
        /// Makes a container and its init process.
        create_container(api::CreateContainerRequest) -> api::ProcessCreated;
        /// Prepares one more process.
        exec_process(api::ExecProcessRequest) -> api::ProcessCreated;
        /// Runs a prepared process.
        start_process(api::ProcessRequest) -> api::ProcessCreated;
        /// Sends a signal.
        signal_process(api::SignalProcessRequest) -> api::Empty;
        /// Sets a terminal's size.
        resize_pty(api::ResizePtyRequest) -> api::Empty;
        /// Forgets an exited process, or removes a container.
        delete_process(api::ProcessRequest) -> api::Empty;
        /// Reads a container's cgroup.
        stats(api::ContainerRequest) -> api::StatsResponse;
        /// Changes limits.
        update_container(api::UpdateContainerRequest) -> api::Empty;
        /// Takes up what the machine has got.
        take_up(api::TakeUpRequest) -> api::Empty;
        /// Freezes a container.
        pause_container(api::ContainerRequest) -> api::Empty;
        /// Thaws a container.
        resume_container(api::ContainerRequest) -> api::Empty;
        /// Joins a connection that waits for the host with the host's end.
        connect_socket(api::ConnectSocketRequest) -> api::Empty;
    }

    /// Opens the stream of what happens in the guest.
    ///
    /// # Errors
    /// When the agent is gone.
    pub async fn events(&self) -> Result<ClientStreamReceiver<api::Event>, AgentError> {
        self.0.events(Context::default(), &api::Empty::new()).await.map_err(AgentError::from)
    }
}

/// Makes a call that ends at the deadline, here and, by the timeout it carries, in the guest.
async fn bounded<T, F>(deadline: Instant, call: impl FnOnce(Context) -> F) -> Result<T, AgentError>
where
    F: Future<Output = ttrpc::Result<T>>,
{
    let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
    match timeout_at(deadline, call(with_duration(left))).await {
        Ok(result) => result.map_err(AgentError::from),
        Err(_) => Err(AgentError::TimedOut),
    }
}
