//! Segments and page tables with which the first CPU enters the kernel.

use kvm_bindings::kvm_segment;
use vm_memory::{Bytes, GuestAddress};

use super::BootError;
use crate::memory::GuestRam;

/// The descriptor table.
pub const GDT: GuestAddress = GuestAddress(0x500);

/// The topmost page table; the other two follow.
pub const PAGE_TABLES: GuestAddress = GuestAddress(0x9000);

/// Selectors that the boot protocol asks for.
const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const TASK_SELECTOR: u16 = 0x20;

/// Bytes of the descriptor table.
pub const GDT_BYTES: u16 = 5 * 8;

/// Present and writable.
const TABLE: u64 = 0x3;
/// Present, writable and 2 MiB large.
const LARGE_PAGE: u64 = 0x83;
const ENTRIES: u64 = 512;

/// Writes the descriptor table, and page tables that map the first GiB onto itself, in which kernel, zero page and
/// command line lie.
pub fn write(ram: &GuestRam) -> Result<(), BootError> {
    let gdt = [0, 0, descriptor(&code_segment()), descriptor(&data_segment()), descriptor(&task_segment())];
    put(ram, GDT.0, &gdt)?;
    let (middle, low) = (PAGE_TABLES.0 + 0x1000, PAGE_TABLES.0 + 0x2000);
    put(ram, PAGE_TABLES.0, &[middle | TABLE])?;
    put(ram, middle, &[low | TABLE])?;
    let pages: Vec<u64> = (0..ENTRIES).map(|index| index << 21 | LARGE_PAGE).collect();
    put(ram, low, &pages)
}

fn put(ram: &GuestRam, address: u64, entries: &[u64]) -> Result<(), BootError> {
    let bytes: Vec<u8> = entries.iter().flat_map(|entry| entry.to_le_bytes()).collect();
    ram.write_slice(&bytes, GuestAddress(address)).map_err(BootError::Memory)
}

/// Flat 64-bit code.
pub fn code_segment() -> kvm_segment {
    // Type: execute, read, accessed.
    kvm_segment { selector: CODE_SELECTOR, type_: 0xb, l: 1, db: 0, ..flat() }
}

/// Flat data.
pub fn data_segment() -> kvm_segment {
    // Type: read, write, accessed.
    kvm_segment { selector: DATA_SELECTOR, type_: 0x3, db: 1, ..flat() }
}

/// A task state, which long mode wants to exist.
pub fn task_segment() -> kvm_segment {
    // Type: busy 64-bit task state.
    kvm_segment { selector: TASK_SELECTOR, type_: 0xb, s: 0, g: 0, limit: 0x67, ..flat() }
}

fn flat() -> kvm_segment {
    kvm_segment { limit: u32::MAX, present: 1, s: 1, g: 1, ..Default::default() }
}

/// As the CPU reads it (Intel SDM volume 3, figure 3-8). Bases are 0.
fn descriptor(segment: &kvm_segment) -> u64 {
    let limit = u64::from(if segment.g == 1 { segment.limit >> 12 } else { segment.limit });
    let access = u64::from(segment.type_) | u64::from(segment.s) << 4 | u64::from(segment.present) << 7;
    let flags = u64::from(segment.l) << 1 | u64::from(segment.db) << 2 | u64::from(segment.g) << 3;
    limit & 0xffff | access << 40 | (limit >> 16 & 0xf) << 48 | flags << 52
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_have_the_form_that_the_cpu_expects() {
        assert_eq!(descriptor(&code_segment()), 0x00af_9b00_0000_ffff);
        assert_eq!(descriptor(&data_segment()), 0x00cf_9300_0000_ffff);
        assert_eq!(descriptor(&task_segment()), 0x0000_8b00_0000_0067);
    }

    #[test]
    fn the_first_gib_is_mapped_onto_itself() {
        let ram = GuestRam::new(1 << 20).unwrap();
        write(&ram).unwrap();
        let entry = |address| ram.read_obj::<u64>(GuestAddress(address)).unwrap();
        assert_eq!(entry(0x9000), 0xa003);
        assert_eq!(entry(0xa000), 0xb003);
        assert_eq!(entry(0xb000), 0x83);
        assert_eq!(entry(0xbff8), (511 << 21) | 0x83);
    }
}
