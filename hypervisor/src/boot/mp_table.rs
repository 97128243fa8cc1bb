//! The MultiProcessor table (Intel's MultiProcessor Specification 1.4), by which a kernel without ACPI learns of its
//! CPUs and interrupts.

use vm_memory::{Bytes, GuestAddress};

use super::BootError;
use crate::memory::GuestRam;

/// The kernel is built for no more.
pub const MAX_VCPUS: u8 = 64;

/// The kernel looks for the table's signature in 0xf0000..0x100000.
const TABLE: GuestAddress = GuestAddress(0xf_0000);
const POINTER_BYTES: usize = 16;
const HEADER_BYTES: usize = 44;

const LOCAL_APIC: u32 = 0xfee0_0000;
const IO_APIC: u32 = 0xfec0_0000;
const IO_APIC_PINS: u8 = 24;
const APIC_VERSION: u8 = 0x14;
const ISA_BUS: u8 = 0;

/// Writes the table for CPUs 0 to `vcpus` - 1.
pub fn write(ram: &GuestRam, vcpus: u8) -> Result<(), BootError> {
    ram.write_slice(&table(vcpus), TABLE).map_err(BootError::Memory)
}

fn table(vcpus: u8) -> Vec<u8> {
    let io_apic_id = vcpus;
    let mut entries = Vec::new();
    for id in 0..vcpus {
        // Usable, and the first is the one that boots.
        let flags = if id == 0 { 3 } else { 1 };
        entries.extend_from_slice(&[0, id, APIC_VERSION, flags]);
        // Signature and features, which the kernel takes from CPUID.
        entries.extend_from_slice(&[0; 16]);
    }
    entries.extend_from_slice(&[1, ISA_BUS]);
    entries.extend_from_slice(b"ISA   ");
    entries.extend_from_slice(&[2, io_apic_id, APIC_VERSION, 1]);
    entries.extend_from_slice(&IO_APIC.to_le_bytes());
    for pin in 0..IO_APIC_PINS {
        // Interrupt of the bus's own polarity and trigger: high, edge.
        entries.extend_from_slice(&[3, 0, 0, 0, ISA_BUS, pin, io_apic_id, pin]);
    }
    // On every CPU, local pin 0 is the old interrupt controller and pin 1 the non-maskable interrupt.
    entries.extend_from_slice(&[4, 3, 0, 0, ISA_BUS, 0, 0xff, 0]);
    entries.extend_from_slice(&[4, 1, 0, 0, ISA_BUS, 0, 0xff, 1]);
    let count = u16::from(vcpus) + 2 + u16::from(IO_APIC_PINS) + 2;

    let mut table = pointer();
    table.extend_from_slice(&header(&entries, count));
    table.extend_from_slice(&entries);
    table
}

/// The floating pointer structure.
fn pointer() -> Vec<u8> {
    let mut pointer = b"_MP_".to_vec();
    let header_at = u32::try_from(TABLE.0).unwrap_or(0) + 16;
    pointer.extend_from_slice(&header_at.to_le_bytes());
    // Length in 16 bytes, revision 1.4, checksum, features.
    pointer.extend_from_slice(&[1, 4, 0, 0, 0, 0, 0, 0]);
    pointer[10] = checksum(&pointer);
    debug_assert_eq!(pointer.len(), POINTER_BYTES);
    pointer
}

fn header(entries: &[u8], count: u16) -> Vec<u8> {
    let length = u16::try_from(HEADER_BYTES + entries.len()).unwrap_or(u16::MAX);
    let mut header = b"PCMP".to_vec();
    header.extend_from_slice(&length.to_le_bytes());
    header.extend_from_slice(&[4, 0]);
    header.extend_from_slice(b"VMSHIM  microvm     ");
    // No table of the manufacturer's.
    header.extend_from_slice(&[0; 6]);
    header.extend_from_slice(&count.to_le_bytes());
    header.extend_from_slice(&LOCAL_APIC.to_le_bytes());
    header.extend_from_slice(&[0; 4]);
    debug_assert_eq!(header.len(), HEADER_BYTES);
    header[7] = checksum(&[&header, entries].concat());
    header
}

/// The byte that makes the sum of all bytes 0.
fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0u8, |sum, &byte| sum.wrapping_add(byte)).wrapping_neg()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_and_lengths_hold() {
        for vcpus in [1, 2, MAX_VCPUS] {
            let table = table(vcpus);
            let (pointer, rest) = table.split_at(POINTER_BYTES);
            assert_eq!(checksum(pointer), 0);
            assert_eq!(checksum(rest), 0);
            assert_eq!(usize::from(u16::from_le_bytes([rest[4], rest[5]])), rest.len());
            assert_eq!(rest.len(), HEADER_BYTES + 20 * usize::from(vcpus) + 8 + 8 + 24 * 8 + 16);
        }
    }

    #[test]
    fn every_cpu_is_listed_once() {
        let table = table(3);
        let cpus: Vec<_> = table[POINTER_BYTES + HEADER_BYTES..].chunks(20).take(3).collect();
        assert_eq!(
            cpus.iter().map(|cpu| (cpu[0], cpu[1], cpu[3])).collect::<Vec<_>>(),
            [(0, 0, 3), (0, 1, 1), (0, 2, 1)]
        );
    }
}
