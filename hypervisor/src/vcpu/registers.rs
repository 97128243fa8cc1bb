//! Registers with which the first CPU enters the kernel (Linux, Documentation/arch/x86/boot.rst, "64-bit boot protocol").

use kvm_bindings::{kvm_dtable, kvm_regs};
use kvm_ioctls::VcpuFd;
use vm_memory::GuestAddress;

use crate::boot::{self, GDT, GDT_BYTES, PAGE_TABLES, ZERO_PAGE};

const CR0_PROTECTED: u64 = 1;
const CR0_PAGING: u64 = 1 << 31;
const CR4_PHYSICAL_ADDRESS_EXTENSION: u64 = 1 << 5;
const EFER_LONG_MODE: u64 = 1 << 8 | 1 << 10;
/// Interrupts are off; bit 1 is always set.
const FLAGS: u64 = 2;

/// Sets them. What is not named keeps its value after reset; so does the local APIC, whose first pin KVM connects to the
/// interrupt controller.
pub(super) fn set(vcpu: &VcpuFd, entry: GuestAddress) -> Result<(), kvm_ioctls::Error> {
    let mut special = vcpu.get_sregs()?;
    special.cs = boot::code_segment();
    let data = boot::data_segment();
    (special.ds, special.es, special.fs, special.gs, special.ss) = (data, data, data, data, data);
    special.tr = boot::task_segment();
    special.gdt = kvm_dtable { base: GDT.0, limit: GDT_BYTES - 1, ..Default::default() };
    special.idt = kvm_dtable::default();
    special.cr0 = CR0_PROTECTED | CR0_PAGING;
    special.cr3 = PAGE_TABLES.0;
    special.cr4 = CR4_PHYSICAL_ADDRESS_EXTENSION;
    special.efer = EFER_LONG_MODE;
    vcpu.set_sregs(&special)?;
    vcpu.set_regs(&kvm_regs { rip: entry.0, rsi: ZERO_PAGE.0, rflags: FLAGS, ..Default::default() })
}
