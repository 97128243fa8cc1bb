//! Connections made within the pod's network namespace.
//!
//! containerd forwards a port by a connection to `localhost` inside the pod's network namespace, where with runc the
//! pod's processes are. Here they are in the guest, so every connection to one of the namespace's own addresses is taken
//! in, whatever its port: the guest's agent connects to the same address and port in the guest, and the VMM gets the
//! connection's descriptor and moves the bytes. Nothing listens on a port that could be in somebody's way, and nobody has
//! to know which ports the guest has.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::time::Instant;
use vmshim_protocol::agent as api;
use vmshim_protocol::control::FdRole;

use super::netns::Netns;
use super::steering::steer_all;
use crate::host_network::endpoint;
use crate::vm::Vm;

/// How long the guest may take to accept a connection.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);

/// Takes in connections to the addresses of a network namespace.
pub struct Forwarder {
    listener: TcpListener,
    /// Kept for what it does while it is open.
    steering: OwnedFd,
}

impl Forwarder {
    /// Begins to take in connections, but not those to the ports of servers that the namespace has. To be called in the
    /// namespace.
    pub fn new(netns: &Netns, servers: &[SocketAddr]) -> io::Result<Self> {
        // The port has no meaning. One IPv6 socket takes in both families, where there is IPv6 at all.
        let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, 0))
            .or_else(|_| TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)))?;
        listener.set_nonblocking(true)?;
        let steering = steer_all(netns, &listener, servers.iter().map(SocketAddr::port))?;
        Ok(Self { listener, steering })
    }

    /// Hands connections on to the guest until the VM ends.
    pub fn run(self, vm: Arc<Vm>) {
        tokio::spawn(async move {
            let Self { listener, steering } = self;
            let Ok(listener) = tokio::net::TcpListener::from_std(listener) else { return };
            loop {
                let accepted = tokio::select! {
                    accepted = listener.accept() => accepted,
                    _ = vm.ended() => break,
                };
                match accepted {
                    Ok((connection, _)) => drop(tokio::spawn(hand_on(vm.clone(), connection))),
                    // The client has gone already.
                    Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                    Err(error) => {
                        log::error!("connections in the pod's namespace are no longer taken in: {error}");
                        break;
                    }
                }
            }
            drop(steering);
        });
    }
}

async fn hand_on(vm: Arc<Vm>, connection: TcpStream) {
    let Ok(address) = connection.local_addr() else { return };
    if let Err(error) = connect(&vm, connection, address).await {
        log::info!("a connection to {address} in the pod's namespace fails: {error}");
    }
}

async fn connect(vm: &Vm, connection: TcpStream, to: SocketAddr) -> Result<(), super::NetworkError> {
    let deadline = Instant::now() + CONNECT_LIMIT;
    let (port, _closed) = vm.expect(&[(FdRole::StreamSocket, connection.as_fd())], deadline).await?;
    let request =
        api::ConnectTcpRequest { stream: port.0, to: Some(endpoint(to)).into(), ..Default::default() };
    if let Err(error) = vm.agent().connect_tcp(&request, deadline).await {
        vm.forget(port, deadline).await;
        return Err(error.into());
    }
    Ok(())
}
