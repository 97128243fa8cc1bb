//! Capability sets of a process.

use crate::engine::error::{Context, Result};
use crate::sys::check;
use crate::sys::process::prctl;
use oci_spec::runtime::{Capabilities, Capability, LinuxCapabilities};
use std::io;

/// The kernel's numbers are an append-only list; its index is the number.
const NUMBERED: &[Capability] = &[
    Capability::Chown,
    Capability::DacOverride,
    Capability::DacReadSearch,
    Capability::Fowner,
    Capability::Fsetid,
    Capability::Kill,
    Capability::Setgid,
    Capability::Setuid,
    Capability::Setpcap,
    Capability::LinuxImmutable,
    Capability::NetBindService,
    Capability::NetBroadcast,
    Capability::NetAdmin,
    Capability::NetRaw,
    Capability::IpcLock,
    Capability::IpcOwner,
    Capability::SysModule,
    Capability::SysRawio,
    Capability::SysChroot,
    Capability::SysPtrace,
    Capability::SysPacct,
    Capability::SysAdmin,
    Capability::SysBoot,
    Capability::SysNice,
    Capability::SysResource,
    Capability::SysTime,
    Capability::SysTtyConfig,
    Capability::Mknod,
    Capability::Lease,
    Capability::AuditWrite,
    Capability::AuditControl,
    Capability::Setfcap,
    Capability::MacOverride,
    Capability::MacAdmin,
    Capability::Syslog,
    Capability::WakeAlarm,
    Capability::BlockSuspend,
    Capability::AuditRead,
    Capability::Perfmon,
    Capability::Bpf,
    Capability::CheckpointRestore,
];

/// The five sets as bit masks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sets {
    bounding: u64,
    effective: u64,
    permitted: u64,
    inheritable: u64,
    ambient: u64,
}

impl Sets {
    /// The sets of a spec; none where it has no capabilities.
    pub fn of(capabilities: Option<&LinuxCapabilities>) -> Self {
        let Some(sets) = capabilities else { return Self::default() };
        Self {
            bounding: mask(sets.bounding().as_ref()),
            effective: mask(sets.effective().as_ref()),
            permitted: mask(sets.permitted().as_ref()),
            inheritable: mask(sets.inheritable().as_ref()),
            ambient: mask(sets.ambient().as_ref()),
        }
    }

    /// Drops what is outside of the bounding set. Needs CAP_SETPCAP, so it comes before the user changes.
    pub fn bound(&self) -> Result<()> {
        for number in 0..64u64 {
            if self.bounding & (1 << number) != 0 {
                continue;
            }
            match prctl(libc::PR_CAPBSET_DROP, number) {
                // The kernel knows no capability from here on.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => break,
                other => other.doing(|| "drop capabilities from the bounding set").map(drop)?,
            }
        }
        Ok(())
    }

    /// Takes on the other sets.
    pub fn apply(&self) -> Result<()> {
        set(self.effective, self.permitted, self.inheritable).doing(|| "set the process's capabilities")?;
        let ambient = |operation: libc::c_int, number: libc::c_ulong| {
            // SAFETY: plain integers.
            check(unsafe { libc::prctl(libc::PR_CAP_AMBIENT, operation, number, 0, 0) }.into())
        };
        ambient(libc::PR_CAP_AMBIENT_CLEAR_ALL, 0).doing(|| "clear ambient capabilities")?;
        for number in (0..64u64).filter(|number| self.ambient & (1 << number) != 0) {
            ambient(libc::PR_CAP_AMBIENT_RAISE, number).doing(|| "raise ambient capabilities")?;
        }
        Ok(())
    }
}

fn mask(set: Option<&Capabilities>) -> u64 {
    let set = set.into_iter().flatten();
    set.filter_map(|wanted| NUMBERED.iter().position(|known| known == wanted))
        .fold(0, |mask, number| mask | 1 << number)
}

#[repr(C)]
struct Header {
    version: u32,
    pid: i32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Data {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

fn set(effective: u64, permitted: u64, inheritable: u64) -> io::Result<()> {
    const VERSION_3: u32 = 0x2008_0522;
    let half = |mask: u64, shift: u32| u32::try_from((mask >> shift) & u64::from(u32::MAX)).unwrap_or(0);
    let data = [0, 32].map(|shift| Data {
        effective: half(effective, shift),
        permitted: half(permitted, shift),
        inheritable: half(inheritable, shift),
    });
    let header = Header { version: VERSION_3, pid: 0 };
    // SAFETY: both structures have the layout of version 3, which has two data elements, and outlive the call.
    check(unsafe { libc::syscall(libc::SYS_capset, &raw const header, data.as_ptr()) }).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_the_kernels() {
        let number = |wanted| NUMBERED.iter().position(|known| *known == wanted).unwrap();
        assert_eq!(number(Capability::SysAdmin), 21);
        assert_eq!(number(Capability::Mknod), 27);
        assert_eq!(number(Capability::CheckpointRestore), 40);
    }

    #[test]
    fn no_capabilities_is_none_at_all() {
        assert_eq!(Sets::of(None), Sets::default());
    }
}
