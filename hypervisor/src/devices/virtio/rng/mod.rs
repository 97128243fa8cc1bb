//! virtio-rng (virtio 1.2, section 5.4): the host kernel's random bytes.
//!
//! Runs on the `io` thread.

use vm_memory::Bytes;
use vmshim_protocol::control::DeviceStatistics;

use super::service::{Chain, Service};
use super::{Activation, ActivationError, RING_EVENT_IDX, VirtioDevice};
use crate::event_loop::Readiness;
use crate::memory::GuestRam;
use crate::random;

const DEVICE_TYPE: u32 = 4;
const QUEUE_SIZES: [u16; 1] = [64];

/// Bytes given to one request. A device may give less than asked for, and a driver asks for some dozens.
const MAX_BYTES: usize = 256;

/// The entropy device.
#[derive(Default)]
pub struct Rng {
    service: Option<Service>,
    statistics: DeviceStatistics,
}

impl Rng {
    /// A device that has not been started.
    pub fn new() -> Self {
        Self { service: None, statistics: DeviceStatistics { name: "rng".into(), ..Default::default() } }
    }

    fn serve(&mut self) {
        let statistics = &mut self.statistics;
        if let Some(service) = &mut self.service {
            service.serve(|memory, chain| answer(memory, chain, statistics));
        }
    }
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn name(&self) -> &str {
        &self.statistics.name
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        RING_EVENT_IDX
    }

    fn read_config(&self, _offset: u32, _data: &mut [u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), ActivationError> {
        self.service = Some(Service::start(activation)?);
        Ok(())
    }

    fn reset(&mut self) {
        self.service = None;
    }

    fn on_queue(&mut self, _index: usize) {
        self.serve();
    }

    fn on_event(&mut self, _token: u32, _readiness: Readiness) {
        self.serve();
    }

    fn statistics(&self) -> DeviceStatistics {
        self.statistics.clone()
    }
}

fn answer(memory: &GuestRam, chain: Chain, statistics: &mut DeviceStatistics) -> u32 {
    match fill(memory, chain) {
        Some(written) => {
            statistics.requests += 1;
            statistics.read_bytes += u64::from(written);
            written
        }
        None => {
            statistics.errors += 1;
            0
        }
    }
}

/// Fills the first writable descriptor. None where there is none, or it lies outside RAM.
fn fill(memory: &GuestRam, chain: Chain) -> Option<u32> {
    let descriptor = chain.writable().next()?;
    let mut bytes = [0; MAX_BYTES];
    let len = usize::try_from(descriptor.len()).ok()?.min(MAX_BYTES);
    let bytes = bytes.get_mut(..len)?;
    random::fill(bytes).ok()?;
    memory.write_slice(bytes, descriptor.addr()).ok()?;
    u32::try_from(len).ok()
}
