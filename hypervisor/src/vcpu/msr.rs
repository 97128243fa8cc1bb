//! Model-specific registers that firmware would have set.

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

use super::VcpuError;

/// Index and value.
const BOOT: [(u32, u64); 2] = [
    // Fast string operations.
    (0x1a0, 1),
    // Memory types: enabled, write-back by default. Without it everything that is not plain RAM would be uncached.
    (0x2ff, 0x806),
];

pub(super) fn set(vcpu: &VcpuFd, index: u8) -> Result<(), VcpuError> {
    let entries = BOOT.map(|(index, data)| kvm_msr_entry { index, data, ..Default::default() });
    let failed = |source| VcpuError::Kvm { what: "set the model-specific registers of", index, source };
    // Fails only for lists beyond KVM's own limit.
    let msrs = Msrs::from_entries(&entries).map_err(|_| failed(kvm_ioctls::Error::new(nix::libc::E2BIG)))?;
    let done = vcpu.set_msrs(&msrs).map_err(failed)?;
    // KVM stops at the first one that it refuses.
    BOOT.get(done).map_or(Ok(()), |(refused, _)| Err(VcpuError::Msr(*refused)))
}
