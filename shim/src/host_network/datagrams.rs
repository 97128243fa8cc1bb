//! Datagrams that containers send to servers on the host or beyond: one socket of the host's for each pair of a client
//! and a server.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use tokio::net::{UdpSocket, UnixStream};
use tokio::sync::OwnedSemaphorePermit;
use vmshim_protocol::datagrams::{LONGEST, read, write};

use super::{Refused, answer, expect};
use crate::vm::{Port, Vm};

/// For one guest at a time: twice as many as the agent has, since the end of one comes here a little later. Which of them
/// are still in use the guest knows.
pub const MOST_PAIRS: usize = 512;

/// Carries the datagrams of a pair until the guest ends it.
pub async fn follow(vm: Arc<Vm>, connection: u64, to: SocketAddr, permit: OwnedSemaphorePermit) {
    match open(&vm, to).await {
        Ok((port, stream, socket)) => {
            answer(&vm, connection, Some(port)).await;
            // The guest has ended it, or will find out.
            let _ = exchange(stream, &socket).await;
        }
        Err(error) => {
            log::info!("datagrams to {to} get lost: {error}");
            answer(&vm, connection, None).await;
        }
    }
    drop(permit);
}

async fn open(vm: &Vm, to: SocketAddr) -> Result<(Port, UnixStream, UdpSocket), Refused> {
    let own = match to {
        SocketAddr::V4(_) => SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)),
        SocketAddr::V6(_) => SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0)),
    };
    let socket = UdpSocket::bind(own).await?;
    socket.connect(to).await?;
    let (ours, vmms) = UnixStream::pair()?;
    let port = expect(vm, &vmms.into_std()?.into()).await?;
    Ok((port, ours, socket))
}

/// Until the stream ends.
async fn exchange(stream: UnixStream, socket: &UdpSocket) -> io::Result<()> {
    let (mut input, mut output) = stream.into_split();
    let outward = async {
        let mut buffer = Vec::new();
        loop {
            read(&mut input, &mut buffer).await?;
            // As any datagram, it may get lost.
            let _ = socket.send(&buffer).await;
        }
    };
    let inward = async {
        let mut buffer = vec![0; LONGEST];
        loop {
            // What comes back of a datagram that nobody wanted is an error of the socket, but not its end.
            if let Ok(length) = socket.recv(&mut buffer).await {
                write(&mut output, buffer.get(..length).unwrap_or_default()).await?;
            }
        }
    };
    tokio::select! {
        result = outward => result,
        result = inward => result,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn datagrams_go_both_ways_and_a_server_that_is_not_there_yet_does_no_harm() {
        let place = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let server = place.local_addr().unwrap();
        drop(place);
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        socket.connect(server).await.unwrap();
        let (mut guest, ours) = UnixStream::pair().unwrap();
        let carried = tokio::spawn(async move { exchange(ours, &socket).await });
        write(&mut guest, b"lost").await.unwrap();
        let server = loop {
            // The first has been refused by now.
            match UdpSocket::bind(server).await {
                Ok(server) => break server,
                Err(_) => tokio::task::yield_now().await,
            }
        };
        let mut buffer = [0; 16];
        let (length, client) = loop {
            write(&mut guest, b"hello").await.unwrap();
            if let Ok(received) = server.try_recv_from(&mut buffer) {
                break received;
            }
            tokio::task::yield_now().await;
        };
        assert!(length > 0);
        server.send_to(b"answer", client).await.unwrap();
        let mut answer = Vec::new();
        read(&mut guest, &mut answer).await.unwrap();
        assert_eq!(answer, b"answer");
        drop(guest);
        assert_eq!(carried.await.unwrap().unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }
}
