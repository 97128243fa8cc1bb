//! Getting a vCPU's thread out of the guest.
//!
//! Two things have to happen: a signal makes a running vCPU return to this process, and a flag that KVM reads on entry
//! keeps one from going in that was about to when the signal came. The signal's handler does nothing.

use std::os::unix::thread::JoinHandleExt;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread::JoinHandle;

use kvm_ioctls::VcpuFd;
use nix::sys::pthread::{Pthread, pthread_kill};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

const SIGNAL: Signal = Signal::SIGUSR1;

/// Makes [`SIGNAL`] interrupt a system call and do nothing else. Once per process, before the first vCPU runs.
///
/// # Errors
/// Never for this signal.
pub fn install_signal_handler() -> nix::Result<()> {
    extern "C" fn nothing(_signal: nix::libc::c_int) {}
    // Without SA_RESTART, so that the system call returns.
    let action = SigAction::new(SigHandler::Handler(nothing), SaFlags::empty(), SigSet::empty());
    // SAFETY: the handler does nothing, which is safe whatever it interrupts.
    unsafe { sigaction(SIGNAL, &action) }.map(drop)
}

/// The `immediate_exit` flag of a vCPU, in the page that it shares with KVM.
pub(super) struct Kick(NonNull<AtomicU8>);

impl Kick {
    pub(super) fn new(vcpu: &mut VcpuFd) -> Self {
        Self(NonNull::from(&mut vcpu.get_kvm_run().immediate_exit).cast())
    }

    /// `thread` runs the vCPU and never ends.
    pub(super) fn of(self, thread: &JoinHandle<()>) -> KickThread {
        KickThread { flag: self.0, thread: thread.as_pthread_t() }
    }
}

/// A vCPU's thread, from outside.
pub(super) struct KickThread {
    flag: NonNull<AtomicU8>,
    thread: Pthread,
}

// SAFETY: the flag is a byte in a mapping that lives as long as the vCPU, whose thread never ends; it is only accessed
// atomically, or by KVM. A thread id may be used anywhere.
unsafe impl Send for KickThread {}

impl KickThread {
    /// The vCPU will return from the guest, or not enter it, at least once from now on.
    pub(super) fn kick(&self) {
        // SAFETY: see `Send`. The vCPU's own thread accesses the byte between two runs only, to clear it.
        unsafe { self.flag.as_ref() }.store(1, Ordering::SeqCst);
        // Fails only for a thread that has ended, and this one does not.
        let _ = pthread_kill(self.thread, SIGNAL);
    }
}
