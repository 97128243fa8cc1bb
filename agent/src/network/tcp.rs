//! Connections from the host to servers of the guest, and listening in the stead of servers of the host.

use super::Home;
use crate::failure::{Failure, Kind, describe};
use crate::link::{Dialer, Host};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrStorage, bind, setsockopt, socket, sockopt,
};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::os::fd::AsRawFd;
use tokio::net::{TcpSocket, TcpStream};
use vmshim_protocol::agent::ConnectTcpRequest;

/// Connects a stream of the host to a server of the guest, or of the pod's network namespace, and carries bytes until both
/// ends are done.
pub async fn connect(request: &ConnectTcpRequest, home: Option<Home>) -> Result<(), Failure> {
    let to = request
        .to
        .socket_address()
        .ok_or_else(|| Failure::new(Kind::InvalidArgument, "to: is no address with a port"))?;
    let mut server = open(to, home.as_ref()).await.map_err(|error| {
        Failure::new(Kind::FailedPrecondition, format!("{to} of the guest: {}", describe(&error)))
    })?;
    let mut client = Host.dial(request.stream).await.map_err(|error| {
        Failure::new(Kind::Internal, format!("dial stream {}: {}", request.stream, describe(&error)))
    })?;
    tokio::spawn(async move {
        // Whatever ends it, both sides see their connection closed.
        let _ = tokio::io::copy_bidirectional(&mut server, &mut client).await;
    });
    Ok(())
}

/// The client's family first; but on the loopback it cannot know that a server has only the other one, since its own
/// connection has been accepted.
async fn open(to: SocketAddr, home: Option<&Home>) -> io::Result<TcpStream> {
    let result = open_one(to, home).await;
    match result {
        Err(_) if to.ip().is_loopback() => {
            let other = match to.ip() {
                IpAddr::V4(_) => IpAddr::from(Ipv6Addr::LOCALHOST),
                IpAddr::V6(_) => IpAddr::from(Ipv4Addr::LOCALHOST),
            };
            open_one((other, to.port()).into(), home).await.or(result)
        }
        other => other,
    }
}

/// A socket is for ever of the network namespace that it was made in.
async fn open_one(address: SocketAddr, home: Option<&Home>) -> io::Result<TcpStream> {
    let make = if address.is_ipv4() { TcpSocket::new_v4 } else { TcpSocket::new_v6 };
    let socket = home.map_or_else(make, |home| home.run(make)?)?;
    socket.connect(address).await
}

/// Listens in the network namespace of this thread. An IPv6 address is that alone, so that there may be another server for
/// IPv4.
pub fn listen(at: SocketAddr) -> io::Result<TcpListener> {
    let family = if at.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(family, SockType::Stream, flags, None)?;
    setsockopt(&socket, sockopt::ReuseAddr, &true)?;
    if at.is_ipv6() {
        setsockopt(&socket, sockopt::Ipv6V6Only, &true)?;
    }
    bind(socket.as_raw_fd(), &SockaddrStorage::from(at))?;
    nix::sys::socket::listen(&socket, Backlog::MAXCONN)?;
    Ok(socket.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmshim_protocol::agent::Endpoint;

    #[tokio::test]
    async fn a_server_of_either_family_is_found() {
        let listener = listen((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
        let port = listener.local_addr().unwrap().port();
        let addresses = [IpAddr::from(Ipv4Addr::LOCALHOST), IpAddr::from(Ipv6Addr::LOCALHOST)];
        for address in addresses {
            assert!(open(SocketAddr::new(address, port), None).await.is_ok());
        }
        drop(listener);
        assert!(open(SocketAddr::new(addresses[0], port), None).await.is_err());
    }

    #[test]
    fn the_families_listen_apart() {
        let v6 = listen((Ipv6Addr::UNSPECIFIED, 0).into()).unwrap();
        let port = v6.local_addr().unwrap().port();
        assert!(listen((Ipv4Addr::UNSPECIFIED, port).into()).is_ok());
        assert!(listen((Ipv6Addr::UNSPECIFIED, port).into()).is_err());
    }

    #[tokio::test]
    async fn what_is_no_endpoint_is_refused() {
        let to = Endpoint { address: vec![127, 0, 0, 1], port: 65536, ..Default::default() };
        let request = ConnectTcpRequest { to: Some(to).into(), ..Default::default() };
        assert_eq!(connect(&request, None).await.unwrap_err().kind, Kind::InvalidArgument);
    }
}
