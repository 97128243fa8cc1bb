//! What the `fs` thread needs of its jail: data for `crate::jail`, and for its tests.
//!
//! # Order
//! 1. In the VMM's own user and mount namespaces, before the old root goes away: clone `/proc/self/fd` as a mount of
//!    its own (`open_tree(OPEN_TREE_CLONE)`, or a bind mount opened with `O_PATH` and then detached), so that `..` does
//!    not lead from it to the rest of `/proc`. Open `/proc/self/mountinfo` of the new mount namespace.
//! 2. Make the shared directory the root, with propagation from the host (`MS_SLAVE | MS_REC`), so that what the shim
//!    mounts below it later arrives.
//! 3. Open `/` with `O_PATH | O_DIRECTORY`. The descriptor that the shim passed will not do: it belongs to the host's
//!    mount namespace, where `..` leads out and mounts are others.
//! 4. Build [`super::SharedDirectory`] of the three descriptors, and the device of that.
//! 5. Drop capabilities to [`CAPABILITIES`], permitted and effective, with an ambient and inheritable set of none, and
//!    clear the supplementary groups. `no_new_privs` is fine.
//! 6. On the `fs` thread, [`super::VirtioFs::enter_thread`], then the thread's seccomp filter: [`SYSTEM_CALLS`].
//!
//! The thread shares the process's descriptor table (never `unshare(CLONE_FILES)`: `/proc/self/fd` shows the main
//! thread's). Landlock, where used, must allow everything beneath `/`, or be left off for this thread.

use nix::libc::{self, c_long};

/// A capability (`capabilities(7)`) held in the VMM's user namespace, whose id map is the identity.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Capability {
    /// Give files to other users.
    Chown,
    /// Reach and change any file below the root; the guest's kernel has checked.
    DacOverride,
    /// Reach directories that are not readable.
    DacReadSearch,
    /// Change modes and times of any file.
    Fowner,
    /// Keep set-group-id bits where a privileged process in the guest sets them.
    Fsetid,
    /// Make files as any group.
    Setgid,
    /// Make files as any user.
    Setuid,
    /// Keep the others while it does (`SECBIT_NO_SETUID_FIXUP`); only [`super::VirtioFs::enter_thread`] needs it.
    Setpcap,
    /// Set `security.capability`.
    Setfcap,
}

impl Capability {
    /// The kernel's number.
    pub const fn number(self) -> u32 {
        match self {
            Self::Chown => 0,
            Self::DacOverride => 1,
            Self::DacReadSearch => 2,
            Self::Fowner => 3,
            Self::Fsetid => 4,
            Self::Setgid => 6,
            Self::Setuid => 7,
            Self::Setpcap => 8,
            Self::Setfcap => 31,
        }
    }
}

/// Everything the thread needs.
pub const CAPABILITIES: &[Capability] = &[
    Capability::Chown,
    Capability::DacOverride,
    Capability::DacReadSearch,
    Capability::Fowner,
    Capability::Fsetid,
    Capability::Setgid,
    Capability::Setuid,
    Capability::Setpcap,
    Capability::Setfcap,
];

/// The system calls of the thread once it serves, beside those of any event loop and the allocator. `openat` is the way
/// to the files and cannot be left out; what it can reach is bounded by the mount namespace.
pub const SYSTEM_CALLS: &[c_long] = &[
    libc::SYS_capset,
    libc::SYS_chmod,
    libc::SYS_copy_file_range,
    libc::SYS_fallocate,
    libc::SYS_fchownat,
    libc::SYS_fcntl,
    libc::SYS_fdatasync,
    libc::SYS_fstatfs,
    libc::SYS_fsync,
    libc::SYS_ftruncate,
    libc::SYS_getdents64,
    libc::SYS_getxattr,
    libc::SYS_linkat,
    libc::SYS_listxattr,
    libc::SYS_lseek,
    libc::SYS_mkdirat,
    libc::SYS_mknodat,
    libc::SYS_openat,
    libc::SYS_preadv,
    libc::SYS_pwritev2,
    libc::SYS_readlinkat,
    libc::SYS_removexattr,
    libc::SYS_renameat2,
    libc::SYS_setfsgid,
    libc::SYS_setfsuid,
    libc::SYS_setxattr,
    libc::SYS_statx,
    libc::SYS_symlinkat,
    libc::SYS_syncfs,
    libc::SYS_truncate,
    libc::SYS_umask,
    libc::SYS_unlinkat,
    libc::SYS_utimensat,
];

/// Descriptors per inode that the guest's kernel remembers and per file that it has open. The device refuses lookups
/// with `ENFILE` some way before the process's limit, so the limit should be high: the hard limit of the host's root.
pub const OPEN_FILES: u64 = 1 << 20;
