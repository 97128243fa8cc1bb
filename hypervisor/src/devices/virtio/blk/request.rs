//! One block request, from the guest's descriptors to its status byte (virtio 1.2, section 5.2.6).
//!
//! How the driver cuts a request into descriptors carries no meaning: what the device reads are the header and the
//! data to be written, what it writes are the data to be read and, last, the status byte.

use nix::errno::Errno;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress, Permissions};

use super::buffers::Buffers;
use super::disk::{Disk, SECTOR};
use super::{MAX_DISCARD_SECTORS, MAX_RANGES, MAX_SEGMENTS, SEGMENT_BYTES};
use crate::devices::virtio::service::Chain;
use crate::memory::GuestRam;

/// Header: type, reserved, first sector.
const HEADER: usize = 16;

/// Bytes of one range of a discard: first sector, number of sectors, flags.
const RANGE: usize = 16;

/// Bytes of the device's serial number.
pub const SERIAL_BYTES: usize = 20;

/// Descriptors of the longest chain: the data, a header and a status.
const MAX_DESCRIPTORS: usize = MAX_SEGMENTS as usize + 2;

mod kind {
    pub const IN: u32 = 0;
    pub const OUT: u32 = 1;
    pub const FLUSH: u32 = 4;
    pub const GET_ID: u32 = 8;
    pub const DISCARD: u32 = 11;
    pub const WRITE_ZEROES: u32 = 13;
}

/// A range of a write-zeroes request may be given back instead.
const UNMAP: u32 = 1;

/// What the guest reads in the status byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    Ok = 0,
    IoError = 1,
    Unsupported = 2,
}

/// What has become of a request.
#[derive(Debug, PartialEq, Eq)]
pub struct Answer {
    /// None where there is no byte for it: the chain is malformed beyond an answer.
    pub status: Option<Status>,
    /// Bytes read from the disk into the guest.
    pub read: u64,
    /// Bytes written by the guest to the disk.
    pub written: u64,
    /// Bytes written to the chain.
    pub used: u32,
}

impl Answer {
    const MALFORMED: Self = Self { status: None, read: 0, written: 0, used: 0 };
}

/// Answers a request.
pub fn answer(memory: &GuestRam, chain: Chain, disk: Option<&Disk>, serial: &[u8; SERIAL_BYTES]) -> Answer {
    let Some(request) = Request::parse(memory, chain) else { return Answer::MALFORMED };
    let status_at = request.status_at;
    let (result, capacity) = (request.run(disk, serial), request.input_bytes());
    let (status, read, written) = match result {
        Ok(Done { read, written }) => (Status::Ok, read, written),
        Err(status) => (status, 0, 0),
    };
    if memory.write_obj(status as u8, status_at).is_err() {
        return Answer::MALFORMED;
    }
    // The status byte comes after the data area, all of which a failed read may have touched.
    let used = u32::try_from(capacity).unwrap_or(u32::MAX).saturating_add(1);
    Answer { status: Some(status), read, written, used }
}

#[derive(Default)]
struct Done {
    read: u64,
    written: u64,
}

/// A request in pieces, all of them in RAM.
struct Request {
    kind: u32,
    sector: u64,
    /// Data from the guest, without the header.
    output: Vec<Piece>,
    /// Room for data to the guest, without the status byte.
    input: Vec<Piece>,
    status_at: GuestAddress,
    memory: GuestRam,
}

#[derive(Debug, Clone, Copy)]
struct Piece {
    address: GuestAddress,
    len: u32,
}

impl Request {
    /// None where there is no header or no status byte.
    fn parse(memory: &GuestRam, chain: Chain) -> Option<Self> {
        let (mut output, mut input) = split(chain)?;
        let mut header = [0; HEADER];
        take_front(memory, &mut output, &mut header)?;
        let last = input.last_mut()?;
        last.len = last.len.checked_sub(1)?;
        let status_at = GuestAddress(last.address.0.checked_add(u64::from(last.len))?);
        let [a, b, c, d, _, _, _, _, sector @ ..] = header;
        let (kind, sector) = (u32::from_le_bytes([a, b, c, d]), u64::from_le_bytes(sector));
        Some(Self { kind, sector, output, input, status_at, memory: memory.clone() })
    }

    fn input_bytes(&self) -> u64 {
        self.input.iter().map(|piece| u64::from(piece.len)).sum()
    }

    fn run(&self, disk: Option<&Disk>, serial: &[u8; SERIAL_BYTES]) -> Result<Done, Status> {
        if self.kind == kind::GET_ID {
            return self.write_serial(serial);
        }
        let disk = disk.ok_or(Status::IoError)?;
        match self.kind {
            kind::IN => self.read(disk),
            kind::OUT => self.write(disk),
            kind::FLUSH => disk.flush().map(|()| Done::default()).map_err(|_| Status::IoError),
            kind::DISCARD | kind::WRITE_ZEROES => self.deallocate(disk),
            _ => Err(Status::Unsupported),
        }
    }

    fn read(&self, disk: &Disk) -> Result<Done, Status> {
        let mut buffers = self.buffers(&self.input, Permissions::Write)?;
        let bytes = buffers.bytes();
        let extent = disk.range(self.sector, bytes).ok_or(Status::IoError)?;
        disk.read(extent, &mut buffers).map_err(|_| Status::IoError)?;
        Ok(Done { read: bytes, written: 0 })
    }

    fn write(&self, disk: &Disk) -> Result<Done, Status> {
        let mut buffers = self.buffers(&self.output, Permissions::Read)?;
        let bytes = buffers.bytes();
        let extent = disk.range(self.sector, bytes).ok_or(Status::IoError)?;
        if disk.is_read_only() {
            return Err(Status::IoError);
        }
        disk.write(extent, &mut buffers).map_err(|_| Status::IoError)?;
        Ok(Done { read: 0, written: bytes })
    }

    fn buffers(&self, pieces: &[Piece], access: Permissions) -> Result<Buffers, Status> {
        let mut buffers = Buffers::new(self.memory.clone());
        for piece in pieces {
            buffers.push(piece.address, piece.len, access).ok_or(Status::IoError)?;
        }
        // The driver was told both limits, see the configuration space.
        if buffers.bytes() > u64::from(MAX_SEGMENTS) * u64::from(SEGMENT_BYTES) {
            return Err(Status::IoError);
        }
        Ok(buffers)
    }

    fn write_serial(&self, serial: &[u8; SERIAL_BYTES]) -> Result<Done, Status> {
        let mut rest = &serial[..];
        for piece in &self.input {
            let len = usize::try_from(piece.len).unwrap_or(usize::MAX).min(rest.len());
            let (now, later) = rest.split_at(len);
            self.memory.write_slice(now, piece.address).map_err(|_| Status::IoError)?;
            rest = later;
        }
        Ok(Done::default())
    }

    /// Discards or zeroes ranges. All of them are judged before the first is touched.
    fn deallocate(&self, disk: &Disk) -> Result<Done, Status> {
        if disk.is_read_only() {
            return Err(Status::IoError);
        }
        let mut extents = Vec::with_capacity(MAX_RANGES as usize);
        for range in self.ranges()? {
            if range.flags & !UNMAP != 0 || (self.kind == kind::DISCARD && range.flags != 0) {
                return Err(Status::Unsupported);
            }
            if range.sectors > MAX_DISCARD_SECTORS {
                return Err(Status::IoError);
            }
            let bytes = u64::from(range.sectors) * SECTOR;
            let extent = disk.range(range.sector, bytes).ok_or(Status::IoError)?;
            extents.push((extent, self.kind == kind::DISCARD || range.flags & UNMAP != 0));
        }
        for (extent, unmap) in extents {
            let done = if unmap { disk.discard(extent) } else { disk.write_zeroes(extent) };
            done.map_err(|errno| match errno {
                Errno::EOPNOTSUPP => Status::Unsupported,
                _ => Status::IoError,
            })?;
        }
        Ok(Done::default())
    }

    fn ranges(&self) -> Result<Vec<Range>, Status> {
        let bytes: u64 = self.output.iter().map(|piece| u64::from(piece.len)).sum();
        let bytes = usize::try_from(bytes).map_err(|_| Status::IoError)?;
        if bytes == 0 || bytes % RANGE != 0 || bytes / RANGE > MAX_RANGES as usize {
            return Err(Status::IoError);
        }
        let mut data = vec![0; bytes];
        take_front(&self.memory, &mut self.output.clone(), &mut data).ok_or(Status::IoError)?;
        Ok(data.as_chunks().0.iter().map(Range::from).collect())
    }
}

struct Range {
    sector: u64,
    sectors: u32,
    flags: u32,
}

impl From<&[u8; RANGE]> for Range {
    fn from(bytes: &[u8; RANGE]) -> Self {
        let [a, b, c, d, e, f, g, h, sectors @ .., i, j, k, l] = *bytes;
        Self {
            sector: u64::from_le_bytes([a, b, c, d, e, f, g, h]),
            sectors: u32::from_le_bytes(sectors),
            flags: u32::from_le_bytes([i, j, k, l]),
        }
    }
}

/// What the device reads and what it writes, in this order in the chain (section 2.7.4.2).
fn split(chain: Chain) -> Option<(Vec<Piece>, Vec<Piece>)> {
    let (mut output, mut input) = (Vec::new(), Vec::new());
    for (count, descriptor) in chain.enumerate() {
        if count == MAX_DESCRIPTORS || (!descriptor.is_write_only() && !input.is_empty()) {
            return None;
        }
        let pieces = if descriptor.is_write_only() { &mut input } else { &mut output };
        pieces.push(Piece::from(descriptor));
    }
    Some((output, input))
}

impl From<Descriptor> for Piece {
    fn from(descriptor: Descriptor) -> Self {
        Self { address: descriptor.addr(), len: descriptor.len() }
    }
}

/// Copies the first bytes out of `pieces` and cuts them off. None where there are fewer, or they are not in RAM.
fn take_front(memory: &GuestRam, pieces: &mut Vec<Piece>, data: &mut [u8]) -> Option<()> {
    let mut rest = data;
    let mut used_up = 0;
    for piece in pieces.iter_mut() {
        let len = usize::try_from(piece.len).ok()?.min(rest.len());
        let (now, later) = rest.split_at_mut(len);
        memory.read_slice(now, piece.address).ok()?;
        let taken = u32::try_from(len).ok()?;
        piece.address = GuestAddress(piece.address.0.checked_add(u64::from(taken))?);
        piece.len -= taken;
        rest = later;
        if piece.len > 0 {
            break;
        }
        used_up += 1;
    }
    pieces.drain(..used_up);
    rest.is_empty().then_some(())
}

#[cfg(test)]
#[path = "request_tests.rs"]
mod tests;
