//! The pod's network: from the namespace that CNI made to interfaces of the guest.
//!
//! Each Ethernet interface of the namespace, whatever made it (veth, macvlan, netkit, …), gets a tap beside it, and
//! traffic control hands every frame from the one to the other, so that the interface itself stays as it is. The VMM
//! gets the tap's descriptor, the agent gives the guest's interface the name, addresses, routes and neighbours that the
//! interface has on the host.
//!
//! ```text
//!   eth0 ──ingress: redirect──▶ vmshim0 ══ VMM ══ guest's eth0
//!        ◀─redirect :ingress──
//! ```
//!
//! A namespace belongs to a thread, so all work in one is done by a thread of its own that ends with it ([`Netns`]); the
//! guest boots meanwhile, and Create waits for both ([`Ready`]). Host and CNI are trusted. Taps go with their
//! descriptors; what stays behind is the redirection on the pod's interfaces, which the journal knows.

mod error;
mod forward;
mod netns;
mod ready;
mod redirect;
mod scan;
mod servers;
mod steering;
mod tap;

use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio::time::Instant;
use vmshim_protocol::agent as api;
use vmshim_protocol::netlink::Netlink;

use crate::state::{Entry, Journal, Redirection};
use crate::vm::Vm;
pub use error::NetworkError;
use forward::Forwarder;
pub use netns::{Inode, Netns};
pub use ready::Ready;
pub use servers::Servers;

/// A pod's network on the host's side.
pub struct Prepared {
    interfaces: Vec<Interface>,
    /// None where the kernel cannot do it.
    forwarder: Option<Forwarder>,
    servers: Vec<SocketAddr>,
    netns: Netns,
}

/// What a machine has for interfaces.
#[derive(Debug, Clone, Copy)]
pub struct Nics {
    /// How many there can be.
    pub slots: u8,
    /// Queues of each tap.
    pub queues: u8,
}

/// One interface.
struct Interface {
    /// The queues of its tap.
    tap: Vec<OwnedFd>,
    description: api::NetworkInterface,
}

/// Connects a tap to each interface of the network namespace at `path`, of which there may be as many as the machine has
/// for them. Waits for the kernel, and for modules that it may have to load.
///
/// # Errors
/// When the namespace or what is in it cannot be used. What has been made by then stands in the journal.
pub fn prepare(path: &Path, nics: Nics, journal: &Journal) -> Result<Prepared, NetworkError> {
    let netns = Netns::open(path)?;
    let (interfaces, servers, forwarder) = netns.run(|| {
        let interfaces = prepare_interfaces(&netns, path, nics, journal)?;
        // Before the forwarder, which listens itself.
        let servers = servers::scan().map_err(NetworkError::host("see who listens"))?;
        let forwarder = Forwarder::new(&netns, &servers)
            .inspect_err(|error| log::warn!("ports of the pod cannot be forwarded: {error}"))
            .ok();
        Ok::<_, NetworkError>((interfaces, servers, forwarder))
    })??;
    Ok(Prepared { interfaces, forwarder, servers, netns })
}

fn prepare_interfaces(
    netns: &Netns,
    path: &Path,
    nics: Nics,
    journal: &Journal,
) -> Result<Vec<Interface>, NetworkError> {
    let mut netlink = Netlink::open().map_err(NetworkError::host("open a netlink socket"))?;
    let found = scan::scan(&mut netlink, path)?;
    if found.len() > usize::from(nics.slots) {
        return Err(NetworkError::TooMany { found: found.len(), slots: nics.slots });
    }
    let mut interfaces = Vec::with_capacity(found.len());
    for (slot, found) in (0u8..).zip(found) {
        let (index, mut description) = (found.index, found.description);
        description.slot = slot.into();
        let name = description.name.clone();
        log::debug!("interface {name} becomes NIC {slot}");
        let tap = tap::create(slot, nics.queues, &name)?;
        let tap_index = tap::set_up(&mut netlink, slot, nics.queues, description.mtu)?;
        let redirection = Redirection {
            netns: path.to_owned(),
            inode: netns.inode(),
            index,
            whole_qdisc: !redirect::has_ingress(&mut netlink, index)?,
        };
        journal.intend(&Entry::Redirection(redirection.clone()))?;
        redirect::connect(&mut netlink, &name, &redirection, tap_index)?;
        interfaces.push(Interface { tap, description });
    }
    Ok(interfaces)
}

impl Prepared {
    /// Gives the taps to the VMM and the description to the guest, after the pod's own namespaces where it has such in which
    /// its network belongs. The taps live on in the VMM alone. Comes with the servers that the namespace has.
    ///
    /// # Errors
    /// When either refuses.
    pub async fn apply(
        self,
        vm: &Arc<Vm>,
        namespaces: Option<&api::SetUpPodRequest>,
        deadline: Instant,
    ) -> Result<Servers, NetworkError> {
        let servers = Servers::new(self.netns, self.servers);
        for (slot, interface) in (0u8..).zip(&self.interfaces) {
            vm.attach_nic(slot, &interface.tap, deadline).await?;
        }
        let interfaces = self.interfaces.into_iter().map(|interface| interface.description).collect();
        let standing_in = servers.at().iter().copied().map(api::Endpoint::from).collect();
        let request = api::ConfigureNetworkRequest { interfaces, servers: standing_in, ..Default::default() };
        if let Some(namespaces) = namespaces {
            vm.agent().set_up_pod(namespaces, deadline).await?;
        }
        vm.agent().configure_network(&request, deadline).await?;
        if let Some(forwarder) = self.forwarder {
            forwarder.run(vm.clone());
        }
        Ok(servers)
    }
}

/// The network namespace that a path given with a sandbox means. Callers that have none give no path, or an ordinary file
/// in its place; what is wrong with any other path is found out when the network is set up.
pub fn meant_by(path: &Path) -> Option<PathBuf> {
    if path.as_os_str().is_empty() || matches!(Netns::open(path), Err(NetworkError::NotNetns(_))) {
        return None;
    }
    Some(path.to_owned())
}

/// Takes the redirection off a pod's interface. What is gone already, or has become another namespace, is fine.
///
/// # Errors
/// When the kernel refuses.
pub fn undo(redirection: &Redirection) -> std::io::Result<()> {
    let netns = match Netns::open(&redirection.netns) {
        Ok(netns) if netns.inode() == redirection.inode => netns,
        Ok(_) | Err(NetworkError::Missing(_) | NetworkError::NotNetns(_)) => return Ok(()),
        Err(error) => return Err(std::io::Error::other(error)),
    };
    netns.run(|| redirect::disconnect(redirection)).map_err(std::io::Error::other)?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_namespace_that_is_gone_or_another_by_now_needs_no_undoing() {
        let own = Netns::open(Path::new("/proc/self/ns/net")).unwrap().inode();
        let redirection = |netns: &str, inode| Redirection {
            netns: netns.into(),
            inode,
            index: u32::MAX,
            whole_qdisc: true,
        };
        for netns in ["/run/netns/no-such", "/dev/null"] {
            undo(&redirection(netns, own)).unwrap();
        }
        let other = serde_json::from_str(r#"{"device":0,"number":0}"#).unwrap();
        undo(&redirection("/proc/self/ns/net", other)).unwrap();
    }
}
