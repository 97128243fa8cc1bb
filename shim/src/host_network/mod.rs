//! The host's network for pods that are to share it: what their containers would do as processes of the host, the shim
//! does for them with sockets of its own, in the network namespace that containerd is in.
//!
//! The guest is hostile. Whether it shares anything is decided by the container's spec and the node's configuration;
//! what it then asks for is an address and a port, which are checked, and how much of everything there is at a time is
//! bounded. Unix sockets of the host, its interfaces and its raw packets are never shared.

mod datagrams;
mod listeners;

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpSocket;
use tokio::sync::{OnceCell, Semaphore};
use tokio::time::{Instant, timeout};
use vmshim_protocol::agent as api;
use vmshim_protocol::control::FdRole;

use crate::agent_client::AgentError;
use crate::network::Servers;
use crate::vm::{ControlError, Port, Vm};
use listeners::Listeners;

/// Connections that are being made for one guest. An agent that is well never asks for more, and further ones get no
/// answer: even a refusal would be work that a hostile guest can ask for without limit.
const MOST_PENDING: usize = 256;

/// How long a server may take to accept a connection.
const CONNECT_LIMIT: Duration = Duration::from_secs(60);

/// How long guest and VMM may take.
const LIMIT: Duration = Duration::from_secs(10);

/// Why a connection is not made.
#[derive(Debug, thiserror::Error)]
enum Refused {
    #[error("{0}")]
    Host(#[from] io::Error),
    #[error("{0}")]
    Control(#[from] ControlError),
    #[error("{0}")]
    Agent(#[from] AgentError),
}

/// In which network namespace a connection is made.
enum Way {
    /// containerd's.
    Host,
    /// The pod's own.
    Namespace(Servers),
}

/// What a pod has of the host's network: nothing until it is shared.
pub struct HostNetwork {
    allowed: bool,
    shared: OnceCell<()>,
    pending: Arc<Semaphore>,
    pairs: Arc<Semaphore>,
    listeners: Listeners,
}

impl HostNetwork {
    /// Not shared yet, and never where the node does not allow it.
    pub fn new(allowed: bool) -> Self {
        Self {
            allowed,
            shared: OnceCell::new(),
            pending: Arc::new(Semaphore::new(MOST_PENDING)),
            pairs: Arc::new(Semaphore::new(datagrams::MOST_PAIRS)),
            listeners: Listeners::default(),
        }
    }

    /// Shares it with the guest, if that is allowed and has not been done.
    ///
    /// # Errors
    /// When the guest refuses, does not answer in time, or is gone.
    pub async fn share(&self, vm: &Vm, deadline: Instant) -> Result<(), AgentError> {
        if !self.allowed {
            log::info!("the host's network is not shared (runtime.host_network): there is loopback only");
            return Ok(());
        }
        let share = || async { vm.agent().share_host_network(&api::Empty::new(), deadline).await.map(drop) };
        self.shared.get_or_try_init(share).await.map(drop)
    }

    /// Follows a connection that somebody in a container has made, or a first datagram: to one of the servers of the pod's
    /// own network namespace, or to whatever the host's network leads to.
    pub fn dialled(&self, vm: &Arc<Vm>, dialled: &api::HostDialled, servers: &Servers) {
        let (vm, connection) = (vm.clone(), dialled.connection);
        let Some((way, to)) = self.way(dialled, servers) else { return };
        let limit = if dialled.datagrams { &self.pairs } else { &self.pending };
        let Ok(permit) = limit.clone().try_acquire_owned() else {
            log::warn!("the guest makes more connections at once than are followed");
            return;
        };
        if dialled.datagrams {
            drop(tokio::spawn(datagrams::follow(vm, connection, to, permit)));
            return;
        }
        tokio::spawn(async move {
            let port = match connect(&vm, &way, to).await {
                Ok(port) => Some(port),
                Err(error) => {
                    log::debug!("a connection to {to} fails: {error}");
                    None
                }
            };
            answer(&vm, connection, port).await;
            drop(permit);
        });
    }

    /// Listens where somebody in a container is about to.
    pub fn listen(&self, vm: &Arc<Vm>, listen: &api::HostListen) {
        let Some(at) = self.endpoint(&listen.at) else { return };
        let Ok(permit) = self.pending.clone().try_acquire_owned() else { return };
        let errno = match self.listeners.open(vm, at, listen.ipv6_only) {
            Ok(()) => 0,
            Err(error) => {
                log::info!("a container cannot listen on {at} of the host: {error}");
                error.raw_os_error().unwrap_or(libc::EIO)
            }
        };
        let request =
            api::HostListeningRequest { id: listen.id, errno: errno.unsigned_abs(), ..Default::default() };
        let vm = vm.clone();
        tokio::spawn(async move {
            let _ = vm.agent().host_listening(&request, Instant::now() + LIMIT).await;
            drop(permit);
        });
    }

    /// Listens no more.
    pub fn unlisten(&self, unlisten: &api::HostUnlisten) {
        if let Some(at) = self.endpoint(&unlisten.at) {
            self.listeners.close(at, unlisten.ipv6_only);
        }
    }

    /// How the guest gets where it wants to, if it may.
    fn way(&self, dialled: &api::HostDialled, servers: &Servers) -> Option<(Way, SocketAddr)> {
        let to = dialled.to.socket_address()?;
        if !dialled.datagrams && servers.have(to) {
            return Some((Way::Namespace(servers.clone()), to));
        }
        self.endpoint(&dialled.to).map(|to| (Way::Host, to))
    }

    /// What the guest names, where it may name anything.
    fn endpoint(&self, endpoint: &api::Endpoint) -> Option<SocketAddr> {
        self.shared.get()?;
        endpoint.socket_address()
    }
}

/// How the guest is told of an address, which an IPv6 socket may know as a mapped one.
pub fn endpoint(address: SocketAddr) -> api::Endpoint {
    SocketAddr::new(address.ip().to_canonical(), address.port()).into()
}

async fn connect(vm: &Vm, way: &Way, to: SocketAddr) -> Result<Port, Refused> {
    let make = if to.is_ipv4() { TcpSocket::new_v4 } else { TcpSocket::new_v6 };
    let socket = match way {
        Way::Host => make()?,
        Way::Namespace(servers) => servers.socket(make).await?,
    };
    let connected = timeout(CONNECT_LIMIT, socket.connect(to)).await;
    let connection = connected.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))?;
    // Small pieces come from the guest as they were sent.
    connection.set_nodelay(true)?;
    expect(vm, &connection.into_std()?.into()).await
}

async fn expect(vm: &Vm, socket: &OwnedFd) -> Result<Port, Refused> {
    let (port, _) = vm.expect(&[(FdRole::StreamSocket, socket.as_fd())], Instant::now() + LIMIT).await?;
    Ok(port)
}

/// Tells the guest where a connection goes on; nowhere without a port.
async fn answer(vm: &Vm, connection: u64, port: Option<Port>) {
    let deadline = Instant::now() + LIMIT;
    let request =
        api::ConnectSocketRequest { connection, port: port.map_or(0, |port| port.0), ..Default::default() };
    if let (Err(error), Some(port)) = (vm.agent().connect_socket(&request, deadline).await, port) {
        log::warn!("the guest does not take a connection: {error}");
        vm.forget(port, deadline).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::Netns;

    fn named(address: &[u8], port: u32) -> api::Endpoint {
        api::Endpoint { address: address.to_vec(), port, ..Default::default() }
    }

    #[test]
    fn a_guest_that_shares_nothing_can_name_nothing() {
        let network = HostNetwork::new(true);
        assert_eq!(network.endpoint(&named(&[127, 0, 0, 1], 80)), None);
        network.shared.set(()).unwrap();
        assert_eq!(network.endpoint(&named(&[127, 0, 0, 1], 80)), Some("127.0.0.1:80".parse().unwrap()));
        for bad in [named(&[127, 0, 0], 80), named(&[], 80), named(&[1; 4], 0), named(&[1; 4], 65536)] {
            assert_eq!(network.endpoint(&bad), None, "{bad:?}");
        }
    }

    #[test]
    fn a_pods_own_servers_are_reached_in_its_namespace_and_nothing_else_is() {
        let network = HostNetwork::new(true);
        let netns = Netns::open(std::path::Path::new("/proc/self/ns/net")).unwrap();
        let servers = Servers::new(netns, vec!["10.0.0.1:80".parse().unwrap()]);
        let way = |address: &[u8], port, datagrams| {
            let to = Some(named(address, port)).into();
            network.way(&api::HostDialled { to, datagrams, ..Default::default() }, &servers)
        };
        assert!(matches!(way(&[10, 0, 0, 1], 80, false), Some((Way::Namespace(_), _))));
        assert!(way(&[10, 0, 0, 1], 81, false).is_none());
        assert!(way(&[10, 0, 0, 1], 80, true).is_none());
        network.shared.set(()).unwrap();
        assert!(matches!(way(&[10, 0, 0, 1], 81, false), Some((Way::Host, _))));
    }

    #[test]
    fn the_guest_is_told_what_it_can_tell() {
        let network = HostNetwork::new(true);
        network.shared.set(()).unwrap();
        for text in ["10.0.0.1:9", "[::1]:65535"] {
            let address: SocketAddr = text.parse().unwrap();
            assert_eq!(network.endpoint(&endpoint(address)), Some(address));
        }
        assert_eq!(endpoint("[::ffff:1.2.3.4]:5".parse().unwrap()).address, [1, 2, 3, 4]);
    }
}
