//! The guest's network interfaces, made to look as those that the pod has on the host.
//!
//! The shim says what it found in the pod's network namespace; everything in a request is meant so, and checked only for
//! being possible at all, so that an error names the field. Interfaces are known by their slot, see
//! [`vmshim_protocol::nic`]. All of it waits for the kernel, so it runs on a thread that may.

mod home;
pub mod loopback;
mod messages;
mod queues;
mod request;
mod tcp;

use crate::boot::cpus;
use crate::failure::{Failure, Kind, describe};
use crate::log;
use crate::sys::slots;
pub use home::Home;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use request::Interface;
use std::collections::BTreeMap;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};
pub use tcp::connect;
use vmshim_protocol::agent::ConfigureNetworkRequest;
use vmshim_protocol::netlink::route::RouteNetlinkMessage;
use vmshim_protocol::netlink::route::link::{LinkAttribute, LinkFlags, LinkMessage};
use vmshim_protocol::netlink::{NLM_F_CREATE, NLM_F_REPLACE, Netlink};
use vmshim_protocol::nic::slot_mac;

/// `RTNLGRP_LINK`: changes of interfaces.
const LINK_GROUP: u32 = 1;

/// How long a link may take to come up. The host's end is there already, so it is a matter of an interrupt.
const LINK_LIMIT: Duration = Duration::from_secs(10);

/// Configures interfaces, at `home` where that is not in the guest's own network namespace, and waits until their links are
/// up. Then listens where servers of the host do; one that the guest cannot have is left out.
pub async fn configure(
    request: ConfigureNetworkRequest,
    home: Option<Home>,
) -> Result<Vec<TcpListener>, Failure> {
    let interfaces = request::parse(&request)?;
    let servers = request::servers(&request)?;
    let apply = move || {
        slots::look_again().map_err(|error| internal("start the network devices", &error))?;
        let all = || apply(&interfaces).map(|()| servers.into_iter().filter_map(stand_in).collect());
        let Some(home) = home else { return all() };
        let refused = |error: io::Error| internal("take the network to the pod's users", &error);
        home.take_in(&interfaces).map_err(refused)?;
        home.run(all).map_err(refused)?
    };
    let done = tokio::task::spawn_blocking(apply).await;
    done.unwrap_or_else(|_| Err(Failure::new(Kind::Internal, "the network's thread has died")))
}

/// Makes every address one of the guest's own, at its loopback interface.
pub async fn share_addresses() -> Result<(), Failure> {
    let done = tokio::task::spawn_blocking(|| -> io::Result<()> {
        let loopback = nix::net::if_::if_nametoindex("lo")?;
        let mut netlink = Netlink::open()?;
        for route in messages::every_address(loopback) {
            netlink.change(route, NLM_F_CREATE | NLM_F_REPLACE)?;
        }
        Ok(())
    });
    let done = done.await.unwrap_or_else(|_| Err(io::Error::other("the thread has died")));
    done.map_err(|error| internal("route every address to the loopback interface", &error))
}

fn internal(what: &str, error: &io::Error) -> Failure {
    Failure::new(Kind::Internal, format!("{what}: {}", describe(error)))
}

fn stand_in(at: SocketAddr) -> Option<TcpListener> {
    let missing = |error: &io::Error| log::error(&format!("{at} of the pod's namespace is missing: {error}"));
    tcp::listen(at).inspect_err(missing).ok()
}

/// In the network namespace that the caller is in.
fn apply(interfaces: &[Interface]) -> Result<(), Failure> {
    let talk = |error: io::Error| internal("talk to the guest's kernel about its network", &error);
    let mut netlink = Netlink::open().map_err(talk)?;
    // Before anything comes up, so that nothing is missed.
    let mut changes = Netlink::open().map_err(talk)?;
    changes.subscribe(LINK_GROUP).map_err(talk)?;
    let mut devices = devices(&mut netlink).map_err(talk)?;
    let mut ours = Vec::new();
    for interface in interfaces {
        let index = devices.remove(&interface.slot).ok_or_else(|| {
            let message =
                format!("interface {}: the guest has no NIC slot {}", interface.name, interface.slot);
            Failure::new(Kind::FailedPrecondition, message)
        })?;
        ours.push((interface, index));
    }
    // One may have the name that another shall have.
    for (interface, index) in &ours {
        let name = format!("vmshim{}", interface.slot);
        netlink.change(messages::rename(*index, name.clone()), 0).map_err(talk)?;
        use_queues(&name);
    }
    for (interface, index) in &ours {
        set_up(&mut netlink, interface, *index)?;
    }
    wait_for_links(&mut netlink, &mut changes, &ours)
}

/// One pair of queues carries everything, too.
fn use_queues(interface: &str) {
    let cpus = cpus::count();
    if cpus > 1
        && let Err(error) = queues::use_for(cpus, interface)
    {
        log::info(&format!("{interface} uses no more of its queues: {}", describe(&error)));
    }
}

/// Indices of the virtio-net devices, by slot.
fn devices(netlink: &mut Netlink) -> io::Result<BTreeMap<u8, u32>> {
    let links = netlink.dump(RouteNetlinkMessage::GetLink(LinkMessage::default()))?;
    Ok(links.iter().filter_map(device).collect())
}

fn device(message: &RouteNetlinkMessage) -> Option<(u8, u32)> {
    let RouteNetlinkMessage::NewLink(link) = message else { return None };
    let permanent = link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::PermAddress(address) => Some(address),
        _ => None,
    })?;
    let number = *permanent.last()?;
    if permanent[..] != slot_mac(number) {
        return None;
    }
    Some((number, link.header.index))
}

fn set_up(netlink: &mut Netlink, interface: &Interface, index: u32) -> Result<(), Failure> {
    let name = &interface.name;
    let refused =
        |what: String| move |error: io::Error| internal(&format!("interface {name}: {what}"), &error);
    netlink.change(messages::link(interface, index), 0).map_err(refused(format!(
        "set mac {} and mtu {}",
        messages::hex(interface.mac),
        interface.mtu
    )))?;
    let new = NLM_F_CREATE | NLM_F_REPLACE;
    for address in &interface.addresses {
        let what = format!("add address {}/{}", address.ip, address.prefix);
        netlink.change(messages::address(address, index), new).map_err(refused(what))?;
    }
    for neighbour in &interface.neighbours {
        let what = format!("add neighbour {}", neighbour.ip);
        netlink.change(messages::neighbour(neighbour, index), new).map_err(refused(what))?;
    }
    for route in &interface.routes {
        let what = format!("add route to {}/{}", route.destination, route.prefix);
        netlink.change(messages::route(route, index), new).map_err(refused(what))?;
    }
    Ok(())
}

/// A link whose interrupt is still on its way would swallow the first packets.
fn wait_for_links(
    netlink: &mut Netlink,
    changes: &mut Netlink,
    ours: &[(&Interface, u32)],
) -> Result<(), Failure> {
    let failed = |error: io::Error| internal("wait for the guest's links", &error);
    let mut down: BTreeMap<u32, &str> =
        ours.iter().map(|(interface, index)| (*index, interface.name.as_str())).collect();
    let links = netlink.dump(RouteNetlinkMessage::GetLink(LinkMessage::default())).map_err(failed)?;
    forget_ready(&mut down, &links);
    let deadline = Instant::now() + LINK_LIMIT;
    while let Some(name) = down.values().next() {
        let left = deadline.saturating_duration_since(Instant::now());
        let mut descriptors = [PollFd::new(changes.as_fd(), PollFlags::POLLIN)];
        match poll(&mut descriptors, PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)) {
            Ok(0) => {
                let message = format!("interface {name}: the link does not come up");
                return Err(Failure::new(Kind::DeadlineExceeded, message));
            }
            Ok(_) => forget_ready(&mut down, &changes.changes().map_err(failed)?),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(failed(errno.into())),
        }
    }
    Ok(())
}

fn forget_ready(down: &mut BTreeMap<u32, &str>, messages: &[RouteNetlinkMessage]) {
    for message in messages {
        if let RouteNetlinkMessage::NewLink(link) = message
            && link.header.flags.contains(LinkFlags::LowerUp)
        {
            down.remove(&link.header.index);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn new_link(index: u32, flags: LinkFlags, attributes: Vec<LinkAttribute>) -> RouteNetlinkMessage {
        let mut link = LinkMessage::default();
        link.header.index = index;
        link.header.flags = flags;
        link.attributes = attributes;
        RouteNetlinkMessage::NewLink(link)
    }

    #[test]
    fn a_slot_is_known_by_its_permanent_address() {
        let name = || LinkAttribute::IfName("eth0".into());
        let ours =
            new_link(4, LinkFlags::empty(), vec![name(), LinkAttribute::PermAddress(slot_mac(2).to_vec())]);
        assert_eq!(device(&ours), Some((2, 4)));
        for address in [vec![], vec![2; 6], vec![0, 1, 2]] {
            let other = vec![name(), LinkAttribute::PermAddress(address)];
            assert!(device(&new_link(4, LinkFlags::empty(), other)).is_none());
        }
        assert!(device(&new_link(1, LinkFlags::empty(), vec![name()])).is_none());
    }

    #[test]
    fn a_link_is_waited_for_until_it_carries() {
        let mut down = BTreeMap::from([(4, "eth0"), (5, "eth1")]);
        forget_ready(
            &mut down,
            &[new_link(4, LinkFlags::Up, vec![]), new_link(5, LinkFlags::Up | LinkFlags::LowerUp, vec![])],
        );
        assert_eq!(down.into_keys().collect::<Vec<_>>(), [4]);
    }
}
