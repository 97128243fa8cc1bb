//! Connections from the pod's localhost on the host to the guest's.

use crate::failure::{Failure, Kind, describe};
use crate::link::{Dialer, Host};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use tokio::net::TcpStream;
use vmshim_protocol::agent::ConnectLocalhostRequest;

/// Connects a stream of the host to a port of the guest's localhost, and carries bytes until both ends are done.
pub async fn connect(request: &ConnectLocalhostRequest) -> Result<(), Failure> {
    let port = u16::try_from(request.port)
        .map_err(|_| Failure::new(Kind::InvalidArgument, format!("port {} is none", request.port)))?;
    let mut server = open(port, request.ipv6).await.map_err(|error| {
        let message = format!("port {port} of the guest's localhost: {}", describe(&error));
        Failure::new(Kind::FailedPrecondition, message)
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

/// The client's family first; but it cannot know that a server has only the other one, since its own connection has
/// been accepted.
async fn open(port: u16, ipv6: bool) -> io::Result<TcpStream> {
    let (v4, v6) = (IpAddr::from(Ipv4Addr::LOCALHOST), IpAddr::from(Ipv6Addr::LOCALHOST));
    let (first, second) = if ipv6 { (v6, v4) } else { (v4, v6) };
    match TcpStream::connect((first, port)).await {
        Ok(stream) => Ok(stream),
        Err(error) => TcpStream::connect((second, port)).await.map_err(|_| error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::TcpListener;

    #[tokio::test]
    async fn a_server_of_either_family_is_found() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        for ipv6 in [false, true] {
            assert!(open(port, ipv6).await.is_ok());
        }
        drop(listener);
        assert!(open(port, false).await.is_err());
    }

    #[tokio::test]
    async fn a_port_that_is_none_is_refused() {
        let request = ConnectLocalhostRequest { port: 65536, ..Default::default() };
        assert_eq!(connect(&request).await.unwrap_err().message, "port 65536 is none");
    }
}
