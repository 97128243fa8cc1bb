//! The reader's end of a BPF ring buffer of 8-byte records.
//!
//! Its layout is the kernel's (`kernel/bpf/ringbuf.c`): a page with the reader's position, which is ours to write, a
//! page with the writer's, and the data, which is mapped twice in a row.

use super::{check, register};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

const PAGE: usize = 4096;
/// The length of a record is in its first word, under these two bits.
const BUSY: u32 = 1 << 31;
const DISCARDED: u32 = 1 << 30;
/// Before a record's data.
const HEADER: usize = 8;

/// A ring.
#[derive(Debug)]
pub struct Ring {
    fd: AsyncFd<OwnedFd>,
    /// One page.
    reader: Mapping,
    /// A page and the data.
    writer: Mapping,
    size: usize,
}

impl Ring {
    /// The ring of a map of `size` bytes of data.
    pub fn new(map: OwnedFd, size: u32) -> io::Result<Self> {
        let size = usize::try_from(size).map_err(io::Error::other)?;
        let reader = Mapping::new(&map, libc::PROT_READ | libc::PROT_WRITE, 0, PAGE)?;
        let writer = Mapping::new(&map, libc::PROT_READ, PAGE, PAGE + 2 * size)?;
        Ok(Self { fd: register(map, Interest::READABLE)?, reader, writer, size })
    }

    /// Waits for the next record.
    pub async fn next(&mut self) -> io::Result<u64> {
        loop {
            let mut guard = self.fd.readable().await?;
            if let Some(record) = take(&self.reader, &self.writer, self.size) {
                return Ok(record);
            }
            guard.clear_ready();
            // One that came between the last look and the line before has its own notification; this is for those of
            // which the kernel thought that they were seen.
            if let Some(record) = take(&self.reader, &self.writer, self.size) {
                return Ok(record);
            }
        }
    }
}

/// The next record that is complete.
fn take(reader: &Mapping, writer: &Mapping, size: usize) -> Option<u64> {
    let consumed = reader.double(0)?;
    loop {
        let position = consumed.load(Ordering::Acquire);
        if position >= writer.double(0)?.load(Ordering::Acquire) {
            return None;
        }
        let at = PAGE + usize::try_from(position).ok()? % size;
        let header = writer.word(at)?.load(Ordering::Acquire);
        if header & BUSY != 0 {
            return None;
        }
        let record = writer.double(at + HEADER)?.load(Ordering::Relaxed);
        let length = u64::from(header & !DISCARDED) + HEADER as u64;
        consumed.store(position + length.next_multiple_of(8), Ordering::Release);
        if header & DISCARDED == 0 {
            return Some(record);
        }
    }
}

/// Memory that is shared with the kernel, until this is dropped.
#[derive(Debug)]
struct Mapping {
    address: usize,
    length: usize,
}

impl Mapping {
    fn new(map: &OwnedFd, protection: libc::c_int, offset: usize, length: usize) -> io::Result<Self> {
        let offset = libc::off_t::try_from(offset).map_err(io::Error::other)?;
        // SAFETY: a new mapping at a place of the kernel's choice touches no other memory.
        let address = unsafe {
            libc::mmap(std::ptr::null_mut(), length, protection, libc::MAP_SHARED, map.as_raw_fd(), offset)
        };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { address: address.expose_provenance(), length })
    }

    fn double(&self, at: usize) -> Option<&AtomicU64> {
        let fits = at.is_multiple_of(8) && at.checked_add(8)? <= self.length;
        // SAFETY: within the mapping, which lives as long as `self`, aligned, and shared with a kernel that writes
        // whole words.
        fits.then(|| unsafe { &*std::ptr::with_exposed_provenance::<AtomicU64>(self.address + at) })
    }

    fn word(&self, at: usize) -> Option<&AtomicU32> {
        let fits = at.is_multiple_of(4) && at.checked_add(4)? <= self.length;
        // SAFETY: as above.
        fits.then(|| unsafe { &*std::ptr::with_exposed_provenance::<AtomicU32>(self.address + at) })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: made by `new`, and nothing that refers to it outlives this.
        let _ = check(
            unsafe { libc::munmap(std::ptr::with_exposed_provenance_mut(self.address), self.length) }.into(),
        );
    }
}
