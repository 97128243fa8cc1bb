//! Disks that a snapshotter's mounts name.

use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use containerd_shim_protos::api::Mount;

use super::StorageError;

/// Bytes of a sector.
const SECTOR: u64 = 512;

/// A disk for a kernel to mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskRequest {
    /// An image file or block device.
    pub source: PathBuf,
    /// "ext4" or "erofs".
    pub filesystem: &'static str,
    /// Options for the mount.
    pub options: Vec<String>,
    /// Not writable.
    pub read_only: bool,
}

/// An opened disk.
#[derive(Debug)]
pub struct Disk {
    /// The image or device.
    pub file: File,
    /// Its whole sectors.
    pub sectors: u64,
    /// What is on it.
    pub filesystem: &'static str,
    /// Options for the guest's mount.
    pub options: Vec<String>,
    /// Not writable.
    pub read_only: bool,
}

impl DiskRequest {
    /// Understands one mount; None where it is of another type.
    ///
    /// # Errors
    /// An option that is not supported is named.
    pub fn parse(mount: &Mount) -> Result<Option<Self>, StorageError> {
        let filesystem = match mount.type_.as_str() {
            "ext4" => "ext4",
            "erofs" => "erofs",
            _ => return Ok(None),
        };
        // A further device would be a path of the host.
        let unsupported = |option: &&String| {
            ["X-containerd.", "uidmap=", "gidmap=", "device="].iter().any(|prefix| option.starts_with(prefix))
        };
        if let Some(option) = mount.options.iter().find(unsupported) {
            return Err(StorageError::UnsupportedOption(option.clone()));
        }
        let host_only = |option: &&String| !matches!(option.as_str(), "loop" | "rw");
        Ok(Some(Self {
            source: PathBuf::from(&mount.source),
            filesystem,
            options: mount.options.iter().filter(host_only).cloned().collect(),
            read_only: filesystem == "erofs" || mount.options.iter().any(|option| option == "ro"),
        }))
    }

    /// Opens the disk.
    ///
    /// # Errors
    /// When it cannot be opened, or is neither a file nor a block device.
    pub fn open(self) -> Result<Disk, StorageError> {
        let Self { source, filesystem, mut options, read_only } = self;
        let mut file = open(&source, read_only)?;
        let bytes = file
            .seek(SeekFrom::End(0))
            .map_err(|error| StorageError::Source { path: source, source: error })?;
        if read_only && !options.iter().any(|option| option == "ro") {
            options.push("ro".to_owned());
        }
        Ok(Disk { file, sectors: bytes / SECTOR, filesystem, options, read_only })
    }
}

/// Opens a file or block device, which is what a mount of a disk names (CVE-2026-24054).
pub fn open(path: &Path, read_only: bool) -> Result<File, StorageError> {
    let failed = |source| StorageError::Source { path: path.to_owned(), source };
    // Opening a fifo would wait for its other end.
    let file = OpenOptions::new()
        .read(true)
        .write(!read_only)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .map_err(failed)?;
    let kind = file.metadata().map_err(failed)?.file_type();
    if kind.is_file() || kind.is_block_device() {
        Ok(file)
    } else {
        Err(StorageError::NotADisk(path.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_a_file_or_a_block_device() {
        let directory = tempfile::tempdir().unwrap();
        let disk = |source: PathBuf| {
            DiskRequest { source, filesystem: "ext4", options: vec![], read_only: true }.open()
        };
        assert!(matches!(disk(directory.path().join("none")), Err(StorageError::Source { .. })));
        assert!(matches!(disk(directory.path().to_owned()), Err(StorageError::NotADisk(_))));
        assert!(matches!(disk("/dev/null".into()), Err(StorageError::NotADisk(_))));
        let image = directory.path().join("image");
        std::fs::write(&image, [0; 1030]).unwrap();
        let opened = disk(image).unwrap();
        assert_eq!((opened.sectors, opened.options), (2, vec!["ro".to_owned()]));
    }

    #[test]
    fn a_path_of_the_host_is_no_option_of_the_guest() {
        for option in ["device=/dev/sda", "X-containerd.dmverity=/x", "uidmap=0:1:2"] {
            let mount = Mount {
                type_: "erofs".to_owned(),
                options: vec!["ro".to_owned(), option.to_owned()],
                ..Mount::default()
            };
            assert!(
                matches!(DiskRequest::parse(&mount), Err(StorageError::UnsupportedOption(_))),
                "{option}"
            );
        }
    }
}
