//! User and group.

use std::io::{Read, Write};

use nix::errno::Errno;
use nix::libc;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Gid, Uid, fork, getpid, setgroups, setresgid, setresuid};

use super::{Identity, JailError, Tried};

/// Every id is itself.
const IDENTITY_MAP: &[u8] = b"0 0 4294967295\n";

/// Runs `unshare`, which puts this process into a user namespace, and gives that namespace its map of ids. Only a process
/// of the parent namespace may do so, hence a child that waits until it can.
pub fn map_while(unshare: impl FnOnce() -> Result<(), Errno>) -> Result<(), JailError> {
    let parent = getpid();
    let pipe =
        || std::io::pipe().map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(libc::EMFILE)));
    let (mut go_on, mut begin) = pipe().tried("make a pipe")?;
    // SAFETY: the process has one thread, so the child may do whatever its parent could.
    match unsafe { fork() }.tried("fork a helper")? {
        ForkResult::Child => {
            drop(begin);
            let ready = go_on.read(&mut [0]);
            let mapped = matches!(ready, Ok(1)) && write_maps(parent.as_raw()).is_ok();
            // SAFETY: ends the child without running what its parent has registered.
            unsafe { libc::_exit(if mapped { 0 } else { 1 }) }
        }
        ForkResult::Parent { child } => {
            drop(go_on);
            let unshared = unshare();
            if unshared.is_ok() {
                // A helper that is gone shows in its exit status.
                let _ = begin.write(&[0]);
            }
            drop(begin);
            let helped = waitpid(child, None).tried("wait for its helper")?;
            unshared.tried("enter namespaces of its own (each limit in /proc/sys/user must be above 0)")?;
            let mapped = matches!(helped, WaitStatus::Exited(_, 0));
            if mapped { Ok(()) } else { Err(Errno::EPERM).tried("map the ids of its user namespace") }
        }
    }
}

fn write_maps(process: i32) -> std::io::Result<()> {
    for map in ["uid_map", "gid_map"] {
        std::fs::OpenOptions::new()
            .write(true)
            .open(format!("/proc/{process}/{map}"))?
            .write_all(IDENTITY_MAP)?;
    }
    Ok(())
}

/// Becomes the configured user and group, and a member of no other group. Capabilities stay permitted.
pub fn assume(identity: Identity) -> Result<(), JailError> {
    nix::sys::prctl::set_keepcaps(true).tried("keep its capabilities for a moment")?;
    let (user, group) = (Uid::from_raw(identity.uid), Gid::from_raw(identity.gid));
    setgroups(&[]).tried("leave its supplementary groups")?;
    setresgid(group, group, group).tried("change its group")?;
    setresuid(user, user, user).tried("change its user")?;
    nix::sys::prctl::set_keepcaps(false).tried("forget its capabilities")
}
