//! Confinement of a child, since there is no way back.

use std::os::fd::{AsRawFd, IntoRawFd};

use nix::sys::signal::Signal;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork};

use super::*;

/// Runs `act` in a process of its own, whose exit status is what it returns.
fn in_a_child(act: impl FnOnce() -> i32) -> WaitStatus {
    // SAFETY: the child uses the C library's allocator only, whose locks are whole after a fork.
    match unsafe { fork() }.unwrap() {
        ForkResult::Child => {
            let status = act();
            // SAFETY: ends the child without running what the test's process has registered.
            unsafe { nix::libc::_exit(status) }
        }
        ForkResult::Parent { child } => waitpid(child, None).unwrap(),
    }
}

#[test]
fn a_forbidden_call_kills() {
    for role in [Role::Vcpu, Role::Io, Role::Blk, Role::Net] {
        let ended = in_a_child(|| {
            if seccomp::apply(role).is_err() {
                return 1;
            }
            let _ = std::fs::File::open("/dev/null");
            2
        });
        assert!(matches!(ended, WaitStatus::Signaled(_, Signal::SIGSYS, _)), "{role:?}: {ended:?}");
    }
}

#[test]
fn allowed_calls_do_not() {
    for role in [Role::Vcpu, Role::Io, Role::Blk, Role::Net, Role::Fs] {
        let ended = in_a_child(|| {
            let mut fds = [0; 2];
            // SAFETY: the call writes two descriptors.
            if unsafe { nix::libc::pipe(fds.as_mut_ptr()) } != 0 || seccomp::apply(role).is_err() {
                return 1;
            }
            // SAFETY: reads one byte of a string.
            let written = unsafe { nix::libc::write(fds[1], c"x".as_ptr().cast(), 1) };
            i32::from(written != 1)
        });
        assert!(matches!(ended, WaitStatus::Exited(_, 0)), "{role:?}: {ended:?}");
    }
}

#[test]
fn a_foreign_request_of_a_descriptor_kills() {
    let ended = in_a_child(|| {
        if seccomp::apply(Role::Vcpu).is_err() {
            return 1;
        }
        // TIOCSTI, which types into a terminal.
        // SAFETY: the descriptor is no terminal, so the call touches nothing.
        unsafe { nix::libc::ioctl(0, 0x5412, std::ptr::null::<u8>()) };
        2
    });
    assert!(matches!(ended, WaitStatus::Signaled(_, Signal::SIGSYS, _)), "{ended:?}");
}

#[test]
fn strangers_are_closed_and_the_control_socket_is_not() {
    let ended = in_a_child(|| {
        let (keep, stranger) = std::os::unix::net::UnixStream::pair().unwrap();
        // Given up, since closing it twice would be a fault.
        let stranger = stranger.into_raw_fd();
        if close_strangers(&keep).is_err() {
            return 1;
        }
        // SAFETY: asks about a number.
        let open = |fd| unsafe { nix::libc::fcntl(fd, nix::libc::F_GETFD) } != -1;
        i32::from(!open(keep.as_raw_fd()) || open(stranger))
    });
    assert!(matches!(ended, WaitStatus::Exited(_, 0)), "{ended:?}");
}
