//! Packets with file descriptors over a `SOCK_SEQPACKET` socket.

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::cmsg_space;
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, sendmsg,
    socketpair,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Bytes of the largest packet.
pub const MAX_MESSAGE: usize = 64 * 1024;

/// Descriptors of the largest packet: as many as the kernel takes at once.
pub const MAX_FDS: usize = 253;

/// Why a packet could not be sent or taken.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// The peer has closed its end.
    #[error("the other side has closed the control socket")]
    Closed,
    /// The socket is non-blocking and not ready.
    #[error("the control socket is not ready")]
    WouldBlock,
    /// More than [`MAX_MESSAGE`] bytes or [`MAX_FDS`] descriptors.
    #[error("a control message is larger than the protocol allows")]
    TooLarge,
    /// Not a message of the protocol.
    #[error("a control message cannot be understood")]
    Malformed(#[source] serde_json::Error),
    /// The kernel refused.
    #[error("the control socket failed")]
    Os(#[source] Errno),
}

impl From<Errno> for SocketError {
    fn from(errno: Errno) -> Self {
        match errno {
            Errno::EAGAIN => Self::WouldBlock,
            Errno::EPIPE | Errno::ECONNRESET => Self::Closed,
            other => Self::Os(other),
        }
    }
}

/// One end of a control connection. Blocking or not as its descriptor is.
#[derive(Debug)]
pub struct ControlSocket(OwnedFd);

impl ControlSocket {
    /// A connected pair, both ends close-on-exec.
    ///
    /// # Errors
    /// When the process has no descriptors left.
    pub fn pair() -> Result<(Self, Self), SocketError> {
        let (a, b) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
        Ok((Self(a), Self(b)))
    }

    /// Takes over the descriptor of a connected `SOCK_SEQPACKET` socket.
    pub fn from_fd(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// Sends one message.
    ///
    /// # Errors
    /// `TooLarge` before anything is sent; `WouldBlock` when nothing was sent; `Closed` when the peer is gone.
    pub fn send<T: Serialize>(&self, message: &T, fds: &[BorrowedFd<'_>]) -> Result<(), SocketError> {
        let bytes = serde_json::to_vec(message).map_err(SocketError::Malformed)?;
        if bytes.len() > MAX_MESSAGE || fds.len() > MAX_FDS {
            return Err(SocketError::TooLarge);
        }
        let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let control = if raw.is_empty() { &[][..] } else { &rights[..] };
        let iov = [IoSlice::new(&bytes)];
        loop {
            match sendmsg::<()>(self.0.as_raw_fd(), &iov, control, MsgFlags::MSG_NOSIGNAL, None) {
                Ok(_) => return Ok(()),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Takes one message and the descriptors sent with it.
    ///
    /// # Errors
    /// Whatever the error, no descriptor of the packet stays open.
    pub fn recv<T: DeserializeOwned>(&self) -> Result<(T, Vec<OwnedFd>), SocketError> {
        let mut bytes = vec![0; MAX_MESSAGE];
        let mut control = cmsg_space!([RawFd; MAX_FDS]);
        let (length, truncated, fds) = loop {
            let mut iov = [IoSliceMut::new(&mut bytes)];
            let flags = MsgFlags::MSG_CMSG_CLOEXEC;
            let received = match recvmsg::<()>(self.0.as_raw_fd(), &mut iov, Some(&mut control), flags) {
                Ok(received) => received,
                Err(Errno::EINTR) => continue,
                Err(errno) => return Err(errno.into()),
            };
            let mut fds = Vec::new();
            for message in received.cmsgs()? {
                if let ControlMessageOwned::ScmRights(raw) = message {
                    // SAFETY: the kernel has just installed these descriptors for us and nobody else knows them.
                    fds.extend(raw.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
                }
            }
            let truncated = received.flags.intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC);
            break (received.bytes, truncated, fds);
        };
        if truncated {
            return Err(SocketError::TooLarge);
        }
        if length == 0 {
            return Err(SocketError::Closed);
        }
        let message = serde_json::from_slice(&bytes[..length]).map_err(SocketError::Malformed)?;
        Ok((message, fds))
    }
}

impl AsFd for ControlSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for ControlSocket {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl From<ControlSocket> for OwnedFd {
    fn from(socket: ControlSocket) -> Self {
        socket.0
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;
    use crate::control::{Command, FdRole, Request};

    fn request(fds: Vec<FdRole>) -> Request {
        Request { id: 1, command: Command::Expect { port: 9 }, fds }
    }

    #[test]
    fn message_and_descriptor_arrive_together() {
        let (a, b) = ControlSocket::pair().unwrap();
        let (mut reader, mut writer) = std::io::pipe().unwrap();
        a.send(&request(vec![FdRole::StreamSink]), &[writer.as_fd()]).unwrap();
        let (message, fds): (Request, _) = b.recv().unwrap();
        assert_eq!(message, request(vec![FdRole::StreamSink]));
        writer.write_all(b"-").unwrap();
        drop(writer);
        let mut sent = std::fs::File::from(fds.into_iter().next().unwrap());
        sent.write_all(b"x").unwrap();
        drop(sent);
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "-x");
    }

    #[test]
    fn closed_peer_is_told_apart() {
        let (a, b) = ControlSocket::pair().unwrap();
        drop(b);
        assert!(matches!(a.recv::<Request>(), Err(SocketError::Closed)));
        assert!(matches!(a.send(&request(vec![]), &[]), Err(SocketError::Closed)));
    }

    #[test]
    fn oversized_message_is_refused_by_the_sender() {
        let (a, _b) = ControlSocket::pair().unwrap();
        let error = a.send(&"x".repeat(MAX_MESSAGE), &[]).unwrap_err();
        assert!(matches!(error, SocketError::TooLarge));
    }

    #[test]
    fn garbage_is_malformed_and_leaks_no_descriptor() {
        let (a, b) = ControlSocket::pair().unwrap();
        let (reader, writer) = std::io::pipe().unwrap();
        a.send(&"not a request", &[writer.as_fd()]).unwrap();
        drop(writer);
        assert!(matches!(b.recv::<Request>(), Err(SocketError::Malformed(_))));
        // End of file arrives only if the copy that travelled was closed.
        assert_eq!(std::io::read_to_string(reader).unwrap(), "");
    }
}
