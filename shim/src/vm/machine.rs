//! How large a pod's machine is.

use vmshim_protocol::control::GROWTH_STEP_MIB;

use crate::config::Config;
use crate::oci::Limits;

/// A machine as it is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Machine {
    /// vCPUs that are up at first.
    pub vcpus: u8,
    /// More of them, which can come up while it runs.
    pub spare_vcpus: u8,
    /// Guest RAM.
    pub memory_mib: u32,
    /// What it can get beyond that while it runs.
    pub growth_mib: u32,
    /// What of all that the guest's kernel and agent need.
    overhead_mib: u32,
}

/// What a machine has while it runs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Size {
    /// vCPUs that are up.
    pub vcpus: u8,
    /// Memory beyond what it has booted with, in MiB.
    pub growth_mib: u32,
}

/// What the guest's kernel spends on bookkeeping: 64 of 4096 bytes.
const BOOKKEEPING: u32 = 64;

impl Machine {
    /// Sizes the machine by the pod's limits, within what the administrator allows. Without a limit, the default; a
    /// CPU limit says nothing about memory and the other way round. A pod whose containers are yet to come has no less
    /// than the default: the sum of limits says nothing about containers without one. A limit may be more than the host
    /// has, of which a machine could use nothing and would need 1.6 % for bookkeeping.
    pub fn new(config: &Config, limits: &Limits, host_memory_mib: u32) -> Self {
        let vm = &config.hypervisor;
        let vcpus = limits.cpus().map_or(vm.default_vcpus, |cpus| u8::try_from(cpus).unwrap_or(u8::MAX));
        let memory_mib = limits.memory_bytes().map_or(vm.default_memory_mib, |bytes| {
            let mib = u32::try_from(bytes.div_ceil(1 << 20)).unwrap_or(u32::MAX);
            mib.saturating_add(vm.overhead_memory_mib).min(host_memory_mib)
        });
        let (vcpus, memory_mib) = if limits.partial {
            (vcpus.max(vm.default_vcpus), memory_mib.max(vm.default_memory_mib))
        } else {
            (vcpus, memory_mib)
        };
        let memory_mib = memory_mib.max(vm.min_memory_mib).min(vm.max_memory_mib);
        let room = vm.max_memory_mib.min(host_memory_mib).saturating_sub(memory_mib);
        let growth_mib = vm.memory_growth_mib.min(room);
        let vcpus = vcpus.clamp(1, vm.max_vcpus);
        // Without a limit there is none to be raised, and each costs the guest's kernel memory.
        let spare_vcpus = limits.cpus().map_or(0, |_| vm.vcpu_growth.min(vm.max_vcpus - vcpus));
        Self {
            vcpus,
            spare_vcpus,
            memory_mib,
            growth_mib: growth_mib - growth_mib % GROWTH_STEP_MIB,
            overhead_mib: vm.overhead_memory_mib,
        }
    }

    /// Its vCPUs, those that are spare included.
    pub fn all_vcpus(&self) -> u8 {
        self.vcpus.saturating_add(self.spare_vcpus)
    }

    /// Its size when it has just been made.
    pub fn made(&self) -> Size {
        Size { vcpus: self.vcpus, growth_mib: 0 }
    }

    /// Its size for containers with these limits, as far as it can have it, and no less than it was made with.
    pub fn size_for(&self, limits: &[Limits]) -> Size {
        let milli_cpus = limits.iter().filter_map(Limits::milli_cpus).fold(0, u64::saturating_add);
        let vcpus = u8::try_from(milli_cpus.div_ceil(1000)).unwrap_or(u8::MAX);
        Size {
            vcpus: vcpus.clamp(self.vcpus, self.all_vcpus()),
            growth_mib: self.growth_for(sum_of_memory(limits)).min(self.growth_mib),
        }
    }

    /// Whether it can have memory for these limits.
    pub fn has_room_for(&self, limits: &[Limits]) -> bool {
        self.growth_for(sum_of_memory(limits)) <= self.growth_mib
    }

    /// What it needs beyond what it has booted with, in MiB, for containers whose memory limits have this sum.
    fn growth_for(&self, limits_bytes: u64) -> u32 {
        let limits_mib = u32::try_from(limits_bytes.div_ceil(1 << 20)).unwrap_or(u32::MAX);
        let beyond = limits_mib.saturating_add(self.overhead_mib).saturating_sub(self.memory_mib);
        if limits_mib == 0 { 0 } else { beyond.saturating_add(beyond.div_ceil(BOOKKEEPING)) }
    }

    /// The largest sum of memory limits that it can grow to, in MiB.
    pub fn most_limits_mib(&self) -> u32 {
        let growth = self.growth_mib - self.growth_mib.div_ceil(BOOKKEEPING + 1);
        self.memory_mib.saturating_add(growth).saturating_sub(self.overhead_mib)
    }
}

/// The sum of memory limits, in bytes.
pub fn sum_of_memory(limits: &[Limits]) -> u64 {
    limits.iter().filter_map(Limits::memory_bytes).fold(0, u64::saturating_add)
}

/// The memory that the host has.
pub fn host_memory_mib() -> u32 {
    let bytes = nix::sys::sysinfo::sysinfo().map_or(u64::MAX, |info| info.ram_total());
    u32::try_from(bytes >> 20).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn machine(quota: i64, period: u64, memory: i64) -> (u8, u32) {
        let limits = Limits { quota, period, memory, partial: false };
        let machine = Machine::new(&Config::default(), &limits, u32::MAX);
        (machine.vcpus, machine.memory_mib)
    }

    #[test]
    fn a_pod_has_the_default_at_least() {
        let pod = |memory| Limits { memory, partial: true, ..Limits::default() };
        let memory = |memory| Machine::new(&Config::default(), &pod(memory), u32::MAX).memory_mib;
        assert_eq!((memory(0), memory(1 << 20), memory(1 << 30)), (512, 512, 1088));
    }

    #[test]
    fn limits_round_up_and_add_the_overhead() {
        assert_eq!(machine(0, 0, 0), (1, 512));
        assert_eq!(machine(150_000, 100_000, 0), (2, 512));
        assert_eq!(machine(50_000, 100_000, 300 << 20), (1, 364));
        assert_eq!(machine(-1, 100_000, (256 << 20) + 1), (1, 321));
    }

    #[test]
    fn limits_stay_within_the_administrators_bounds() {
        assert_eq!(machine(i64::MAX, 1, i64::MAX), (32, 262_144));
        assert_eq!(machine(1, u64::MAX, 1), (1, 128));
    }

    #[test]
    fn a_limit_beyond_the_hosts_memory_makes_no_machine_beyond_it() {
        let limits = Limits { memory: 1 << 40, partial: true, ..Limits::default() };
        assert_eq!(Machine::new(&Config::default(), &limits, 3000).memory_mib, 3000);
        // What the administrator has set is not a pod's to be taken for wrong.
        assert_eq!(Machine::new(&Config::default(), &limits, 100).memory_mib, 512);
    }

    fn growing(default_mib: u32, growth_mib: u32, host_mib: u32) -> Machine {
        let mut config = Config::default();
        config.hypervisor.default_memory_mib = default_mib;
        config.hypervisor.memory_growth_mib = growth_mib;
        Machine::new(&config, &Limits::default(), host_mib)
    }

    #[test]
    fn a_machine_grows_within_what_it_may_and_the_host_has() {
        assert_eq!(growing(512, 1024, u32::MAX).growth_mib, 1024);
        assert_eq!(growing(512, 1100, u32::MAX).growth_mib, 1024);
        assert_eq!(growing(512, 1024, 1000).growth_mib, 384);
        assert_eq!(growing(512, 1024, 300).growth_mib, 0);
        assert_eq!(growing(262_144, 1024, u32::MAX).growth_mib, 0);
    }

    #[test]
    fn it_grows_by_what_the_limits_need() {
        let machine = growing(512, 1024, u32::MAX);
        let mib = |limit: u64| machine.growth_for(limit << 20);
        assert_eq!((mib(0), mib(1), mib(448), mib(449), mib(448 + 640)), (0, 0, 0, 2, 650));
        assert_eq!(machine.growth_for((448 << 20) + 1), 2);
        assert!(machine.growth_for(u64::MAX) > machine.growth_mib);
    }

    #[test]
    fn only_a_machine_with_a_cpu_limit_has_spare_vcpus() {
        let mut config = Config::default();
        config.hypervisor.vcpu_growth = 3;
        config.hypervisor.max_vcpus = 4;
        let machine = |quota| Machine::new(&config, &Limits { quota, ..Limits::default() }, u32::MAX);
        let vcpus = |quota| (machine(quota).vcpus, machine(quota).spare_vcpus);
        assert_eq!(
            [vcpus(0), vcpus(50_000), vcpus(250_000), vcpus(900_000)],
            [(1, 0), (1, 3), (3, 1), (4, 0)]
        );
        let cpus = |quotas: &[i64]| {
            let limits = |quota: &i64| Limits { quota: *quota, ..Limits::default() };
            machine(50_000).size_for(&quotas.iter().map(limits).collect::<Vec<_>>()).vcpus
        };
        assert_eq!(
            [cpus(&[]), cpus(&[-1, 0]), cpus(&[50_000, 50_000]), cpus(&[50_000, 50_001])],
            [1, 1, 1, 2]
        );
        assert_eq!([cpus(&[400_000]), cpus(&[i64::MAX, i64::MAX])], [4, 4]);
    }

    proptest! {
        #[test]
        fn the_largest_limits_are_just_met(default_mib in 64u32..4096, growth_mib in 0u32..8192, overhead in 0u32..1024) {
            let mut config = Config::default();
            config.hypervisor.default_memory_mib = default_mib;
            config.hypervisor.memory_growth_mib = growth_mib;
            config.hypervisor.overhead_memory_mib = overhead;
            let machine = Machine::new(&config, &Limits::default(), u32::MAX);
            let most = u64::from(machine.most_limits_mib());
            prop_assert!(machine.growth_for(most << 20) <= machine.growth_mib);
            prop_assert!(machine.growth_for((most + 2) << 20) > machine.growth_mib || most == 0);
        }

        #[test]
        fn any_limits_give_a_machine(quota: i64, period: u64, memory: i64) {
            let (vcpus, memory) = machine(quota, period, memory);
            prop_assert!((1..=32).contains(&vcpus) && (128..=262_144).contains(&memory));
        }
    }
}
