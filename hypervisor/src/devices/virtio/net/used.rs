//! Giving chains back, all of a frame at once.
//!
//! virtio-queue publishes each chain by itself. A driver on another CPU would then find the first chain of a frame, be
//! told by its header how many there are, and miss the others.

use std::sync::atomic::{Ordering, fence};

use virtio_queue::{Error, Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};

use crate::memory::GuestRam;

/// Chains written to the used ring since the driver was last considered for an interrupt.
#[derive(Debug, Default)]
pub struct Used {
    /// Written, and not seen by the driver before [`Used::publish`].
    written: u16,
    published: u16,
}

impl Used {
    /// Writes that `bytes` of a chain are used.
    pub fn write(&mut self, memory: &GuestRam, queue: &Queue, head: u16, bytes: u32) -> Result<(), Error> {
        let index = queue.next_used().wrapping_add(self.written) % queue.size();
        let element = u64::from(head) | u64::from(bytes) << 32;
        let place = address(queue.used_ring(), 4 + 8 * u64::from(index))?;
        memory.write_slice(&element.to_le_bytes(), place).map_err(Error::GuestMemory)?;
        self.written = self.written.wrapping_add(1);
        Ok(())
    }

    /// Shows the driver what was written.
    pub fn publish(&mut self, memory: &GuestRam, queue: &mut Queue) -> Result<(), Error> {
        let next = queue.next_used().wrapping_add(self.written);
        queue.set_next_used(next);
        self.published = self.published.wrapping_add(self.written);
        self.written = 0;
        memory
            .store(next.to_le(), address(queue.used_ring(), 2)?, Ordering::Release)
            .map_err(Error::GuestMemory)
    }

    /// Whether the driver wants an interrupt for what was published since this was last asked.
    pub fn wants_interrupt(&mut self, memory: &GuestRam, queue: &Queue) -> Result<bool, Error> {
        let published = std::mem::take(&mut self.published);
        // The driver writes what it wants and then looks at the index; here it is the other way round.
        fence(Ordering::SeqCst);
        if published == 0 || !queue.event_idx_enabled() {
            return Ok(published > 0);
        }
        let place = address(queue.avail_ring(), 4 + 2 * u64::from(queue.size()))?;
        let wanted: u16 = memory.load(place, Ordering::Relaxed).map_err(Error::GuestMemory)?;
        let passed = queue.next_used().wrapping_sub(u16::from_le(wanted)).wrapping_sub(1);
        Ok(passed < published)
    }
}

fn address(base: u64, offset: u64) -> Result<GuestAddress, Error> {
    base.checked_add(offset).map(GuestAddress).ok_or(Error::AddressOverflow)
}

#[cfg(test)]
mod tests {
    use virtio_queue::mock::MockSplitQueue;

    use super::*;

    #[test]
    fn chains_appear_together_and_the_ring_wraps() {
        let memory = GuestRam::new(1 << 20).unwrap();
        let mock = MockSplitQueue::new(&*memory, 4);
        let mut queue: Queue = mock.create_queue().unwrap();
        queue.set_next_used(u16::MAX - 1);
        let mut used = Used::default();
        for head in 0..3 {
            used.write(&memory, &queue, head, 100 + u32::from(head)).unwrap();
        }
        assert_eq!(mock.used().idx().load(), 0);
        used.publish(&memory, &mut queue).unwrap();
        assert_eq!(mock.used().idx().load(), 1);
        for (place, head) in [(2, 0), (3, 1), (0, 2)] {
            let element = mock.used().ring().ref_at(place).unwrap().load();
            assert_eq!((element.id(), element.len()), (head, 100 + head));
        }
    }

    #[test]
    fn an_interrupt_is_wanted_when_the_index_passes_the_event() {
        let memory = GuestRam::new(1 << 20).unwrap();
        let mock = MockSplitQueue::new(&*memory, 8);
        let mut queue: Queue = mock.create_queue().unwrap();
        queue.set_event_idx(true);
        let mut used = Used::default();
        let event = GuestAddress(queue.avail_ring() + 4 + 2 * 8);
        for (event_index, published, wanted) in [(0u16, 1, true), (0, 2, false), (4, 2, true), (9, 3, false)]
        {
            memory.write_obj(event_index, event).unwrap();
            for head in 0..published {
                used.write(&memory, &queue, head, 0).unwrap();
            }
            used.publish(&memory, &mut queue).unwrap();
            assert_eq!(used.wants_interrupt(&memory, &queue).unwrap(), wanted, "{event_index}");
        }
        assert!(!used.wants_interrupt(&memory, &queue).unwrap());
    }
}
