//! What the shim asks for, as types that can be asked of the kernel.

use crate::failure::{Failure, Kind};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use vmshim_protocol::address;
use vmshim_protocol::agent::{
    ConfigureNetworkRequest, Endpoint, InterfaceAddress, Neighbour as NeighbourMessage, NetworkInterface,
    Route as RouteMessage,
};

/// The longest name of an interface.
const MAX_NAME: usize = 15;

/// The smallest MTU that IPv4 allows, and the largest that a packet's length can tell.
const MTUS: std::ops::RangeInclusive<u32> = 68..=65535;

/// One interface.
#[derive(Debug, PartialEq, Eq)]
pub struct Interface {
    pub slot: u8,
    pub name: String,
    pub mac: [u8; 6],
    pub mtu: u32,
    pub no_arp: bool,
    pub addresses: Vec<Address>,
    pub routes: Vec<Route>,
    pub neighbours: Vec<Neighbour>,
}

/// One of its addresses.
#[derive(Debug, PartialEq, Eq)]
pub struct Address {
    pub ip: IpAddr,
    pub prefix: u8,
    pub peer: Option<IpAddr>,
    pub broadcast: Option<Ipv4Addr>,
    pub scope: u8,
    pub no_prefix_route: bool,
}

/// One route through it.
#[derive(Debug, PartialEq, Eq)]
pub struct Route {
    pub destination: IpAddr,
    pub prefix: u8,
    pub gateway: Option<IpAddr>,
    pub source: Option<IpAddr>,
    pub scope: u8,
    pub metric: u32,
    pub on_link: bool,
    pub mtu: u32,
}

/// One permanent neighbour.
#[derive(Debug, PartialEq, Eq)]
pub struct Neighbour {
    pub ip: IpAddr,
    pub mac: [u8; 6],
}

/// The interfaces of a request.
pub fn parse(request: &ConfigureNetworkRequest) -> Result<Vec<Interface>, Failure> {
    request.interfaces.iter().map(interface).collect()
}

/// Where the agent shall listen in others' stead.
pub fn servers(request: &ConfigureNetworkRequest) -> Result<Vec<SocketAddr>, Failure> {
    let address = |endpoint: &Endpoint| {
        endpoint.socket_address().ok_or_else(|| wrong("servers", "holds what is no address with a port"))
    };
    request.servers.iter().map(address).collect()
}

fn interface(message: &NetworkInterface) -> Result<Interface, Failure> {
    let name = &message.name;
    let usable = |letter: char| letter.is_ascii_graphic() && letter != '/' && letter != ':';
    let reserved = ["", ".", "..", "lo"].contains(&name.as_str());
    if reserved || name.len() > MAX_NAME || !name.chars().all(usable) {
        return Err(wrong("interfaces.name", format!("{name:?} cannot name a network interface")));
    }
    let within =
        |failure: Failure| Failure { message: format!("interface {name}: {}", failure.message), ..failure };
    let parsed = || {
        if !MTUS.contains(&message.mtu) {
            let problem = format!("must be from {} to {}, not {}", MTUS.start(), MTUS.end(), message.mtu);
            return Err(wrong("mtu", problem));
        }
        Ok(Interface {
            slot: u8::try_from(message.slot).map_err(|_| wrong("slot", "is out of range"))?,
            name: name.clone(),
            mac: mac("mac", &message.mac)?,
            mtu: message.mtu,
            no_arp: message.no_arp,
            addresses: message.addresses.iter().map(address).collect::<Result<_, _>>()?,
            routes: message.routes.iter().map(route).collect::<Result<_, _>>()?,
            neighbours: message.neighbours.iter().map(neighbour).collect::<Result<_, _>>()?,
        })
    };
    parsed().map_err(within)
}

fn address(message: &InterfaceAddress) -> Result<Address, Failure> {
    let ip = ip("addresses.address", &message.address)?;
    let peer = optional("addresses.peer", &message.peer)?;
    same_family("addresses.peer", ip, peer)?;
    let broadcast = match optional("addresses.broadcast", &message.broadcast)? {
        None => None,
        Some(IpAddr::V4(address)) => Some(address),
        Some(IpAddr::V6(_)) => return Err(wrong("addresses.broadcast", "must be an IPv4 address")),
    };
    Ok(Address {
        ip,
        prefix: prefix("addresses.prefix", ip, message.prefix)?,
        peer,
        broadcast,
        scope: scope("addresses.scope", message.scope)?,
        no_prefix_route: message.no_prefix_route,
    })
}

fn route(message: &RouteMessage) -> Result<Route, Failure> {
    let destination = ip("routes.destination", &message.destination)?;
    let gateway = optional("routes.gateway", &message.gateway)?;
    let source = optional("routes.source", &message.source)?;
    // An IPv4 route through an IPv6 gateway is the kernel's to judge.
    if destination.is_ipv6() {
        same_family("routes.gateway", destination, gateway)?;
    }
    same_family("routes.source", destination, source)?;
    Ok(Route {
        destination,
        prefix: prefix("routes.prefix", destination, message.prefix)?,
        gateway,
        source,
        scope: scope("routes.scope", message.scope)?,
        metric: message.metric,
        on_link: message.on_link,
        mtu: message.mtu,
    })
}

fn neighbour(message: &NeighbourMessage) -> Result<Neighbour, Failure> {
    Ok(Neighbour {
        ip: ip("neighbours.address", &message.address)?,
        mac: mac("neighbours.mac", &message.mac)?,
    })
}

fn wrong(field: &str, problem: impl std::fmt::Display) -> Failure {
    Failure::new(Kind::InvalidArgument, format!("{field} {problem}"))
}

fn ip(field: &str, bytes: &[u8]) -> Result<IpAddr, Failure> {
    optional(field, bytes)?.ok_or_else(|| wrong(field, "is missing"))
}

fn optional(field: &str, bytes: &[u8]) -> Result<Option<IpAddr>, Failure> {
    if bytes.is_empty() {
        return Ok(None);
    }
    let parsed = address::ip(bytes);
    parsed.map(Some).ok_or_else(|| wrong(field, format!("has {} bytes, not 4 or 16", bytes.len())))
}

fn same_family(field: &str, one: IpAddr, other: Option<IpAddr>) -> Result<(), Failure> {
    match other {
        Some(other) if other.is_ipv4() != one.is_ipv4() => {
            Err(wrong(field, format!("{other} is not of the family of {one}")))
        }
        _ => Ok(()),
    }
}

fn prefix(field: &str, ip: IpAddr, prefix: u32) -> Result<u8, Failure> {
    let most = if ip.is_ipv4() { 32 } else { 128 };
    u8::try_from(prefix)
        .ok()
        .filter(|prefix| *prefix <= most)
        .ok_or_else(|| wrong(field, format!("{prefix} is longer than {ip}")))
}

fn scope(field: &str, scope: u32) -> Result<u8, Failure> {
    u8::try_from(scope).map_err(|_| wrong(field, format!("{scope} is not a scope")))
}

fn mac(field: &str, bytes: &[u8]) -> Result<[u8; 6], Failure> {
    let mac =
        <[u8; 6]>::try_from(bytes).map_err(|_| wrong(field, format!("has {} bytes, not 6", bytes.len())))?;
    if mac == [0; 6] || mac[0] & 1 == 1 {
        return Err(wrong(field, "is not the address of one station"));
    }
    Ok(mac)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use protobuf::Message;

    fn sound() -> NetworkInterface {
        NetworkInterface {
            slot: 1,
            name: "eth0".into(),
            mac: vec![2, 0, 0, 0, 0, 1],
            mtu: 1500,
            addresses: vec![InterfaceAddress {
                address: vec![10, 0, 0, 2],
                prefix: 24,
                broadcast: vec![10, 0, 0, 255],
                ..Default::default()
            }],
            routes: vec![RouteMessage {
                destination: vec![0; 16],
                gateway: [vec![0xfe, 0x80], vec![0; 13], vec![1]].concat(),
                ..Default::default()
            }],
            neighbours: vec![NeighbourMessage {
                address: vec![10, 0, 0, 1],
                mac: vec![2, 0, 0, 0, 0, 2],
                ..Default::default()
            }],
            ..Default::default()
        }
    }

    #[test]
    fn what_is_sound_is_understood() {
        let parsed = interface(&sound()).unwrap();
        assert_eq!(parsed.addresses[0].ip, IpAddr::from([10, 0, 0, 2]));
        assert_eq!(parsed.routes[0].gateway.unwrap().to_string(), "fe80::1");
    }

    #[test]
    fn errors_name_the_interface_and_the_field() {
        let refused = |change: fn(&mut NetworkInterface)| {
            let mut message = sound();
            change(&mut message);
            let failure = interface(&message).unwrap_err();
            assert_eq!(failure.kind, Kind::InvalidArgument);
            failure.message
        };
        assert_eq!(refused(|i| i.mtu = 67), "interface eth0: mtu must be from 68 to 65535, not 67");
        assert_eq!(refused(|i| i.slot = 256), "interface eth0: slot is out of range");
        assert_eq!(refused(|i| i.mac = vec![1; 6]), "interface eth0: mac is not the address of one station");
        assert_eq!(refused(|i| i.mac = vec![2; 5]), "interface eth0: mac has 5 bytes, not 6");
        assert_eq!(
            refused(|i| i.name = "../x".into()),
            "interfaces.name \"../x\" cannot name a network interface"
        );
        assert_eq!(
            refused(|i| i.name = "lo".into()),
            "interfaces.name \"lo\" cannot name a network interface"
        );
        let address = refused(|i| i.addresses[0].prefix = 33);
        assert_eq!(address, "interface eth0: addresses.prefix 33 is longer than 10.0.0.2");
        assert_eq!(
            refused(|i| i.addresses[0].address.clear()),
            "interface eth0: addresses.address is missing"
        );
        assert!(refused(|i| i.routes[0].source = vec![1; 4]).contains("routes.source"));
        assert!(refused(|i| i.routes[0].gateway = vec![1; 4]).contains("routes.gateway"));
        assert!(refused(|i| i.neighbours[0].address = vec![1; 5]).contains("has 5 bytes"));
    }

    proptest! {
        #[test]
        fn any_request_is_understood_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            if let Ok(request) = ConfigureNetworkRequest::parse_from_bytes(&bytes) {
                let _ = parse(&request);
            }
        }
    }
}
