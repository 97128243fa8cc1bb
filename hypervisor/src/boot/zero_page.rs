//! The zero page: the kernel's description of its machine (Linux, Documentation/arch/x86/zero-page.rst).

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use vm_memory::{Bytes, GuestAddress};

use super::root_image::Place;
use super::{BootError, HIGH_MEMORY, ZERO_PAGE};
use crate::memory::{GuestRam, MMIO_GAP_END, MMIO_GAP_START};
use crate::random;

/// Where the PC's reserved range begins; the MP table is in it.
const LOW_MEMORY_END: u64 = 0x9_fc00;

/// Further set-up data: the seed.
const SETUP_DATA: GuestAddress = GuestAddress(0xc000);

const RAM: u32 = 1;
const RESERVED: u32 = 2;

const BOOT_FLAG: u16 = 0xaa55;
const HEADER_MAGIC: u32 = u32::from_le_bytes(*b"HdrS");
/// Of the boot protocol: the first with set-up data is 0x209.
const PROTOCOL_VERSION: u16 = 0x20f;
const LOADER_WITHOUT_ID: u8 = 0xff;
const RNG_SEED: u32 = 9;
const SEED_BYTES: usize = 32;

/// Writes the zero page and what it points to.
pub fn write(
    ram: &GuestRam,
    command_line: GuestAddress,
    command_line_len: usize,
    root: &Place,
) -> Result<(), BootError> {
    let fits = |value: u64| u32::try_from(value).map_err(|_| BootError::Damaged("it lies above 4 GiB"));
    let mut page = boot_params::default();
    page.hdr.boot_flag = BOOT_FLAG;
    page.hdr.header = HEADER_MAGIC;
    page.hdr.version = PROTOCOL_VERSION;
    page.hdr.type_of_loader = LOADER_WITHOUT_ID;
    page.hdr.cmd_line_ptr = fits(command_line.0)?;
    page.hdr.cmdline_size = fits(command_line_len as u64)?;
    if let Place::Initramfs(range) = root {
        page.hdr.ramdisk_image = fits(range.start)?;
        page.hdr.ramdisk_size = fits(range.end - range.start)?;
    }
    page.hdr.setup_data = SETUP_DATA.0;
    for (entry, range) in page.e820_table.iter_mut().zip(memory_map(ram, root)) {
        *entry = range;
        page.e820_entries += 1;
    }
    write_seed(ram)?;
    ram.write_obj(page, ZERO_PAGE).map_err(BootError::Memory)
}

fn memory_map(ram: &GuestRam, root: &Place) -> impl Iterator<Item = boot_e820_entry> {
    let low = ram.size().min(MMIO_GAP_START);
    // Persistent memory is its device's to tell of.
    let pmem = match root {
        Place::Pmem(range) => range.clone(),
        Place::Initramfs(_) => low..low,
    };
    let high = ram.size() - low;
    let ranges = [
        (0, LOW_MEMORY_END, RAM),
        (LOW_MEMORY_END, HIGH_MEMORY - LOW_MEMORY_END, RESERVED),
        (HIGH_MEMORY, pmem.start.saturating_sub(HIGH_MEMORY), RAM),
        (pmem.end, low.saturating_sub(pmem.end), RAM),
        (MMIO_GAP_END, high, RAM),
    ];
    ranges.into_iter().filter(|(_, size, _)| *size > 0).map(|(addr, size, kind)| boot_e820_entry {
        addr,
        size,
        r#type: kind,
    })
}

/// Random bytes with which the guest's generator is ready at once, where its CPU offers none.
fn write_seed(ram: &GuestRam) -> Result<(), BootError> {
    let mut seed = [0; SEED_BYTES];
    random::fill(&mut seed).map_err(BootError::Seed)?;
    let mut data = 0u64.to_le_bytes().to_vec();
    data.extend_from_slice(&RNG_SEED.to_le_bytes());
    data.extend_from_slice(&u32::try_from(SEED_BYTES).unwrap_or(0).to_le_bytes());
    data.extend_from_slice(&seed);
    ram.write_slice(&data, SETUP_DATA).map_err(BootError::Memory)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ARCHIVE: Place = Place::Initramfs(0x300_0000..0x300_1234);

    fn map(bytes: u64, root: Place) -> Vec<(u64, u64, u32)> {
        let ram = GuestRam::new(bytes).unwrap();
        memory_map(&ram, &root).map(|entry| (entry.addr, entry.size, entry.r#type)).collect()
    }

    #[test]
    fn the_map_covers_ram_and_nothing_else() {
        let low = [(0, 0x9fc00, RAM), (0x9fc00, 0x60400, RESERVED)];
        assert_eq!(map(256 << 20, ARCHIVE), [low[0], low[1], (1 << 20, 255 << 20, RAM)]);
        assert_eq!(
            map(4 << 30, ARCHIVE),
            [low[0], low[1], (1 << 20, (3 << 30) - (1 << 20), RAM), (4 << 30, 1 << 30, RAM)]
        );
    }

    #[test]
    fn a_root_image_in_persistent_memory_is_not_ram() {
        let root = Place::Pmem(250 << 20..256 << 20);
        assert_eq!(map(257 << 20, root)[2..], [(1 << 20, 249 << 20, RAM), (256 << 20, 1 << 20, RAM)]);
    }

    #[test]
    fn the_kernel_finds_its_command_line_initramfs_and_seed() {
        let ram = GuestRam::new(64 << 20).unwrap();
        write(&ram, GuestAddress(0x20000), 5, &ARCHIVE).unwrap();
        let page: boot_params = ram.read_obj(ZERO_PAGE).unwrap();
        let header = page.hdr;
        assert_eq!({ header.cmd_line_ptr }, 0x20000);
        assert_eq!({ header.ramdisk_image }, 0x300_0000);
        assert_eq!({ header.ramdisk_size }, 0x1234);
        assert_eq!(page.e820_entries, 3);
        let kind: u32 = ram.read_obj(GuestAddress(header.setup_data + 8)).unwrap();
        assert_eq!(kind, RNG_SEED);
        let seed: [u8; SEED_BYTES] = ram.read_obj(GuestAddress(header.setup_data + 16)).unwrap();
        assert_ne!(seed, [0; SEED_BYTES]);
    }
}
