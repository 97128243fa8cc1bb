//! What the thread that serves the directory is: its working directory, its capabilities, and whose files it makes.
//!
//! All of it is per thread in Linux and is set with the bare system calls; glibc's wrappers would change the whole
//! process. The guest's kernel has checked permissions before it asks (virtio-fs mounts with `default_permissions`),
//! so the thread keeps its capabilities while it acts for a guest's user, and only the owner of what it makes is
//! switched. Otherwise a user who may write to a directory through a supplementary group, which FUSE does not tell,
//! could not make a file there.

use std::os::fd::{AsRawFd, BorrowedFd};

use nix::errno::Errno;
use nix::libc;

use crate::devices::virtio::fs::needs::Capability;

/// On whose behalf a request comes, as the guest's kernel says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Caller {
    /// Owner of what is made.
    pub uid: u32,
    /// Group of what is made, where the directory does not decide.
    pub gid: u32,
}

/// The prepared thread. Only that thread may use it.
#[derive(Debug)]
pub struct Worker {
    base: Caller,
    capabilities: Option<Capabilities>,
    umask: u32,
}

impl Worker {
    /// Prepares the calling thread: gives it a working directory and a umask of its own, keeps its capabilities across
    /// changes of user, and sets aside the one that set-id bits need.
    ///
    /// # Errors
    /// When the host refuses the directory.
    pub fn enter(proc_self_fd: BorrowedFd<'_>) -> Result<Self, Errno> {
        // SAFETY: these calls touch no memory.
        unsafe {
            Errno::result(libc::unshare(libc::CLONE_FS))?;
            Errno::result(libc::fchdir(proc_self_fd.as_raw_fd()))?;
            libc::umask(0);
        }
        keep_capabilities();
        let capabilities = Capabilities::of_this_thread()?;
        if let Some(capabilities) = &capabilities {
            capabilities.set_fsetid(false)?;
        }
        Ok(Self { base: current_caller(), capabilities, umask: 0 })
    }

    /// Runs `make` with the owner and the umask of what it makes switched to the caller's. With `set_id`, bits that
    /// need it are kept.
    pub fn make<T>(
        &mut self,
        caller: Caller,
        umask: u32,
        set_id: bool,
        make: impl FnOnce() -> Result<T, Errno>,
    ) -> Result<T, Errno> {
        const PERMISSIONS: u32 = 0o777;
        // -1 means "leave as it is" to the kernel.
        if caller.uid == u32::MAX || caller.gid == u32::MAX {
            return Err(Errno::EINVAL);
        }
        let umask = umask & PERMISSIONS;
        if umask != self.umask {
            // SAFETY: the call touches no memory.
            unsafe { libc::umask(umask) };
            self.umask = umask;
        }
        let _acting = Acting::begin(self.base, caller)?;
        self.keeping_set_id(set_id, make)
    }

    /// Runs `act` with the capability to keep set-user-id and set-group-id bits where `keep` says so.
    pub fn keeping_set_id<T>(&self, keep: bool, act: impl FnOnce() -> Result<T, Errno>) -> Result<T, Errno> {
        let Some(capabilities) = self.capabilities.as_ref().filter(|_| keep) else { return act() };
        capabilities.set_fsetid(true)?;
        let result = act();
        capabilities.set_fsetid(false)?;
        result
    }
}

/// Switches back when it goes.
struct Acting {
    base: Caller,
    caller: Caller,
}

impl Acting {
    fn begin(base: Caller, caller: Caller) -> Result<Self, Errno> {
        let acting = Self { base, caller };
        if caller.gid != base.gid {
            switch_gid(caller.gid);
        }
        if caller.uid != base.uid {
            switch_uid(caller.uid);
        }
        // The calls do not say whether they worked; a failed one is undone by dropping `acting`.
        if caller != base && current_caller() != caller {
            return Err(Errno::EPERM);
        }
        Ok(acting)
    }
}

impl Drop for Acting {
    fn drop(&mut self) {
        if self.caller.uid != self.base.uid {
            switch_uid(self.base.uid);
        }
        if self.caller.gid != self.base.gid {
            switch_gid(self.base.gid);
        }
    }
}

fn switch_uid(uid: u32) -> u32 {
    // SAFETY: the call touches no memory. Its result is the previous id, 32 bits in a long.
    u32::try_from(unsafe { libc::syscall(libc::SYS_setfsuid, uid) }).unwrap_or(u32::MAX)
}

fn switch_gid(gid: u32) -> u32 {
    // SAFETY: as above.
    u32::try_from(unsafe { libc::syscall(libc::SYS_setfsgid, gid) }).unwrap_or(u32::MAX)
}

/// -1 is no id, so that these calls only tell.
fn current_caller() -> Caller {
    Caller { uid: switch_uid(u32::MAX), gid: switch_gid(u32::MAX) }
}

/// Without it, the kernel takes the capabilities over files away while the user is not root. A thread that may not set
/// it has no other users to act for either, or is refused what they are not allowed.
fn keep_capabilities() {
    const NO_SETUID_FIXUP: libc::c_int = 1 << 2;
    // SAFETY: these calls touch no memory.
    unsafe {
        let bits = libc::prctl(libc::PR_GET_SECUREBITS);
        if bits >= 0 && bits & NO_SETUID_FIXUP == 0 {
            libc::prctl(libc::PR_SET_SECUREBITS, bits | NO_SETUID_FIXUP);
        }
    }
}

/// `struct __user_cap_header_struct`.
#[repr(C)]
struct CapabilityHeader {
    version: u32,
    pid: i32,
}

/// `struct __user_cap_data_struct`, of which the kernel takes two: capabilities 0 to 31, and the rest.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
struct CapabilityWord {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// The capabilities of a thread that is permitted `CAP_FSETID`.
#[derive(Debug)]
struct Capabilities([CapabilityWord; 2]);

impl Capabilities {
    const VERSION_3: u32 = 0x2008_0522;
    const FSETID: u32 = 1 << Capability::Fsetid.number();

    /// `None` when there is nothing to switch, the thread not having the capability.
    fn of_this_thread() -> Result<Option<Self>, Errno> {
        let header = CapabilityHeader { version: Self::VERSION_3, pid: 0 };
        let mut words = [CapabilityWord::default(); 2];
        // SAFETY: the kernel reads the header and writes two words.
        Errno::result(unsafe { libc::syscall(libc::SYS_capget, &raw const header, words.as_mut_ptr()) })?;
        Ok((words[0].permitted & Self::FSETID != 0).then_some(Self(words)))
    }

    fn set_fsetid(&self, effective: bool) -> Result<(), Errno> {
        let mut words = self.0;
        if effective {
            words[0].effective |= Self::FSETID;
        } else {
            words[0].effective &= !Self::FSETID;
        }
        let header = CapabilityHeader { version: Self::VERSION_3, pid: 0 };
        // SAFETY: the kernel reads the header and two words.
        Errno::result(unsafe { libc::syscall(libc::SYS_capset, &raw const header, words.as_ptr()) })?;
        Ok(())
    }
}
