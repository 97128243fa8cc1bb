//! What backs a disk: a regular file or a block device, always raw.
//!
//! No format is ever guessed from content, since the guest writes the content.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, FcntlArg, OFlag, fallocate, fcntl};
use nix::libc;

use super::buffers::Buffers;

/// Bytes of a sector (virtio 1.2, section 5.2).
pub const SECTOR: u64 = 512;

/// Why a descriptor cannot be a disk.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// Neither file nor block device.
    #[error("a disk must be a regular file or a block device")]
    NotADisk,
    /// Less than one sector.
    #[error("the disk is empty: it needs at least 512 bytes")]
    Empty,
    /// Opened for reading, attached for writing.
    #[error("the disk is to be writable, but it is open for reading only")]
    NotWritable,
    /// The kernel refused.
    #[error("the disk cannot be examined")]
    Os(#[source] Errno),
}

/// An attached disk.
#[derive(Debug)]
pub struct Disk {
    file: File,
    sectors: u64,
    read_only: bool,
}

nix::ioctl_read!(block_device_size, 0x12, 114, u64);

impl Disk {
    /// Takes over a descriptor. Its size is read once; a tail shorter than a sector is out of reach.
    ///
    /// # Errors
    /// See [`DiskError`].
    pub fn new(fd: OwnedFd, read_only: bool) -> Result<Self, DiskError> {
        let file = File::from(fd);
        let bytes = size(&file)?;
        if bytes < SECTOR {
            return Err(DiskError::Empty);
        }
        let flags = fcntl(&file, FcntlArg::F_GETFL).map_err(DiskError::Os)?;
        if !read_only && OFlag::from_bits_truncate(flags) & OFlag::O_ACCMODE != OFlag::O_RDWR {
            return Err(DiskError::NotWritable);
        }
        Ok(Self { file, sectors: bytes / SECTOR, read_only })
    }

    /// Size in sectors.
    pub fn sectors(&self) -> u64 {
        self.sectors
    }

    /// Whether writes are refused.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// The byte range of some sectors. None where it leaves the disk.
    pub fn range(&self, sector: u64, bytes: u64) -> Option<Extent> {
        let end = sector.checked_add(bytes / SECTOR)?;
        if !bytes.is_multiple_of(SECTOR) || end > self.sectors {
            return None;
        }
        let start = i64::try_from(sector.checked_mul(SECTOR)?).ok()?;
        Some(Extent { start, len: i64::try_from(bytes).ok()? })
    }

    /// Fills `buffers` from the start of `extent`, whose length is theirs.
    ///
    /// # Errors
    /// Whatever the file says; `UnexpectedEof` when it has shrunk.
    pub fn read(&self, extent: Extent, buffers: &mut Buffers) -> io::Result<()> {
        self.transfer(extent, buffers, libc::preadv, io::ErrorKind::UnexpectedEof)
    }

    /// Writes `buffers` to the start of `extent`, whose length is theirs.
    ///
    /// # Errors
    /// Whatever the file says.
    pub fn write(&self, extent: Extent, buffers: &mut Buffers) -> io::Result<()> {
        self.transfer(extent, buffers, libc::pwritev, io::ErrorKind::WriteZero)
    }

    fn transfer(
        &self,
        extent: Extent,
        buffers: &mut Buffers,
        call: unsafe extern "C" fn(
            libc::c_int,
            *const libc::iovec,
            libc::c_int,
            libc::off_t,
        ) -> libc::ssize_t,
        at_zero: io::ErrorKind,
    ) -> io::Result<()> {
        let mut offset = extent.start;
        while let Some((vectors, count)) = buffers.remaining() {
            // SAFETY: `vectors` are `count` ranges of guest RAM, which stays mapped as long as `buffers` lives, and in
            // which no Rust object lives: the kernel may read and write them at any time, as the guest does.
            let moved = unsafe { call(self.file.as_raw_fd(), vectors, count, offset) };
            match usize::try_from(moved) {
                Ok(0) => return Err(at_zero.into()),
                Ok(bytes) => {
                    buffers.advance(bytes);
                    offset = offset.checked_add(i64::try_from(bytes).unwrap_or(i64::MAX)).unwrap_or(i64::MAX);
                }
                Err(_) => match Errno::last() {
                    Errno::EINTR => {}
                    errno => return Err(errno.into()),
                },
            }
        }
        Ok(())
    }

    /// Everything written before survives a crash of the host.
    ///
    /// # Errors
    /// Whatever the file says.
    pub fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    /// The guest does not need these bytes any more.
    ///
    /// # Errors
    /// `EOPNOTSUPP` where the file system cannot give space back.
    pub fn discard(&self, extent: Extent) -> Result<(), Errno> {
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        self.allocate(flags, extent)
    }

    /// Makes these bytes read as zeroes.
    ///
    /// # Errors
    /// `EOPNOTSUPP` where the file system has no short way to do so.
    pub fn write_zeroes(&self, extent: Extent) -> Result<(), Errno> {
        self.allocate(FallocateFlags::FALLOC_FL_ZERO_RANGE | FallocateFlags::FALLOC_FL_KEEP_SIZE, extent)
    }

    fn allocate(&self, flags: FallocateFlags, extent: Extent) -> Result<(), Errno> {
        if extent.len == 0 {
            return Ok(());
        }
        loop {
            match fallocate(&self.file, flags, extent.start, extent.len) {
                Err(Errno::EINTR) => {}
                done => return done,
            }
        }
    }
}

/// A range of bytes that lies within a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    start: i64,
    len: i64,
}

fn size(file: &File) -> Result<u64, DiskError> {
    let metadata = file.metadata().map_err(|error| DiskError::Os(errno(&error)))?;
    if metadata.is_file() {
        return Ok(metadata.size());
    }
    if !metadata.file_type().is_block_device() {
        return Err(DiskError::NotADisk);
    }
    let mut bytes = 0;
    // SAFETY: the request writes one u64 to the address given, which is that of a u64.
    unsafe { block_device_size(file.as_raw_fd(), &raw mut bytes) }.map_err(DiskError::Os)?;
    Ok(bytes)
}

fn errno(error: &io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(bytes: u64, read_only: bool) -> Result<Disk, DiskError> {
        let file = tempfile::tempfile().unwrap();
        file.set_len(bytes).unwrap();
        Disk::new(file.into(), read_only)
    }

    #[test]
    fn a_tail_shorter_than_a_sector_is_out_of_reach() {
        assert_eq!(disk(2 * SECTOR + 511, false).unwrap().sectors(), 2);
        assert!(matches!(disk(511, false), Err(DiskError::Empty)));
    }

    #[test]
    fn only_files_and_block_devices_are_disks() {
        let (reader, _writer) = io::pipe().unwrap();
        assert!(matches!(Disk::new(reader.into(), true), Err(DiskError::NotADisk)));
        let directory = File::open("/").unwrap();
        assert!(matches!(Disk::new(directory.into(), true), Err(DiskError::NotADisk)));
        let character = File::open("/dev/null").unwrap();
        assert!(matches!(Disk::new(character.into(), true), Err(DiskError::NotADisk)));
    }

    #[test]
    fn a_writable_disk_needs_a_writable_descriptor() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(SECTOR).unwrap();
        let open = || OwnedFd::from(File::open(file.path()).unwrap());
        assert!(matches!(Disk::new(open(), false), Err(DiskError::NotWritable)));
        assert!(Disk::new(open(), true).unwrap().is_read_only());
    }

    #[test]
    fn ranges_end_with_the_disk() {
        let disk = disk(4 * SECTOR, false).unwrap();
        assert_eq!(disk.range(1, 3 * SECTOR), Some(Extent { start: 512, len: 1536 }));
        assert_eq!(disk.range(4, 0), Some(Extent { start: 2048, len: 0 }));
        for (sector, bytes) in [(1, 4 * SECTOR), (5, 0), (u64::MAX, SECTOR), (0, 100), (0, u64::MAX - 511)] {
            assert_eq!(disk.range(sector, bytes), None, "{sector} {bytes}");
        }
    }
}
