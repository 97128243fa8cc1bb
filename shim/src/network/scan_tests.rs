//! Namespaces as the kernel lists them.

use super::*;

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];

fn new_link(index: u32, flags: LinkFlags, kind: LinkLayerType, mac: &[u8]) -> RouteNetlinkMessage {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.header.flags = flags;
    message.header.link_layer_type = kind;
    message.attributes = vec![
        LinkAttribute::IfName(format!("eth{index}")),
        LinkAttribute::Mtu(1400),
        LinkAttribute::Address(mac.to_vec()),
    ];
    RouteNetlinkMessage::NewLink(message)
}

fn new_address(index: u32, ip: &str, prefix: u8) -> RouteNetlinkMessage {
    let mut message = AddressMessage::default();
    message.header.index = index;
    message.header.prefix_len = prefix;
    message.attributes = vec![AddressAttribute::Address(ip.parse().unwrap())];
    RouteNetlinkMessage::NewAddress(message)
}

fn new_route(index: u32, gateway: Option<[u8; 4]>, protocol: RouteProtocol) -> RouteNetlinkMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = AddressFamily::Inet;
    message.header.table = RouteHeader::RT_TABLE_MAIN;
    message.header.kind = RouteType::Unicast;
    message.header.protocol = protocol;
    message.attributes = vec![RouteAttribute::Oif(index)];
    message.attributes.extend(gateway.map(|ip| RouteAttribute::Gateway(RouteAddress::Inet(ip.into()))));
    RouteNetlinkMessage::NewRoute(message)
}

fn described(
    links: &[RouteNetlinkMessage],
    addresses: &[RouteNetlinkMessage],
    routes: &[RouteNetlinkMessage],
) -> Result<Vec<Found>, NetworkError> {
    describe(links, addresses, routes, &[], Path::new("/run/netns/x"))
}

fn up(index: u32) -> RouteNetlinkMessage {
    new_link(index, LinkFlags::Up, LinkLayerType::Ether, &MAC)
}

#[test]
fn an_interface_comes_with_all_that_hangs_on_it() {
    let routes = [
        new_route(2, Some([10, 0, 0, 1]), RouteProtocol::Boot),
        new_route(2, None, RouteProtocol::Static),
        new_route(2, None, RouteProtocol::Kernel),
        new_route(9, None, RouteProtocol::Static),
    ];
    let found = described(&[up(2)], &[new_address(2, "10.0.0.2", 24)], &routes).unwrap();
    let [Found { index: 2, description }] = &found[..] else { panic!("{found:?}") };
    assert_eq!((description.name.as_str(), description.mtu), ("eth2", 1400));
    assert_eq!((&description.mac[..], &description.addresses[0].address[..]), (&MAC[..], &[10, 0, 0, 2][..]));
    // The one without a gateway first, the kernel's and that of an unknown interface not at all.
    let gateways: Vec<_> = description.routes.iter().map(|route| route.gateway.clone()).collect();
    assert_eq!(gateways, [vec![], vec![10, 0, 0, 1]]);
}

#[test]
fn what_is_not_in_use_is_left_out() {
    let links = [
        new_link(1, LinkFlags::Up | LinkFlags::Loopback, LinkLayerType::Loopback, &[0; 6]),
        new_link(2, LinkFlags::empty(), LinkLayerType::Ether, &MAC),
        new_link(3, LinkFlags::Up, LinkLayerType::Tunnel, &[0; 4]),
    ];
    assert!(tap::is_name("vmshim0") && !tap::is_name("vmshim") && !tap::is_name("vmshim0x"));
    assert!(described(&links, &[new_address(1, "127.0.0.1", 8)], &[]).unwrap().is_empty());
}

#[test]
fn an_address_on_something_else_than_ethernet_is_refused_by_name() {
    let tunnel = new_link(3, LinkFlags::Up, LinkLayerType::Tunnel, &[10, 0, 0, 9]);
    let nameless = new_link(3, LinkFlags::Up, LinkLayerType::Ether, &[0; 6]);
    for link in [tunnel, nameless] {
        let error = described(&[link], &[new_address(3, "10.0.0.2", 24)], &[]).unwrap_err();
        assert!(error.to_string().starts_with("interface eth3 has addresses but "), "{error}");
    }
}

#[test]
fn interfaces_without_any_address_are_an_error_unless_another_has_one() {
    let link_local = [new_address(2, "fe80::1", 64)];
    assert!(matches!(described(&[up(2)], &link_local, &[]), Err(NetworkError::NoAddress(_))));
    assert!(matches!(described(&[up(2)], &[], &[]), Err(NetworkError::NoAddress(_))));
    let found = described(&[up(3), up(2)], &[new_address(3, "fd00::2", 64)], &[]).unwrap();
    assert_eq!(found.iter().map(|found| found.index).collect::<Vec<_>>(), [2, 3]);
}

#[test]
fn only_permanent_neighbours_of_one_station_are_kept() {
    let entry = |state, ip: [u8; 4], mac: &[u8]| {
        let mut message = NeighbourMessage::default();
        message.header.state = state;
        message.attributes = vec![
            NeighbourAttribute::Destination(NeighbourAddress::Inet(ip.into())),
            NeighbourAttribute::LinkLayerAddress(mac.to_vec()),
        ];
        neighbour(&message)
    };
    assert!(entry(NeighbourState::Permanent, [10, 0, 0, 1], &MAC).is_some());
    assert!(entry(NeighbourState::Reachable, [10, 0, 0, 1], &MAC).is_none());
    assert!(entry(NeighbourState::Permanent, [224, 0, 0, 1], &MAC).is_none());
    assert!(entry(NeighbourState::Permanent, [10, 0, 0, 1], &[1; 4]).is_none());
}
