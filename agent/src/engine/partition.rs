//! Parts of a disk, made known to the kernel.
//!
//! The layers of an image lie one after the other on one read-only disk, without a table: the shim says where each
//! begins, and the kernel makes a device of it. Whatever the kernel may have taken for a table in an image's own first
//! sector is removed first, with what an earlier container has left.

use super::error::{Context, Error, Result};
use super::wire::Part;
use crate::sys::check;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

/// The number of a device's first part.
pub const FIRST_PART: u32 = 1;

/// The kernel names no more.
const LAST_PART: u32 = 255;
const SECTOR: u64 = 512;

const BLKPG: libc::Ioctl = 0x1269;
const ADD: libc::c_int = 1;
const DELETE: libc::c_int = 2;

/// `struct blkpg_partition` of linux/blkpg.h.
#[repr(C)]
struct Partition {
    start: libc::c_longlong,
    length: libc::c_longlong,
    number: libc::c_int,
    device_name: [u8; 64],
    volume_name: [u8; 64],
}

/// `struct blkpg_ioctl_arg` of linux/blkpg.h.
#[repr(C)]
struct Request {
    operation: libc::c_int,
    flags: libc::c_int,
    length: libc::c_int,
    data: *mut Partition,
}

/// A disk without parts, or with those that were added.
pub struct Device {
    path: PathBuf,
    file: File,
}

/// Opens a disk and removes what parts it has.
pub fn clear(path: &Path) -> Result<Device> {
    let doing = || format!("clear {}", path.display());
    let device = Device { path: path.to_owned(), file: File::open(path).doing(doing)? };
    let name = path.file_name().unwrap_or_default();
    for number in parts(&Path::new("/sys/block").join(name)).doing(doing)? {
        device.change(DELETE, number, 0, 0).doing(doing)?;
    }
    Ok(device)
}

impl Device {
    /// The whole disk.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Adds a part and says which device it is.
    pub fn add(&self, number: u32, part: Part) -> Result<PathBuf> {
        let field = || format!("rootfs: part {number} of {}", self.path.display());
        if !(FIRST_PART..=LAST_PART).contains(&number) {
            return Err(Error::invalid(field(), format!("is beyond the {LAST_PART} that a disk can have")));
        }
        let bytes = |sectors: u64| sectors.checked_mul(SECTOR).and_then(|bytes| i64::try_from(bytes).ok());
        let (Some(start), Some(length)) = (bytes(part.first_sector), bytes(part.sectors)) else {
            return Err(Error::invalid(field(), "is larger than any disk"));
        };
        self.change(ADD, number, start, length)
            .doing(|| format!("make part {number} of {}", self.path.display()))?;
        let mut name = OsString::from(&self.path);
        name.push(number.to_string());
        Ok(name.into())
    }

    fn change(&self, operation: libc::c_int, number: u32, start: i64, length: i64) -> io::Result<()> {
        let number = number.try_into().map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
        let mut partition = Partition { start, length, number, device_name: [0; 64], volume_name: [0; 64] };
        let length = size_of::<Partition>().try_into().unwrap_or(libc::c_int::MAX);
        let request = Request { operation, flags: 0, length, data: &raw mut partition };
        // SAFETY: the request and the partition it points to are laid out as the kernel has them, and outlive the call.
        let result = unsafe { libc::ioctl(self.file.as_raw_fd(), BLKPG, &raw const request) };
        check(result.into()).map(drop)
    }
}

/// The numbers of a disk's parts.
fn parts(device: &Path) -> io::Result<Vec<u32>> {
    let mut numbers = Vec::new();
    for entry in fs::read_dir(device)? {
        let Ok(text) = fs::read_to_string(entry?.path().join("partition")) else { continue };
        numbers.extend(text.trim().parse::<u32>());
    }
    Ok(numbers)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_told_from_the_rest() {
        let device = tempfile::tempdir().unwrap();
        for name in ["vda1", "vda17", "queue"] {
            fs::create_dir(device.path().join(name)).unwrap();
        }
        fs::write(device.path().join("vda1/partition"), "1\n").unwrap();
        fs::write(device.path().join("vda17/partition"), "17\n").unwrap();
        fs::write(device.path().join("size"), "8\n").unwrap();
        let mut numbers = parts(device.path()).unwrap();
        numbers.sort_unstable();
        assert_eq!(numbers, [1, 17]);
    }

    #[test]
    fn numbers_and_sizes_have_bounds() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let device = Device { path: file.path().to_owned(), file: file.reopen().unwrap() };
        let part = |first_sector, sectors| Part { first_sector, sectors };
        for (number, part) in
            [(0, part(0, 1)), (256, part(0, 1)), (1, part(u64::MAX, 1)), (1, part(1, u64::MAX / 512))]
        {
            assert!(matches!(device.add(number, part), Err(Error::Invalid { .. })), "{number}");
        }
    }
}
