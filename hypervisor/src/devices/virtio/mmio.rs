//! The virtio-mmio transport, version 2 (virtio 1.2, section 4.2).
//!
//! Turns register accesses of vCPU threads into calls of a [`VirtioDevice`]. What the driver may do follows from the
//! phase of initialisation it has reached (section 3.1.1), held in [`Phase`]: features can be written in one phase,
//! queues configured in the next, and from `DRIVER_OK` on nothing changes any more until a reset. Every access is
//! hostile; one that is not legal in its phase has no effect.
//!
//! Lock order: transport, then device.

use std::sync::Mutex;

use virtio_queue::{Queue, QueueState, QueueT};

use super::device::{Activation, ActivationError};
use super::interrupt::Interrupt;
use super::worker::SharedDevice;
use super::{RING_EVENT_IDX, VERSION_1};
use crate::bus::BusDevice;
use crate::event_loop::Registrar;
use crate::memory::GuestRam;
use crate::sync::lock;
use crate::{bits, log};

/// Addresses that a device takes up.
pub const MMIO_WINDOW: u64 = 0x1000;

/// Where a driver rings doorbells, with the queue's index as the value: KVM turns these writes into events.
pub const QUEUE_NOTIFY: u64 = 0x050;

const CONFIG_SPACE: u64 = 0x100;
const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"vmsh");

/// Status bits (section 2.1).
mod status {
    pub const ACKNOWLEDGE: u32 = 1;
    pub const DRIVER: u32 = 2;
    pub const DRIVER_OK: u32 = 4;
    pub const FEATURES_OK: u32 = 8;
    pub const NEEDS_RESET: u32 = 64;
    pub const FAILED: u32 = 128;
}

/// How far the driver has come. Each phase is left for the next one, or by a reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Nothing has happened.
    Reset,
    /// The driver has seen the device.
    Acknowledged,
    /// The driver knows how to drive it and may write features.
    Driver,
    /// Features are agreed on; queues may be configured.
    Configuring,
    /// The device is active.
    Running,
    /// The device could not start.
    Broken,
}

impl Phase {
    fn status(self) -> u32 {
        use status::{ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, NEEDS_RESET};
        match self {
            Self::Reset => 0,
            Self::Acknowledged => ACKNOWLEDGE,
            Self::Driver => ACKNOWLEDGE | DRIVER,
            Self::Configuring => ACKNOWLEDGE | DRIVER | FEATURES_OK,
            Self::Running => ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK,
            Self::Broken => Self::Running.status() | NEEDS_RESET,
        }
    }
}

/// What the driver has written about one queue. Addresses and size are judged when the device starts.
#[derive(Debug, Clone, Copy, Default)]
struct QueueConfig {
    size: u16,
    ready: bool,
    descriptors: u64,
    available: u64,
    used: u64,
}

struct Registers {
    phase: Phase,
    /// The driver gave up; informational.
    failed: bool,
    driver_features: u64,
    device_features_select: u32,
    driver_features_select: u32,
    queue_select: u32,
    queues: Vec<QueueConfig>,
}

/// One device behind a window of memory-mapped registers.
pub struct MmioTransport {
    registers: Mutex<Registers>,
    device: SharedDevice,
    memory: GuestRam,
    interrupt: Interrupt,
    registrar: Registrar,
    queue_sizes: Vec<u16>,
}

impl MmioTransport {
    /// A transport in reset.
    pub fn new(device: SharedDevice, memory: GuestRam, interrupt: Interrupt, registrar: Registrar) -> Self {
        let queue_sizes = device.lock().queue_sizes().to_vec();
        let registers = Registers {
            phase: Phase::Reset,
            failed: false,
            driver_features: 0,
            device_features_select: 0,
            driver_features_select: 0,
            queue_select: 0,
            queues: vec![QueueConfig::default(); queue_sizes.len()],
        };
        Self { registers: Mutex::new(registers), device, memory, interrupt, registrar, queue_sizes }
    }

    fn offered_features(&self) -> u64 {
        self.device.lock().features() | VERSION_1
    }

    fn read_register(&self, offset: u64) -> Option<u32> {
        let registers = lock(&self.registers);
        let value = match offset {
            0x000 => MAGIC,
            0x004 => VERSION,
            0x008 => self.device.lock().device_type(),
            0x00c => VENDOR,
            0x010 => half(self.offered_features(), registers.device_features_select),
            0x034 => u32::from(self.max_size(&registers)),
            0x044 => u32::from(registers.queue().is_some_and(|queue| queue.ready)),
            0x060 => self.interrupt.status(),
            0x070 => self.status(&registers),
            0x0fc => self.interrupt.config_generation(),
            // Shared memory regions read as absent, which is all ones (section 4.2.2): so does everything else.
            _ => return None,
        };
        Some(value)
    }

    fn max_size(&self, registers: &Registers) -> u16 {
        let index = usize::try_from(registers.queue_select).ok();
        index.and_then(|index| self.queue_sizes.get(index).copied()).unwrap_or(0)
    }

    fn status(&self, registers: &Registers) -> u32 {
        let failed = if registers.failed { status::FAILED } else { 0 };
        let needs_reset = if self.interrupt.needs_reset() { status::NEEDS_RESET } else { 0 };
        registers.phase.status() | failed | needs_reset
    }

    fn write_register(&self, offset: u64, value: u32) {
        let mut registers = lock(&self.registers);
        match offset {
            0x014 => registers.device_features_select = value,
            0x020 => registers.write_driver_features(value),
            0x024 => registers.driver_features_select = value,
            0x030 => registers.queue_select = value,
            0x038 => registers.configure(|queue| queue.size = u16::try_from(value).unwrap_or(0)),
            0x044 => registers.set_ready(value),
            0x064 => self.interrupt.acknowledge(value),
            0x070 => self.write_status(&mut registers, value),
            0x080 => registers.configure(|queue| set_low(&mut queue.descriptors, value)),
            0x084 => registers.configure(|queue| set_high(&mut queue.descriptors, value)),
            0x090 => registers.configure(|queue| set_low(&mut queue.available, value)),
            0x094 => registers.configure(|queue| set_high(&mut queue.available, value)),
            0x0a0 => registers.configure(|queue| set_low(&mut queue.used, value)),
            0x0a4 => registers.configure(|queue| set_high(&mut queue.used, value)),
            // Doorbells with a legal index never come here, see `QUEUE_NOTIFY`.
            _ => {}
        }
    }

    fn write_status(&self, registers: &mut Registers, value: u32) {
        use status::{ACKNOWLEDGE, DRIVER, DRIVER_OK, FAILED, FEATURES_OK, NEEDS_RESET};
        if value == 0 {
            return self.reset(registers);
        }
        if value & FAILED != 0 {
            registers.failed = true;
            return;
        }
        match (registers.phase, value & !NEEDS_RESET) {
            (Phase::Reset, ACKNOWLEDGE) => registers.phase = Phase::Acknowledged,
            (Phase::Acknowledged, bits) if bits == ACKNOWLEDGE | DRIVER => registers.phase = Phase::Driver,
            // Otherwise the bit stays clear, by which the driver sees that its choice is refused.
            (Phase::Driver, bits)
                if bits == ACKNOWLEDGE | DRIVER | FEATURES_OK
                    && self.acceptable(registers.driver_features) =>
            {
                registers.phase = Phase::Configuring;
            }
            (Phase::Configuring, bits) if bits == ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK => {
                registers.phase = self.activate(registers);
            }
            _ => {}
        }
    }

    /// Without `VERSION_1` the driver is a legacy one, which this transport does not serve (section 6.2).
    fn acceptable(&self, features: u64) -> bool {
        features & !self.offered_features() == 0 && features & VERSION_1 != 0
    }

    fn activate(&self, registers: &Registers) -> Phase {
        let started = self.validated_queues(registers).and_then(|queues| {
            let mut device = self.device.lock();
            device.activate(Activation {
                memory: self.memory.clone(),
                queues,
                features: registers.driver_features,
                interrupt: self.interrupt.clone(),
                registrar: self.registrar.clone(),
            })?;
            self.device.set_active(true);
            Ok(())
        });
        match started {
            Ok(()) => Phase::Running,
            Err(error) => {
                log::guest(format_args!("{}: not started: {error}", self.device.lock().name()));
                self.interrupt.signal_needs_reset();
                Phase::Broken
            }
        }
    }

    fn validated_queues(&self, registers: &Registers) -> Result<Vec<Queue>, ActivationError> {
        let event_idx = registers.driver_features & RING_EVENT_IDX != 0;
        let needed = self.device.lock().queues_needed(registers.driver_features);
        let configured = registers.queues.iter().zip(&self.queue_sizes).take(needed);
        let queues: Vec<Queue> =
            configured.filter_map(|(config, &max_size)| self.queue(config, max_size, event_idx)).collect();
        let enabled = queues.len();
        if enabled < needed {
            return Err(ActivationError::MissingQueues { enabled, needed });
        }
        Ok(queues)
    }

    /// None for a queue that is not ready, has a size the device does not offer, or lies outside RAM.
    fn queue(&self, config: &QueueConfig, max_size: u16, event_idx: bool) -> Option<Queue> {
        let state = QueueState {
            max_size,
            next_avail: 0,
            next_used: 0,
            event_idx_enabled: event_idx,
            size: config.size,
            ready: config.ready,
            desc_table: config.descriptors,
            avail_ring: config.available,
            used_ring: config.used,
        };
        let queue = Queue::try_from(state).ok()?;
        (queue.ready() && queue.is_valid(&*self.memory)).then_some(queue)
    }

    fn reset(&self, registers: &mut Registers) {
        let mut device = self.device.lock();
        if self.device.is_active() {
            self.device.set_active(false);
            device.reset();
        }
        drop(device);
        self.interrupt.reset();
        registers.phase = Phase::Reset;
        registers.failed = false;
        registers.driver_features = 0;
        registers.device_features_select = 0;
        registers.driver_features_select = 0;
        registers.queue_select = 0;
        registers.queues.fill(QueueConfig::default());
    }

    fn write_config(&self, offset: u64, data: &[u8]) {
        let registers = lock(&self.registers);
        // Drivers may write from the moment they know the device (section 3.1.1 step 7); before, they have no business.
        if matches!(registers.phase, Phase::Configuring | Phase::Running)
            && let Ok(offset) = u32::try_from(offset)
        {
            self.device.lock().write_config(offset, data);
        }
    }
}

impl Registers {
    fn queue(&self) -> Option<&QueueConfig> {
        self.queues.get(usize::try_from(self.queue_select).ok()?)
    }

    /// A ready queue is out of reach, and so is every queue once the device runs.
    fn configure(&mut self, change: impl FnOnce(&mut QueueConfig)) {
        if self.phase != Phase::Configuring {
            return;
        }
        let Ok(index) = usize::try_from(self.queue_select) else { return };
        if let Some(queue) = self.queues.get_mut(index).filter(|queue| !queue.ready) {
            change(queue);
        }
    }

    fn set_ready(&mut self, value: u32) {
        if self.phase != Phase::Configuring {
            return;
        }
        let Ok(index) = usize::try_from(self.queue_select) else { return };
        if let Some(queue) = self.queues.get_mut(index) {
            queue.ready = value == 1;
        }
    }

    fn write_driver_features(&mut self, value: u32) {
        if self.phase != Phase::Driver {
            return;
        }
        match self.driver_features_select {
            0 => set_low(&mut self.driver_features, value),
            1 => set_high(&mut self.driver_features, value),
            // No feature beyond bit 63 is offered, so none can be accepted.
            _ => {}
        }
    }
}

impl BusDevice for MmioTransport {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if let Some(offset) = offset.checked_sub(CONFIG_SPACE) {
            data.fill(0);
            if let Ok(offset) = u32::try_from(offset) {
                self.device.lock().read_config(offset, data);
            }
            return;
        }
        data.fill(0xff);
        if let Ok(word) = <&mut [u8; 4]>::try_from(data)
            && let Some(value) = self.read_register(offset)
        {
            *word = value.to_le_bytes();
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some(offset) = offset.checked_sub(CONFIG_SPACE) {
            self.write_config(offset, data);
        } else if let Ok(word) = <[u8; 4]>::try_from(data) {
            self.write_register(offset, u32::from_le_bytes(word));
        }
    }
}

fn half(value: u64, select: u32) -> u32 {
    match select {
        0 => bits::low(value),
        1 => bits::high(value),
        _ => 0,
    }
}

fn set_low(value: &mut u64, low: u32) {
    *value = bits::with_low(*value, low);
}

fn set_high(value: &mut u64, high: u32) {
    *value = bits::with_high(*value, high);
}

#[cfg(test)]
#[path = "mmio_tests.rs"]
mod tests;
