//! System calls that each thread may make, as data. Any other one kills the process.

use nix::errno::Errno;
use nix::libc::{self, c_long};

use super::{JailError, Tried, filter};
use crate::devices::virtio::fs::needs;

/// What a thread is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Runs a vCPU and, on its behalf, what a device does when a register is touched: start, reset, interrupt.
    Vcpu,
    /// The control socket, vsock and entropy.
    Io,
    /// Disks.
    Blk,
    /// Network interfaces.
    Net,
    /// The shared directory.
    Fs,
}

/// The allocator, locks, clocks, events, and how a thread or the process ends or panics.
const COMMON: &[c_long] = &[
    libc::SYS_brk,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_close,
    libc::SYS_epoll_ctl,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_futex,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_madvise,
    libc::SYS_mmap,
    libc::SYS_mprotect,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_read,
    libc::SYS_restart_syscall,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_yield,
    libc::SYS_sigaltstack,
    libc::SYS_tgkill,
    libc::SYS_write,
    libc::SYS_writev,
];

/// Waiting for events.
const WORKER: &[c_long] = &[libc::SYS_epoll_pwait, libc::SYS_epoll_wait];

/// A device is started and reset by the vCPU that writes its status. By `fcntl` a debug build makes sure of a descriptor
/// before it closes it.
const VCPU: &[c_long] = &[libc::SYS_eventfd2, libc::SYS_fcntl, libc::SYS_shutdown, libc::SYS_timerfd_settime];

const IO: &[c_long] = &[
    libc::SYS_accept4,
    libc::SYS_eventfd2,
    libc::SYS_fcntl,
    libc::SYS_fstat,
    libc::SYS_lseek,
    libc::SYS_newfstatat,
    libc::SYS_readv,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_shutdown,
    libc::SYS_statx,
    libc::SYS_timerfd_settime,
];

const NET: &[c_long] = &[libc::SYS_readv, libc::SYS_timerfd_settime];

const BLK: &[c_long] = &[libc::SYS_fallocate, libc::SYS_fdatasync, libc::SYS_preadv, libc::SYS_pwritev];

/// Requests that a thread may make of a descriptor by `ioctl`.
mod request {
    pub const KVM_RUN: u32 = 0xae80;
    pub const KVM_KVMCLOCK_CTRL: u32 = 0xaead;
    /// `BLKGETSIZE64`, of a disk that is attached.
    pub const BLOCK_DEVICE_SIZE: u32 = 0x8008_1272;
    /// `TUNGETFEATURES`, `TUNGETIFF` and `TUNSETVNETHDRSZ`, of a tap that is attached.
    pub const TAP_FEATURES: u32 = 0x8004_54cf;
    pub const TAP_INTERFACE: u32 = 0x8004_54d2;
    pub const TAP_HEADER: u32 = 0x4004_54d8;
    /// `TUNSETOFFLOAD`, of a tap when it is attached or its driver starts, whichever comes last.
    pub const TAP_OFFLOAD: u32 = 0x4004_54d0;
    /// `TUNSETQUEUE`, when the driver of a NIC says how many queues it uses, or is no more.
    pub const TAP_QUEUE: u32 = 0x4004_54d9;
    /// `FIONBIO`, of a socket that is accepted.
    pub const NON_BLOCKING: u32 = 0x5421;
}

impl Role {
    fn system_calls(self) -> impl Iterator<Item = c_long> {
        let (worker, own) = match self {
            Self::Vcpu => (&[][..], VCPU),
            Self::Io => (WORKER, IO),
            Self::Blk => (WORKER, BLK),
            Self::Net => (WORKER, NET),
            Self::Fs => (WORKER, needs::SYSTEM_CALLS),
        };
        COMMON.iter().chain(worker).chain(own).copied()
    }

    fn requests(self) -> &'static [u32] {
        match self {
            Self::Vcpu => {
                &[request::KVM_RUN, request::KVM_KVMCLOCK_CTRL, request::TAP_OFFLOAD, request::TAP_QUEUE]
            }
            Self::Io => &[
                request::BLOCK_DEVICE_SIZE,
                request::TAP_FEATURES,
                request::TAP_INTERFACE,
                request::TAP_HEADER,
                request::TAP_OFFLOAD,
                request::NON_BLOCKING,
            ],
            Self::Net => &[request::TAP_QUEUE],
            Self::Blk | Self::Fs => &[],
        }
    }
}

/// Limits the calling thread, and those it starts, to the calls of `role`.
pub fn apply(role: Role) -> Result<(), JailError> {
    let program = filter::compile(role.system_calls(), role.requests());
    seccompiler::apply_filter(&program).map_err(|_| Errno::EINVAL).tried("install its system call filter")
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROLES: [Role; 5] = [Role::Vcpu, Role::Io, Role::Blk, Role::Net, Role::Fs];

    #[test]
    fn no_call_is_listed_twice() {
        for role in ROLES {
            let mut calls: Vec<_> = role.system_calls().collect();
            calls.sort_unstable();
            let count = calls.len();
            calls.dedup();
            assert_eq!(calls.len(), count, "{role:?}");
        }
    }

    #[test]
    fn nobody_may_execute_trace_mount_or_make_a_socket() {
        let forbidden = [
            libc::SYS_execve,
            libc::SYS_execveat,
            libc::SYS_fork,
            libc::SYS_clone,
            libc::SYS_clone3,
            libc::SYS_ptrace,
            libc::SYS_mount,
            libc::SYS_move_mount,
            libc::SYS_unshare,
            libc::SYS_setns,
            libc::SYS_socket,
            libc::SYS_connect,
            libc::SYS_bpf,
            libc::SYS_io_uring_setup,
            libc::SYS_prctl,
            libc::SYS_kill,
        ];
        for role in ROLES {
            assert!(role.system_calls().all(|call| !forbidden.contains(&call)), "{role:?}");
            assert!(role == Role::Fs || role.system_calls().all(|call| call != libc::SYS_openat), "{role:?}");
        }
    }
}
