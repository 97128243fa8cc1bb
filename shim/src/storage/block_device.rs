//! Block devices that a spec gives a container.
//!
//! The spec has a device's number and the path in the container. The host's own name for it is the kernel's, and what
//! is found there has to have that number (CVE-2026-24054).

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

use super::{StorageError, disk};
use crate::oci::BlockDevice;

/// A block device of the host, opened for the VMM.
#[derive(Debug)]
pub struct OpenedDevice {
    /// What the container gets.
    pub device: BlockDevice,
    /// The device itself.
    pub file: File,
}

impl OpenedDevice {
    /// Opens each of the devices.
    ///
    /// # Errors
    /// When the host has no device of a number, or it cannot be opened.
    pub fn open_all(devices: Vec<BlockDevice>) -> Result<Vec<Self>, StorageError> {
        devices.into_iter().map(|device| Self::open(device, Path::new("/sys/dev/block"))).collect()
    }

    fn open(device: BlockDevice, numbers: &Path) -> Result<Self, StorageError> {
        let failed = |source| StorageError::NoDevice {
            path: device.path.clone(),
            major: device.major,
            minor: device.minor,
            source,
        };
        let path = node(&numbers.join(format!("{}:{}", device.major, device.minor))).map_err(failed)?;
        let file = disk::open(&path, device.is_read_only())?;
        let found = file.metadata().map_err(failed)?.rdev();
        if found != nix::sys::stat::makedev(device.major.into(), device.minor.into()) {
            return Err(failed(io::Error::other(format!("{} is another device", path.display()))));
        }
        Ok(Self { device, file })
    }
}

/// Where the kernel says that the node of a device is.
fn node(of_kernel: &Path) -> io::Result<PathBuf> {
    let text = std::fs::read_to_string(of_kernel.join("uevent"))?;
    let name = text.lines().find_map(|line| line.strip_prefix("DEVNAME="));
    let name = Path::new(name.ok_or(io::ErrorKind::InvalidData)?);
    if name.components().any(|part| !matches!(part, Component::Normal(_))) {
        return Err(io::ErrorKind::InvalidData.into());
    }
    Ok(Path::new("/dev").join(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(uevent: &str) -> io::Result<PathBuf> {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("uevent"), uevent).unwrap();
        node(directory.path())
    }

    #[test]
    fn the_kernel_names_the_node() {
        assert_eq!(named("MAJOR=8\nDEVNAME=sda\nDEVTYPE=disk\n").unwrap(), Path::new("/dev/sda"));
        assert_eq!(named("DEVNAME=mapper/x\n").unwrap(), Path::new("/dev/mapper/x"));
        for wrong in ["", "DEVNAME=../etc/passwd\n", "DEVNAME=/etc/passwd\n"] {
            assert!(named(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn what_is_another_device_is_refused() {
        let numbers = tempfile::tempdir().unwrap();
        let directory = numbers.path().join("250:9");
        let device = BlockDevice {
            path: "/dev/xvda".to_owned(),
            major: 250,
            minor: 9,
            access: "r".to_owned(),
            mode: 0o600,
            uid: 0,
            gid: 0,
        };
        let open = || OpenedDevice::open(device.clone(), numbers.path()).unwrap_err();
        assert!(open().to_string().contains("no block device 250:9 for /dev/xvda"), "{}", open());
        std::fs::create_dir(&directory).unwrap();
        std::fs::write(directory.join("uevent"), "DEVNAME=null\n").unwrap();
        assert!(matches!(open(), StorageError::NotADisk(_)));
    }
}
