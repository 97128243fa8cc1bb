//! What a virtio device is, whatever its transport.
//!
//! A device is a state struct. Its worker thread calls [`VirtioDevice::on_queue`] and [`VirtioDevice::on_event`]; a
//! transport calls the rest from the vCPU that touched a register. Both hold the device's lock, so no method may wait
//! for anything but a bounded amount of its own work. Everything read from a queue or written to the configuration
//! space comes from a hostile guest.

use virtio_queue::Queue;

use super::Interrupt;
use crate::event_loop::{Readiness, Registrar};
use crate::memory::GuestRam;

/// Why a device could not be started. The transport answers with `DEVICE_NEEDS_RESET`.
#[derive(Debug, thiserror::Error)]
pub enum ActivationError {
    /// The driver enabled fewer queues than the device needs.
    #[error("the driver enabled {enabled} queues where the device needs {needed}")]
    MissingQueues {
        /// Queues that are ready.
        enabled: usize,
        /// Queues that have to be.
        needed: usize,
    },
    /// The host refused a resource.
    #[error("the host refused a resource of the device")]
    Host(#[source] std::io::Error),
}

/// What a device gets when its driver sets `DRIVER_OK`.
pub struct Activation {
    /// Guest RAM, the only memory that a descriptor may name.
    pub memory: GuestRam,
    /// The queues that are needed, validated and ready, in the device's order. Their configuration never changes again
    /// before a reset.
    pub queues: Vec<Queue>,
    /// Features the driver accepted, a subset of those offered.
    pub features: u64,
    /// How the device interrupts the guest.
    pub interrupt: Interrupt,
    /// Where the device registers descriptors of its own, for [`VirtioDevice::on_event`].
    pub registrar: Registrar,
}

/// A virtio device (virtio 1.2, section 2 and the device's own section 5.x).
pub trait VirtioDevice: Send {
    /// Device type id (virtio 1.2, section 5). 0 for a placeholder, which no driver starts; it becomes another when there
    /// is something to be started, and stays so as long as a driver has it.
    fn device_type(&self) -> u32;

    /// Name for logs and statistics, such as `blk0`.
    fn name(&self) -> &str;

    /// The largest size of each queue, a power of two.
    fn queue_sizes(&self) -> &[u16];

    /// How many of the queues, from the first on, the driver has to enable when it has accepted `features`.
    fn queues_needed(&self, _features: u64) -> usize {
        self.queue_sizes().len()
    }

    /// Feature bits offered, device-specific ones and ring features the device handles (`EVENT_IDX`, `INDIRECT_DESC`).
    /// The transport adds `VERSION_1`.
    fn features(&self) -> u64;

    /// Reads the configuration space; bytes past its end read as 0.
    fn read_config(&self, offset: u32, data: &mut [u8]);

    /// Writes the configuration space; most devices have nothing to write there.
    fn write_config(&mut self, _offset: u32, _data: &[u8]) {}

    /// The driver has set `DRIVER_OK`. Called at most once between resets.
    ///
    /// # Errors
    /// The device stays inactive.
    fn activate(&mut self, activation: Activation) -> Result<(), ActivationError>;

    /// Back to the state before [`VirtioDevice::activate`]: no guest memory is touched any more, descriptors are
    /// taken out of the event loop.
    fn reset(&mut self);

    /// The driver has rung the doorbell of a queue.
    fn on_queue(&mut self, index: usize);

    /// A descriptor that the device registered is ready. `token` is what the device gave at registration.
    fn on_event(&mut self, _token: u32, _readiness: Readiness) {}

    /// Counters for [`vmshim_protocol::control::Statistics`].
    fn statistics(&self) -> vmshim_protocol::control::DeviceStatistics;
}

/// What [`VirtioDevice::read_config`] reads of a configuration space that is the bytes of `space`.
pub fn read_space(space: &[u8], offset: u32, data: &mut [u8]) {
    let rest = usize::try_from(offset).ok().and_then(|offset| space.get(offset..)).unwrap_or_default();
    for (byte, value) in data.iter_mut().zip(rest.iter().chain(std::iter::repeat(&0))) {
        *byte = *value;
    }
}

#[cfg(test)]
mod tests {
    use super::read_space;

    #[test]
    fn past_the_end_of_the_space_there_is_nothing() {
        for (offset, expected) in [(0, [1, 2]), (1, [2, 3]), (2, [3, 0]), (3, [0, 0]), (u32::MAX, [0, 0])] {
            let mut data = [7; 2];
            read_space(&[1, 2, 3], offset, &mut data);
            assert_eq!(data, expected);
        }
    }
}
