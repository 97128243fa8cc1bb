//! What the guest learns about its CPU.
//!
//! KVM says what host and hypervisor can do; this takes out what a pod has no use for or that would not work, and makes
//! the topology that of this machine: one socket, one thread per core.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

/// CPUs of a machine.
#[derive(Debug, Clone, Copy)]
pub struct Topology {
    /// How many.
    pub vcpus: u8,
    /// Whether KVM emulates the deadline mode of the local APIC's timer.
    pub tsc_deadline: bool,
}

impl Topology {
    /// Bits of an APIC id that number the cores.
    fn core_bits(self) -> u32 {
        u32::from(self.vcpus).next_power_of_two().trailing_zeros()
    }
}

/// Leaf 1, ECX.
mod features {
    pub const VMX: u32 = 1 << 5;
    pub const PERFORMANCE: u32 = 1 << 15;
    pub const TSC_DEADLINE: u32 = 1 << 24;
    pub const HYPERVISOR: u32 = 1 << 31;
    /// In EDX: the count of logical CPUs in EBX is valid.
    pub const MULTITHREADING: u32 = 1 << 28;
}

/// Leaf 0x80000001, ECX.
mod extended {
    pub const SVM: u32 = 1 << 2;
    pub const PERFORMANCE: u32 = 1 << 23 | 1 << 24 | 1 << 28;
}

/// Leaf 6, EAX: the local APIC's timer runs in every sleep state, so no other timer is needed.
const ALWAYS_RUNNING_TIMER: u32 = 1 << 2;

/// The features of vCPU `index`, which is its APIC id too.
pub(super) fn normalised(supported: &CpuId, topology: Topology, index: u8) -> CpuId {
    let id = u32::from(index);
    let mut entries: Vec<kvm_cpuid_entry2> =
        supported.as_slice().iter().copied().filter(|entry| !is_topology(entry.function)).collect();
    for entry in &mut entries {
        normalise(entry, topology, id);
    }
    let deepest = entries.iter().find(|entry| entry.function == 0).map_or(0, |entry| entry.eax);
    let leaves = [0xb, 0x1f].into_iter().filter(|&leaf| leaf <= deepest);
    entries.extend(leaves.flat_map(|leaf| extended_topology(leaf, topology, id)));
    // KVM takes 256 entries and lists fewer; an excess would be refused when it is set.
    CpuId::from_entries(&entries).unwrap_or_else(|_| supported.clone())
}

fn is_topology(function: u32) -> bool {
    matches!(function, 0xb | 0x1f)
}

fn normalise(entry: &mut kvm_cpuid_entry2, topology: Topology, id: u32) {
    let vcpus = u32::from(topology.vcpus);
    match entry.function {
        0x1 => {
            let cpus = 1 << topology.core_bits();
            // Keeps the brand (bits 7:0) and the size of a cache line (15:8).
            entry.ebx = entry.ebx & 0xffff | cpus << 16 | id << 24;
            entry.ecx &= !(features::VMX | features::PERFORMANCE | features::TSC_DEADLINE);
            entry.ecx |= features::HYPERVISOR;
            if topology.tsc_deadline {
                entry.ecx |= features::TSC_DEADLINE;
            }
            entry.edx &= !features::MULTITHREADING;
            if vcpus > 1 {
                entry.edx |= features::MULTITHREADING;
            }
        }
        // Caches, Intel: the first two levels belong to a core, the third to all.
        0x4 if entry.eax & 0x1f != 0 => {
            let level = entry.eax >> 5 & 0x7;
            let sharing = if level >= 3 { (1 << topology.core_bits()) - 1 } else { 0 };
            entry.eax = entry.eax & 0x3fff | sharing << 14 | (vcpus - 1) << 26;
        }
        0x6 => {
            entry.eax &= ALWAYS_RUNNING_TIMER;
            (entry.ebx, entry.ecx, entry.edx) = (0, 0, 0);
        }
        // Performance monitoring, Intel and AMD: a pod is not told what its neighbours do.
        0xa | 0x8000_0022 => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
        0x8000_0001 => entry.ecx &= !(extended::SVM | extended::PERFORMANCE),
        // Cores, AMD: bits of the id, and the number less one.
        0x8000_0008 => entry.ecx = entry.ecx & !0xf0ff | topology.core_bits() << 12 | (vcpus - 1),
        // Caches, AMD.
        0x8000_001d if entry.eax & 0x1f != 0 => {
            let level = entry.eax >> 5 & 0x7;
            let sharing = if level >= 3 { vcpus - 1 } else { 0 };
            entry.eax = entry.eax & !(0xfff << 14) | sharing << 14;
        }
        // APIC id, core without siblings, single node.
        0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (id, id, 0),
        _ => {}
    }
}

/// Two levels, of threads and of cores, and the end of the list.
fn extended_topology(leaf: u32, topology: Topology, id: u32) -> [kvm_cpuid_entry2; 3] {
    const THREADS: u32 = 1;
    const CORES: u32 = 2;
    let level = |index: u32, bits: u32, cpus: u32, kind: u32| kvm_cpuid_entry2 {
        function: leaf,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: bits,
        ebx: cpus,
        ecx: index | kind << 8,
        edx: id,
        ..Default::default()
    };
    [
        level(0, 0, 1, THREADS),
        level(1, topology.core_bits(), u32::from(topology.vcpus), CORES),
        level(2, 0, 0, 0),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, ecx: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, ecx, ..Default::default() }
    }

    fn find(cpuid: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
        *cpuid.as_slice().iter().find(|entry| entry.function == function && entry.index == index).unwrap()
    }

    fn supported() -> CpuId {
        let deepest = kvm_cpuid_entry2 { function: 0, eax: 0x1f, ..Default::default() };
        let caches = kvm_cpuid_entry2 { function: 4, index: 3, eax: 0xfc00_4163, ..Default::default() };
        let entries =
            [deepest, entry(1, u32::MAX), caches, entry(0xa, 7), entry(0xb, 9), entry(0x8000_0001, u32::MAX)];
        CpuId::from_entries(&entries).unwrap()
    }

    #[test]
    fn each_cpu_has_its_own_id() {
        let topology = Topology { vcpus: 3, tsc_deadline: true };
        for index in 0..3 {
            let cpuid = normalised(&supported(), topology, index);
            assert_eq!(find(&cpuid, 1, 0).ebx, u32::from(index) << 24 | 4 << 16);
            assert_eq!(find(&cpuid, 0xb, 0).edx, u32::from(index));
            assert_eq!(find(&cpuid, 0xb, 1).ebx, 3);
            assert_eq!(find(&cpuid, 0x1f, 1).eax, 2);
            assert_eq!(find(&cpuid, 4, 3).eax >> 14 & 0xfff, 3);
        }
    }

    #[test]
    fn a_guest_gets_neither_virtualisation_nor_performance_counters() {
        let cpuid = normalised(&supported(), Topology { vcpus: 1, tsc_deadline: false }, 0);
        let one = find(&cpuid, 1, 0);
        assert_eq!(one.ecx & (features::VMX | features::PERFORMANCE | features::TSC_DEADLINE), 0);
        assert_ne!(one.ecx & features::HYPERVISOR, 0);
        assert_eq!(find(&cpuid, 0xa, 0).ecx, 0);
        assert_eq!(find(&cpuid, 0x8000_0001, 0).ecx & extended::SVM, 0);
    }

    #[test]
    fn one_topology_leaf_each() {
        let cpuid = normalised(&supported(), Topology { vcpus: 64, tsc_deadline: true }, 63);
        assert_eq!(cpuid.as_slice().iter().filter(|entry| entry.function == 0xb).count(), 3);
    }
}
