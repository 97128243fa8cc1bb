//! The kernel's command line.

use std::ffi::CString;

use linux_loader::cmdline::Cmdline;
use vm_memory::{Bytes, GuestAddress};

use super::BootError;
use crate::memory::GuestRam;

/// Bytes that an x86 kernel takes, with the final NUL.
const CAPACITY: usize = 2048;

/// What every guest is told.
///
/// * `console=ttyS0 quiet`: what kills the kernel is seen, nothing else costs an exit per character.
/// * `reboot=k panic=-1`: a panic resets the machine at once, by the one port that does so here.
/// * `maxcpus=1`: the other CPUs wait until the agent wants them.
/// * `random.trust_cpu=on`: the first reader of randomness does not wait.
/// * `tsc=reliable no_timer_check`: there is neither a timer to calibrate against nor one to check.
/// * `cryptomgr.notests`: the same code passed its self-tests when the kernel was built.
/// * `8250.nr_uarts=1`: one serial port, no probing for more.
/// * `memory_hotplug.online_policy=auto-movable`: memory that comes later is kept free of what cannot be moved, up to
///   three times what the kernel has for that, so that it can go again.
const COMMON: &str = "console=ttyS0 quiet reboot=k panic=-1 maxcpus=1 random.trust_cpu=on tsc=reliable no_timer_check \
    cryptomgr.notests 8250.nr_uarts=1 memory_hotplug.online_policy=auto-movable";

/// Buckets of the tables of directory entries and of inodes for each MiB of RAM: half of the kernel's own measure, which
/// writes all of them at boot. At a guest's usual size they would be the largest part of what an idle one costs that is
/// never read.
const DENTRY_BUCKETS: u32 = 64;
const INODE_BUCKETS: u32 = 32;

/// Why a command line cannot be given to the kernel.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum CommandLineError {
    /// Not fit for a command line.
    #[error("kernel_params may hold printable ASCII characters only")]
    Characters,
    /// Past [`CAPACITY`].
    #[error("the kernel command line is longer than 2047 characters; shorten kernel_params")]
    TooLong,
}

/// A command line that fits.
#[derive(Debug)]
pub struct CommandLine(CString);

impl CommandLine {
    /// What every guest is told, what goes by its RAM in MiB, what its root file system takes, its devices as pairs of address and interrupt, and at
    /// last the administrator's own parameters, which therefore win.
    ///
    /// # Errors
    /// See [`CommandLineError`].
    pub fn new(
        memory_mib: u32,
        root: &str,
        devices: &[(u64, u32)],
        extra: &str,
    ) -> Result<Self, CommandLineError> {
        if !extra.bytes().all(|byte| (b' '..=b'~').contains(&byte)) {
            return Err(CommandLineError::Characters);
        }
        // The builder fails on other characters and on what is too long; the former are ruled out.
        let too_long = |_| CommandLineError::TooLong;
        let mut line = Cmdline::new(CAPACITY).map_err(too_long)?;
        line.insert_str(COMMON).map_err(too_long)?;
        let buckets = |each: u32| memory_mib.saturating_mul(each);
        let tables =
            format!("dhash_entries={} ihash_entries={}", buckets(DENTRY_BUCKETS), buckets(INODE_BUCKETS));
        line.insert_str(tables).map_err(too_long)?;
        if !root.is_empty() {
            line.insert_str(root).map_err(too_long)?;
        }
        for (address, irq) in devices {
            line.insert_str(format!("virtio_mmio.device=4K@{address:#x}:{irq}")).map_err(too_long)?;
        }
        if !extra.trim().is_empty() {
            line.insert_str(extra.trim()).map_err(too_long)?;
        }
        line.as_cstring().map(Self).map_err(too_long)
    }

    /// Bytes without the final NUL.
    pub fn len(&self) -> usize {
        self.0.count_bytes()
    }

    /// Never: a guest always has something to be told.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn write(&self, ram: &GuestRam, address: GuestAddress) -> Result<(), BootError> {
        ram.write_slice(self.0.to_bytes_with_nul(), address).map_err(BootError::Memory)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_come_before_the_administrators_parameters() {
        let line =
            CommandLine::new(512, "root=/dev/pmem0", &[(0xd000_0000, 5), (0xd000_1000, 6)], " quiet=0 ")
                .unwrap();
        let text = line.0.to_str().unwrap();
        assert!(text.starts_with("console=ttyS0 "));
        assert!(text.contains(" dhash_entries=32768 ihash_entries=16384 root=/dev/pmem0 "));
        assert!(
            text.ends_with(" virtio_mmio.device=4K@0xd0000000:5 virtio_mmio.device=4K@0xd0001000:6 quiet=0")
        );
    }

    #[test]
    fn what_the_kernel_cannot_take_is_refused() {
        assert_eq!(CommandLine::new(512, "", &[], &"x".repeat(2048)).unwrap_err(), CommandLineError::TooLong);
        for bad in ["a\nb", "a\0b", "ä", "a\tb"] {
            assert_eq!(CommandLine::new(512, "", &[], bad).unwrap_err(), CommandLineError::Characters);
        }
        let room = CAPACITY - 1 - CommandLine::new(512, "", &[], "").unwrap().len() - 1;
        assert_eq!(CommandLine::new(512, "", &[], &"x".repeat(room)).unwrap().len(), CAPACITY - 1);
        assert!(CommandLine::new(512, "", &[], &"x".repeat(room + 1)).is_err());
    }

    #[test]
    fn a_full_machine_leaves_room_for_parameters() {
        let devices: Vec<_> = (0..19).map(|i| (0xd000_0000 + 4096 * u64::from(i), 5 + i)).collect();
        assert!(CommandLine::new(512, "", &devices, "").unwrap().len() < 1200);
    }
}
