//! The machine that was asked for, once its numbers have been checked.

use vmshim_protocol::control::{GROWTH_STEP_MIB, MachineConfig, RateLimit};

use crate::boot::MAX_VCPUS;

/// virtio-blk and virtio-net devices of one machine: what the interrupt lines leave beside the other devices.
pub const MAX_SLOTS: u8 = 14;

const MIN_MEMORY_MIB: u32 = 16;
const MAX_MEMORY_MIB: u32 = 1 << 20;

/// What is wrong with a [`MachineConfig`].
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ConfigError {
    /// None, or too many.
    #[error("a machine has 1 to {MAX_VCPUS} vCPUs, not {0}")]
    Vcpus(u8),
    /// Too little for any kernel, or absurd.
    #[error("a machine has {MIN_MEMORY_MIB} to {MAX_MEMORY_MIB} MiB of memory, not {0}")]
    Memory(u32),
    /// Not in steps, or absurd.
    #[error(
        "a machine grows by at most {MAX_MEMORY_MIB} MiB of memory, in steps of {GROWTH_STEP_MIB} MiB, not by {0}"
    )]
    Growth(u32),
    /// Too many.
    #[error("a machine has at most {MAX_SLOTS} disk and NIC slots together, not {disks} and {nics}")]
    Slots {
        /// Disk slots.
        disks: u8,
        /// NIC slots.
        nics: u8,
    },
    /// Root is not an identity to be confined to.
    #[error("the VMM needs a user id and a group id of its own, not those of root")]
    Root,
}

/// A checked [`MachineConfig`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan(MachineConfig);

impl TryFrom<MachineConfig> for Plan {
    type Error = ConfigError;

    fn try_from(config: MachineConfig) -> Result<Self, ConfigError> {
        if !(1..=MAX_VCPUS).contains(&config.vcpus) {
            return Err(ConfigError::Vcpus(config.vcpus));
        }
        if !(MIN_MEMORY_MIB..=MAX_MEMORY_MIB).contains(&config.memory_mib) {
            return Err(ConfigError::Memory(config.memory_mib));
        }
        if config.growth_mib > MAX_MEMORY_MIB || !config.growth_mib.is_multiple_of(GROWTH_STEP_MIB) {
            return Err(ConfigError::Growth(config.growth_mib));
        }
        let (disks, nics) = (config.disk_slots, config.nic_slots);
        if disks.checked_add(nics).is_none_or(|slots| slots > MAX_SLOTS) {
            return Err(ConfigError::Slots { disks, nics });
        }
        if config.uid == 0 || config.gid == 0 {
            return Err(ConfigError::Root);
        }
        Ok(Self(config))
    }
}

impl Plan {
    /// At least one.
    pub fn vcpus(&self) -> u8 {
        self.0.vcpus
    }

    /// Guest RAM in MiB.
    pub fn memory_mib(&self) -> u32 {
        self.0.memory_mib
    }

    /// A whole number of MiB.
    pub fn memory_bytes(&self) -> u64 {
        u64::from(self.0.memory_mib) << 20
    }

    /// Whole steps, or 0 for a machine that does not grow.
    pub fn growth_bytes(&self) -> u64 {
        u64::from(self.0.growth_mib) << 20
    }

    /// See [`MAX_SLOTS`].
    pub fn disk_slots(&self) -> u8 {
        self.0.disk_slots
    }

    /// See [`MAX_SLOTS`].
    pub fn nic_slots(&self) -> u8 {
        self.0.nic_slots
    }

    /// What each NIC may take to the guest.
    pub fn receive_limit(&self) -> Option<RateLimit> {
        self.0.receive_limit
    }

    /// What each NIC may take from the guest.
    pub fn send_limit(&self) -> Option<RateLimit> {
        self.0.send_limit
    }

    /// The administrator's part of the command line.
    pub fn kernel_params(&self) -> &str {
        &self.0.kernel_params
    }

    /// Host user id to run as, never root's.
    pub fn uid(&self) -> u32 {
        self.0.uid
    }

    /// Host group id to run as, never root's.
    pub fn gid(&self) -> u32 {
        self.0.gid
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> MachineConfig {
        MachineConfig {
            id: "a".into(),
            vcpus: 2,
            memory_mib: 256,
            growth_mib: 1024,
            kernel_params: String::new(),
            disk_slots: 4,
            nic_slots: 2,
            receive_limit: None,
            send_limit: None,
            uid: 1000,
            gid: 1000,
        }
    }

    #[test]
    fn numbers_out_of_bounds_are_refused() {
        let refused = |change: fn(&mut MachineConfig)| {
            let mut config = config();
            change(&mut config);
            Plan::try_from(config).unwrap_err()
        };
        assert!(Plan::try_from(config()).is_ok());
        assert_eq!(refused(|config| config.vcpus = 0), ConfigError::Vcpus(0));
        assert_eq!(refused(|config| config.vcpus = 65), ConfigError::Vcpus(65));
        assert_eq!(refused(|config| config.memory_mib = 15), ConfigError::Memory(15));
        assert_eq!(refused(|config| config.memory_mib = u32::MAX), ConfigError::Memory(u32::MAX));
        assert_eq!(refused(|config| config.growth_mib = 100), ConfigError::Growth(100));
        assert_eq!(refused(|config| config.growth_mib = 1 << 21), ConfigError::Growth(1 << 21));
        assert_eq!(refused(|config| config.disk_slots = 13), ConfigError::Slots { disks: 13, nics: 2 });
        assert_eq!(refused(|config| config.nic_slots = 255), ConfigError::Slots { disks: 4, nics: 255 });
        assert_eq!(refused(|config| config.uid = 0), ConfigError::Root);
        assert_eq!(refused(|config| config.gid = 0), ConfigError::Root);
    }
}
