//! Frames from the guest.

use nix::libc::iovec;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Address, Bytes, GuestMemory, Permissions};
use vmshim_protocol::control::DeviceStatistics;

use super::MAX_FRAME;
use super::header::{self, HEADER};
use super::tap::Tap;
use crate::devices::virtio::service::Chain;
use crate::memory::GuestRam;

/// Pieces of one frame. Linux sends at most some 50.
const MAX_PIECES: usize = 128;

/// The shortest frame: an Ethernet header.
const MIN_FRAME: usize = 14;

/// Sends the frame of a chain, or drops it. Returns how many bytes were sent.
pub fn send(
    memory: &GuestRam,
    chain: Chain,
    features: u64,
    tap: Option<&Tap>,
    statistics: &mut DeviceStatistics,
) -> u64 {
    let sent = Frame::parse(memory, chain, features).zip(tap).and_then(|(frame, tap)| frame.write(tap));
    match sent {
        Some(bytes) => {
            statistics.requests += 1;
            statistics.written_bytes += bytes;
            bytes
        }
        None => {
            statistics.errors += 1;
            0
        }
    }
}

/// A frame in guest memory with a sound header of ours.
struct Frame {
    header: [u8; HEADER],
    /// The first place is the header's.
    vectors: Vec<iovec>,
    bytes: usize,
    /// Keeps the addresses in `vectors` valid.
    _memory: GuestRam,
}

impl Frame {
    /// None where the chain is malformed.
    fn parse(memory: &GuestRam, chain: Chain, features: u64) -> Option<Self> {
        let mut guest = [0; HEADER];
        let mut rest = &mut guest[..];
        let mut frame = Self {
            header: [0; HEADER],
            vectors: vec![iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }],
            bytes: 0,
            _memory: memory.clone(),
        };
        for (count, descriptor) in chain.enumerate() {
            if count == MAX_PIECES || descriptor.is_write_only() {
                return None;
            }
            let len = usize::try_from(descriptor.len()).ok()?;
            let (now, later) = rest.split_at_mut(len.min(rest.len()));
            memory.read_slice(now, descriptor.addr()).ok()?;
            let skipped = now.len();
            rest = later;
            frame.push(memory, &descriptor, skipped, len - skipped)?;
        }
        if !rest.is_empty() || frame.bytes < MIN_FRAME {
            return None;
        }
        frame.header = header::checked(guest, frame.bytes, features)?;
        Some(frame)
    }

    fn push(&mut self, memory: &GuestRam, descriptor: &Descriptor, skip: usize, len: usize) -> Option<()> {
        self.bytes = self.bytes.checked_add(len).filter(|bytes| *bytes <= MAX_FRAME)?;
        if len == 0 {
            return Some(());
        }
        let address = descriptor.addr().checked_add(u64::try_from(skip).ok()?)?;
        for slice in GuestMemory::get_slices(&**memory, address, len, Permissions::Read).ok()? {
            let slice = slice.ok()?;
            let guard = slice.ptr_guard_mut();
            self.vectors.push(iovec { iov_base: guard.as_ptr().cast(), iov_len: slice.len() });
        }
        Some(())
    }

    /// How many bytes were sent. None where the tap does not take them.
    fn write(mut self, tap: &Tap) -> Option<u64> {
        if let Some(first) = self.vectors.first_mut() {
            *first = iovec { iov_base: self.header.as_mut_ptr().cast(), iov_len: HEADER };
        }
        // SAFETY: the first vector is our header, the others are ranges of RAM that `_memory` keeps mapped.
        unsafe { tap.write(&self.vectors) }.ok()?;
        u64::try_from(self.bytes).ok()
    }
}
