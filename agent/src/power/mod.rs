//! Ends the machine.

use crate::log;
use std::process;
use vmshim_protocol::power::{POWER_OFF, POWER_PORT};

/// Writes what disks must have, and stops the machine; as anything but the guest's first process, only this one.
pub fn off() -> ! {
    if process::id() != 1 {
        process::exit(0);
    }
    nix::unistd::sync();
    announce();
    // Only if there is nobody at the port, and then the machine resets.
    let _ = nix::sys::reboot::reboot(nix::sys::reboot::RebootMode::RB_AUTOBOOT);
    log::error("the machine does not reset");
    process::abort();
}

/// Writes the byte to the VMM's port, which does not come back from it.
fn announce() {
    // SAFETY: plain integers; asks for leave to use one port.
    if unsafe { libc::ioperm(POWER_PORT.into(), 1, 1) } != 0 {
        log::error("the power port is not to be had");
        return;
    }
    // SAFETY: leave for this port has just been given, and the instruction touches neither memory nor stack.
    unsafe {
        std::arch::asm!("out dx, al", in("dx") POWER_PORT, in("al") POWER_OFF, options(nomem, nostack, preserves_flags));
    }
}
