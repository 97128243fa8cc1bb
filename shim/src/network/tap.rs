//! The taps that stand beside a pod's interfaces.
//!
//! Their names are fixed, so that a second VM in the same network namespace is found out by the kernel.

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use nix::errno::Errno;
use vmshim_protocol::netlink::Netlink;
use vmshim_protocol::netlink::route::RouteNetlinkMessage;
use vmshim_protocol::netlink::route::link::{LinkAttribute, LinkFlags, LinkMessage};

use super::NetworkError;

/// `TUNSETIFF`: makes the interface that the descriptor stands for.
const MAKE: libc::c_ulong = 0x4004_54ca;

/// The name of a slot's tap.
fn name(slot: u8) -> String {
    format!("vmshim{slot}")
}

/// Whether an interface has the name of a tap, which then is that of another VM.
pub fn is_name(interface: &str) -> bool {
    interface.strip_prefix("vmshim").is_some_and(|slot| slot.parse::<u8>().is_ok())
}

/// Makes the tap of a slot in the calling thread's network namespace. It goes away with its descriptor.
pub fn create(slot: u8, interface: &str) -> Result<OwnedFd, NetworkError> {
    let failed =
        |source| NetworkError::Host { what: format!("make a tap for interface {interface}"), source };
    let file = File::options().read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/net/tun");
    let file = file.map_err(failed)?;
    // SAFETY: `ifreq` is a plain structure, all zero is a valid value of it.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (place, byte) in request.ifr_name.iter_mut().zip(name(slot).bytes()) {
        *place = byte.cast_signed();
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(flags).map_err(|_| NetworkError::Internal)?;
    // SAFETY: the request reads and fills this structure.
    match Errno::result(unsafe { libc::ioctl(file.as_raw_fd(), MAKE, &raw mut request) }) {
        Ok(_) => Ok(file.into()),
        Err(Errno::EBUSY) => Err(NetworkError::InUse(interface.to_owned())),
        Err(errno) => Err(failed(errno.into())),
    }
}

/// Sets the tap of a slot up and returns its index.
pub fn set_up(netlink: &mut Netlink, slot: u8, mtu: u32) -> Result<u32, NetworkError> {
    let failed = || NetworkError::host(format!("set up the tap {}", name(slot)));
    // Its own packets would reach the guest.
    disable_ipv6(slot).map_err(failed())?;
    let index =
        nix::net::if_::if_nametoindex(name(slot).as_str()).map_err(io::Error::from).map_err(failed())?;
    let mut link = LinkMessage::default();
    link.header.index = index;
    link.header.flags = LinkFlags::Up;
    link.header.change_mask = LinkFlags::Up;
    link.attributes.push(LinkAttribute::Mtu(mtu));
    netlink.change(RouteNetlinkMessage::SetLink(link), 0).map_err(failed())?;
    Ok(index)
}

fn disable_ipv6(slot: u8) -> io::Result<()> {
    match fs::write(format!("/proc/sys/net/ipv6/conf/{}/disable_ipv6", name(slot)), "1") {
        // A host without IPv6.
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        other => other,
    }
}
