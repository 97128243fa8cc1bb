//! Where devices are: addresses, interrupt lines and threads.

use std::io;
use std::sync::Arc;

use super::kvm::{KvmError, Vm};
use crate::bus::{Bus, BusError};
use crate::devices::legacy::{
    Console, KeyboardController, PowerPort, SERIAL_IRQ, SERIAL_PORT, SERIAL_PORTS, Serial,
};
use crate::devices::virtio::{Interrupt, MMIO_WINDOW, MmioTransport, QUEUE_NOTIFY, SharedDevice};
use crate::event_loop::EventLoop;
use crate::machine::Ending;
use crate::memory::GuestRam;

/// The first window of a virtio device, in the gap below 4 GiB.
const FIRST_WINDOW: u64 = 0xd000_0000;

/// The first and the last interrupt line of a virtio device. Lines below are the PC's own; the controller has 24.
const FIRST_LINE: u32 = 5;
const LAST_LINE: u32 = 23;

/// Why a device cannot be put into the machine.
#[derive(Debug, thiserror::Error)]
pub enum PlatformError {
    /// Addresses clash, a fault of this program.
    #[error("two devices claim the same addresses")]
    Bus(#[from] BusError),
    /// KVM refused.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The host refused.
    #[error("the host has no descriptors left for the devices")]
    Host(#[from] io::Error),
    /// More than there are interrupt lines.
    #[error("the machine has more devices than interrupt lines")]
    NoLine,
}

/// The address spaces while they are filled.
#[derive(Default)]
pub(super) struct Platform {
    pub ports: Bus,
    pub registers: Bus,
    /// Window and interrupt line of each virtio device, for the command line.
    pub windows: Vec<(u64, u32)>,
    pub devices: Vec<SharedDevice>,
}

impl Platform {
    /// Puts in the serial port and the ways to end the machine.
    pub fn add_legacy(&mut self, vm: &Vm, console: Console, ending: &Ending) -> Result<(), PlatformError> {
        let serial = Serial::new(console)?;
        serial.with_irqfd(|event| vm.interrupt_by(event, SERIAL_IRQ))?;
        self.ports.insert(SERIAL_PORT, SERIAL_PORTS, Arc::new(serial))?;
        let keyboard = Arc::new(KeyboardController::new(ending.clone()));
        self.ports.insert(KeyboardController::PORT, KeyboardController::PORTS, keyboard)?;
        let power = Arc::new(PowerPort::new(ending.clone()));
        self.ports.insert(u64::from(vmshim_protocol::power::POWER_PORT), 1, power)?;
        Ok(())
    }

    /// Puts in a virtio device that works on the thread of `event_loop`.
    pub fn add_virtio(
        &mut self,
        vm: &Vm,
        memory: &GuestRam,
        event_loop: &EventLoop,
        device: SharedDevice,
    ) -> Result<(), PlatformError> {
        let index = u32::try_from(self.windows.len()).map_err(|_| PlatformError::NoLine)?;
        let line = FIRST_LINE.checked_add(index).filter(|line| *line <= LAST_LINE).ok_or(PlatformError::NoLine)?;
        let window = FIRST_WINDOW + u64::from(index) * MMIO_WINDOW;
        let interrupt = Interrupt::new()?;
        vm.interrupt_by(interrupt.irqfd(), line)?;
        let doorbells = device.doorbells(event_loop)?;
        for (queue, event) in (0..).zip(doorbells.events()) {
            vm.ring_by(event, window + QUEUE_NOTIFY, queue)?;
        }
        let registrar = device.registrar(event_loop);
        let transport = MmioTransport::new(device.clone(), memory.clone(), interrupt, registrar);
        self.registers.insert(window, MMIO_WINDOW, Arc::new(transport))?;
        self.windows.push((window, line));
        self.devices.push(device);
        Ok(())
    }
}
