//! File system images made for tests.

use std::fs::File;
use std::path::Path;
use std::process::Command;

use anyhow::{Result, ensure};

/// Makes an empty ext4 file system of `size` bytes in a sparse file.
///
/// # Errors
/// When the file can't be made or `mkfs.ext4` fails.
pub fn make_ext4(path: &Path, size: u64) -> Result<()> {
    File::create(path)?.set_len(size)?;
    let output = Command::new("mkfs.ext4")
        .args(["-q", "-F", "-O", "^has_journal", "-E", "lazy_itable_init=1,nodiscard"])
        .arg(path)
        .output()?;
    ensure!(output.status.success(), "mkfs.ext4: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}
