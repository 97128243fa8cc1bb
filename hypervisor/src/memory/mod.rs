//! Guest RAM.
//!
//! Anonymous private memory, backed as the guest touches it, page by page but for what is asked to be huge pages: no
//! device lives in another process, so nothing has to be shared. Below 3 GiB it is one range from address 0; what is more continues at 4 GiB, above the
//! hole that x86 keeps for devices. Bytes in it change under our feet, since the guest writes them at any time: each
//! field is read once, by copy.

mod reservation;

use std::ops::Deref;
use std::sync::Arc;

use nix::errno::Errno;
use vm_memory::mmap::{GuestRegionMmap, MmapRegion, MmapRegionError};
use vm_memory::{
    GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionCollectionError,
};

use self::reservation::Reservation;

/// Where RAM ends below 4 GiB, and the range begins in which devices answer.
pub const MMIO_GAP_START: u64 = 0xc000_0000;

/// Where RAM goes on above the gap.
pub const MMIO_GAP_END: u64 = 0x1_0000_0000;

const PAGE: u64 = 4096;

/// What a large page of x86 covers.
pub const HUGE_PAGE: u64 = 2 << 20;

/// Why guest RAM could not be made.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// No pages, or not a whole number of them, or more than an address holds.
    #[error("{0} bytes are not a possible size of guest memory")]
    Size(u64),
    /// The host refused.
    #[error("the host cannot provide the guest's memory")]
    Map(#[source] Errno),
    /// What the host gave cannot be a region.
    #[error("the host's memory cannot be the guest's")]
    Region(#[source] MmapRegionError),
    /// Regions overlap.
    #[error("the guest's memory cannot be laid out")]
    Layout(#[source] GuestRegionCollectionError),
}

/// A handle on guest RAM. Cloning is cheap, and every clone is the same RAM.
///
/// It dereferences to vm-memory's `GuestMemoryMmap`; pass `ram.clone()` or `&*ram` where virtio-queue wants memory.
#[derive(Debug, Clone)]
pub struct GuestRam(Arc<Ram>);

#[derive(Debug)]
struct Ram {
    memory: GuestMemoryMmap,
    /// What `memory` points into.
    _host: Vec<Reservation>,
}

/// One contiguous range of guest RAM and where this process sees it. It stays mapped as long as a [`GuestRam`] lives.
#[derive(Debug, Clone, Copy)]
pub struct HostRange {
    /// Guest physical address.
    pub guest: GuestAddress,
    /// Address in this process.
    pub host: *mut u8,
    /// Bytes.
    pub len: usize,
}

impl GuestRam {
    /// Reserves RAM of `bytes`, a multiple of the page size.
    ///
    /// # Errors
    /// See [`MemoryError`].
    pub fn new(bytes: u64) -> Result<Self, MemoryError> {
        if bytes == 0 || !bytes.is_multiple_of(PAGE) {
            return Err(MemoryError::Size(bytes));
        }
        let low = bytes.min(MMIO_GAP_START);
        let mut ranges = vec![(0, low)];
        if bytes > low {
            ranges.push((MMIO_GAP_END, bytes - low));
        }
        let mut host = Vec::new();
        let mut regions = Vec::new();
        for (start, bytes) in ranges {
            let size = usize::try_from(bytes).map_err(|_| MemoryError::Size(bytes))?;
            let reservation = Reservation::new(size).map_err(MemoryError::Map)?;
            regions.push(region(start, bytes, reservation.region().map_err(MemoryError::Region)?)?);
            host.push(reservation);
        }
        let memory = GuestMemoryMmap::from_regions(regions).map_err(MemoryError::Layout)?;
        Ok(Self(Arc::new(Ram { memory, _host: host })))
    }

    /// Backs the huge pages that lie whole within `start..end` at once and in one piece each, where the host has such
    /// pages to give: for what the guest will touch page by page anyway, at an exit each. What else is there already
    /// stays as it is.
    pub fn prefer_huge_pages(&self, start: u64, end: u64) {
        let (start, end) = (start.next_multiple_of(HUGE_PAGE), end - end % HUGE_PAGE);
        let Some(bytes) = end.checked_sub(start).and_then(|bytes| usize::try_from(bytes).ok()) else {
            return;
        };
        let Ok(slice) = self.get_slice(GuestAddress(start), bytes) else { return };
        reservation::prefer_huge_pages(&slice);
    }

    /// Gives whole pages back to the host. When the guest touches them again it finds zeroed ones, or where the kernel or
    /// the root image is mapped the file's. False where the range is not whole pages, or not RAM.
    pub fn take_back(&self, start: GuestAddress, bytes: u32) -> bool {
        let Ok(len) = usize::try_from(bytes) else { return false };
        let is_pages = start.0.is_multiple_of(PAGE) && u64::from(bytes).is_multiple_of(PAGE) && len > 0;
        let slice = self.get_slice(start, len).ok().filter(|_| is_pages);
        slice.is_some_and(|slice| reservation::take_back(&slice))
    }

    /// The ranges of RAM in ascending order of guest address.
    pub fn ranges(&self) -> impl Iterator<Item = HostRange> {
        self.0.memory.iter().map(|region| HostRange {
            guest: region.start_addr(),
            host: region.as_ptr(),
            len: region.size(),
        })
    }

    /// Bytes of RAM.
    pub fn size(&self) -> u64 {
        self.0.memory.iter().map(GuestMemoryRegion::len).sum()
    }
}

impl Deref for GuestRam {
    type Target = GuestMemoryMmap;

    fn deref(&self) -> &GuestMemoryMmap {
        &self.0.memory
    }
}

fn region(start: u64, bytes: u64, mapping: MmapRegion) -> Result<GuestRegionMmap, MemoryError> {
    GuestRegionMmap::new(mapping, GuestAddress(start)).ok_or(MemoryError::Size(bytes))
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::*;

    fn layout(ram: &GuestRam) -> Vec<(u64, usize)> {
        ram.ranges().map(|range| (range.guest.0, range.len)).collect()
    }

    #[test]
    fn small_memory_is_one_range() {
        let ram = GuestRam::new(64 << 20).unwrap();
        assert_eq!(layout(&ram), [(0, 64 << 20)]);
    }

    #[test]
    fn memory_beyond_the_gap_continues_at_four_gib() {
        let ram = GuestRam::new(MMIO_GAP_START).unwrap();
        assert_eq!(layout(&ram), [(0, 3 << 30)]);
        let ram = GuestRam::new(MMIO_GAP_START + 4096).unwrap();
        assert_eq!(layout(&ram), [(0, 3 << 30), (4 << 30, 4096)]);
        assert_eq!(ram.size(), (3 << 30) + 4096);
    }

    #[test]
    fn impossible_sizes_are_refused() {
        assert!(matches!(GuestRam::new(0), Err(MemoryError::Size(0))));
        assert!(matches!(GuestRam::new(4097), Err(MemoryError::Size(4097))));
        assert!(matches!(GuestRam::new(u64::MAX - 4095), Err(MemoryError::Map(_) | MemoryError::Size(_))));
    }

    #[test]
    fn an_access_across_the_end_fails() {
        let ram = GuestRam::new(4096).unwrap();
        assert!(ram.write_obj(1u64, GuestAddress(4096 - 8)).is_ok());
        assert!(ram.write_obj(1u64, GuestAddress(4096 - 7)).is_err());
        assert!(ram.write_obj(1u64, GuestAddress(u64::MAX - 3)).is_err());
    }
}
