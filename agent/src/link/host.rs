//! The host behind vsock.

use super::{Dialer, Stream};
use crate::sys::register;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, VsockAddr, accept4, bind, connect, getpeername, getsockopt,
    listen, socket, sockopt,
};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use tokio::io::Interest;
use vmshim_protocol::vsock::HOST_CID;

/// Dials the host.
#[derive(Debug, Clone, Copy)]
pub struct Host;

impl Host {
    /// Begins to dial, without an event loop yet: at boot the host's answer and the agent's work overlap.
    pub fn begin(port: u32) -> io::Result<OwnedFd> {
        let socket = new_socket()?;
        match connect(socket.as_raw_fd(), &VsockAddr::new(HOST_CID, port)) {
            Ok(()) | Err(nix::Error::EINPROGRESS) => Ok(socket),
            Err(error) => Err(error.into()),
        }
    }

    /// Waits for the answer to a dial that has begun.
    pub async fn finish(socket: OwnedFd) -> io::Result<Stream> {
        let stream = Stream::new(socket)?;
        stream
            .when(Interest::WRITABLE, |socket| match getsockopt(&socket, sockopt::SocketError)? {
                0 => match getpeername::<VsockAddr>(socket.as_raw_fd()) {
                    Ok(_) => Ok(()),
                    // The event loop's first guess is that a descriptor is ready; it is not yet.
                    Err(nix::Error::ENOTCONN) => Err(io::ErrorKind::WouldBlock.into()),
                    Err(error) => Err(error.into()),
                },
                code => Err(io::Error::from_raw_os_error(code)),
            })
            .await?;
        Ok(stream)
    }
}

#[async_trait::async_trait]
impl Dialer for Host {
    async fn dial(&self, port: u32) -> io::Result<Stream> {
        Self::finish(Self::begin(port)?).await
    }
}

/// Listens on a port of the guest and hands out the streams that the host opens. Others inside the guest, a container
/// with a vsock socket among them, are turned away: the agent obeys the host alone.
pub async fn accept_from_host(port: u32, mut take: impl FnMut(Stream)) -> io::Result<()> {
    let socket = new_socket()?;
    bind(socket.as_raw_fd(), &VsockAddr::new(libc::VMADDR_CID_ANY, port))?;
    listen(&socket, Backlog::new(16)?)?;
    let listener = register(socket, Interest::READABLE)?;
    loop {
        let accepted = listener
            .async_io(Interest::READABLE, |listener| {
                Ok(accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK)?)
            })
            .await?;
        // SAFETY: the kernel has just made this descriptor.
        let accepted = unsafe { OwnedFd::from_raw_fd(accepted) };
        let peer = getpeername::<VsockAddr>(accepted.as_raw_fd());
        if peer.is_ok_and(|peer| peer.cid() == HOST_CID) {
            take(Stream::new(accepted)?);
        }
    }
}

fn new_socket() -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    Ok(socket(AddressFamily::Vsock, SockType::Stream, flags, None)?)
}
