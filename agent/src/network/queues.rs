//! How many of its queues an interface uses.
//!
//! Its driver decides that when it starts, by the CPUs that are there then. An interface that the host connects early
//! enough is found when the kernel looks through the bus at boot, with one CPU.

use crate::sys::check;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

/// `SIOCETHTOOL`, and what is asked by it: `ETHTOOL_GCHANNELS` and `ETHTOOL_SCHANNELS`.
const ETHTOOL: libc::Ioctl = 0x8946;
const GET_CHANNELS: u32 = 0x3c;
const SET_CHANNELS: u32 = 0x3d;

/// `struct ethtool_channels`.
#[repr(C)]
#[derive(Default)]
struct Channels {
    command: u32,
    most_receiving: u32,
    most_sending: u32,
    most_other: u32,
    most_combined: u32,
    receiving: u32,
    sending: u32,
    other: u32,
    combined: u32,
}

/// Has the interface use a queue pair for each of so many CPUs, as far as it has them.
pub fn use_for(cpus: u32, interface: &str) -> io::Result<()> {
    let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    let mut channels = Channels { command: GET_CHANNELS, ..Default::default() };
    ask(&socket, interface, &mut channels)?;
    let wanted = channels.most_combined.min(cpus);
    if channels.combined == wanted {
        return Ok(());
    }
    channels = Channels { command: SET_CHANNELS, combined: wanted, ..Default::default() };
    ask(&socket, interface, &mut channels)
}

fn ask(socket: &OwnedFd, interface: &str, channels: &mut Channels) -> io::Result<()> {
    // SAFETY: `ifreq` is a plain structure, all zero is a valid value of it.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // The last byte stays 0.
    let places = request.ifr_name.iter_mut().take(libc::IFNAMSIZ - 1);
    for (place, byte) in places.zip(interface.bytes()) {
        *place = byte.cast_signed();
    }
    request.ifr_ifru.ifru_data = std::ptr::from_mut(channels).cast();
    // SAFETY: the request reads and fills both structures, which live until it returns.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), ETHTOOL, &raw mut request) }.into()).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interface_without_queues_to_choose_is_an_error_and_no_more() {
        assert!(use_for(2, "lo").is_err());
        assert!(use_for(2, "no-such-interface-with-a-long-name").is_err());
    }
}
