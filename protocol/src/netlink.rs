//! Requests to the kernel's rtnetlink, made by the shim in a pod's network namespace and by the agent in its guest.
//!
//! The socket belongs to the namespace in which it was opened and waits for each answer, so it is for threads that may
//! wait. What the kernel says is trusted.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload,
};
pub use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
pub use netlink_packet_route as route;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};

/// A connection to the rtnetlink of the calling thread's network namespace.
pub struct Netlink {
    socket: Socket,
    sequence: u32,
}

impl Netlink {
    /// Opens a connection.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Self { socket, sequence: 0 })
    }

    /// Asks to be told of changes of `group`, such as `RTNLGRP_LINK`, which [`Netlink::changes`] then returns. Such a
    /// connection is for nothing else.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn subscribe(&mut self, group: u32) -> io::Result<()> {
        self.socket.add_membership(group)
    }

    /// Makes a change and waits until it is made. `flags` are those of a new object.
    ///
    /// # Errors
    /// The kernel's.
    pub fn change(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        self.send(message, flags | NLM_F_ACK)?;
        self.answers(|_| ())
    }

    /// Lists all objects of the message's kind.
    ///
    /// # Errors
    /// The kernel's, or an answer that is not understood.
    pub fn dump(&mut self, message: RouteNetlinkMessage) -> io::Result<Vec<RouteNetlinkMessage>> {
        self.send(message, NLM_F_DUMP)?;
        let mut found = Vec::new();
        self.answers(|message| found.push(message))?;
        Ok(found)
    }

    /// Waits for a message that was subscribed to.
    ///
    /// # Errors
    /// The kernel's; also when so many came that some are lost.
    pub fn changes(&mut self) -> io::Result<Vec<RouteNetlinkMessage>> {
        let (bytes, _) = self.socket.recv_from_full()?;
        let mut found = Vec::new();
        for message in messages(&bytes) {
            if let NetlinkPayload::InnerMessage(message) = message?.payload {
                found.push(message);
            }
        }
        Ok(found)
    }

    fn send(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | flags;
        header.sequence_number = self.sequence;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::from(message));
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        self.socket.send(&bytes, 0).map(drop)
    }

    /// Hands on what answers the last request, up to its end.
    fn answers(&mut self, mut each: impl FnMut(RouteNetlinkMessage)) -> io::Result<()> {
        loop {
            let (bytes, _) = self.socket.recv_from_full()?;
            for message in messages(&bytes) {
                let message = message?;
                if message.header.sequence_number != self.sequence {
                    continue;
                }
                match message.payload {
                    NetlinkPayload::InnerMessage(message) => each(message),
                    NetlinkPayload::Done(_) => return Ok(()),
                    NetlinkPayload::Error(error) if error.code.is_none() => return Ok(()),
                    NetlinkPayload::Error(error) => return Err(error.to_io()),
                    _ => {}
                }
            }
        }
    }
}

impl AsFd for Netlink {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the socket owns its descriptor and outlives the borrow.
        unsafe { BorrowedFd::borrow_raw(self.socket.as_raw_fd()) }
    }
}

/// The messages in a datagram; after one that is not understood there are no more.
fn messages(bytes: &[u8]) -> impl Iterator<Item = io::Result<NetlinkMessage<RouteNetlinkMessage>>> + '_ {
    let mut rest = bytes;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let message = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest);
        // Each message begins at a multiple of four.
        let len = message.as_ref().map_or(rest.len(), |message| {
            usize::try_from(message.header.length).unwrap_or(usize::MAX).next_multiple_of(4)
        });
        rest = rest.get(len.max(16)..).unwrap_or(&[]);
        Some(message.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error.to_string())))
    })
}

#[cfg(test)]
mod tests {
    use netlink_packet_route::link::{LinkAttribute, LinkMessage};
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_loopback_interface_is_listed() {
        let mut netlink = Netlink::open().unwrap();
        let links = netlink.dump(RouteNetlinkMessage::GetLink(LinkMessage::default())).unwrap();
        let is_lo = |attribute: &LinkAttribute| *attribute == LinkAttribute::IfName("lo".into());
        assert!(links.iter().any(|message| match message {
            RouteNetlinkMessage::NewLink(link) => link.attributes.iter().any(is_lo),
            _ => false,
        }));
    }

    #[test]
    fn a_refusal_is_the_kernels_error() {
        let mut link = LinkMessage::default();
        link.attributes.push(LinkAttribute::IfName("no-such-link".into()));
        let error = Netlink::open().unwrap().change(RouteNetlinkMessage::DelLink(link), 0).unwrap_err();
        // Without the right to, it is not even looked for.
        assert!(matches!(error.raw_os_error(), Some(1 | 19)), "{error}");
    }

    proptest! {
        #[test]
        fn any_bytes_come_to_an_end(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(messages(&bytes).count() <= 13);
        }
    }
}
