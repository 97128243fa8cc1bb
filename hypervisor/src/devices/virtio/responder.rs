//! Devices that have one queue of requests, a fixed configuration space, and nothing else to them.
//!
//! They run on the `io` thread.

use vmshim_protocol::control::DeviceStatistics;

use super::service::{Chain, Service};
use super::{Activation, ActivationError, RING_EVENT_IDX, VirtioDevice, read_space};
use crate::event_loop::Readiness;
use crate::memory::GuestRam;

/// What such a device does.
pub trait Responder: Send {
    /// Device type id (virtio 1.2, section 5).
    const DEVICE_TYPE: u32;
    /// Name for logs and statistics.
    const NAME: &'static str;
    /// The largest size of its queue.
    const QUEUE_SIZES: [u16; 1];

    /// The configuration space.
    fn config(&self) -> &[u8];

    /// Answers a request; says how many bytes it has written to the chain. None for one that cannot be answered, which is
    /// counted as an error.
    fn answer(&mut self, memory: &GuestRam, chain: Chain) -> Option<u32>;
}

/// The device around it.
pub struct Responding<R> {
    responder: R,
    service: Option<Service>,
    statistics: DeviceStatistics,
}

impl<R: Responder> Responding<R> {
    /// A device that has not been started.
    pub fn new(responder: R) -> Self {
        let statistics = DeviceStatistics { name: R::NAME.into(), ..Default::default() };
        Self { responder, service: None, statistics }
    }

    fn serve(&mut self) {
        let Self { responder, service: Some(service), statistics } = self else { return };
        service.serve(|memory, chain| {
            let written = responder.answer(memory, chain);
            match written {
                Some(_) => statistics.requests += 1,
                None => statistics.errors += 1,
            }
            let written = written.unwrap_or(0);
            statistics.read_bytes += u64::from(written);
            written
        });
    }
}

impl<R: Responder> VirtioDevice for Responding<R> {
    fn device_type(&self) -> u32 {
        R::DEVICE_TYPE
    }

    fn name(&self) -> &str {
        R::NAME
    }

    fn queue_sizes(&self) -> &[u16] {
        &R::QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        RING_EVENT_IDX
    }

    fn read_config(&self, offset: u32, data: &mut [u8]) {
        read_space(self.responder.config(), offset, data);
    }

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
