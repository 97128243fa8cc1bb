//! Addresses with ports, as the shim and the agent write them.

use crate::failure::{Failure, Kind};
use std::net::{IpAddr, SocketAddr};
use vmshim_protocol::agent::Endpoint;

/// What a request names.
pub fn parse(field: &str, endpoint: &Endpoint) -> Result<SocketAddr, Failure> {
    let refused = || Failure::new(Kind::InvalidArgument, format!("{field}: is no address with a port"));
    let address = match *endpoint.address.as_slice() {
        [a, b, c, d] => IpAddr::from([a, b, c, d]),
        ref bytes => IpAddr::from(<[u8; 16]>::try_from(bytes).map_err(|_| refused())?),
    };
    let port = u16::try_from(endpoint.port).ok().filter(|port| *port != 0).ok_or_else(refused)?;
    Ok(SocketAddr::new(address, port))
}

/// How an event names one.
pub fn write(address: SocketAddr) -> Endpoint {
    let bytes = match address.ip() {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    };
    Endpoint { address: bytes, port: address.port().into(), ..Default::default() }
}

/// The same with an IPv4 address where an IPv6 socket knows it as a mapped one.
pub fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        for text in ["127.0.0.1:80", "[::1]:65535", "0.0.0.0:1"] {
            let address: SocketAddr = text.parse().unwrap();
            assert_eq!(parse("x", &write(address)).unwrap(), address);
        }
        for (length, port) in [(4, 0), (4, 65536), (5, 80), (0, 80)] {
            let endpoint = Endpoint { address: vec![1; length], port, ..Default::default() };
            assert_eq!(parse("x", &endpoint).unwrap_err().message, "x: is no address with a port");
        }
    }
}
