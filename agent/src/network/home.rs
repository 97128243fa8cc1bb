//! Where the pod's network is, if it is not the guest's own: in the network namespace of a pod that has users of its own.
//! Were it the guest's, the pod's root could not do there what root does, whatever its capabilities are.

use super::devices;
use super::messages;
use super::request::Interface;
use crate::sys::process::join_namespaces;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use vmshim_protocol::netlink::Netlink;

/// The network namespace of a process.
pub struct Home {
    /// Its id in the guest's first pid namespace.
    pub pid: u32,
    /// The process.
    pub pidfd: OwnedFd,
}

impl Home {
    /// Does something there, on a thread that ends with it: namespaces are a thread's.
    pub fn run<T: Send>(&self, action: impl FnOnce() -> T + Send) -> io::Result<T> {
        let body = || {
            join_namespaces(self.pidfd.as_fd(), libc::CLONE_NEWNET)?;
            Ok(action())
        };
        std::thread::scope(|scope| scope.spawn(body).join())
            .unwrap_or_else(|_| Err(io::Error::other("the network's thread has died")))
    }

    /// Takes the devices of interfaces there. One that is missing is missed later.
    pub fn take_in(&self, interfaces: &[Interface]) -> io::Result<()> {
        let mut netlink = Netlink::open()?;
        let devices = devices(&mut netlink)?;
        for index in interfaces.iter().filter_map(|interface| devices.get(&interface.slot)) {
            netlink.change(messages::move_to(*index, self.pid), 0)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::process::pidfd_open;

    #[test]
    fn what_runs_there_is_on_a_thread_of_its_own() {
        if !nix::unistd::Uid::effective().is_root() {
            return;
        }
        let pid = std::process::id();
        let home = Home { pid, pidfd: pidfd_open(pid).unwrap() };
        let here = std::thread::current().id();
        match home.run(|| std::thread::current().id()) {
            // A sandbox may let nobody join namespaces.
            Err(error) => assert_eq!(error.kind(), io::ErrorKind::PermissionDenied),
            Ok(there) => assert_ne!(there, here),
        }
    }
}
