//! The serial port COM1, output only: the guest's console.

use std::io;
use std::sync::Mutex;

use nix::sys::eventfd::{EfdFlags, EventFd};
use vm_superio::Trigger;
use vm_superio::serial::NoEvents;

use super::Console;
use crate::bus::BusDevice;
use crate::sync::lock;

/// First port of COM1.
pub const SERIAL_PORT: u64 = 0x3f8;

/// Ports of an 8250.
pub const SERIAL_PORTS: u64 = 8;

/// Interrupt of COM1.
pub const SERIAL_IRQ: u32 = 4;

/// The interrupt line, on which KVM listens.
struct Line(EventFd);

impl Trigger for Line {
    type E = nix::errno::Errno;

    fn trigger(&self) -> Result<(), Self::E> {
        self.0.write(1).map(drop)
    }
}

/// An 8250 that writes to a [`Console`].
pub struct Serial(Mutex<vm_superio::Serial<Line, NoEvents, Console>>);

impl Serial {
    /// A port after reset, and its interrupt line for KVM.
    ///
    /// # Errors
    /// When the process has no descriptors left.
    pub fn new(console: Console) -> io::Result<Self> {
        let line = Line(EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?);
        Ok(Self(Mutex::new(vm_superio::Serial::new(line, console))))
    }

    /// Calls `with` with the event that KVM shall listen on.
    pub fn with_irqfd<T>(&self, with: impl FnOnce(&EventFd) -> T) -> T {
        with(&lock(&self.0).interrupt_evt().0)
    }
}

impl BusDevice for Serial {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let Ok(offset) = u8::try_from(offset) else { return };
        let mut serial = lock(&self.0);
        data.fill_with(|| serial.read(offset));
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let Ok(offset) = u8::try_from(offset) else { return };
        let mut serial = lock(&self.0);
        for &byte in data {
            // Fails when the interrupt is pending already, or the receiver is full in loop-back mode.
            let _ = serial.write(offset, byte);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn bytes_written_come_out_on_the_console() {
        let console = Console::default();
        let serial = Serial::new(console.clone()).unwrap();
        serial.write(0, b"hello\n");
        assert_eq!(console.lines(), ["hello"]);
    }

    #[test]
    fn the_transmitter_is_always_ready() {
        const LINE_STATUS: u64 = 5;
        let serial = Serial::new(Console::default()).unwrap();
        let mut data = [0];
        serial.read(LINE_STATUS, &mut data);
        assert_eq!(data[0] & 0x60, 0x60);
    }

    proptest! {
        #[test]
        fn any_access_is_answered(accesses in proptest::collection::vec((0u64..8, any::<u8>(), any::<bool>()), 0..200)) {
            let serial = Serial::new(Console::default()).unwrap();
            for (offset, value, write) in accesses {
                if write {
                    serial.write(offset, &[value; 3]);
                } else {
                    serial.read(offset, &mut [value]);
                }
            }
        }
    }
}
