//! The addresses of this process behind a range of guest RAM.

use std::num::NonZeroUsize;
use std::ops::Range;
use std::ptr::NonNull;

use nix::errno::Errno;
use nix::libc::c_void;
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap_anonymous, mprotect, munmap};
use vm_memory::VolatileSlice;
use vm_memory::mmap::{MmapRegion, MmapRegionError};

use super::HUGE_PAGE;

/// Anonymous memory that begins at a huge page's boundary, so that one page of the host can be one of the guest. It is
/// given back when this is dropped.
#[derive(Debug)]
pub struct Reservation {
    start: NonNull<c_void>,
    size: NonZeroUsize,
}

// SAFETY: the mapping is the process's; nothing about it belongs to the thread that made it.
unsafe impl Send for Reservation {}
// SAFETY: only `drop`, which has it alone, changes anything.
unsafe impl Sync for Reservation {}

/// [`HUGE_PAGE`] in this process's own size.
const ALIGNMENT: usize = 2 << 20;
const _: () = assert!(ALIGNMENT as u64 == HUGE_PAGE);

fn protection() -> ProtFlags {
    ProtFlags::PROT_READ | ProtFlags::PROT_WRITE
}

fn flags() -> MapFlags {
    MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE
}

impl Reservation {
    /// Reserves `size` bytes, a multiple of the page size. Huge pages are given for the asking only, also where the host
    /// would give them unasked: a guest touches RAM here and there, and each touch would be backed, and zeroed, two MiB
    /// at a time.
    ///
    /// # Errors
    /// When the host has not that many, or it is none.
    pub fn new(size: usize) -> Result<Self, Errno> {
        Self::with(size, protection())
    }

    /// Reserves addresses, a multiple of the page size, that [`Reservation::set_accessible`] makes memory of.
    ///
    /// # Errors
    /// When this process has not that many, or it is none.
    pub fn inaccessible(size: usize) -> Result<Self, Errno> {
        Self::with(size, ProtFlags::PROT_NONE)
    }

    fn with(size: usize, protection: ProtFlags) -> Result<Self, Errno> {
        let size = NonZeroUsize::new(size).ok_or(Errno::EINVAL)?;
        let mapped = size.checked_add(ALIGNMENT).ok_or(Errno::ENOMEM)?;
        // SAFETY: a new anonymous mapping at an address that the kernel chooses.
        let mapping = unsafe { mmap_anonymous(None, mapped, protection, flags()) }?.cast::<u8>();
        let before = mapping.as_ptr().align_offset(ALIGNMENT);
        let start = mapping.as_ptr().wrapping_add(before);
        unmap(mapping.as_ptr(), before)?;
        unmap(start.wrapping_add(size.get()), ALIGNMENT - before)?;
        let start = NonNull::new(start.cast()).ok_or(Errno::EFAULT)?;
        advise(start, size.get(), MmapAdvise::MADV_NOHUGEPAGE);
        Ok(Self { start, size })
    }

    /// The memory as vm-memory wants it, which must not be used any more when this is dropped.
    pub fn region(&self) -> Result<MmapRegion, MmapRegionError> {
        let flags = flags() | MapFlags::MAP_ANONYMOUS;
        // SAFETY: that is the whole mapping, its protection and its kind. `GuestRam` keeps both together.
        unsafe {
            MmapRegion::build_raw(
                self.start.cast().as_ptr(),
                self.size.get(),
                protection().bits(),
                flags.bits(),
            )
        }
    }
}

impl Reservation {
    /// Makes a part, of whole pages, accessible or not.
    ///
    /// # Errors
    /// When the part lies outside, or the host can tell no more parts apart.
    pub fn set_accessible(&self, part: Range<usize>, accessible: bool) -> Result<(), Errno> {
        let protection = if accessible { protection() } else { ProtFlags::PROT_NONE };
        let (start, bytes) = self.part(part)?;
        // SAFETY: the part is within this mapping, in which nothing but guest memory lives. Whoever accesses it all the
        // same, against what it was told, gets a fault and no other memory.
        unsafe { mprotect(start, bytes, protection) }
    }

    /// Gives a part, of whole pages, back to the host, zeroed.
    pub fn take_back(&self, part: Range<usize>) {
        let Ok((start, bytes)) = self.part(part) else { return };
        // SAFETY: as above; guest memory may change at any time, as it does now. It cannot fail for private memory that
        // is mapped.
        let _ = unsafe { madvise(start, bytes, MmapAdvise::MADV_DONTNEED) };
    }

    fn part(&self, part: Range<usize>) -> Result<(NonNull<c_void>, usize), Errno> {
        let bytes = part.end.checked_sub(part.start).filter(|_| part.end <= self.size.get());
        let start = self.start.cast::<u8>().as_ptr().wrapping_add(part.start);
        NonNull::new(start.cast()).zip(bytes).ok_or(Errno::EINVAL)
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        // It can only fail for what never was mapped.
        let _ = unmap(self.start.cast().as_ptr(), self.size.get());
    }
}

/// Unmaps a part of a reservation that nothing points into.
fn unmap(start: *mut u8, bytes: usize) -> Result<(), Errno> {
    let Some(start) = NonNull::new(start.cast()).filter(|_| bytes > 0) else { return Ok(()) };
    // SAFETY: the callers are the mapping's owner: they name what they have just mapped and not yet handed out, or all
    // of it when what points into it is gone, as `region` says.
    unsafe { munmap(start, bytes) }
}

/// Asks for huge pages.
pub fn prefer_huge_pages(memory: &VolatileSlice<'_>) {
    let Some(start) = NonNull::new(memory.ptr_guard_mut().as_ptr().cast()) else { return };
    advise(start, memory.len(), MmapAdvise::MADV_HUGEPAGE);
}

/// A host without huge pages refuses, and has none.
fn advise(start: NonNull<c_void>, bytes: usize, advice: MmapAdvise) {
    // SAFETY: the callers name mapped memory, and neither advice changes anything of what is in it.
    let _ = unsafe { madvise(start, bytes, advice) };
}

/// Gives pages back to the host, zeroed or, where a file is mapped, as in the file.
pub fn take_back(memory: &VolatileSlice<'_>) -> bool {
    let Some(start) = NonNull::new(memory.ptr_guard_mut().as_ptr().cast()) else { return false };
    // SAFETY: the slice is guest memory, which is mapped, and of which this process takes nothing for granted: it may
    // change at any time, as it does now.
    unsafe { madvise(start, memory.len(), MmapAdvise::MADV_DONTNEED) }.is_ok()
}
