//! virtio-balloon (virtio 1.2, section 5.5): the guest's free memory goes back to the host.
//!
//! Only free page reporting is used. The guest reports blocks that it does not use, Linux some two seconds after they
//! have become free and in pieces of 2 MiB or more; the host takes their pages, and gives zeroed ones when the guest
//! touches them again. The balloon proper is never inflated: its target is always zero, so its two queues stay empty, and
//! what a guest puts there all the same is not looked at.
//!
//! Hostile: the guest, in every range. It can give back what it uses, which is its own loss. Runs on the `io` thread.

use vmshim_protocol::control::DeviceStatistics;

use super::service::{Chain, Service};
use super::{Activation, ActivationError, RING_EVENT_IDX, VirtioDevice};
use crate::event_loop::Readiness;
use crate::memory::GuestRam;

const DEVICE_TYPE: u32 = 5;

/// Inflate, deflate, reporting. Without statistics and hints the third queue is the reporting one; Linux reports 32
/// ranges at a time.
const QUEUE_SIZES: [u16; 3] = [16, 16, 32];
const REPORTING: usize = 2;

/// Feature bits (section 5.5.3).
mod feature {
    pub const PAGE_REPORTING: u64 = 1 << 5;
}

/// The longest range that is taken back in one piece, which bounds the work of one request. Linux's largest block is
/// 4 MiB.
const MAX_RANGE: u32 = 16 << 20;

/// The device.
pub struct Balloon {
    service: Option<Service>,
    statistics: DeviceStatistics,
}

impl Default for Balloon {
    fn default() -> Self {
        Self::new()
    }
}

impl Balloon {
    /// A device that has not been started.
    pub fn new() -> Self {
        Self { service: None, statistics: DeviceStatistics { name: "balloon".into(), ..Default::default() } }
    }

    fn serve(&mut self) {
        let statistics = &mut self.statistics;
        if let Some(service) = &mut self.service {
            service.serve(|memory, chain| {
                take_back(memory, chain, statistics);
                0
            });
        }
    }
}

impl VirtioDevice for Balloon {
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
        feature::PAGE_REPORTING | RING_EVENT_IDX
    }

    /// The balloon's target and all else there is are zero.
    fn read_config(&self, _offset: u32, data: &mut [u8]) {
        data.fill(0);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivationError> {
        let Activation { memory, mut queues, features, interrupt, registrar } = activation;
        let enabled = queues.len();
        if features & feature::PAGE_REPORTING == 0 {
            return Ok(());
        }
        if enabled <= REPORTING {
            return Err(ActivationError::MissingQueues { enabled, needed: QUEUE_SIZES.len() });
        }
        let queues = vec![queues.swap_remove(REPORTING)];
        self.service = Some(Service::start(Activation { memory, queues, features, interrupt, registrar })?);
        Ok(())
    }

    fn reset(&mut self) {
        self.service = None;
    }

    fn on_queue(&mut self, index: usize) {
        if index == REPORTING {
            self.serve();
        }
    }

    fn on_event(&mut self, _token: u32, _readiness: Readiness) {
        self.serve();
    }

    fn statistics(&self) -> DeviceStatistics {
        self.statistics.clone()
    }
}

/// Takes what the guest reports. `written_bytes` counts what was taken.
fn take_back(memory: &GuestRam, chain: Chain, statistics: &mut DeviceStatistics) {
    statistics.requests += 1;
    for range in chain.writable() {
        if range.len() <= MAX_RANGE && memory.take_back(range.addr(), range.len()) {
            statistics.written_bytes += u64::from(range.len());
        } else {
            statistics.errors += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use nix::sys::epoll::EpollTimeout;
    use virtio_queue::desc::RawDescriptor;
    use virtio_queue::desc::split::Descriptor;
    use virtio_queue::mock::MockSplitQueue;
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::devices::virtio::{Interrupt, SharedDevice};
    use crate::event_loop::EventLoop;

    const MIB: u64 = 1 << 20;
    const NEXT: u16 = 1;
    const WRITE: u16 = 2;

    /// Ranges that are taken between others that cannot be.
    #[test]
    fn whole_pages_of_ram_are_taken_and_nothing_else() {
        let memory = GuestRam::new(64 * MIB).unwrap();
        let event_loop = EventLoop::new().unwrap();
        let balloon = Arc::new(Mutex::new(Balloon::new()));
        let shared = SharedDevice::new(balloon.clone());
        let doorbells = shared.doorbells(&event_loop).unwrap();
        let mock = MockSplitQueue::new(&*memory, 32);
        let taken = [8 * MIB, 12 * MIB];
        for place in [4 * MIB, 8 * MIB, 12 * MIB, 20 * MIB] {
            memory.write_obj(7u64, GuestAddress(place)).unwrap();
        }
        let ranges = [
            (taken[0], 2 * MIB, WRITE),
            (20 * MIB + 8, 4096, WRITE),
            (20 * MIB, 100, WRITE),
            (20 * MIB, 0, WRITE),
            (20 * MIB, 32 * MIB, WRITE),
            (63 * MIB, 2 * MIB, WRITE),
            (u64::MAX - 4095, 4096, WRITE),
            (taken[1], 4096, WRITE),
        ];
        let last = ranges.len() - 1;
        let chain: Vec<RawDescriptor> = (0u16..)
            .zip(ranges)
            .map(|(index, (place, len, flags))| {
                let next = if usize::from(index) == last { 0 } else { NEXT };
                Descriptor::new(place, u32::try_from(len).unwrap(), flags | next, index + 1).into()
            })
            .collect();
        mock.build_desc_chain(&chain).unwrap();
        let queue = mock.create_queue().unwrap();
        let activation = Activation {
            memory: memory.clone(),
            queues: vec![mock.create_queue().unwrap(), mock.create_queue().unwrap(), queue],
            features: feature::PAGE_REPORTING,
            interrupt: Interrupt::new().unwrap(),
            registrar: shared.registrar(&event_loop),
        };
        balloon.lock().unwrap().activate(activation).unwrap();
        shared.set_active(true);
        doorbells.events()[REPORTING].write(1).unwrap();
        while event_loop.turn(EpollTimeout::ZERO).unwrap() > 0 {}
        let read = |place| memory.read_obj::<u64>(GuestAddress(place)).unwrap();
        assert_eq!(taken.map(read), [0, 0]);
        assert_eq!((read(4 * MIB), read(20 * MIB)), (7, 7));
        let statistics = balloon.lock().unwrap().statistics();
        assert_eq!((statistics.requests, statistics.errors), (1, 6));
        assert_eq!(statistics.written_bytes, 2 * MIB + 4096);
    }

    #[test]
    fn a_driver_without_reporting_is_left_alone() {
        let memory = GuestRam::new(4 * MIB).unwrap();
        let event_loop = EventLoop::new().unwrap();
        let mut balloon = Balloon::new();
        let shared = SharedDevice::new(Arc::new(Mutex::new(Balloon::new())));
        let mut activation = Activation {
            memory,
            queues: Vec::new(),
            features: 0,
            interrupt: Interrupt::new().unwrap(),
            registrar: shared.registrar(&event_loop),
        };
        balloon.activate(activation).unwrap();
        balloon.on_queue(REPORTING);
        activation = Activation {
            memory: GuestRam::new(4 * MIB).unwrap(),
            queues: Vec::new(),
            features: feature::PAGE_REPORTING,
            interrupt: Interrupt::new().unwrap(),
            registrar: shared.registrar(&event_loop),
        };
        assert!(balloon.activate(activation).is_err());
    }
}
