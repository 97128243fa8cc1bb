//! Who answers at which address.
//!
//! Ports and memory-mapped registers are two address spaces of the same shape: a sorted table of ranges, built once
//! and then only read, so that vCPUs dispatch without a lock. Address, length and data of every access come from the
//! guest. What nobody claims reads as all ones and swallows writes, as on a PC.

use std::sync::Arc;

/// Something that answers in a range of addresses. Called by any vCPU thread, several at once.
pub trait BusDevice: Send + Sync {
    /// Fills `data` from `offset` bytes into the range. A repeated port read (`rep ins`) comes as one long access.
    fn read(&self, offset: u64, data: &mut [u8]);

    /// Takes `data` at `offset` bytes into the range.
    fn write(&self, offset: u64, data: &[u8]);
}

/// Why a device could not be put on a bus.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BusError {
    /// Empty, or past the end of the address space.
    #[error("{len} bytes at {start:#x} are not a range of addresses")]
    Range {
        /// First address.
        start: u64,
        /// Bytes.
        len: u64,
    },
    /// Some other device is there.
    #[error("the addresses at {0:#x} are taken")]
    Taken(u64),
}

struct Range {
    start: u64,
    /// Last address.
    last: u64,
    device: Arc<dyn BusDevice>,
}

/// One address space.
#[derive(Default)]
pub struct Bus(Vec<Range>);

impl Bus {
    /// Puts a device at `len` addresses from `start`.
    ///
    /// # Errors
    /// See [`BusError`].
    pub fn insert(&mut self, start: u64, len: u64, device: Arc<dyn BusDevice>) -> Result<(), BusError> {
        let last = len.checked_sub(1).and_then(|rest| start.checked_add(rest));
        let last = last.ok_or(BusError::Range { start, len })?;
        let index = self.0.partition_point(|range| range.last < start);
        if self.0.get(index).is_some_and(|range| range.start <= last) {
            return Err(BusError::Taken(start));
        }
        self.0.insert(index, Range { start, last, device });
        Ok(())
    }

    /// Reads for the guest.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.find(address) {
            Some((device, offset)) => device.read(offset, data),
            None => data.fill(0xff),
        }
    }

    /// Writes for the guest.
    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some((device, offset)) = self.find(address) {
            device.write(offset, data);
        }
    }

    fn find(&self, address: u64) -> Option<(&dyn BusDevice, u64)> {
        let index = self.0.partition_point(|range| range.last < address);
        let range = self.0.get(index)?;
        let offset = address.checked_sub(range.start)?;
        Some((range.device.as_ref(), offset))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use proptest::prelude::*;

    use super::*;

    #[derive(Default)]
    struct Probe(Mutex<Vec<(u64, Vec<u8>)>>);

    impl BusDevice for Probe {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(u8::try_from(offset & 0x7f).unwrap());
        }

        fn write(&self, offset: u64, data: &[u8]) {
            self.0.lock().unwrap().push((offset, data.to_vec()));
        }
    }

    fn read(bus: &Bus, address: u64) -> u8 {
        let mut data = [0];
        bus.read(address, &mut data);
        data[0]
    }

    #[test]
    fn an_access_reaches_the_device_at_its_address() {
        let mut bus = Bus::default();
        let probe = Arc::new(Probe::default());
        bus.insert(0x200, 0x10, Arc::new(Probe::default())).unwrap();
        bus.insert(0x100, 0x10, probe.clone()).unwrap();
        assert_eq!(read(&bus, 0x10f), 0xf);
        assert_eq!(read(&bus, 0x200), 0);
        bus.write(0x104, &[1, 2]);
        assert_eq!(*probe.0.lock().unwrap(), [(4, vec![1, 2])]);
    }

    #[test]
    fn what_nobody_claims_is_all_ones() {
        let mut bus = Bus::default();
        assert_eq!(read(&bus, 0), 0xff);
        bus.insert(0x100, 0x10, Arc::new(Probe::default())).unwrap();
        for address in [0, 0xff, 0x110, u64::MAX] {
            assert_eq!(read(&bus, address), 0xff, "{address:#x}");
            bus.write(address, &[0; 8]);
        }
    }

    #[test]
    fn ranges_may_touch_but_not_overlap() {
        let mut bus = Bus::default();
        let device = || Arc::new(Probe::default());
        bus.insert(0x100, 0x10, device()).unwrap();
        bus.insert(0x110, 0x10, device()).unwrap();
        bus.insert(0xf0, 0x10, device()).unwrap();
        for (start, len) in [(0x100, 1), (0xff, 2), (0x11f, 1), (0, 0x1000), (0x108, 4)] {
            assert_eq!(bus.insert(start, len, device()), Err(BusError::Taken(start)));
        }
        assert_eq!(bus.insert(0, 0, device()), Err(BusError::Range { start: 0, len: 0 }));
        let past_the_end = BusError::Range { start: u64::MAX, len: 2 };
        assert_eq!(bus.insert(u64::MAX, 2, device()), Err(past_the_end));
    }

    proptest! {
        #[test]
        fn any_access_is_answered(
            ranges in proptest::collection::vec((any::<u64>(), 1..1u64 << 40), 0..20),
            address in any::<u64>(),
            len in 0usize..4096,
        ) {
            let mut bus = Bus::default();
            for (start, len) in ranges {
                let _ = bus.insert(start, len, Arc::new(Probe::default()));
            }
            let mut data = vec![0; len];
            bus.read(address, &mut data);
            bus.write(address, &data);
        }
    }
}
