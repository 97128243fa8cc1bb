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

/// The interrupt lines of virtio devices, in the order in which they are given out. Lines below are the PC's own, but for
/// that of a second serial port, which this one has not; the controller has 24.
const LINES: [u32; 20] = [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 3];

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
        let index = self.windows.len();
        let line = *LINES.get(index).ok_or(PlatformError::NoLine)?;
        let window = FIRST_WINDOW + index as u64 * MMIO_WINDOW;
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

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;
    use std::sync::Mutex;

    use proptest::prelude::*;

    use super::*;
    use crate::devices::virtio::blk::Blk;
    use crate::devices::virtio::rng::{Entropy, Rng};

    fn platform() -> (Platform, Vm, EventLoop) {
        let kvm = OpenOptions::new().read(true).write(true).open("/dev/kvm").unwrap();
        let ram = GuestRam::new(1 << 20).unwrap();
        let vm = Vm::new(kvm.into(), &ram).unwrap();
        let event_loop = EventLoop::new().unwrap();
        let mut platform = Platform::default();
        platform.add_legacy(&vm, Console::default(), &Ending::new().unwrap()).unwrap();
        let rng = SharedDevice::new(Arc::new(Mutex::new(Rng::new(Entropy))));
        let blk = SharedDevice::new(Arc::new(Mutex::new(Blk::new(0))));
        platform.add_virtio(&vm, &ram, &event_loop, rng).unwrap();
        platform.add_virtio(&vm, &ram, &event_loop, blk).unwrap();
        (platform, vm, event_loop)
    }

    #[test]
    #[ignore = "needs KVM"]
    fn there_are_as_many_devices_as_interrupt_lines() {
        let (mut platform, vm, event_loop) = platform();
        let ram = GuestRam::new(1 << 20).unwrap();
        let mut add = || {
            let device = SharedDevice::new(Arc::new(Mutex::new(Rng::new(Entropy))));
            platform.add_virtio(&vm, &ram, &event_loop, device)
        };
        for _ in 2..LINES.len() {
            add().unwrap();
        }
        assert!(matches!(add(), Err(PlatformError::NoLine)));
        assert_eq!(platform.windows.last(), Some(&(0xd001_3000, 3)));
    }

    /// Of the class of cloud-hypervisor's panics by odd accesses (8506, 8405, 8417).
    #[test]
    #[ignore = "needs KVM"]
    fn any_access_of_a_guest_is_answered() {
        let (platform, _vm, _event_loop) = platform();
        let port = prop_oneof![any::<u16>(), 0x3f8u16..0x400, 0x60u16..0x65, Just(0x600)];
        let register = prop_oneof![any::<u64>(), 0xd000_0000u64..0xd000_2000];
        let data = prop::collection::vec(any::<u8>(), 0..9);
        proptest!(|(port in port, register in register, data in data)| {
            platform.ports.write(u64::from(port), &data);
            platform.registers.write(register, &data);
            let mut data = data;
            platform.ports.read(u64::from(port), &mut data);
            platform.registers.read(register, &mut data);
            if !(0xd000_0000..0xd000_2000).contains(&register) {
                prop_assert!(data.iter().all(|&byte| byte == 0xff));
            }
        });
    }
}
