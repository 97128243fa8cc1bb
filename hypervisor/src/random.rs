//! The host kernel's random bytes.

use std::io;

use nix::libc;

/// Fills `bytes`.
///
/// # Errors
/// When the kernel refuses, which one that is up never does.
pub fn fill(bytes: &mut [u8]) -> io::Result<()> {
    let mut filled = 0;
    while let Some(rest) = bytes.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        // SAFETY: the kernel writes at most `rest.len()` bytes to `rest`.
        let got = unsafe { libc::getrandom(rest.as_mut_ptr().cast(), rest.len(), 0) };
        filled += usize::try_from(got).map_err(|_| io::Error::last_os_error())?;
    }
    Ok(())
}
