//! What backs a disk: a regular file or a block device, always raw, or several of them one after the other.
//!
//! No format is ever guessed from content, since the guest writes the content. A disk of several pieces is read-only:
//! it holds the layers of an image, more of them than there are slots. Where a piece ends means nothing to a request,
//! which may reach over it.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, FcntlArg, OFlag, fallocate, fcntl};
use nix::libc;
use vmshim_protocol::control::MAX_DISK_PIECES;

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
    #[error("the disk is empty: each piece of it needs at least 512 bytes")]
    Empty,
    /// No piece, or too many.
    #[error("a disk has from 1 to {MAX_DISK_PIECES} pieces, not {0}")]
    Pieces(usize),
    /// Several pieces, attached for writing.
    #[error("a disk of several pieces can only be read")]
    WritablePieces,
    /// More sectors than can be counted in bytes.
    #[error("the disk is too large")]
    TooLarge,
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
    /// In order, each beginning where the one before ends.
    pieces: Vec<Piece>,
    sectors: u64,
    read_only: bool,
}

/// One file of a disk, with the bytes of the disk that it holds.
#[derive(Debug)]
struct Piece {
    file: File,
    start: i64,
    end: i64,
}

nix::ioctl_read!(block_device_size, 0x12, 114, u64);

impl Disk {
    /// Takes over the descriptors. Sizes are read once; a tail shorter than a sector is out of reach.
    ///
    /// # Errors
    /// See [`DiskError`].
    pub fn new(fds: Vec<OwnedFd>, read_only: bool) -> Result<Self, DiskError> {
        if fds.is_empty() || fds.len() > MAX_DISK_PIECES {
            return Err(DiskError::Pieces(fds.len()));
        }
        if fds.len() > 1 && !read_only {
            return Err(DiskError::WritablePieces);
        }
        let mut pieces = Vec::with_capacity(fds.len());
        let mut end = 0;
        for fd in fds {
            let piece = Piece::new(fd, end, read_only)?;
            end = piece.end;
            pieces.push(piece);
        }
        Ok(Self { pieces, sectors: end.cast_unsigned() / SECTOR, read_only })
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
        while !buffers.is_empty() {
            let piece = self.piece(offset)?;
            let rest = usize::try_from(piece.end - offset).unwrap_or(usize::MAX);
            let Some((vectors, count)) = buffers.front(rest) else { break };
            // SAFETY: `vectors` are `count` ranges of guest RAM, which stays mapped as long as `buffers` lives, and in
            // which no Rust object lives: the kernel may read and write them at any time, as the guest does.
            let moved = unsafe { call(piece.file.as_raw_fd(), vectors, count, offset - piece.start) };
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

    /// The piece that holds the byte at `offset`.
    fn piece(&self, offset: i64) -> Result<&Piece, Errno> {
        let index = self.pieces.partition_point(|piece| piece.end <= offset);
        self.pieces.get(index).ok_or(Errno::EINVAL)
    }

    /// Everything written before survives a crash of the host.
    ///
    /// # Errors
    /// Whatever the file says.
    pub fn flush(&self) -> io::Result<()> {
        if self.read_only {
            return Ok(());
        }
        self.pieces.iter().try_for_each(|piece| piece.file.sync_data())
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
        // Of a disk that can be written there is one piece, so the extent lies within it.
        let piece = self.piece(extent.start)?;
        loop {
            match fallocate(&piece.file, flags, extent.start - piece.start, extent.len) {
                Err(Errno::EINTR) => {}
                done => return done,
            }
        }
    }
}

impl Piece {
    fn new(fd: OwnedFd, start: i64, read_only: bool) -> Result<Self, DiskError> {
        let file = File::from(fd);
        let sectors = size(&file)? / SECTOR;
        if sectors == 0 {
            return Err(DiskError::Empty);
        }
        let flags = fcntl(&file, FcntlArg::F_GETFL).map_err(DiskError::Os)?;
        if !read_only && OFlag::from_bits_truncate(flags) & OFlag::O_ACCMODE != OFlag::O_RDWR {
            return Err(DiskError::NotWritable);
        }
        let bytes = i64::try_from(sectors * SECTOR).map_err(|_| DiskError::TooLarge)?;
        let end = start.checked_add(bytes).ok_or(DiskError::TooLarge)?;
        Ok(Self { file, start, end })
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
    use proptest::prelude::*;
    use vm_memory::{Bytes, GuestAddress, Permissions};

    use super::*;

    fn disk(bytes: u64, read_only: bool) -> Result<Disk, DiskError> {
        let file = tempfile::tempfile().unwrap();
        file.set_len(bytes).unwrap();
        Disk::new(vec![file.into()], read_only)
    }

    #[test]
    fn a_tail_shorter_than_a_sector_is_out_of_reach() {
        assert_eq!(disk(2 * SECTOR + 511, false).unwrap().sectors(), 2);
        assert!(matches!(disk(511, false), Err(DiskError::Empty)));
    }

    #[test]
    fn only_files_and_block_devices_are_disks() {
        let (reader, _writer) = io::pipe().unwrap();
        assert!(matches!(Disk::new(vec![reader.into()], true), Err(DiskError::NotADisk)));
        let directory = File::open("/").unwrap();
        assert!(matches!(Disk::new(vec![directory.into()], true), Err(DiskError::NotADisk)));
        let character = File::open("/dev/null").unwrap();
        assert!(matches!(Disk::new(vec![character.into()], true), Err(DiskError::NotADisk)));
    }

    #[test]
    fn a_writable_disk_needs_a_writable_descriptor() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(SECTOR).unwrap();
        let open = || OwnedFd::from(File::open(file.path()).unwrap());
        assert!(matches!(Disk::new(vec![open()], false), Err(DiskError::NotWritable)));
        assert!(Disk::new(vec![open()], true).unwrap().is_read_only());
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

    fn pieces(lengths: &[u64]) -> Vec<OwnedFd> {
        let piece = |(number, length): (u8, &u64)| {
            let mut file = tempfile::tempfile().unwrap();
            let bytes = vec![number; usize::try_from(*length).unwrap()];
            io::Write::write_all(&mut file, &bytes).unwrap();
            file.into()
        };
        (1..).zip(lengths).map(piece).collect()
    }

    #[test]
    fn several_pieces_make_one_disk_that_is_only_read() {
        assert_eq!(Disk::new(pieces(&[512, 1024 + 511, 512]), true).unwrap().sectors(), 4);
        assert!(matches!(Disk::new(pieces(&[512, 512]), false), Err(DiskError::WritablePieces)));
        assert!(matches!(Disk::new(pieces(&[512, 511]), true), Err(DiskError::Empty)));
        assert!(matches!(Disk::new(Vec::new(), true), Err(DiskError::Pieces(0))));
        let many = vec![SECTOR; MAX_DISK_PIECES + 1];
        assert!(matches!(Disk::new(pieces(&many), true), Err(DiskError::Pieces(_))));
    }

    proptest! {
        #[test]
        fn a_request_over_the_end_of_a_piece_reads_both(
            lengths in proptest::collection::vec(1..5_u64, 1..6),
            from in 0..20_u64,
            cuts in proptest::collection::vec(1..3000_u32, 1..6),
        ) {
            let bytes: Vec<u64> = lengths.iter().map(|sectors| sectors * SECTOR + 7).collect();
            let disk = Disk::new(pieces(&bytes), true).unwrap();
            let expected: Vec<u8> = (1..)
                .zip(&lengths)
                .flat_map(|(number, sectors)| vec![number; usize::try_from(sectors * SECTOR).unwrap()])
                .collect();
            let memory = crate::memory::GuestRam::new(1 << 20).unwrap();
            let mut buffers = Buffers::new(memory.clone());
            let (mut at, wanted) = (0, u64::from(cuts.iter().sum::<u32>()).next_multiple_of(SECTOR));
            let last = u32::try_from(wanted - u64::from(cuts.iter().sum::<u32>())).unwrap();
            for cut in cuts.iter().chain([&last]) {
                buffers.push(GuestAddress(at), *cut, Permissions::Write).unwrap();
                at += u64::from(*cut);
            }
            let start = usize::try_from(from * SECTOR).unwrap();
            match (disk.range(from, wanted), expected.get(start..start + usize::try_from(wanted).unwrap())) {
                (Some(extent), Some(expected)) => {
                    disk.read(extent, &mut buffers).unwrap();
                    let mut read = vec![0; expected.len()];
                    memory.read_slice(&mut read, GuestAddress(0)).unwrap();
                    prop_assert_eq!(read, expected);
                }
                (None, None) => {}
                (extent, _) => prop_assert!(false, "{:?}", extent),
            }
        }
    }
}
