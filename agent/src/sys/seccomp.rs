//! Seccomp filters, and those that ask (`SECCOMP_RET_USER_NOTIF`, seccomp_unotify(2)): a system call waits until whoever
//! holds the filter's listener has answered.

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
/// The architecture of 64-bit calls and, with a bit of their number set, of x32's.
pub const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;

/// Steps of a filter, and where in the data that it is about they look.
pub mod step {
    /// Loads a word of the data.
    pub const LOAD: u16 = 0x20;
    /// Jumps by equality.
    pub const JUMP_EQUAL: u16 = 0x15;
    /// Jumps by being greater.
    pub const JUMP_GREATER: u16 = 0x25;
    /// Ends with a verdict.
    pub const RETURN: u16 = 0x06;
    /// The call's number.
    pub const NUMBER: u32 = 0;
    /// The call's architecture.
    pub const ARCHITECTURE: u32 = 4;

    /// One step.
    pub const fn of(code: u16, jt: u8, jf: u8, k: u32) -> libc::sock_filter {
        libc::sock_filter { code, jt, jf, k }
    }
}

/// Puts a filter into force for this process. The result is the listener's descriptor where the flags ask for one.
pub fn load(program: &[libc::sock_filter], flags: libc::c_ulong) -> io::Result<libc::c_long> {
    let len =
        libc::c_ushort::try_from(program.len()).map_err(|_| io::Error::from_raw_os_error(libc::E2BIG))?;
    let program = libc::sock_fprog { len, filter: program.as_ptr().cast_mut() };
    // SAFETY: the steps outlive the call, which copies them.
    check(unsafe { libc::syscall(libc::SYS_seccomp, SET_MODE_FILTER, flags, &raw const program) })
}

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
    use step::{ARCHITECTURE, JUMP_EQUAL, LOAD, NUMBER, RETURN};
    let call = u32::try_from(call).map_err(io::Error::other)?;
    let program = [
        step::of(LOAD, 0, 0, ARCHITECTURE),
        step::of(JUMP_EQUAL, 0, 3, AUDIT_ARCH_X86_64),
        step::of(LOAD, 0, 0, NUMBER),
        step::of(JUMP_EQUAL, 0, 1, call),
        step::of(RETURN, 0, 0, RETURN_ASK),
        step::of(RETURN, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    check_fd(load(&program, NEW_LISTENER | WAIT_KILLABLE)?)
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
