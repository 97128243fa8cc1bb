//! Makes the process that holds a pod's own namespaces, for a pod whose containers come and go and none of which is
//! there from first to last.
//!
//! It is the first process of the pod's pid namespace, so it inherits that namespace's orphans; the kernel buries them,
//! as nobody asks for their statuses. Containers that share the namespace can see it, so there is nothing to see: its
//! root is an empty file system, and no descriptor is open.

use super::error::{Context, Error, Result};
use super::rootfs::pivot;
use super::rootfs::tree::Tree;
use super::spec::check_pod_sysctl;
use super::wire::{self, Pod, Report};
use super::{become_root, give_up, idmap, set_sysctl, signal_pair};
use crate::network::loopback;
use crate::sys::mountfd::{self, FsContext};
use crate::sys::process::{CloneRequest, Cloned, clone3};
use nix::mount::{MsFlags, mount};
use nix::sys::signal::{SigHandler, Signal, signal};
use std::convert::Infallible;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

/// The engine's side. `place` is any directory: it is covered, for the new process only.
pub fn make(agent: BorrowedFd<'_>, place: &Path, pod: &Pod) -> Result<()> {
    pod.sysctls.keys().try_for_each(|name| check_pod_sysctl(name))?;
    let (ours, theirs) = signal_pair()?;
    let mut namespaces = libc::CLONE_NEWIPC | libc::CLONE_NEWUTS | libc::CLONE_NEWPID | libc::CLONE_NEWNS;
    if pod.users.is_some() {
        // It comes to own the others, and the pod's network is in one of them.
        namespaces |= libc::CLONE_NEWUSER | libc::CLONE_NEWNET;
    }
    let request =
        CloneRequest { namespaces: u64::from(namespaces.cast_unsigned()), cgroup: None, sibling: true };
    // SAFETY: an engine process has one thread.
    match unsafe { clone3(&request) }.doing(|| "make the pod's namespaces")? {
        Cloned::Child => {
            drop(ours);
            let Err(error) = hold(agent, &theirs, place, pod);
            give_up(agent, error)
        }
        Cloned::Parent(pid, pidfd) => {
            drop(theirs);
            wire::report(agent, &Report::Spawned(pid), Some(pidfd.as_fd())).doing(|| "answer the agent")?;
            if let Some(users) = &pod.users {
                idmap::write(pid, &users.uids, &users.gids)?;
            }
            nix::unistd::write(&ours, b"!").doing(|| "let the pod begin").map(drop)
        }
    }
}

/// The new process's side.
fn hold(agent: BorrowedFd<'_>, outside: &OwnedFd, place: &Path, pod: &Pod) -> Result<Infallible> {
    if nix::unistd::read(outside, &mut [0]).doing(|| "wait for the engine")? != 1 {
        return Err(Error::Stopped);
    }
    if pod.users.is_some() {
        become_root()?;
        loopback::set_up().doing(|| "set up the loopback interface")?;
    }
    nix::unistd::setsid().doing(|| "begin a session")?;
    if !pod.hostname.is_empty() {
        nix::unistd::sethostname(&pod.hostname).doing(|| "set hostname")?;
    }
    pod.sysctls.iter().try_for_each(|(name, value)| set_sysctl(name, value))?;
    enter_nowhere(place)?;
    // SAFETY: no handler is installed; the kernel then reaps the children that this process inherits.
    unsafe { signal(Signal::SIGCHLD, SigHandler::SigIgn) }.doing(|| "leave orphans to the kernel")?;
    wire::report(agent, &Report::Ready, None).doing(|| "answer the agent")?;
    if nix::unistd::read(agent, &mut [0]).doing(|| "wait for the agent")? != 1 {
        return Err(Error::Stopped);
    }
    // SAFETY: closes every descriptor; nothing below uses one.
    unsafe { libc::syscall(libc::SYS_close_range, 0, libc::c_uint::MAX, 0) };
    loop {
        nix::unistd::pause();
    }
}

/// Moves this process to a root in which there is nothing.
fn enter_nowhere(place: &Path) -> Result<()> {
    let doing = || "enter an empty root";
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_SLAVE, None::<&str>).doing(doing)?;
    let empty =
        FsContext::open("tmpfs").and_then(|tmpfs| tmpfs.mount(libc::MOUNT_ATTR_RDONLY)).doing(doing)?;
    let place = super::rootfs::mounts::open_location(place).doing(doing)?;
    mountfd::attach(empty.as_fd(), place.as_fd()).doing(doing)?;
    pivot(&Tree::new(empty))
}
