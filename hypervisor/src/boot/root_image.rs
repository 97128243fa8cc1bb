//! The guest's root file system, which lies in its memory.
//!
//! Two forms, told apart by their first bytes. An erofs image is persistent memory to the guest, and its files are used
//! where they lie (DAX): what is read of it are pages of the host's page cache, one copy for all guests, and nothing is
//! unpacked. A cpio archive is an initramfs, which the kernel copies out into its own memory at boot.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use super::{BootError, HEADROOM, map_file, page_floor};
use crate::memory::{GuestRam, MMIO_GAP_START};

/// The superblock of erofs and the number that it begins with (Linux, fs/erofs/erofs_fs.h).
const EROFS_SUPERBLOCK: u64 = 1024;
const EROFS_MAGIC: u32 = 0xe0f5_e1e2;

/// Magic of cpio's "newc" form, the one that Linux unpacks.
const CPIO_MAGIC: &[u8] = b"07070";

/// What the kernel's page structures come in, and with them a range of persistent memory (Linux, memory hotplug's
/// sub-section).
const PMEM_UNIT: u64 = 2 << 20;

/// A root file system in a file, and its place in guest memory.
#[derive(Debug)]
pub struct RootImage {
    file: File,
    bytes: u64,
    place: Place,
}

/// Where a root file system lies, at the top of low memory, out of the kernel's way. In bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// Not RAM but persistent memory, of whole units of 2 MiB.
    Pmem(Range<u64>),
    /// An archive in RAM, from a page's boundary on.
    Initramfs(Range<u64>),
}

impl RootImage {
    /// Tells the form by the file's first bytes, and finds a place in `ram`.
    ///
    /// # Errors
    /// When it cannot be read, is of neither form, or larger than `ram`.
    pub fn new(file: File, ram: &GuestRam) -> Result<Self, BootError> {
        let bytes = file.metadata().map_err(BootError::RootImage)?.len();
        let low = ram.size().min(MMIO_GAP_START);
        let too_little = || too_little_memory(ram, bytes);
        let place = if starts_with(&file, EROFS_SUPERBLOCK, &EROFS_MAGIC.to_le_bytes()) {
            let end = low - low % PMEM_UNIT;
            let start = bytes.checked_next_multiple_of(PMEM_UNIT).and_then(|size| end.checked_sub(size));
            Place::Pmem(start.ok_or_else(too_little)?..end)
        } else if starts_with(&file, 0, CPIO_MAGIC) {
            let start = page_floor(low.checked_sub(bytes).ok_or_else(too_little)?);
            Place::Initramfs(start..start + bytes)
        } else {
            return Err(BootError::NotARootImage);
        };
        Ok(Self { file, bytes, place })
    }

    /// Where it lies.
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// What the kernel's command line has to say of it.
    pub fn kernel_parameters(&self) -> &'static str {
        match self.place {
            Place::Pmem(_) => "root=/dev/pmem0 rootfstype=erofs rootflags=dax=always ro init=/init",
            Place::Initramfs(_) => "",
        }
    }

    /// Maps it, if there is room for it and for a kernel that ends at `kernel_end`.
    pub(super) fn load(&self, ram: &GuestRam, kernel_end: u64) -> Result<(), BootError> {
        let (start, copy) = match &self.place {
            Place::Pmem(range) => (range.start, 0),
            // The kernel unpacks the archive: for a while it is there twice.
            Place::Initramfs(range) => (range.start, self.bytes),
        };
        let need = [kernel_end, self.bytes, copy, HEADROOM].into_iter().fold(0u64, u64::saturating_add);
        if need > ram.size().min(MMIO_GAP_START) {
            return Err(too_little_memory(ram, need));
        }
        map_file(ram, &self.file, 0, start, self.bytes)
    }
}

fn too_little_memory(ram: &GuestRam, need: u64) -> BootError {
    const MIB: u64 = 1 << 20;
    BootError::TooLittleMemory { have_mib: ram.size() / MIB, need_mib: need.div_ceil(MIB) }
}

fn starts_with(file: &File, offset: u64, magic: &[u8]) -> bool {
    let mut bytes = [0; 8];
    let Some(bytes) = bytes.get_mut(..magic.len()) else { return false };
    file.read_exact_at(bytes, offset).is_ok() && bytes == magic
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    const MIB: u64 = 1 << 20;

    fn file(bytes: &[u8], len: u64) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file.set_len(len).unwrap();
        file
    }

    fn erofs(len: u64) -> File {
        let mut start = vec![0; 1024];
        start.extend_from_slice(b"\xe2\xe1\xf5\xe0");
        file(&start, len)
    }

    fn ram(mib: u64) -> GuestRam {
        GuestRam::new(mib * MIB).unwrap()
    }

    #[test]
    fn an_erofs_image_is_whole_units_at_the_top_of_low_memory() {
        for (memory, start, end) in [(512, 506, 512), (513, 506, 512), (4096, 3066, 3072)] {
            let image = RootImage::new(erofs(5 * MIB), &ram(memory)).unwrap();
            assert_eq!(*image.place(), Place::Pmem(start * MIB..end * MIB), "{memory}");
        }
    }

    #[test]
    fn an_archive_is_right_below_the_end_of_low_memory() {
        let image = RootImage::new(file(b"070701", 4097), &ram(64)).unwrap();
        let start = 64 * MIB - 8192;
        assert_eq!(*image.place(), Place::Initramfs(start..start + 4097));
    }

    #[test]
    fn what_does_not_fit_says_what_it_takes() {
        let refused = |file, mib| {
            let ram = ram(mib);
            let error = RootImage::new(file, &ram).and_then(|image| image.load(&ram, 34 * MIB)).unwrap_err();
            let BootError::TooLittleMemory { have_mib, need_mib } = error else { panic!("{error}") };
            (have_mib, need_mib)
        };
        assert_eq!(refused(erofs(5 * MIB), 62), (62, 63));
        assert_eq!(refused(file(b"070701", 5 * MIB), 64), (64, 68));
        assert_eq!(refused(erofs(5 * MIB), 4), (4, 5));
        assert_eq!(refused(file(b"070701", 1 << 40), 64), (64, 1 << 20));
    }

    #[test]
    fn other_files_are_refused() {
        for bytes in [&b""[..], b"0707", &[0; 4096], b"\x1f\x8b gzip"] {
            let file = file(bytes, bytes.len() as u64);
            assert!(matches!(RootImage::new(file, &ram(64)), Err(BootError::NotARootImage)));
        }
    }

    #[test]
    fn the_image_is_seen_where_it_was_placed() {
        let ram = ram(128);
        let image = RootImage::new(erofs(3 * MIB), &ram).unwrap();
        image.load(&ram, 34 * MIB).unwrap();
        let Place::Pmem(range) = image.place() else { panic!("{image:?}") };
        let magic: u32 =
            vm_memory::Bytes::read_obj(&*ram, vm_memory::GuestAddress(range.start + 1024)).unwrap();
        assert_eq!(magic, EROFS_MAGIC);
    }
}
