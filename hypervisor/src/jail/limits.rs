//! Resource limits.

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use super::{JailError, Tried};
use crate::devices::virtio::fs::needs;

/// Descriptors without a shared directory: two for each of some thousand streams, and those of the machine.
const OPEN_FILES: u64 = 8192;

/// Sets them while the process may still raise them.
pub fn set(serves_files: bool) -> Result<(), JailError> {
    // A core would hold the guest's memory.
    setrlimit(Resource::RLIMIT_CORE, 0, 0).tried("forbid core dumps")?;
    setrlimit(Resource::RLIMIT_MEMLOCK, 0, 0).tried("forbid locked memory")?;
    let wanted = if serves_files { needs::OPEN_FILES } else { OPEN_FILES };
    if setrlimit(Resource::RLIMIT_NOFILE, wanted, wanted).is_err() {
        // More than the host allows to anybody; then as many as it does.
        let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).tried("learn how many files it may open")?;
        let most = hard.min(wanted);
        setrlimit(Resource::RLIMIT_NOFILE, most, most).tried("limit its open files")?;
    }
    Ok(())
}
