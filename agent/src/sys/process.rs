//! Processes: `clone3`, pidfds, namespaces by pidfd, and the small calls of a process about itself.

use super::{check, check_fd};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// What `clone3` shall make.
#[derive(Debug, Default)]
pub struct CloneRequest<'a> {
    /// `CLONE_NEW*` flags.
    pub namespaces: u64,
    /// The cgroup that the child is born in.
    pub cgroup: Option<BorrowedFd<'a>>,
    /// The caller's parent becomes the child's, too.
    pub sibling: bool,
}

/// Which side of the clone this is.
pub enum Cloned {
    /// The caller: the child's id in the caller's pid namespace, and a pidfd.
    Parent(u32, OwnedFd),
    /// The new process.
    Child,
}

/// Makes a process that is a copy of this one.
///
/// # Safety
/// The caller has one thread: in the child no other thread exists to release a lock that it held.
pub unsafe fn clone3(request: &CloneRequest<'_>) -> io::Result<Cloned> {
    // SAFETY: `clone_args` is a plain structure of integers, all zero is a valid value of it.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    let mut pidfd: libc::c_int = -1;
    args.flags = request.namespaces | u64::from(libc::CLONE_PIDFD.cast_unsigned());
    args.pidfd = std::ptr::from_mut(&mut pidfd).addr() as u64;
    if request.sibling {
        // The exit signal is then the caller's own.
        args.flags |= u64::from(libc::CLONE_PARENT.cast_unsigned());
    } else {
        args.exit_signal = u64::from(libc::SIGCHLD.cast_unsigned());
    }
    if let Some(cgroup) = request.cgroup {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = u64::from(cgroup.as_raw_fd().cast_unsigned());
    }
    // SAFETY: the arguments are valid; without CLONE_VM the child has its own copy of the stack and goes on here.
    let pid = check(unsafe {
        libc::syscall(libc::SYS_clone3, std::ptr::from_mut(&mut args), size_of::<libc::clone_args>())
    })?;
    if pid == 0 {
        return Ok(Cloned::Child);
    }
    let pid = u32::try_from(pid).map_err(|_| io::Error::from_raw_os_error(libc::ESRCH))?;
    // SAFETY: the kernel has stored a new descriptor there because of CLONE_PIDFD.
    Ok(Cloned::Parent(pid, unsafe { OwnedFd::from_raw_fd(pidfd) }))
}

const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// A descriptor of a running process.
pub fn pidfd_open(pid: u32) -> io::Result<OwnedFd> {
    // SAFETY: plain integers.
    check_fd(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })
}

/// Sends a signal to the very process that the pidfd means.
pub fn pidfd_send_signal(pidfd: BorrowedFd<'_>, signal: libc::c_int) -> io::Result<()> {
    // SAFETY: a null siginfo asks the kernel to fill it in as kill(2) does.
    check(unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            signal,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    })
    .map(drop)
}

/// Joins namespaces (`CLONE_NEW*`) of the process that the pidfd means, or of the kind of a namespace descriptor.
pub fn join_namespaces(fd: BorrowedFd<'_>, namespaces: libc::c_int) -> io::Result<()> {
    // SAFETY: plain integers.
    check(unsafe { libc::setns(fd.as_raw_fd(), namespaces) }.into()).map(drop)
}

/// `prctl(2)` with integers only.
pub fn prctl(option: libc::c_int, argument: libc::c_ulong) -> io::Result<libc::c_int> {
    // SAFETY: the options used in this crate take integers in all arguments.
    let result =
        unsafe { libc::prctl(option, argument, 0 as libc::c_ulong, 0 as libc::c_ulong, 0 as libc::c_ulong) };
    check(result.into())?;
    Ok(result)
}

/// Gives the process a session keyring of its own. A kernel without keys is fine.
pub fn join_session_keyring(name: &std::ffi::CStr) -> io::Result<()> {
    const KEYCTL_JOIN_SESSION_KEYRING: libc::c_ulong = 1;
    // SAFETY: the name is a valid C string that outlives the call.
    match check(unsafe { libc::syscall(libc::SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, name.as_ptr()) }) {
        Err(error) if error.raw_os_error() != Some(libc::ENOSYS) => Err(error),
        _ => Ok(()),
    }
}

/// Waits for a child of the caller.
pub fn wait(pid: u32) -> io::Result<libc::c_int> {
    let mut status = 0;
    loop {
        // SAFETY: `status` is a valid place for an integer.
        match check(unsafe { libc::waitpid(pid.cast_signed(), &raw mut status, 0) }.into()) {
            Ok(_) => return Ok(status),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}
