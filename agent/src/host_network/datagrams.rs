//! Datagrams of containers to what may be on the host.
//!
//! Each pair of a client and a server has one stream to the host, with a socket of the host's at its other end, until
//! nothing has come either way for a while. Answers go to the client in the server's name.

use super::canonical;
use super::packet::Sender;
use crate::dials::Dials;
use crate::events::Events;
use crate::link::Stream;
use crate::sys::register;
use nix::sys::socket::{
    AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, SockType, SockaddrIn6, SockaddrLike, bind,
    recvmsg, setsockopt, socket as new_socket, sockopt,
};
use std::collections::HashMap;
use std::io::{self, IoSliceMut};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::io::Interest;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};
use vmshim_protocol::datagrams as framing;

/// Pairs at a time; datagrams of further ones are lost.
const MOST_PAIRS: usize = 256;
/// Datagrams of one pair that wait for the host; further ones are lost.
const MOST_WAITING: usize = 64;
/// After which a pair is given up, as connection trackers do.
const SILENCE: Duration = Duration::from_secs(60);

/// Client and server.
type Pair = (SocketAddr, SocketAddr);

/// The socket at which everything arrives.
pub fn socket() -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = new_socket(AddressFamily::Inet6, SockType::Datagram, flags, None)?;
    setsockopt(&socket, sockopt::Ipv4OrigDstAddr, &true)?;
    setsockopt(&socket, sockopt::Ipv6OrigDstAddr, &true)?;
    bind(socket.as_raw_fd(), &SockaddrIn6::from(SocketAddrV6::new(Ipv6Addr::UNSPECIFIED, 0, 0, 0)))?;
    Ok(socket)
}

/// Carries datagrams for as long as the guest lives.
pub async fn serve(socket: OwnedFd, events: Arc<Events>, dials: Arc<Dials>) -> io::Result<()> {
    let socket = register(socket, Interest::READABLE)?;
    let pairs = Arc::new(Pairs { table: Mutex::default(), sender: Sender::new()?, events, dials });
    let mut buffer = vec![0; framing::LONGEST];
    loop {
        let (pair, length) =
            socket.async_io(Interest::READABLE, |socket| receive(socket.as_fd(), &mut buffer)).await?;
        if let Some(pair) = pair {
            pairs.send(pair, buffer.get(..length).unwrap_or_default());
        }
    }
}

/// A datagram, and the pair it is of where the kernel says it.
fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<(Option<Pair>, usize)> {
    let mut control = nix::cmsg_space!(libc::sockaddr_in6, libc::sockaddr_in);
    let mut parts = [IoSliceMut::new(buffer)];
    let message =
        recvmsg::<SockaddrIn6>(socket.as_raw_fd(), &mut parts, Some(&mut control), MsgFlags::empty())?;
    let server = message.cmsgs()?.find_map(|control| match control {
        ControlMessageOwned::Ipv4OrigDstAddr(to) => {
            let address = Ipv4Addr::from(u32::from_be(to.sin_addr.s_addr));
            Some(SocketAddr::new(address.into(), u16::from_be(to.sin_port)))
        }
        ControlMessageOwned::Ipv6OrigDstAddr(to) => {
            Some(SocketAddr::new(IpAddr::from(to.sin6_addr.s6_addr), u16::from_be(to.sin6_port)))
        }
        _ => None,
    });
    let client = message.address.filter(|address| address.family() == Some(AddressFamily::Inet6));
    let client = client.map(|address| canonical(SocketAddr::new(address.ip().into(), address.port())));
    Ok((client.zip(server.map(canonical)), message.bytes))
}

/// The pairs between which datagrams go.
struct Pairs {
    table: Mutex<HashMap<Pair, mpsc::Sender<Vec<u8>>>>,
    sender: Sender,
    events: Arc<Events>,
    dials: Arc<Dials>,
}

impl Pairs {
    /// Hands a datagram to its pair, or loses it.
    fn send(self: &Arc<Self>, pair: Pair, datagram: &[u8]) {
        let mut table = self.lock();
        if !table.contains_key(&pair) {
            if table.len() >= MOST_PAIRS {
                return;
            }
            let (sender, datagrams) = mpsc::channel(MOST_WAITING);
            table.insert(pair, sender);
            let this = self.clone();
            tokio::spawn(async move {
                // Whoever has sent a datagram expects no answer for sure.
                let _ = this.carry(pair, datagrams).await;
                this.lock().remove(&pair);
            });
        }
        if let Some(sender) = table.get(&pair) {
            let _ = sender.try_send(datagram.to_vec());
        }
    }

    async fn carry(&self, pair: Pair, datagrams: mpsc::Receiver<Vec<u8>>) -> io::Result<()> {
        let (client, server) = pair;
        let told = |number| self.events.host_dialled(number, server, true);
        let Some(stream) = self.dials.request(told).await else { return Ok(()) };
        // As any datagram, an answer may get lost.
        exchange(stream, datagrams, |answer| drop(self.sender.send(server, client, answer))).await
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Pair, mpsc::Sender<Vec<u8>>>> {
        // Nothing that holds the lock can panic half-way.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Sends to the host what comes, and gives to `answer` what comes from there, until the host ends it or both are silent.
async fn exchange(
    stream: Stream,
    mut datagrams: mpsc::Receiver<Vec<u8>>,
    answer: impl Fn(&[u8]),
) -> io::Result<()> {
    let (mut input, mut output) = tokio::io::split(stream);
    let last = Mutex::new(Instant::now());
    let heard = || *last.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    let outward = async {
        while let Some(datagram) = datagrams.recv().await {
            framing::write(&mut output, &datagram).await?;
            heard();
        }
        Ok(())
    };
    let inward = async {
        let mut buffer = Vec::new();
        loop {
            framing::read(&mut input, &mut buffer).await?;
            answer(&buffer);
            heard();
        }
    };
    tokio::select! {
        result = outward => result,
        result = inward => result,
        () = silence(&last) => Ok(()),
    }
}

/// Waits until nothing has been heard for long enough.
async fn silence(last: &Mutex<Instant>) {
    loop {
        let until = *last.lock().unwrap_or_else(PoisonError::into_inner) + SILENCE;
        if until <= Instant::now() {
            return;
        }
        sleep_until(until).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::UdpSocket;
    use tokio::io::AsyncReadExt;

    #[tokio::test]
    async fn a_datagram_comes_with_its_pair() {
        let socket = socket().unwrap();
        let own = nix::sys::socket::getsockname::<SockaddrIn6>(socket.as_raw_fd()).unwrap().port();
        let socket = register(socket, Interest::READABLE).unwrap();
        for address in ["127.0.0.1", "::1"] {
            let ip: IpAddr = address.parse().unwrap();
            let client = UdpSocket::bind((ip, 0)).unwrap();
            client.send_to(b"hello", (ip, own)).unwrap();
            let mut buffer = [0; 16];
            let received =
                socket.async_io(Interest::READABLE, |socket| receive(socket.as_fd(), &mut buffer)).await;
            let pair = (client.local_addr().unwrap(), SocketAddr::new(ip, own));
            assert_eq!(received.unwrap(), (Some(pair), 5));
        }
    }

    #[tokio::test]
    async fn datagrams_go_both_ways_until_the_host_ends_it() {
        let (ours, hosts) = std::os::unix::net::UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        hosts.set_nonblocking(true).unwrap();
        let mut host = tokio::net::UnixStream::from_std(hosts).unwrap();
        let (sender, datagrams) = mpsc::channel(4);
        let (answers, mut answered) = mpsc::channel(4);
        let stream = Stream::new(ours.into()).unwrap();
        let carried = tokio::spawn(exchange(stream, datagrams, move |answer| {
            answers.try_send(answer.to_vec()).unwrap();
        }));
        sender.send(b"ab".to_vec()).await.unwrap();
        let mut frame = [0; 4];
        host.read_exact(&mut frame).await.unwrap();
        assert_eq!(frame, [0, 2, b'a', b'b']);
        framing::write(&mut host, b"xyz").await.unwrap();
        assert_eq!(answered.recv().await.unwrap(), b"xyz");
        drop(host);
        assert!(carried.await.unwrap().is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_pair_is_given_up() {
        let (ours, _host) = std::os::unix::net::UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let (_sender, datagrams) = mpsc::channel(4);
        exchange(Stream::new(ours.into()).unwrap(), datagrams, |_| {}).await.unwrap();
    }
}
