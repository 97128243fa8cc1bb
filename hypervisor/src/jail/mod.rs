//! What this process gives up before it meets a guest.
//!
//! A guest may take over the VMM one day; then it shall find nothing to take. In this order:
//!
//! 1. [`close_strangers`], first thing in `main`: descriptors that were inherited by mistake.
//! 2. [`enter`], while the process has one thread: limits; namespaces for users, mounts, System V IPC, host name, network
//!    and cgroups; a root that is the shared directory, or empty; the configured user and group; capabilities none, or
//!    over the files of the shared directory alone; no new privileges; no core dump, no debugger.
//! 3. [`confine`], first thing on each thread, and at last on the `io` thread: capabilities that are another thread's,
//!    and the system calls of its role, see [`seccomp`].
//!
//! There is no switch that leaves out any of it. The user namespace maps every id onto itself, so that files of the
//! shared directory have their true owners; what its capabilities reach is bounded by the mount namespace. A process
//! id namespace would need another fork and another process to wait in it, and no system call that is left takes a
//! process id but `tgkill`, which reaches processes of the same user: there are none.

mod capabilities;
mod filter;
mod identity;
mod limits;
mod root;
mod seccomp;
mod sys;

use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl;

pub use seccomp::Role;

use crate::devices::virtio::fs::SharedDirectory;

/// Who the process is to become.
#[derive(Debug, Clone, Copy)]
pub struct Identity {
    /// Host user id.
    pub uid: u32,
    /// Host group id.
    pub gid: u32,
}

/// Why the process could not be confined, upon which it does not go on.
#[derive(Debug, thiserror::Error)]
#[error("the VMM cannot be confined: it cannot {what}")]
pub struct JailError {
    what: &'static str,
    #[source]
    source: Errno,
}

/// Says what was tried when a call failed.
trait Tried<T> {
    fn tried(self, what: &'static str) -> Result<T, JailError>;
}

impl<T> Tried<T> for Result<T, Errno> {
    fn tried(self, what: &'static str) -> Result<T, JailError> {
        self.map_err(|source| JailError { what, source })
    }
}

/// Closes all descriptors but the standard ones and `keep`.
///
/// # Errors
/// Never on a kernel that has KVM's irqfds.
pub fn close_strangers(keep: &impl AsRawFd) -> Result<(), JailError> {
    let keep = u32::try_from(keep.as_raw_fd()).map_err(|_| Errno::EBADF).tried("keep its control socket")?;
    let below = if keep > 3 { sys::close_range(3, keep - 1) } else { Ok(()) };
    below.and_then(|()| sys::close_range(keep + 1, u32::MAX)).tried("close inherited descriptors")
}

/// Confines the process, which has one thread and is root. With `shared`, an open directory, that directory becomes the
/// root, and mounts which the host makes below it later arrive; what is needed to serve it is returned.
///
/// # Errors
/// See [`JailError`]. The process is then in an unknown state and is to end.
pub fn enter(identity: Identity, shared: Option<OwnedFd>) -> Result<Option<SharedDirectory>, JailError> {
    limits::set(shared.is_some())?;
    if let Some(directory) = &shared {
        // The new mount namespace is a copy, and the working directory moves into it: a descriptor would not.
        nix::unistd::fchdir(directory).tried("enter the shared directory")?;
    }
    let namespaces = CloneFlags::CLONE_NEWUSER
        | CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWCGROUP;
    // Some 1.1 million instructions, of which the network namespace takes nine tenths. It stays: were a filter ever too
    // wide, this is what keeps the host's abstract sockets and its network out of reach.
    identity::map_while(|| unshare(namespaces))?;
    let (served, capabilities) = if shared.is_some() {
        (Some(root::become_shared_directory()?), capabilities::FILES)
    } else {
        root::become_empty()?;
        (None, capabilities::Set::NONE)
    };
    identity::assume(identity)?;
    capabilities::limit_to(capabilities).tried("drop its capabilities")?;
    prctl::set_no_new_privs().tried("give up new privileges")?;
    // Not before: it would take away the entries of /proc by which the process was set up.
    prctl::set_dumpable(false).tried("refuse to be inspected")?;
    Ok(served)
}

/// Confines the calling thread to its role, for good.
///
/// # Errors
/// When the kernel cannot filter system calls.
pub fn confine(role: Role) -> Result<(), JailError> {
    if role != Role::Fs {
        capabilities::limit_to(capabilities::Set::NONE).tried("drop its capabilities")?;
    }
    seccomp::apply(role)
}

#[cfg(test)]
#[path = "jail_tests.rs"]
mod tests;
