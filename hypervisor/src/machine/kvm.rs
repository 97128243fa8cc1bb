//! The host's KVM, from a descriptor that the shim has opened.

use std::os::fd::{AsFd, FromRawFd, IntoRawFd, OwnedFd};

use kvm_bindings::{CpuId, KVM_API_VERSION, KVM_MAX_CPUID_ENTRIES, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, VmFd};
use nix::sys::eventfd::EventFd;

use crate::memory::GuestRam;

/// What this program cannot do without, by the names that KVM's documentation uses.
const REQUIRED: [(Cap, &str); 8] = [
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
];

/// Three pages that KVM needs on processors which cannot run real mode, in the gap below the APICs.
const TASK_STATE: usize = 0xfffb_d000;

/// Why KVM cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// Not `/dev/kvm`.
    #[error("the descriptor given as KVM is not /dev/kvm")]
    NotKvm(#[source] kvm_ioctls::Error),
    /// Another interface.
    #[error("the host's KVM has interface version {0}; version 12 is needed")]
    Version(i32),
    /// Something is missing.
    #[error("the host's KVM lacks {0}; it needs hardware virtualisation and Linux 5.10 or newer")]
    Missing(&'static str),
    /// A call failed.
    #[error("the host's KVM cannot {what}")]
    Call {
        /// What was tried.
        what: &'static str,
        /// Why.
        #[source]
        source: kvm_ioctls::Error,
    },
}

fn failed(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> KvmError {
    move |source| KvmError::Call { what, source }
}

/// An empty machine: RAM and interrupt controllers, no CPU.
pub(super) struct Vm {
    pub fd: VmFd,
    pub supported_cpuid: CpuId,
    pub tsc_deadline: bool,
}

impl Vm {
    /// Makes a machine with `ram`, all of it before there is a vCPU.
    pub fn new(kvm: OwnedFd, ram: &GuestRam) -> Result<Self, KvmError> {
        // SAFETY: the descriptor is ours, and given up here.
        let kvm = unsafe { Kvm::from_raw_fd(kvm.into_raw_fd()) };
        check(&kvm)?;
        let fd = kvm.create_vm().map_err(failed("make a virtual machine"))?;
        fd.set_tss_address(TASK_STATE).map_err(failed("reserve its task state"))?;
        fd.create_irq_chip().map_err(failed("emulate interrupt controllers"))?;
        add_memory(&fd, ram)?;
        let supported_cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(failed("list the features of its CPUs"))?;
        Ok(Self { fd, supported_cpuid, tsc_deadline: kvm.check_extension(Cap::TscDeadlineTimer) })
    }

    /// Raises interrupt `gsi` when `event` is written.
    pub fn interrupt_by(&self, event: &EventFd, gsi: u32) -> Result<(), KvmError> {
        with_copy(event, |event| self.fd.register_irqfd(event, gsi)).map_err(failed("connect an interrupt"))
    }

    /// Turns the guest's write of `value` to `address` into an event, without an exit to this process.
    pub fn ring_by(&self, event: &EventFd, address: u64, value: u32) -> Result<(), KvmError> {
        let address = IoEventAddress::Mmio(address);
        with_copy(event, |event| self.fd.register_ioevent(event, &address, value))
            .map_err(failed("connect a doorbell"))
    }
}

fn check(kvm: &Kvm) -> Result<(), KvmError> {
    // An old descriptor of anything else fails with ENOTTY here.
    match kvm.get_api_version() {
        version if version == KVM_API_VERSION.cast_signed() => {}
        -1 => return Err(KvmError::NotKvm(kvm_ioctls::Error::last())),
        version => return Err(KvmError::Version(version)),
    }
    match REQUIRED.iter().find(|(capability, _)| !kvm.check_extension(*capability)) {
        Some((_, name)) => Err(KvmError::Missing(name)),
        None => Ok(()),
    }
}

fn add_memory(vm: &VmFd, ram: &GuestRam) -> Result<(), KvmError> {
    for (slot, range) in (0..).zip(ram.all_ranges()) {
        let region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: range.guest.0,
            memory_size: range.len as u64,
            userspace_addr: range.host.addr() as u64,
        };
        // SAFETY: the range is guest RAM, in which no Rust object lives. The machine keeps it mapped: it is never
        // dropped, the process exits instead.
        unsafe { vm.set_user_memory_region(region) }.map_err(failed("take the guest's memory"))?;
    }
    Ok(())
}

/// Calls `with` with a copy of `event` as kvm-ioctls wants it. KVM keeps its own reference.
fn with_copy<T>(
    event: &EventFd,
    with: impl FnOnce(&vmm_sys_util::eventfd::EventFd) -> Result<T, kvm_ioctls::Error>,
) -> Result<T, kvm_ioctls::Error> {
    let copy = event.as_fd().try_clone_to_owned();
    let copy =
        copy.map_err(|error| kvm_ioctls::Error::new(error.raw_os_error().unwrap_or(nix::libc::EMFILE)))?;
    // SAFETY: the copy is an eventfd, is ours, and given up here.
    with(&unsafe { vmm_sys_util::eventfd::EventFd::from_raw_fd(copy.into_raw_fd()) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_kvm_is_told_so() {
        let ram = GuestRam::new(1 << 20).unwrap();
        let null = std::fs::File::open("/dev/null").unwrap();
        assert!(matches!(Vm::new(null.into(), &ram), Err(KvmError::NotKvm(_))));
    }
}
