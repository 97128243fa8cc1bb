//! What is in a pod's network namespace.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::Path;

use vmshim_protocol::address::octets;
use vmshim_protocol::agent as api;
use vmshim_protocol::netlink::Netlink;
use vmshim_protocol::netlink::route::address::{AddressAttribute, AddressFlags, AddressMessage};
use vmshim_protocol::netlink::route::link::{LinkAttribute, LinkFlags, LinkLayerType, LinkMessage};
use vmshim_protocol::netlink::route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use vmshim_protocol::netlink::route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric, RouteProtocol,
    RouteType, RouteVia,
};
use vmshim_protocol::netlink::route::{AddressFamily, RouteNetlinkMessage};

use super::{NetworkError, tap};

/// An interface that the guest shall have.
#[derive(Debug)]
pub struct Found {
    /// Its index in its namespace.
    pub index: u32,
    /// Everything about it but its slot.
    pub description: api::NetworkInterface,
}

/// Describes the interfaces of the calling thread's network namespace, in the order of their indices.
pub fn scan(netlink: &mut Netlink, path: &Path) -> Result<Vec<Found>, NetworkError> {
    let mut dump = |what: &str, message| {
        netlink.dump(message).map_err(NetworkError::host(format!("list the {what} of the network namespace")))
    };
    let links = dump("interfaces", RouteNetlinkMessage::GetLink(LinkMessage::default()))?;
    let addresses = dump("addresses", RouteNetlinkMessage::GetAddress(AddressMessage::default()))?;
    let mut routes = dump("routes", all_routes(AddressFamily::Inet))?;
    routes.extend(dump("routes", all_routes(AddressFamily::Inet6))?.into_iter().filter(is_v6));
    let neighbours = dump("neighbours", RouteNetlinkMessage::GetNeighbour(NeighbourMessage::default()))?;
    describe(&links, &addresses, &routes, &neighbours, path)
}

fn all_routes(family: AddressFamily) -> RouteNetlinkMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = family;
    RouteNetlinkMessage::GetRoute(message)
}

/// A kernel without IPv6 lists the routes of all families instead.
fn is_v6(message: &RouteNetlinkMessage) -> bool {
    matches!(message, RouteNetlinkMessage::NewRoute(route) if route.header.address_family == AddressFamily::Inet6)
}

fn describe(
    links: &[RouteNetlinkMessage],
    addresses: &[RouteNetlinkMessage],
    routes: &[RouteNetlinkMessage],
    neighbours: &[RouteNetlinkMessage],
    path: &Path,
) -> Result<Vec<Found>, NetworkError> {
    let mut on_links: BTreeMap<u32, Vec<api::InterfaceAddress>> = BTreeMap::new();
    for message in addresses {
        if let RouteNetlinkMessage::NewAddress(message) = message
            && let Some(address) = address(message)
        {
            on_links.entry(message.header.index).or_default().push(address);
        }
    }
    let mut found = BTreeMap::new();
    for message in links {
        if let RouteNetlinkMessage::NewLink(message) = message {
            let addresses = on_links.remove(&message.header.index).unwrap_or_default();
            if let Some(description) = link(message, addresses)? {
                found.insert(message.header.index, description);
            }
        }
    }
    let reachable = |interface: &api::NetworkInterface| interface.addresses.iter().any(is_global);
    if !found.is_empty() && !found.values().any(reachable) {
        return Err(NetworkError::NoAddress(path.to_owned()));
    }
    for message in routes {
        if let RouteNetlinkMessage::NewRoute(message) = message
            && let Some((index, route)) = route(message)
            && let Some(interface) = found.get_mut(&index)
        {
            interface.routes.push(route);
        }
    }
    for message in neighbours {
        if let RouteNetlinkMessage::NewNeighbour(message) = message
            && let Some(neighbour) = neighbour(message)
            && let Some(interface) = found.get_mut(&message.header.ifindex)
        {
            interface.neighbours.push(neighbour);
        }
    }
    for interface in found.values_mut() {
        // A gateway has to be reachable by the time it is named.
        interface.routes.sort_by_key(|route| !route.gateway.is_empty());
    }
    Ok(found.into_iter().map(|(index, description)| Found { index, description }).collect())
}

/// None for an interface that is not in use: loopback, down, a tunnel's stand-in without addresses, or a tap of ours,
/// which is found out when another is made.
fn link(
    message: &LinkMessage,
    addresses: Vec<api::InterfaceAddress>,
) -> Result<Option<api::NetworkInterface>, NetworkError> {
    let (mut name, mut mac, mut mtu) = (String::new(), Vec::new(), 0);
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(value) => name.clone_from(value),
            LinkAttribute::Address(value) => mac.clone_from(value),
            LinkAttribute::Mtu(value) => mtu = *value,
            _ => {}
        }
    }
    let flags = message.header.flags;
    if flags.contains(LinkFlags::Loopback) || !flags.contains(LinkFlags::Up) || tap::is_name(&name) {
        return Ok(None);
    }
    let problem = if message.header.link_layer_type != LinkLayerType::Ether {
        Some("carries no Ethernet frames")
    } else if mac.len() != 6 || mac.iter().all(|byte| *byte == 0) {
        Some("has no hardware address")
    } else {
        None
    };
    match problem {
        Some(_) if !addresses.iter().any(is_global) => Ok(None),
        Some(problem) => Err(NetworkError::Unsupported { name, problem }),
        None => Ok(Some(api::NetworkInterface {
            name,
            mac,
            mtu,
            no_arp: flags.contains(LinkFlags::Noarp),
            addresses,
            ..Default::default()
        })),
    }
}

fn address(message: &AddressMessage) -> Option<api::InterfaceAddress> {
    let (mut local, mut other, mut broadcast) = (None, None, Vec::new());
    let mut flags = AddressFlags::empty();
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(ip) => local = Some(*ip),
            AddressAttribute::Address(ip) => other = Some(*ip),
            AddressAttribute::Broadcast(ip) => broadcast = ip.octets().to_vec(),
            AddressAttribute::Flags(value) => flags = *value,
            _ => {}
        }
    }
    let ip = local.or(other)?;
    Some(api::InterfaceAddress {
        address: octets(ip),
        prefix: message.header.prefix_len.into(),
        peer: other.filter(|other| *other != ip).map(octets).unwrap_or_default(),
        broadcast,
        scope: u8::from(message.header.scope).into(),
        no_prefix_route: flags.contains(AddressFlags::Noprefixroute),
        ..Default::default()
    })
}

/// Whether others can reach it, other than on the link.
fn is_global(address: &api::InterfaceAddress) -> bool {
    !matches!(address.address[..], [0xfe, second, ..] if address.address.len() == 16 && second & 0xc0 == 0x80)
}

/// A route that somebody has added, and its interface. Those that come with an address come with it in the guest too.
fn route(message: &RouteMessage) -> Option<(u32, api::Route)> {
    let header = &message.header;
    let added = header.table == RouteHeader::RT_TABLE_MAIN
        && header.kind == RouteType::Unicast
        && !matches!(header.protocol, RouteProtocol::Kernel | RouteProtocol::Ra)
        && !header.flags.contains(RouteFlags::Cloned);
    if !added {
        return None;
    }
    let nothing = match header.address_family {
        AddressFamily::Inet => vec![0; 4],
        AddressFamily::Inet6 => vec![0; 16],
        _ => return None,
    };
    let mut index = None;
    let mut route = api::Route {
        destination: nothing,
        prefix: header.destination_prefix_length.into(),
        scope: u8::from(header.scope).into(),
        on_link: header.flags.contains(RouteFlags::Onlink),
        ..Default::default()
    };
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(address) => route.destination = route_octets(address)?,
            RouteAttribute::Gateway(address) => route.gateway = route_octets(address)?,
            RouteAttribute::Via(RouteVia::Inet6(address)) => route.gateway = address.octets().to_vec(),
            RouteAttribute::PrefSource(address) => route.source = route_octets(address)?,
            RouteAttribute::Priority(metric) => route.metric = *metric,
            RouteAttribute::Oif(oif) => index = Some(*oif),
            RouteAttribute::Metrics(metrics) => {
                for metric in metrics {
                    if let RouteMetric::Mtu(mtu) = metric {
                        route.mtu = *mtu;
                    }
                }
            }
            RouteAttribute::MultiPath(_) => {
                log::warn!("a route over several interfaces at once is left out of the guest");
                return None;
            }
            _ => {}
        }
    }
    Some((index?, route))
}

fn neighbour(message: &NeighbourMessage) -> Option<api::Neighbour> {
    if message.header.state != NeighbourState::Permanent
        || message.header.flags.contains(NeighbourFlags::Proxy)
    {
        return None;
    }
    let (mut ip, mut mac) = (None, Vec::new());
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(address)) => {
                ip = Some(IpAddr::V4(*address));
            }
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(address)) => {
                ip = Some(IpAddr::V6(*address));
            }
            NeighbourAttribute::LinkLayerAddress(address) => mac.clone_from(address),
            _ => {}
        }
    }
    let ip = ip.filter(|ip| !ip.is_multicast())?;
    (mac.len() == 6).then(|| api::Neighbour { address: octets(ip), mac, ..Default::default() })
}

fn route_octets(address: &RouteAddress) -> Option<Vec<u8>> {
    match address {
        RouteAddress::Inet(ip) => Some(ip.octets().to_vec()),
        RouteAddress::Inet6(ip) => Some(ip.octets().to_vec()),
        _ => None,
    }
}

#[cfg(test)]
#[path = "scan_tests.rs"]
mod tests;
