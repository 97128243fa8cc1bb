//! How a device interrupts the guest.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use nix::sys::eventfd::{EfdFlags, EventFd};

/// Interrupt reasons (virtio 1.2, section 4.2.2, `InterruptStatus`).
const USED_QUEUE: u32 = 1 << 0;
const CONFIG_CHANGE: u32 = 1 << 1;

/// A device's interrupt line and the reasons it is raised for. Clones are the same line; any thread may use them.
#[derive(Debug, Clone)]
pub struct Interrupt(Arc<Line>);

#[derive(Debug)]
struct Line {
    status: AtomicU32,
    config_generation: AtomicU32,
    needs_reset: AtomicBool,
    irqfd: EventFd,
}

impl Interrupt {
    /// A line that nothing listens to until its [`Interrupt::irqfd`] has been given to KVM.
    ///
    /// # Errors
    /// When the process has no descriptors left.
    pub fn new() -> io::Result<Self> {
        let irqfd = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        Ok(Self(Arc::new(Line {
            status: AtomicU32::new(0),
            config_generation: AtomicU32::new(0),
            needs_reset: AtomicBool::new(false),
            irqfd,
        })))
    }

    /// Tells the guest that a used ring has grown. The caller has asked the queue whether the guest wants to know
    /// (`needs_notification`).
    pub fn signal_used_queue(&self) {
        self.raise(USED_QUEUE);
    }

    /// Tells the guest that the configuration space has changed.
    pub fn signal_config(&self) {
        self.0.config_generation.fetch_add(1, Ordering::AcqRel);
        self.raise(CONFIG_CHANGE);
    }

    /// Tells the guest that the device is beyond use until it is reset (`DEVICE_NEEDS_RESET`): its driver broke a rule
    /// of the queue that no single request can answer for.
    pub fn signal_needs_reset(&self) {
        self.0.needs_reset.store(true, Ordering::Release);
        self.signal_config();
    }

    fn raise(&self, reason: u32) {
        self.0.status.fetch_or(reason, Ordering::AcqRel);
        // A write fails only when 2^64 - 2 interrupts are pending, and then the line is up already.
        let _ = self.0.irqfd.write(1);
    }

    /// Reasons that the guest has not acknowledged yet.
    pub fn status(&self) -> u32 {
        self.0.status.load(Ordering::Acquire)
    }

    /// The guest has seen these reasons.
    pub fn acknowledge(&self, reasons: u32) {
        self.0.status.fetch_and(!reasons, Ordering::AcqRel);
    }

    /// Whether [`Interrupt::signal_needs_reset`] was called since the last [`Interrupt::reset`].
    pub fn needs_reset(&self) -> bool {
        self.0.needs_reset.load(Ordering::Acquire)
    }

    /// The device has been reset: nothing is pending.
    pub fn reset(&self) {
        self.0.status.store(0, Ordering::Release);
        self.0.needs_reset.store(false, Ordering::Release);
    }

    /// Changes with every [`Interrupt::signal_config`].
    pub fn config_generation(&self) -> u32 {
        self.0.config_generation.load(Ordering::Acquire)
    }

    /// The event to hand to KVM.
    pub fn irqfd(&self) -> &EventFd {
        &self.0.irqfd
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_add_up_until_acknowledged() {
        let line = Interrupt::new().unwrap();
        line.signal_used_queue();
        line.clone().signal_config();
        assert_eq!(line.status(), USED_QUEUE | CONFIG_CHANGE);
        line.acknowledge(USED_QUEUE);
        assert_eq!(line.status(), CONFIG_CHANGE);
        assert_eq!(line.irqfd().read().unwrap(), 2);
    }

    #[test]
    fn only_a_config_change_moves_the_generation() {
        let line = Interrupt::new().unwrap();
        line.signal_used_queue();
        assert_eq!(line.config_generation(), 0);
        line.signal_config();
        assert_eq!(line.config_generation(), 1);
    }
}
