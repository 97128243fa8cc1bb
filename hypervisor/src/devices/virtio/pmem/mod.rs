//! virtio-pmem (virtio 1.2, section 5.19): a range of guest memory that the guest uses as a disk.
//!
//! What is behind the range is not this device's concern. The guest's changes to it are its own and end with it, so
//! there is nothing to write back.

use std::ops::Range;

use vm_memory::Bytes;

use super::responder::{Responder, Responding};
use super::service::Chain;
use crate::memory::GuestRam;

/// The only request there is, and its answer.
const FLUSH: u32 = 0;
const DONE: u32 = 0;
const REFUSED: u32 = 1;

/// A range of persistent memory.
pub type Pmem = Responding<Persistent>;

/// What the guest is told of it: start and size, as the configuration space has them.
pub struct Persistent([u8; 16]);

impl Persistent {
    /// A range in guest memory, of multiples of 2 MiB.
    pub fn new(range: &Range<u64>) -> Self {
        let mut config = [0; 16];
        config[..8].copy_from_slice(&range.start.to_le_bytes());
        config[8..].copy_from_slice(&range.end.saturating_sub(range.start).to_le_bytes());
        Self(config)
    }
}

impl Responder for Persistent {
    const DEVICE_TYPE: u32 = 27;
    const NAME: &'static str = "pmem";
    const QUEUE_SIZES: [u16; 1] = [16];

    fn config(&self) -> &[u8] {
        &self.0
    }

    /// None where the request does not say what it wants, or has no room for an answer.
    fn answer(&mut self, memory: &GuestRam, chain: Chain) -> Option<u32> {
        let request = chain.clone().readable().next()?;
        let answer = chain.writable().next()?;
        if request.len() < 4 || answer.len() < 4 {
            return None;
        }
        let kind = u32::from_le(memory.read_obj(request.addr()).ok()?);
        let result = if kind == FLUSH { DONE } else { REFUSED };
        memory.write_obj(result.to_le(), answer.addr()).ok()?;
        Some(4)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use nix::sys::epoll::EpollTimeout;
    use virtio_queue::desc::RawDescriptor;
    use virtio_queue::desc::split::Descriptor;
    use virtio_queue::mock::MockSplitQueue;
    use vm_memory::GuestAddress;

    use super::*;
    use crate::devices::virtio::{Activation, Interrupt, SharedDevice, VirtioDevice};
    use crate::event_loop::EventLoop;

    const MIB: u64 = 1 << 20;

    #[test]
    fn the_configuration_names_the_range_and_ends() {
        let pmem = Pmem::new(Persistent::new(&(506 * MIB..512 * MIB)));
        let read = |offset| {
            let mut data = [0xff; 8];
            pmem.read_config(offset, &mut data);
            u64::from_le_bytes(data)
        };
        assert_eq!((read(0), read(8)), (506 * MIB, 6 * MIB));
        assert_eq!((read(12), read(16), read(u32::MAX)), (0, 0, 0));
    }

    /// A flush, an unknown request, one without room for the answer, one that says nothing, one outside of memory.
    #[test]
    fn only_a_flush_is_done() {
        const NEXT: u16 = 1;
        const WRITE: u16 = 2;
        let memory = GuestRam::new(4 * MIB).unwrap();
        let event_loop = EventLoop::new().unwrap();
        let pmem = Arc::new(Mutex::new(Pmem::new(Persistent::new(&(2 * MIB..4 * MIB)))));
        let shared = SharedDevice::new(pmem.clone());
        let doorbells = shared.doorbells(&event_loop).unwrap();
        let mock = MockSplitQueue::new(&*memory, 16);
        memory.write_obj(FLUSH, GuestAddress(0x10_0000)).unwrap();
        memory.write_obj(7u32, GuestAddress(0x10_0100)).unwrap();
        let requests: [(u64, u32, u64, u32); 5] = [
            (0x10_0000, 4, 0x20_0000, 4),
            (0x10_0100, 4, 0x20_0100, 4),
            (0x10_0000, 4, 0x20_0200, 3),
            (0x10_0000, 3, 0x20_0300, 4),
            (0x10_0000, 4, u64::MAX - 2, 4),
        ];
        let chains: Vec<RawDescriptor> = (0..)
            .step_by(2)
            .zip(requests)
            .flat_map(|(index, (request, len, answer, room))| {
                [
                    Descriptor::new(request, len, NEXT, index + 1).into(),
                    Descriptor::new(answer, room, WRITE, 0).into(),
                ]
            })
            .collect();
        for place in (0x20_0000..0x20_0400).step_by(0x100) {
            memory.write_obj(u32::MAX, GuestAddress(place)).unwrap();
        }
        mock.add_desc_chains(&chains, 0).unwrap();
        let activation = Activation {
            memory: memory.clone(),
            queues: vec![mock.create_queue().unwrap()],
            features: 0,
            interrupt: Interrupt::new().unwrap(),
            registrar: shared.registrar(&event_loop),
        };
        pmem.lock().unwrap().activate(activation).unwrap();
        shared.set_active(true);
        doorbells.events()[0].write(1).unwrap();
        while event_loop.turn(EpollTimeout::ZERO).unwrap() > 0 {}
        let answers = [0x20_0000, 0x20_0100, 0x20_0200, 0x20_0300]
            .map(|place| memory.read_obj::<u32>(GuestAddress(place)).unwrap());
        assert_eq!(answers, [DONE, REFUSED, u32::MAX, u32::MAX]);
        let statistics = pmem.lock().unwrap().statistics();
        assert_eq!((statistics.requests, statistics.errors), (2, 3));
    }
}
