//! UDP packets with any sender, for answers in the name of servers on the host.

use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, SockaddrIn6, sendto, socket,
};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsRawFd, OwnedFd};

const UDP: u8 = 17;
const UDP_HEADER: u16 = 8;
const V4_HEADER: u16 = 20;
const HOPS: u8 = 64;

/// Sockets that send whole packets.
#[derive(Debug)]
pub struct Sender {
    v4: OwnedFd,
    v6: OwnedFd,
}

impl Sender {
    /// Opens them.
    pub fn new() -> io::Result<Self> {
        let open = |family| {
            let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
            socket(family, SockType::Raw, flags, SockProtocol::Raw)
        };
        Ok(Self { v4: open(AddressFamily::Inet)?, v6: open(AddressFamily::Inet6)? })
    }

    /// Sends a datagram. As any, it may get lost.
    pub fn send(&self, from: SocketAddr, to: SocketAddr, payload: &[u8]) -> io::Result<()> {
        match (from.ip(), to.ip()) {
            (IpAddr::V4(source), IpAddr::V4(target)) => {
                let packet = v4((source, from.port()), (target, to.port()), payload);
                let packet = packet.ok_or_else(too_long)?;
                let address = SockaddrIn::from(std::net::SocketAddrV4::new(target, 0));
                sendto(self.v4.as_raw_fd(), &packet, &address, MsgFlags::empty())?;
            }
            (IpAddr::V6(source), IpAddr::V6(target)) => {
                let packet = v6((source, from.port()), (target, to.port()), payload);
                let packet = packet.ok_or_else(too_long)?;
                let address = SockaddrIn6::from(std::net::SocketAddrV6::new(target, 0, 0, 0));
                sendto(self.v6.as_raw_fd(), &packet, &address, MsgFlags::empty())?;
            }
            _ => return Err(io::ErrorKind::InvalidInput.into()),
        }
        Ok(())
    }
}

fn too_long() -> io::Error {
    io::Error::from_raw_os_error(libc::EMSGSIZE)
}

/// RFC 791, section 3.1; the kernel fills in the checksum of the header. None where the payload is too long.
fn v4(from: (Ipv4Addr, u16), to: (Ipv4Addr, u16), payload: &[u8]) -> Option<Vec<u8>> {
    let udp = udp(from.1, to.1, &[&from.0.octets()[..], &to.0.octets()].concat(), payload)?;
    let length = V4_HEADER.checked_add(u16::try_from(udp.len()).ok()?)?;
    let mut packet = vec![0x45, 0];
    packet.extend(length.to_be_bytes());
    packet.extend([0, 0, 0, 0, HOPS, UDP, 0, 0]);
    packet.extend(from.0.octets());
    packet.extend(to.0.octets());
    packet.extend(udp);
    Some(packet)
}

/// RFC 8200, section 3. None where the payload is too long.
fn v6(from: (Ipv6Addr, u16), to: (Ipv6Addr, u16), payload: &[u8]) -> Option<Vec<u8>> {
    let udp = udp(from.1, to.1, &[&from.0.octets()[..], &to.0.octets()].concat(), payload)?;
    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend(u16::try_from(udp.len()).ok()?.to_be_bytes());
    packet.extend([UDP, HOPS]);
    packet.extend(from.0.octets());
    packet.extend(to.0.octets());
    packet.extend(udp);
    Some(packet)
}

/// RFC 768. `addresses` are those of sender and receiver, one after the other.
fn udp(from: u16, to: u16, addresses: &[u8], payload: &[u8]) -> Option<Vec<u8>> {
    let length = UDP_HEADER.checked_add(u16::try_from(payload.len()).ok()?)?;
    let mut packet = Vec::with_capacity(usize::from(length));
    packet.extend(from.to_be_bytes());
    packet.extend(to.to_be_bytes());
    packet.extend(length.to_be_bytes());
    packet.extend([0, 0]);
    packet.extend(payload);
    let pseudo = [addresses, &[0, UDP], &length.to_be_bytes()].concat();
    let checksum = match checksum(&[&pseudo, &packet]) {
        // Zero says that there is none.
        0 => 0xffff,
        checksum => checksum,
    };
    let [high, low] = checksum.to_be_bytes();
    packet[6] = high;
    packet[7] = low;
    Some(packet)
}

/// The Internet's checksum (RFC 1071) of parts, of which all but the last are of even length.
fn checksum(parts: &[&[u8]]) -> u16 {
    let words = parts.iter().flat_map(|part| part.chunks(2));
    let sum: u64 =
        words.map(|word| u64::from(u16::from_be_bytes([word[0], *word.get(1).unwrap_or(&0)]))).sum();
    let mut folded = sum;
    while folded > 0xffff {
        folded = (folded & 0xffff) + (folded >> 16);
    }
    !u16::try_from(folded).unwrap_or(u16::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_known_packet_has_its_known_checksum() {
        let packet = udp(0x1234, 53, &[127, 0, 0, 1, 127, 0, 0, 1], b"ab").unwrap();
        assert_eq!(packet[..6], [0x12, 0x34, 0, 53, 0, 10]);
        let pseudo = [127, 0, 0, 1, 127, 0, 0, 1, 0, 17, 0, 10];
        // A receiver sums up all of it and finds nothing.
        assert_eq!(checksum(&[&pseudo, &packet]), 0);
    }

    #[test]
    fn what_does_not_fit_a_packet_is_none() {
        let local = Ipv4Addr::LOCALHOST;
        assert!(v4((local, 1), (local, 2), &[0; 65507]).is_some());
        assert!(v4((local, 1), (local, 2), &[0; 65508]).is_none());
    }

    #[test]
    fn the_receiver_sees_the_sender_that_is_told() {
        let sender = match Sender::new() {
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => return,
            other => other.unwrap(),
        };
        for (from, at) in
            [("127.0.0.9:53", "127.0.0.1:0"), ("[::1]:53", "[::1]:0"), ("127.0.0.9:53", "[::]:0")]
        {
            let receiver = std::net::UdpSocket::bind(at).unwrap();
            receiver.set_read_timeout(Some(std::time::Duration::from_secs(5))).unwrap();
            let from: SocketAddr = from.parse().unwrap();
            let own =
                if from.is_ipv4() { Ipv4Addr::LOCALHOST.into() } else { IpAddr::from(Ipv6Addr::LOCALHOST) };
            let to = SocketAddr::new(own, receiver.local_addr().unwrap().port());
            sender.send(from, to, b"hello").unwrap();
            let mut buffer = [0; 16];
            let (length, seen) = receiver.recv_from(&mut buffer).unwrap();
            assert_eq!(&buffer[..length], b"hello");
            assert_eq!(crate::host_network::canonical(seen), from);
        }
    }

    proptest! {
        #[test]
        fn every_receiver_finds_the_checksum_right(
            payload in prop::collection::vec(any::<u8>(), 0..64), from: u16, to: u16, a: [u8; 16], b: [u8; 16],
        ) {
            let addresses = [a, b].concat();
            let packet = udp(from, to, &addresses, &payload).unwrap();
            let length = u16::try_from(packet.len()).unwrap().to_be_bytes();
            let pseudo = [&addresses[..], &[0, UDP], &length].concat();
            prop_assert_eq!(checksum(&[&pseudo, &packet]), 0);
        }
    }
}
