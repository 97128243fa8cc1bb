//! Seccomp filters that ask (`SECCOMP_RET_USER_NOTIF`, seccomp_unotify(2)): a system call waits until whoever holds the
//! filter's listener has answered.

use super::{check, check_fd};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

const SET_MODE_FILTER: libc::c_uint = 1;
const NEW_LISTENER: libc::c_ulong = 1 << 3;
/// Once the listener has the question, no signal but a deadly one takes it back: a program that is sent signals all the
/// time would never get an answer.
const WAIT_KILLABLE: libc::c_ulong = 1 << 5;
const RETURN_ASK: u32 = 0x7fc0_0000;
const RECEIVE: libc::c_ulong = 0xc050_2100;
const ANSWER: libc::c_ulong = 0xc018_2101;
const GO_ON: u32 = 1;
const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;

/// A system call that waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Question {
    id: u64,
    /// The thread, in the reader's pid namespace.
    pub thread: u32,
    /// The call's first argument.
    pub argument: u64,
}

#[cfg(test)]
impl Question {
    /// One that nobody has asked.
    pub fn of(thread: u32, argument: u64) -> Self {
        Self { id: 0, thread, argument }
    }
}

/// What the reader of a listener finds.
#[derive(Debug, PartialEq, Eq)]
pub enum Asked {
    /// A call waits.
    Waits(Question),
    /// Nothing at the moment.
    Nothing,
    /// Nobody is left who could ask.
    Over,
}

/// Has every later `call` of this process and its children ask. The calling thread must be privileged or have
/// no_new_privs.
pub fn ask_for(call: libc::c_long) -> io::Result<OwnedFd> {
    const LOAD: u16 = 0x20;
    const JUMP_EQUAL: u16 = 0x15;
    const RETURN: u16 = 0x06;
    const NUMBER: u32 = 0;
    const ARCHITECTURE: u32 = 4;
    let step = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    let call = u32::try_from(call).map_err(io::Error::other)?;
    let mut steps = [
        step(LOAD, 0, 0, ARCHITECTURE),
        step(JUMP_EQUAL, 0, 3, AUDIT_ARCH_X86_64),
        step(LOAD, 0, 0, NUMBER),
        step(JUMP_EQUAL, 0, 1, call),
        step(RETURN, 0, 0, RETURN_ASK),
        step(RETURN, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog {
        len: libc::c_ushort::try_from(steps.len()).map_err(io::Error::other)?,
        filter: steps.as_mut_ptr(),
    };
    let flags = NEW_LISTENER | WAIT_KILLABLE;
    // SAFETY: the program outlives the call, which copies it.
    check_fd(unsafe { libc::syscall(libc::SYS_seccomp, SET_MODE_FILTER, flags, &raw const program) })
}

/// The next question, without waiting for one.
pub fn receive(listener: BorrowedFd<'_>) -> io::Result<Asked> {
    loop {
        let mut descriptors = [PollFd::new(listener, PollFlags::POLLIN)];
        poll(&mut descriptors, PollTimeout::ZERO)?;
        let ready = descriptors[0].revents().unwrap_or(PollFlags::empty());
        if !ready.contains(PollFlags::POLLIN) {
            return Ok(if ready.contains(PollFlags::POLLHUP) { Asked::Over } else { Asked::Nothing });
        }
        // SAFETY: a plain structure of integers; the kernel wants it zeroed.
        let mut asked: libc::seccomp_notif = unsafe { std::mem::zeroed() };
        // SAFETY: the request fills the structure. It does not wait, since there was a question.
        match check(unsafe { libc::ioctl(listener.as_raw_fd(), RECEIVE, &raw mut asked) }.into()) {
            Ok(_) => {
                let argument = asked.data.args.first().copied().unwrap_or(0);
                return Ok(Asked::Waits(Question { id: asked.id, thread: asked.pid, argument }));
            }
            // It has been taken back meanwhile; there may be others.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
            Err(error) => return Err(error),
        }
    }
}

/// Lets the call go on, or has it fail with an error. One whose process is gone is nobody's loss.
pub fn answer(listener: BorrowedFd<'_>, question: &Question, errno: libc::c_int) {
    let mut answer = libc::seccomp_notif_resp {
        id: question.id,
        val: 0,
        error: -errno,
        flags: if errno == 0 { GO_ON } else { 0 },
    };
    // SAFETY: the request reads the structure.
    let _ = check(unsafe { libc::ioctl(listener.as_raw_fd(), ANSWER, &raw mut answer) }.into());
}

/// A duplicate of the descriptor that a thread means by a number.
pub fn descriptor_of(thread: u32, number: u64) -> io::Result<OwnedFd> {
    const PIDFD_THREAD: libc::c_int = libc::O_EXCL;
    // SAFETY: plain integers.
    let pidfd = check_fd(unsafe { libc::syscall(libc::SYS_pidfd_open, thread, PIDFD_THREAD) })?;
    let number =
        libc::c_int::try_from(number & 0xffff_ffff).map_err(|_| io::Error::from_raw_os_error(libc::EBADF))?;
    // SAFETY: plain integers.
    check_fd(unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_fd().as_raw_fd(), number, 0) })
}
