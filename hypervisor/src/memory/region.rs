//! One contiguous range of guest memory, as devices see it.

use std::sync::Arc;

use vm_memory::guest_memory::Result;
use vm_memory::mmap::GuestRegionMmap;
use vm_memory::{
    GuestAddress, GuestMemoryError, GuestMemoryRegion, GuestMemoryRegionBytes, GuestUsize,
    MemoryRegionAddress, VolatileSlice,
};

use super::growth::Growth;

/// A range that a descriptor may point to; of one whose memory comes and goes, only what is plugged in.
#[derive(Debug)]
pub struct Region {
    mapping: GuestRegionMmap,
    growth: Option<Arc<Growth>>,
}

impl Region {
    pub(super) fn new(mapping: GuestRegionMmap, growth: Option<Arc<Growth>>) -> Self {
        Self { mapping, growth }
    }

    pub(super) fn host(&self) -> *mut u8 {
        self.mapping.as_ptr()
    }
}

/// All accesses of vm-memory and virtio-queue go by way of `get_slice`.
impl GuestMemoryRegion for Region {
    type B = ();

    fn len(&self) -> GuestUsize {
        self.mapping.len()
    }

    fn start_addr(&self) -> GuestAddress {
        self.mapping.start_addr()
    }

    fn bitmap(&self) {}

    fn get_slice(&self, offset: MemoryRegionAddress, count: usize) -> Result<VolatileSlice<'_>> {
        if self.growth.as_ref().is_some_and(|growth| !growth.covers(offset.0, count)) {
            return Err(GuestMemoryError::InvalidBackendAddress);
        }
        self.mapping.get_slice(offset, count)
    }
}

impl GuestMemoryRegionBytes for Region {}
