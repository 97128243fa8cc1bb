//! An initramfs that holds one program.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::path::Path;

/// A cpio archive (newc) with `program` as `/init` and the places where it mounts.
pub fn initramfs(program: &Path) -> Vec<u8> {
    let program = std::fs::read(program).unwrap();
    let mut archive = Vec::new();
    for directory in ["dev", "proc", "sys"] {
        entry(&mut archive, directory, 0o040_755, (0, 0), &[]);
    }
    entry(&mut archive, "dev/console", 0o020_600, (5, 1), &[]);
    entry(&mut archive, "init", 0o100_755, (0, 0), &program);
    entry(&mut archive, "TRAILER!!!", 0, (0, 0), &[]);
    archive
}

fn entry(archive: &mut Vec<u8>, name: &str, mode: u32, device: (u32, u32), data: &[u8]) {
    let inode = archive.len();
    let fields = [
        inode,
        mode as usize,
        0,
        0,
        1,
        0,
        data.len(),
        0,
        0,
        device.0 as usize,
        device.1 as usize,
        name.len() + 1,
        0,
    ];
    archive.extend_from_slice(b"070701");
    for field in fields {
        archive.extend_from_slice(format!("{field:08x}").as_bytes());
    }
    archive.extend_from_slice(name.as_bytes());
    archive.push(0);
    archive.resize(archive.len().next_multiple_of(4), 0);
    archive.extend_from_slice(data);
    archive.resize(archive.len().next_multiple_of(4), 0);
}
