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

use super::{NetworkError, redirect};

/// `TUNSETIFF`: makes the interface that the descriptor stands for, or a queue of it.
const MAKE: libc::c_ulong = 0x4004_54ca;

/// `TUNSETQUEUE`: attaches or detaches a queue.
const SET_QUEUE: libc::c_ulong = 0x4004_54d9;

/// The name of a slot's tap.
fn name(slot: u8) -> String {
    format!("vmshim{slot}")
}

/// Whether an interface has the name of a tap, which then is that of another VM.
pub fn is_name(interface: &str) -> bool {
    interface.strip_prefix("vmshim").is_some_and(|slot| slot.parse::<u8>().is_ok())
}

/// Makes the tap of a slot in the calling thread's network namespace, with so many queues. It goes away with their
/// descriptors. All queues but the first are detached, so that nothing waits where the guest does not look yet.
pub fn create(slot: u8, queues: u8, interface: &str) -> Result<Vec<OwnedFd>, NetworkError> {
    let failed =
        |source| NetworkError::Host { what: format!("make a tap for interface {interface}"), source };
    let kind = libc::IFF_TAP
        | libc::IFF_NO_PI
        | libc::IFF_VNET_HDR
        | if queues > 1 { libc::IFF_MULTI_QUEUE } else { 0 };
    // Otherwise it could become one more queue of another VM's.
    let first = match make(slot, kind | libc::IFF_TUN_EXCL) {
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
            return Err(NetworkError::InUse(interface.to_owned()));
        }
        made => made.map_err(failed)?,
    };
    let mut all = vec![first];
    for _ in 1..queues {
        let queue = make(slot, kind).map_err(failed)?;
        request(&queue, SET_QUEUE, slot, libc::IFF_DETACH_QUEUE).map_err(failed)?;
        all.push(queue);
    }
    Ok(all)
}

fn make(slot: u8, flags: libc::c_int) -> io::Result<OwnedFd> {
    let file =
        File::options().read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/net/tun")?.into();
    request(&file, MAKE, slot, flags)?;
    Ok(file)
}

fn request(tun: &OwnedFd, what: libc::c_ulong, slot: u8, flags: libc::c_int) -> io::Result<()> {
    // SAFETY: `ifreq` is a plain structure, all zero is a valid value of it.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (place, byte) in request.ifr_name.iter_mut().zip(name(slot).bytes()) {
        *place = byte.cast_signed();
    }
    // All flags are in the lower half, whose uppermost bit is one of them.
    let [low, high, ..] = flags.to_ne_bytes();
    request.ifr_ifru.ifru_flags = libc::c_short::from_ne_bytes([low, high]);
    // SAFETY: the requests read this structure, and fill it.
    Errno::result(unsafe { libc::ioctl(tun.as_raw_fd(), what, &raw mut request) })?;
    Ok(())
}

/// Sets the tap of a slot up and returns its index.
pub fn set_up(netlink: &mut Netlink, slot: u8, queues: u8, mtu: u32) -> Result<u32, NetworkError> {
    let failed = || NetworkError::host(format!("set up the tap {}", name(slot)));
    // Its own packets would reach the guest.
    disable_ipv6(slot).map_err(failed())?;
    let index =
        nix::net::if_::if_nametoindex(name(slot).as_str()).map_err(io::Error::from).map_err(failed())?;
    if queues > 1 {
        // Otherwise the kernel makes one of the default kind for each of 256 queues that there could be, 6 MiB of them.
        // They would hold nothing: the tap takes or drops each frame at once.
        redirect::add_no_qdisc(netlink, index).map_err(failed())?;
    }
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
