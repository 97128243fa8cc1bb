//! Guest RAM.
//!
//! Anonymous private memory, backed as the guest touches it, page by page but for what is asked to be huge pages: no
//! device lives in another process, so nothing has to be shared. Below 3 GiB it is one range from address 0; what is more continues at 4 GiB, above the
//! hole that x86 keeps for devices. Bytes in it change under our feet, since the guest writes them at any time: each
//! field is read once, by copy.
//!
//! Above all of it there may be a range of addresses in which a guest gets memory and gives it back: see [`Growth`].

mod growth;
mod region;
mod reservation;

use std::ops::Deref;
use std::sync::Arc;

use nix::errno::Errno;
use vm_memory::mmap::{GuestRegionMmap, MmapRegion, MmapRegionError};
use vm_memory::{
    GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionCollection, GuestRegionCollectionError,
};

pub use growth::{BLOCK, Growth, Plugged};
pub use region::Region;

use self::reservation::Reservation;

/// Where RAM ends below 4 GiB, and the range begins in which devices answer.
pub const MMIO_GAP_START: u64 = 0xc000_0000;

/// Where RAM goes on above the gap.
pub const MMIO_GAP_END: u64 = 0x1_0000_0000;

const PAGE: u64 = 4096;

/// What a large page of x86 covers.
pub const HUGE_PAGE: u64 = 2 << 20;

/// What the start of the range for growth is a multiple of: Linux adds memory in blocks of 128 MiB, and of up to 2 GiB
/// where it has 64 GiB at boot.
const GROWTH_ALIGNMENT: u64 = 2 << 30;

/// Guest memory as vm-memory's traits see it.
pub type GuestMemory = GuestRegionCollection<Region>;

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
/// It dereferences to [`GuestMemory`]; pass `ram.clone()` or `&*ram` where virtio-queue wants memory.
#[derive(Debug, Clone)]
pub struct GuestRam(Arc<Ram>);

#[derive(Debug)]
struct Ram {
    memory: GuestMemory,
    growth: Option<Arc<Growth>>,
    /// What `memory` points into, but for `growth`.
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
        Self::growing(bytes, 0)
    }

    /// Reserves RAM of `bytes`, a multiple of the page size, and addresses for `growth` bytes more, a multiple of
    /// [`BLOCK`].
    ///
    /// # Errors
    /// See [`MemoryError`].
    pub fn growing(bytes: u64, growth: u64) -> Result<Self, MemoryError> {
        if bytes == 0 || !bytes.is_multiple_of(PAGE) {
            return Err(MemoryError::Size(bytes));
        }
        if !growth.is_multiple_of(BLOCK) {
            return Err(MemoryError::Size(growth));
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
            let mapping = reservation.region().map_err(MemoryError::Region)?;
            regions.push(region(start, bytes, mapping, None)?);
            host.push(reservation);
        }
        let growth = if growth > 0 { Some(Arc::new(room(bytes - low, growth)?)) } else { None };
        if let Some(growth) = &growth {
            let mapping = growth.region().map_err(MemoryError::Region)?;
            regions.push(region(growth.start(), growth.size(), mapping, Some(growth.clone()))?);
        }
        let memory = GuestMemory::from_regions(regions).map_err(MemoryError::Layout)?;
        Ok(Self(Arc::new(Ram { memory, growth, _host: host })))
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

    /// The ranges of RAM that the guest has from the start, in ascending order of guest address.
    pub fn ranges(&self) -> impl Iterator<Item = HostRange> {
        let count = self.0.memory.num_regions() - usize::from(self.0.growth.is_some());
        self.all_ranges().take(count)
    }

    /// The same, and last the range in which it can get more.
    pub fn all_ranges(&self) -> impl Iterator<Item = HostRange> {
        self.0.memory.iter().map(|region| HostRange {
            guest: region.start_addr(),
            host: region.host(),
            len: usize::try_from(region.len()).unwrap_or(usize::MAX),
        })
    }

    /// Bytes of RAM that the guest has from the start.
    pub fn size(&self) -> u64 {
        self.ranges().map(|range| range.len as u64).sum()
    }

    /// Where the guest can get more.
    pub fn growth(&self) -> Option<&Arc<Growth>> {
        self.0.growth.as_ref()
    }
}

impl Deref for GuestRam {
    type Target = GuestMemory;

    fn deref(&self) -> &GuestMemory {
        &self.0.memory
    }
}

/// Room for `growth` bytes above `high` bytes from 4 GiB on, where devices are out of the way.
fn room(high: u64, growth: u64) -> Result<Growth, MemoryError> {
    let start = MMIO_GAP_END.checked_add(high).and_then(|end| end.checked_next_multiple_of(GROWTH_ALIGNMENT));
    Growth::new(start.ok_or(MemoryError::Size(high))?, growth).map_err(MemoryError::Map)
}

fn region(
    start: u64,
    bytes: u64,
    mapping: MmapRegion,
    growth: Option<Arc<Growth>>,
) -> Result<Region, MemoryError> {
    let mapping = GuestRegionMmap::new(mapping, GuestAddress(start)).ok_or(MemoryError::Size(bytes))?;
    Ok(Region::new(mapping, growth))
}

/// Memory at any addresses, for tests of devices.
#[cfg(test)]
pub fn at(ranges: &[(GuestAddress, usize)]) -> GuestMemory {
    let regions = ranges.iter().map(|(start, size)| {
        let mapping = GuestRegionMmap::from_range(*start, *size, None).unwrap();
        Region::new(mapping, None)
    });
    GuestMemory::from_regions(regions.collect()).unwrap()
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
    fn room_to_grow_is_above_ram_and_no_part_of_it() {
        let ram = GuestRam::growing(64 << 20, 1 << 30).unwrap();
        assert_eq!((ram.size(), layout(&ram)), (64 << 20, vec![(0, 64 << 20)]));
        assert_eq!(ram.all_ranges().last().map(|range| range.guest.0), Some(4 << 30));
        let ram = GuestRam::growing(5 << 30, BLOCK).unwrap();
        assert_eq!(ram.all_ranges().map(|range| range.guest.0).collect::<Vec<_>>(), [0, 4 << 30, 6 << 30]);
        assert!(matches!(GuestRam::growing(4096, 4096), Err(MemoryError::Size(4096))));
    }

    #[test]
    fn only_what_is_plugged_in_is_accessed() {
        let ram = GuestRam::growing(1 << 20, 4 * BLOCK).unwrap();
        let growth = ram.growth().unwrap();
        let at = |offset| GuestAddress(growth.start() + offset);
        assert!(ram.write_obj(1u64, at(BLOCK)).is_err());
        growth.plug(1..3).unwrap();
        ram.write_obj(7u64, at(2 * BLOCK - 4)).unwrap();
        assert!(ram.write_obj(1u64, at(BLOCK - 4)).is_err());
        assert!(ram.get_slice(at(BLOCK), 2 << 21).is_ok());
        assert!(ram.get_slice(at(BLOCK), (2 << 21) + 1).is_err());
        assert!(ram.take_back(at(BLOCK), 4096) && !ram.take_back(at(0), 4096));
        growth.unplug(1..3).unwrap();
        assert!(ram.read_obj::<u64>(at(2 * BLOCK - 4)).is_err());
        growth.plug(1..3).unwrap();
        assert_eq!(ram.read_obj::<u64>(at(2 * BLOCK - 4)).unwrap(), 0);
    }

    #[test]
    fn an_access_across_the_end_fails() {
        let ram = GuestRam::new(4096).unwrap();
        assert!(ram.write_obj(1u64, GuestAddress(4096 - 8)).is_ok());
        assert!(ram.write_obj(1u64, GuestAddress(4096 - 7)).is_err());
        assert!(ram.write_obj(1u64, GuestAddress(u64::MAX - 3)).is_err());
    }
}
