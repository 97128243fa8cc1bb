//! Internet addresses in messages: 4 bytes for IPv4, 16 for IPv6.

use std::net::{IpAddr, SocketAddr};

use crate::agent::Endpoint;

/// The bytes of an address.
#[must_use]
pub fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

/// The address that bytes are, if they are one.
#[must_use]
pub fn ip(bytes: &[u8]) -> Option<IpAddr> {
    let v4 = <[u8; 4]>::try_from(bytes).map(IpAddr::from);
    v4.or_else(|_| <[u8; 16]>::try_from(bytes).map(IpAddr::from)).ok()
}

impl Endpoint {
    /// Address and port, if they are such; port 0 is none.
    #[must_use]
    pub fn socket_address(&self) -> Option<SocketAddr> {
        let port = u16::try_from(self.port).ok().filter(|port| *port != 0)?;
        Some(SocketAddr::new(ip(&self.address)?, port))
    }
}

impl From<SocketAddr> for Endpoint {
    fn from(address: SocketAddr) -> Self {
        Self { address: octets(address.ip()), port: address.port().into(), ..Self::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        for text in ["127.0.0.1:80", "[::1]:65535", "0.0.0.0:1"] {
            let address: SocketAddr = text.parse().unwrap();
            assert_eq!(Endpoint::from(address).socket_address(), Some(address));
        }
    }

    #[test]
    fn what_is_no_address_with_a_port_is_none() {
        for (length, port) in [(4, 0), (4, 65536), (5, 80), (0, 80), (17, 80)] {
            let endpoint = Endpoint { address: vec![1; length], port, ..Endpoint::default() };
            assert_eq!(endpoint.socket_address(), None, "{length} bytes, port {port}");
        }
    }
}
