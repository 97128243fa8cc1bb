//! The kernel's ELF image.
//!
//! Only what a kernel needs is read: the file header and the loadable segments.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;

use vm_memory::{Bytes, GuestAddress};

use super::{BootError, HIGH_MEMORY, PAGE, map_file, page_floor};
use crate::memory::{GuestRam, HUGE_PAGE};

const FILE_HEADER: usize = 64;
const SEGMENT_HEADER: usize = 56;

/// Segments of the largest image; Linux has five.
const MAX_SEGMENTS: u16 = 32;

/// Where "HdrS" stands in a bzImage (x86 boot protocol, offset 0x202).
const SETUP_MAGIC: usize = 0x202;

/// What is known of a kernel image.
#[derive(Debug)]
pub struct Image {
    entry: GuestAddress,
    segments: Vec<Segment>,
    end: u64,
}

#[derive(Debug, Clone, Copy)]
struct Segment {
    /// In the file.
    offset: u64,
    /// In guest memory.
    address: u64,
    file_size: u64,
    memory_size: u64,
    writable: bool,
    executable: bool,
}

impl Image {
    /// Reads and checks the headers.
    ///
    /// # Errors
    /// When the file is not a kernel.
    pub fn read(file: &File) -> Result<Self, BootError> {
        let mut start = vec![0; SETUP_MAGIC + 4];
        file.read_exact_at(&mut start, 0).map_err(unexpected_end(BootError::NotAKernel))?;
        let header = Fields(&start[..FILE_HEADER]);
        let is_x86_64_elf = header.0.starts_with(b"\x7fELF\x02\x01") && header.u16(18) == 62;
        if !is_x86_64_elf {
            let compressed = start.ends_with(b"HdrS");
            return Err(if compressed { BootError::Compressed } else { BootError::NotAKernel });
        }
        let count = header.u16(56);
        if usize::from(header.u16(54)) != SEGMENT_HEADER || count > MAX_SEGMENTS {
            return Err(BootError::Damaged("its table of segments has an unknown form"));
        }
        let mut table = vec![0; usize::from(count) * SEGMENT_HEADER];
        let damaged = || BootError::Damaged("its table of segments is cut off");
        file.read_exact_at(&mut table, header.u64(32)).map_err(unexpected_end(damaged()))?;
        let size = file.metadata().map_err(BootError::Kernel)?.len();
        let segments = segments(&table, size)?;
        let entry = header.u64(24);
        let end = segments.iter().map(|segment| segment.address + segment.memory_size).max().unwrap_or(0);
        if !segments.iter().any(|segment| segment.contains(entry)) {
            return Err(BootError::Damaged("its entry point lies in no segment"));
        }
        Ok(Self { entry: GuestAddress(entry), segments, end })
    }

    /// Where it is entered.
    pub fn entry(&self) -> GuestAddress {
        self.entry
    }

    /// The first address after it, with its zeroed data.
    pub fn end(&self) -> u64 {
        self.end
    }

    /// Puts the segments into RAM, which is large enough and zero.
    ///
    /// # Errors
    /// When the file cannot be read or mapped.
    pub fn load(&self, ram: &GuestRam, file: &File) -> Result<(), BootError> {
        self.segments.iter().try_for_each(|segment| segment.load(ram, file))
    }
}

impl Segment {
    fn contains(&self, address: u64) -> bool {
        address.checked_sub(self.address).is_some_and(|offset| offset < self.file_size)
    }

    /// Maps whole pages, where address and offset allow for it, and copies the rest.
    ///
    /// Of what it writes to, the kernel would make copies anyway, a page and two or three exits at a time. That is what is
    /// writable, and nearly all of its code, which it patches for the CPU that it finds itself on.
    fn load(&self, ram: &GuestRam, file: &File) -> Result<(), BootError> {
        let end = self.address + self.file_size;
        if self.writable {
            let first = self.address - self.address % HUGE_PAGE;
            ram.prefer_huge_pages(first, (self.address + self.memory_size).next_multiple_of(HUGE_PAGE));
        }
        if self.writable || self.address % PAGE != self.offset % PAGE {
            return self.copy(ram, file, self.address, end);
        }
        let code = if self.executable { self.end_of_code(file)? } else { self.address };
        ram.prefer_huge_pages(self.address, code);
        let first = code.next_multiple_of(PAGE).min(end);
        let last = page_floor(end).max(first);
        self.copy(ram, file, self.address, first)?;
        map_file(ram, file, self.offset + (first - self.address), first, last - first)?;
        self.copy(ram, file, last, end)
    }

    /// Where the huge pages end that are full of code. The linker fills up what is left of the last one with one byte.
    fn end_of_code(&self, file: &File) -> Result<u64, BootError> {
        let mut end = self.address;
        if !self.address.is_multiple_of(HUGE_PAGE) {
            return Ok(end);
        }
        let mut page = [0; 4096];
        while end + HUGE_PAGE <= self.address + self.file_size {
            let last = self.offset + (end - self.address) + HUGE_PAGE - PAGE;
            file.read_exact_at(&mut page, last).map_err(BootError::Kernel)?;
            if page.iter().all(|byte| *byte == page[0]) {
                break;
            }
            end += HUGE_PAGE;
        }
        Ok(end)
    }

    fn copy(&self, ram: &GuestRam, mut file: &File, from: u64, to: u64) -> Result<(), BootError> {
        let len = usize::try_from(to - from).map_err(|_| BootError::Damaged("a segment is too large"))?;
        file.seek(SeekFrom::Start(self.offset + (from - self.address))).map_err(BootError::Kernel)?;
        ram.read_exact_volatile_from(GuestAddress(from), &mut file, len).map_err(BootError::Memory)
    }
}

fn segments(table: &[u8], file_size: u64) -> Result<Vec<Segment>, BootError> {
    const LOADABLE: u32 = 1;
    let headers = table.chunks_exact(SEGMENT_HEADER).map(Fields);
    headers.filter(|header| header.u32(0) == LOADABLE).map(|header| segment(header, file_size)).collect()
}

fn segment(header: Fields<'_>, file_size: u64) -> Result<Segment, BootError> {
    const EXECUTABLE: u32 = 1;
    const WRITABLE: u32 = 2;
    let segment = Segment {
        offset: header.u64(8),
        address: header.u64(24),
        file_size: header.u64(32),
        memory_size: header.u64(40),
        writable: header.u32(4) & WRITABLE != 0,
        executable: header.u32(4) & EXECUTABLE != 0,
    };
    let in_file = segment.offset.checked_add(segment.file_size).is_some_and(|end| end <= file_size);
    if !in_file || segment.file_size > segment.memory_size {
        return Err(BootError::Damaged("a segment is longer than its file"));
    }
    // Addresses up to 2^40 leave every sum far from an overflow; whether RAM reaches that far is asked later.
    let end = segment.address.checked_add(segment.memory_size).filter(|&end| end < 1 << 40);
    if segment.address < HIGH_MEMORY || end.is_none() {
        return Err(BootError::Damaged("a segment does not belong into main memory"));
    }
    Ok(segment)
}

/// Little-endian fields at fixed offsets of a header that is long enough.
#[derive(Clone, Copy)]
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn bytes<const N: usize>(self, offset: usize) -> [u8; N] {
        let mut bytes = [0; N];
        bytes.copy_from_slice(&self.0[offset..offset + N]);
        bytes
    }

    fn u16(self, offset: usize) -> u16 {
        u16::from_le_bytes(self.bytes(offset))
    }

    fn u32(self, offset: usize) -> u32 {
        u32::from_le_bytes(self.bytes(offset))
    }

    fn u64(self, offset: usize) -> u64 {
        u64::from_le_bytes(self.bytes(offset))
    }
}

fn unexpected_end(at_end: BootError) -> impl FnOnce(io::Error) -> BootError {
    |error| match error.kind() {
        io::ErrorKind::UnexpectedEof => at_end,
        _ => BootError::Kernel(error),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use proptest::prelude::*;

    use super::*;

    /// An image with one segment of `data` at `address`, which stands at `offset` in the file.
    /// It is writable.
    fn elf(address: u64, offset: u64, data: &[u8], memory_size: u64) -> Vec<u8> {
        let mut file = vec![0; usize::try_from(offset).unwrap()];
        file[..6].copy_from_slice(b"\x7fELF\x02\x01");
        file[18] = 62;
        file[24..32].copy_from_slice(&address.to_le_bytes());
        file[32] = 64;
        file[54] = 56;
        file[56] = 1;
        file[64] = 1;
        file[68] = 6;
        for (at, value) in [(72, offset), (88, address), (96, data.len() as u64), (104, memory_size)] {
            file[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        file.extend_from_slice(data);
        file
    }

    fn file(bytes: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    fn read(bytes: &[u8]) -> Result<Image, BootError> {
        Image::read(&file(bytes))
    }

    fn data(len: usize) -> Vec<u8> {
        (0..251).cycle().take(len).collect()
    }

    #[test]
    fn segments_are_loaded_whole_whatever_their_alignment() {
        for (address, offset) in
            [(0x20_0000, 0x1000), (0x20_0010, 0x1010), (0x20_0ff0, 0x1100), (0x20_0f00, 0x1f00)]
        {
            for len in [1, 0x100, 0xf0, 0x1000, 0x2345, 0x3000] {
                let data = data(len);
                for flags in [4, 5, 6] {
                    let mut bytes = elf(address, offset, &data, 0x10000);
                    bytes[68] = flags;
                    let file = file(&bytes);
                    let ram = GuestRam::new(4 << 20).unwrap();
                    let image = Image::read(&file).unwrap();
                    assert_eq!(image.end(), address + 0x10000);
                    image.load(&ram, &file).unwrap();
                    let mut loaded = vec![0xff; len + 0x2000];
                    ram.read_slice(&mut loaded, GuestAddress(address)).unwrap();
                    assert_eq!(&loaded[..len], data, "{address:#x} {offset:#x} {len:#x}");
                    assert!(loaded[len..].iter().all(|&byte| byte == 0));
                }
            }
        }
    }

    #[test]
    fn code_is_loaded_whole_whether_it_fills_huge_pages_or_not() {
        let huge_page = usize::try_from(HUGE_PAGE).unwrap();
        for (code, pages) in [(2 * huge_page, 2), (2 * huge_page + 5, 2), (huge_page + huge_page / 2, 1)] {
            let mut content = data(code);
            content.resize(3 * huge_page + 0x1800, 0xcc);
            let mut bytes = elf(0x20_0000, 0x1000, &content, content.len() as u64);
            bytes[68] = 5;
            let file = file(&bytes);
            let ram = GuestRam::new(16 << 20).unwrap();
            let image = Image::read(&file).unwrap();
            assert_eq!(image.segments[0].end_of_code(&file).unwrap(), 0x20_0000 + pages * HUGE_PAGE);
            image.load(&ram, &file).unwrap();
            let mut loaded = vec![0; content.len()];
            ram.read_slice(&mut loaded, GuestAddress(0x20_0000)).unwrap();
            assert!(loaded == content);
        }
    }

    #[test]
    fn what_is_not_a_kernel_is_told_from_what_is_compressed() {
        assert!(matches!(read(b""), Err(BootError::NotAKernel)));
        assert!(matches!(read(&[0; 4096]), Err(BootError::NotAKernel)));
        let mut bz_image = vec![0; 4096];
        bz_image[0x202..0x206].copy_from_slice(b"HdrS");
        assert!(matches!(read(&bz_image), Err(BootError::Compressed)));
        let mut arm = elf(0x20_0000, 0x1000, &data(16), 16);
        arm[18] = 183;
        assert!(matches!(read(&arm), Err(BootError::NotAKernel)));
    }

    #[test]
    fn a_damaged_image_is_refused() {
        let good = || elf(0x20_0000, 0x1000, &data(16), 16);
        assert!(read(&good()).is_ok());
        assert!(matches!(read(&good()[..4100]), Err(BootError::Damaged(_))));
        for (at, value) in [
            (24, 0u64),
            (24, u64::MAX),
            (88, 0x1000),
            (88, u64::MAX),
            (96, 17),
            (104, u64::MAX),
            (32, 1 << 60),
        ] {
            let mut bad = good();
            bad[at..at + 8].copy_from_slice(&value.to_le_bytes());
            assert!(
                matches!(read(&bad), Err(BootError::Damaged(_) | BootError::Kernel(_))),
                "{at} {value:#x}"
            );
        }
    }

    proptest! {
        #[test]
        fn any_header_is_answered(changes in proptest::collection::vec((0usize..120, any::<u8>()), 0..12)) {
            let mut bytes = elf(0x20_0000, 0x1000, &data(64), 64);
            for (at, value) in changes {
                bytes[at] = value;
            }
            let _ = read(&bytes);
        }
    }
}
