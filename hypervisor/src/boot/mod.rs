//! From a kernel file to a guest that can run.
//!
//! The kernel is entered by Linux's 64-bit boot protocol: long mode is on, low memory is mapped onto itself, `rsi` holds
//! the zero page. The other way in, PVH, starts in 32-bit mode and would cost the kernel the very set-up that we do
//! here in a few dozen writes; some flavours of KVM even emulate 32-bit mode instruction by instruction.
//!
//! Kernel and root image are trusted, being the host administrator's, but bounded: every number in them is checked.

mod command_line;
mod cpu_tables;
mod kernel;
mod mp_table;
mod root_image;
mod zero_page;

use std::fs::File;
use std::io;

use nix::errno::Errno;
use nix::sys::mman::{MapFlags, ProtFlags, mmap};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryError};

pub use command_line::{CommandLine, CommandLineError};
pub use cpu_tables::{GDT, GDT_BYTES, PAGE_TABLES, code_segment, data_segment, task_segment};
pub use mp_table::MAX_VCPUS;
pub use root_image::{Place, RootImage};

use crate::memory::{GuestRam, HUGE_PAGE, MMIO_GAP_START};

/// The zero page, which tells the kernel about its machine.
pub const ZERO_PAGE: GuestAddress = GuestAddress(0x7000);

/// Where the command line is.
const COMMAND_LINE: GuestAddress = GuestAddress(0x2_0000);

/// RAM above the PC's reserved range.
const HIGH_MEMORY: u64 = 0x10_0000;

const PAGE: u64 = 4096;

/// What the kernel itself needs to come up, beside its image and the root image: page structures, caches, first processes.
const HEADROOM: u64 = 24 << 20;

/// Why a guest cannot be booted.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// No ELF file at all.
    #[error("the kernel is not an uncompressed x86-64 ELF image (vmlinux)")]
    NotAKernel,
    /// A bzImage.
    #[error("the kernel is a compressed bzImage; give the uncompressed vmlinux of the same build")]
    Compressed,
    /// An ELF file whose headers make no sense.
    #[error("the kernel image is damaged: {0}")]
    Damaged(&'static str),
    /// RAM cannot hold it all.
    #[error(
        "{have_mib} MiB of memory are too little for this kernel and root image; they need at least {need_mib} MiB"
    )]
    TooLittleMemory {
        /// Configured.
        have_mib: u64,
        /// Needed.
        need_mib: u64,
    },
    /// The kernel's file cannot be read.
    #[error("the kernel image cannot be read")]
    Kernel(#[source] io::Error),
    /// The root image's file cannot be read.
    #[error("the root image cannot be read")]
    RootImage(#[source] io::Error),
    /// It is of no form that a guest can be started with.
    #[error("the root image is neither an erofs image nor an uncompressed cpio archive (newc)")]
    NotARootImage,
    /// A file cannot be mapped into RAM.
    #[error("the kernel and its root image cannot be mapped into guest memory")]
    Map(#[source] Errno),
    /// No random bytes.
    #[error("the host has no random bytes for the guest")]
    Seed(#[source] io::Error),
    /// A table lies outside RAM.
    #[error("the boot tables cannot be written to guest memory")]
    Memory(#[source] GuestMemoryError),
}

/// What the kernel is to be started with.
pub struct BootSource<'a> {
    /// An uncompressed ELF kernel.
    pub kernel: &'a File,
    /// The root file system.
    pub root_image: &'a RootImage,
    /// The complete command line.
    pub command_line: &'a CommandLine,
    /// CPUs listed in the MP table.
    pub vcpus: u8,
}

/// Puts everything that the kernel needs into RAM and returns its entry point.
///
/// # Errors
/// See [`BootError`].
pub fn load(ram: &GuestRam, source: &BootSource<'_>) -> Result<GuestAddress, BootError> {
    let image = kernel::Image::read(source.kernel)?;
    source.root_image.load(ram, image.end())?;
    back_page_structures(ram, source.root_image.place());
    image.load(ram, source.kernel)?;
    source.command_line.write(ram, COMMAND_LINE)?;
    mp_table::write(ram, source.vcpus)?;
    cpu_tables::write(ram)?;
    zero_page::write(ram, COMMAND_LINE, source.command_line.len(), source.root_image.place())?;
    Ok(image.entry())
}

/// The kernel's page structures lie right below the first allocations of all, at the top of RAM, and each of them is
/// written at boot: an exit for every page of them, were they not backed by huge pages. Should a kernel lay them out in
/// another way, it costs it those exits, or the host a huge page.
fn back_page_structures(ram: &GuestRam, root: &Place) {
    const STRUCTURE_BYTES: u64 = 64;
    let top = match root {
        Place::Pmem(range) if ram.size() <= MMIO_GAP_START => range.start,
        _ => ram.ranges().last().map_or(0, |range| range.guest.0 + range.len as u64),
    };
    let bytes = (ram.size() / PAGE * STRUCTURE_BYTES).next_multiple_of(HUGE_PAGE) + HUGE_PAGE;
    let end = (top - top % HUGE_PAGE).saturating_sub(HUGE_PAGE);
    ram.prefer_huge_pages(end.saturating_sub(bytes), end);
}

/// Maps part of a file over guest RAM, as a private copy: pages that the guest only reads stay the page cache's, shared
/// by all guests, and nothing is copied that is not used. `offset` and `start` are multiples of the page size; past the
/// end of the file the last page is zero.
///
/// A file that is truncated under a running guest kills it, so kernels are replaced by renaming, as package managers do.
fn map_file(ram: &GuestRam, file: &File, offset: u64, start: u64, len: u64) -> Result<(), BootError> {
    let bytes = usize::try_from(len).map_err(|_| BootError::Damaged("a segment is too large"))?;
    let Some(length) = std::num::NonZeroUsize::new(bytes) else { return Ok(()) };
    let offset = i64::try_from(offset).map_err(|_| BootError::Damaged("a segment is too large"))?;
    let host = ram.get_slice(GuestAddress(start), bytes).map_err(BootError::Memory)?;
    let address = std::num::NonZeroUsize::new(host.ptr_guard_mut().as_ptr().addr());
    let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_FIXED;
    // SAFETY: the range lies within the mapping of guest RAM, which `ram` keeps, and nothing but guest memory lives in
    // it. No vCPU runs yet. The new mapping is of the same protection and is unmapped with the rest of the region.
    unsafe { mmap(address, length, protection, flags, file, offset) }.map_err(BootError::Map)?;
    Ok(())
}

fn page_floor(address: u64) -> u64 {
    address & !(PAGE - 1)
}
