//! Capabilities, which count in the process's own user namespace only.

use nix::errno::Errno;
use nix::libc;

use crate::devices::virtio::fs::needs;

/// A set of capabilities, a bit each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Set(u64);

impl Set {
    /// No capability.
    pub const NONE: Self = Self(0);
}

/// Those over the files of the shared directory.
pub const FILES: Set = {
    let mut bits = 0;
    let mut index = 0;
    while index < needs::CAPABILITIES.len() {
        bits |= 1 << needs::CAPABILITIES[index].number();
        index += 1;
    }
    Set(bits)
};

/// Gives up all capabilities of the calling thread but `set`, and all that a program it executes would get.
pub fn limit_to(set: Set) -> Result<(), Errno> {
    /// `_LINUX_CAPABILITY_VERSION_3`: two words for each set.
    const VERSION: u32 = 0x2008_0522;

    #[repr(C)]
    struct Header {
        version: u32,
        process: libc::c_int,
    }
    #[repr(C)]
    #[derive(Clone, Copy)]
    struct Words {
        effective: u32,
        permitted: u32,
        inheritable: u32,
    }
    let words = |bits| Words { effective: bits, permitted: bits, inheritable: 0 };
    let header = Header { version: VERSION, process: 0 };
    let data = [words(crate::bits::low(set.0)), words(crate::bits::high(set.0))];
    // SAFETY: the structures have the layout of this version and outlive the call.
    Errno::result(unsafe { libc::syscall(libc::SYS_capset, &raw const header, data.as_ptr()) }).map(drop)
}
