//! Requests to the kernel, one for each thing that an interface has.

use super::request::{Address, Interface, Neighbour, Route};
use std::net::IpAddr;
use vmshim_protocol::netlink::route::address::{
    AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage,
};
use vmshim_protocol::netlink::route::link::{LinkAttribute, LinkFlags, LinkMessage};
use vmshim_protocol::netlink::route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use vmshim_protocol::netlink::route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric, RouteProtocol,
    RouteScope, RouteType, RouteVia,
};
use vmshim_protocol::netlink::route::{AddressFamily, RouteNetlinkMessage};

/// `RT_TABLE_LOCAL`: what the kernel takes for its own.
const LOCAL_TABLE: u8 = 255;

/// Gives the interface another name.
pub fn rename(index: u32, name: String) -> RouteNetlinkMessage {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.attributes.push(LinkAttribute::IfName(name));
    RouteNetlinkMessage::SetLink(message)
}

/// Moves the interface to the network namespace of a process.
pub fn move_to(index: u32, pid: u32) -> RouteNetlinkMessage {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.attributes.push(LinkAttribute::NetNsPid(pid));
    RouteNetlinkMessage::SetLink(message)
}

/// Gives the interface its name, address and MTU, and sets it up.
pub fn link(interface: &Interface, index: u32) -> RouteNetlinkMessage {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.header.flags = LinkFlags::Up;
    message.header.change_mask = LinkFlags::Up;
    if interface.no_arp {
        message.header.flags |= LinkFlags::Noarp;
        message.header.change_mask |= LinkFlags::Noarp;
    }
    message.attributes = vec![
        LinkAttribute::IfName(interface.name.clone()),
        LinkAttribute::Address(interface.mac.to_vec()),
        LinkAttribute::Mtu(interface.mtu),
    ];
    RouteNetlinkMessage::SetLink(message)
}

/// Adds an address.
pub fn address(address: &Address, index: u32) -> RouteNetlinkMessage {
    let mut message = AddressMessage::default();
    message.header.family = family(address.ip);
    message.header.prefix_len = address.prefix;
    message.header.scope = address.scope.into();
    message.header.index = index;
    let mut flags = AddressFlags::empty();
    if address.no_prefix_route {
        flags |= AddressFlags::Noprefixroute;
    }
    if address.ip.is_ipv6() {
        // The host has made sure of it already, and looking for a duplicate takes a second.
        flags |= AddressFlags::Nodad;
        message.header.flags = AddressHeaderFlags::Nodad;
    }
    message.attributes = vec![
        AddressAttribute::Local(address.ip),
        AddressAttribute::Address(address.peer.unwrap_or(address.ip)),
        AddressAttribute::Flags(flags),
    ];
    if let Some(broadcast) = address.broadcast {
        message.attributes.push(AddressAttribute::Broadcast(broadcast));
    }
    RouteNetlinkMessage::NewAddress(message)
}

/// Adds a route.
pub fn route(route: &Route, index: u32) -> RouteNetlinkMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = family(route.destination);
    message.header.destination_prefix_length = route.prefix;
    message.header.table = RouteHeader::RT_TABLE_MAIN;
    message.header.protocol = RouteProtocol::Boot;
    message.header.scope = route.scope.into();
    message.header.kind = RouteType::Unicast;
    if route.on_link {
        message.header.flags = RouteFlags::Onlink;
    }
    message.attributes.push(RouteAttribute::Oif(index));
    if route.prefix > 0 {
        message.attributes.push(RouteAttribute::Destination(route_address(route.destination)));
    }
    match route.gateway {
        Some(IpAddr::V6(gateway)) if route.destination.is_ipv4() => {
            message.attributes.push(RouteAttribute::Via(RouteVia::Inet6(gateway)));
        }
        Some(gateway) => message.attributes.push(RouteAttribute::Gateway(route_address(gateway))),
        None => {}
    }
    if let Some(source) = route.source {
        message.attributes.push(RouteAttribute::PrefSource(route_address(source)));
    }
    if route.metric > 0 {
        message.attributes.push(RouteAttribute::Priority(route.metric));
    }
    if route.mtu > 0 {
        message.attributes.push(RouteAttribute::Metrics(vec![RouteMetric::Mtu(route.mtu)]));
    }
    RouteNetlinkMessage::NewRoute(message)
}

/// Makes all addresses of both families local to an interface, and the loopback's own the source of what goes there.
pub fn every_address(index: u32) -> [RouteNetlinkMessage; 2] {
    let sources = [IpAddr::from([127, 0, 0, 1]), IpAddr::from(std::net::Ipv6Addr::LOCALHOST)];
    sources.map(|source| {
        let mut message = RouteMessage::default();
        message.header.address_family = family(source);
        message.header.table = LOCAL_TABLE;
        message.header.protocol = RouteProtocol::Boot;
        message.header.scope = RouteScope::Host;
        message.header.kind = RouteType::Local;
        message.attributes.push(RouteAttribute::Oif(index));
        message.attributes.push(RouteAttribute::PrefSource(route_address(source)));
        RouteNetlinkMessage::NewRoute(message)
    })
}

/// Adds a neighbour for good.
pub fn neighbour(neighbour: &Neighbour, index: u32) -> RouteNetlinkMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = family(neighbour.ip);
    message.header.ifindex = index;
    message.header.state = NeighbourState::Permanent;
    let destination = match neighbour.ip {
        IpAddr::V4(ip) => NeighbourAddress::Inet(ip),
        IpAddr::V6(ip) => NeighbourAddress::Inet6(ip),
    };
    message.attributes = vec![
        NeighbourAttribute::Destination(destination),
        NeighbourAttribute::LinkLayerAddress(neighbour.mac.to_vec()),
    ];
    RouteNetlinkMessage::NewNeighbour(message)
}

/// A hardware address as it is usually written.
pub fn hex(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

fn family(ip: IpAddr) -> AddressFamily {
    if ip.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 }
}

fn route_address(ip: IpAddr) -> RouteAddress {
    match ip {
        IpAddr::V4(ip) => RouteAddress::Inet(ip),
        IpAddr::V6(ip) => RouteAddress::Inet6(ip),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hardware_addresses_are_written_as_usual() {
        assert_eq!(hex([2, 0, 0xab, 0, 0, 0x1f]), "02:00:ab:00:00:1f");
    }

    #[test]
    fn a_default_route_has_no_destination_and_an_on_link_gateway_is_marked() {
        let route = Route {
            destination: IpAddr::from([0, 0, 0, 0]),
            prefix: 0,
            gateway: Some(IpAddr::from([169, 254, 1, 1])),
            source: None,
            scope: 0,
            metric: 0,
            on_link: true,
            mtu: 0,
        };
        let RouteNetlinkMessage::NewRoute(message) = super::route(&route, 7) else { panic!("a route") };
        assert_eq!(message.header.flags, RouteFlags::Onlink);
        let gateway = RouteAttribute::Gateway(RouteAddress::Inet([169, 254, 1, 1].into()));
        assert_eq!(message.attributes, [RouteAttribute::Oif(7), gateway]);
    }
}
