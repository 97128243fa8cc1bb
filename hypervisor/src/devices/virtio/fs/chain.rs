//! The guest's buffers of one request.
//!
//! Hostile input: the descriptors. A chain is taken only if all of it lies in RAM, what the device reads comes before
//! what it writes, and its length is bounded. The bytes in the buffers change whenever the guest likes; each is copied
//! out once, or handed to the kernel to read or write in place.

use nix::libc;
use virtio_queue::DescriptorChain;
use vm_memory::{Bytes, GuestMemoryBackend, VolatileSlice};

use crate::memory::GuestMemory;

/// Buffers of one chain. Linux needs 3 for the headers and 256 for the data; the kernel takes 1024 at once.
const MAX_BUFFERS: usize = 1024;

/// Why a chain is no request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// A descriptor names memory that is not RAM.
    #[error("a descriptor points outside of guest memory")]
    OutsideMemory,
    /// More than [`MAX_BUFFERS`].
    #[error("a descriptor chain is longer than any driver makes it")]
    TooLong,
    /// A readable descriptor follows a writable one (virtio 1.2, section 2.7.4.2).
    #[error("a descriptor chain has a readable buffer behind a writable one")]
    Order,
}

/// A run of guest memory in pieces, consumed from the front.
#[derive(Debug, Default)]
pub struct Buffers<'m> {
    pieces: Vec<VolatileSlice<'m>>,
    /// Pieces used up.
    next: usize,
    len: usize,
}

/// A request's two halves.
#[derive(Debug, Default)]
pub struct Chain<'m> {
    /// What the driver says.
    pub request: Buffers<'m>,
    /// Room for what the device answers.
    pub reply: Buffers<'m>,
}

impl<'m> Chain<'m> {
    /// Collects the buffers of a chain.
    ///
    /// # Errors
    /// See [`ChainError`].
    pub fn collect(
        memory: &'m GuestMemory,
        descriptors: DescriptorChain<&GuestMemory>,
    ) -> Result<Self, ChainError> {
        let mut chain = Self::default();
        for descriptor in descriptors {
            let write_only = descriptor.is_write_only();
            if !write_only && !chain.reply.pieces.is_empty() {
                return Err(ChainError::Order);
            }
            let half = if write_only { &mut chain.reply } else { &mut chain.request };
            half.push(memory, &descriptor)?;
            if chain.request.pieces.len() + chain.reply.pieces.len() > MAX_BUFFERS {
                return Err(ChainError::TooLong);
            }
        }
        Ok(chain)
    }
}

impl<'m> Buffers<'m> {
    fn push(
        &mut self,
        memory: &'m GuestMemory,
        descriptor: &virtio_queue::desc::split::Descriptor,
    ) -> Result<(), ChainError> {
        // One descriptor may span two regions of RAM.
        let len = usize::try_from(descriptor.len()).map_err(|_| ChainError::OutsideMemory)?;
        for piece in memory.get_slices(descriptor.addr(), len) {
            let piece = piece.map_err(|_| ChainError::OutsideMemory)?;
            self.len += piece.len();
            self.pieces.push(piece);
        }
        Ok(())
    }

    /// Bytes left.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Copies out the next bytes, as many as `bytes` takes; false, and nothing consumed, when there are fewer.
    #[must_use]
    pub fn read(&mut self, bytes: &mut [u8]) -> bool {
        if bytes.len() > self.len {
            return false;
        }
        let mut done = 0;
        self.advance(bytes.len(), |piece| {
            let end = done + piece.len();
            // Both are as long as each other: a copy within bounds cannot fail.
            let _ = piece.read_slice(&mut bytes[done..end], 0);
            done = end;
        });
        true
    }

    /// Copies in `bytes`; false, and nothing consumed, when there is not the room.
    #[must_use]
    pub fn write(&mut self, bytes: &[u8]) -> bool {
        if bytes.len() > self.len {
            return false;
        }
        let mut done = 0;
        self.advance(bytes.len(), |piece| {
            let end = done + piece.len();
            let _ = piece.write_slice(&bytes[done..end], 0);
            done = end;
        });
        true
    }

    /// Takes at most `count` bytes off the front.
    pub fn take(&mut self, count: usize) -> Self {
        let mut taken = Self::default();
        let count = count.min(self.len);
        self.advance(count, |piece| {
            taken.len += piece.len();
            taken.pieces.push(piece);
        });
        taken
    }

    /// The first `count` bytes, or as many as there are, without consuming them.
    pub fn prefix(&self, count: usize) -> Self {
        let pieces = self.pieces.get(self.next..).unwrap_or_default().to_vec();
        Self { pieces, next: 0, len: self.len }.take(count)
    }

    /// Calls `each` with the next `count` bytes, of which there must be so many, and consumes them.
    fn advance(&mut self, mut count: usize, mut each: impl FnMut(VolatileSlice<'m>)) {
        self.len -= count;
        while count > 0 {
            let Some(piece) = self.pieces.get_mut(self.next) else { return };
            let Ok((front, rest)) = piece.split_at(count.min(piece.len())) else { return };
            count -= front.len();
            if rest.is_empty() {
                self.next += 1;
            } else {
                *piece = rest;
            }
            each(front);
        }
    }

    /// What is left, as the kernel's `readv` family wants it. The addresses are valid as long as guest memory is
    /// mapped, that is for `'m`, and nobody but the kernel may look at what they point to.
    pub fn io_vectors(&self) -> Vec<libc::iovec> {
        let left = self.pieces.get(self.next..).unwrap_or_default();
        left.iter()
            .map(|piece| libc::iovec {
                iov_base: piece.ptr_guard_mut().as_ptr().cast(),
                iov_len: piece.len(),
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use virtio_queue::desc::{RawDescriptor, split::Descriptor};
    use virtio_queue::mock::MockSplitQueue;
    use vm_memory::GuestAddress;

    use super::*;

    const READ: u16 = 0;
    const WRITE: u16 = 2;

    /// Two adjacent regions of 64 KiB, so that a buffer may straddle them.
    fn memory() -> GuestMemory {
        crate::memory::at(&[(GuestAddress(0), 0x1_0000), (GuestAddress(0x1_0000), 0x1_0000)])
    }

    fn collect<'m>(
        memory: &'m GuestMemory,
        descriptors: &[(u64, u32, u16)],
    ) -> Result<Chain<'m>, ChainError> {
        let queue = MockSplitQueue::create(memory, GuestAddress(0x1000), 16);
        let descriptors: Vec<RawDescriptor> = descriptors
            .iter()
            .map(|&(addr, len, flags)| Descriptor::new(addr, len, flags, 0).into())
            .collect();
        Chain::collect(memory, queue.build_desc_chain(&descriptors).unwrap())
    }

    #[test]
    fn bytes_pass_across_pieces_and_regions() {
        let memory = memory();
        memory.write_slice(b"abcdefgh", GuestAddress(0xfffc)).unwrap();
        memory.write_slice(b"ij", GuestAddress(0x2000)).unwrap();
        let mut chain =
            collect(&memory, &[(0xfffc, 8, READ), (0x2000, 2, READ), (0x1_0ffe, 4, WRITE)]).unwrap();
        assert_eq!((chain.request.len(), chain.reply.len()), (10, 4));
        let mut five = [0; 5];
        assert!(chain.request.read(&mut five));
        assert_eq!(&five, b"abcde");
        let mut rest = chain.request.take(99);
        assert_eq!((chain.request.len(), rest.len()), (0, 5));
        assert_eq!(rest.io_vectors().iter().map(|v| v.iov_len).collect::<Vec<_>>(), [3, 2]);
        assert!(!rest.read(&mut [0; 6]) && rest.read(&mut five));
        assert_eq!(&five, b"fghij");
        assert!(chain.reply.write(b"xy") && !chain.reply.write(b"abc") && chain.reply.write(b"z"));
        let mut written = [0; 3];
        memory.read_slice(&mut written, GuestAddress(0x1_0ffe)).unwrap();
        assert_eq!(&written, b"xyz");
    }

    #[test]
    fn what_is_not_ram_is_refused() {
        let memory = memory();
        for (addr, len) in [(0x1_fff0, 0x11), (0x2_0000, 1), (u64::MAX, 2), (0x5000, u32::MAX)] {
            let error = collect(&memory, &[(addr, len, WRITE)]).unwrap_err();
            assert_eq!(error, ChainError::OutsideMemory, "{addr:#x}");
        }
        // Ending exactly at the end of RAM is allowed.
        assert!(collect(&memory, &[(0x1_fff0, 0x10, READ)]).is_ok());
    }

    #[test]
    fn readable_behind_writable_is_refused() {
        let memory = memory();
        let error = collect(&memory, &[(0x2000, 4, WRITE), (0x3000, 4, READ)]).unwrap_err();
        assert_eq!(error, ChainError::Order);
    }

    #[test]
    fn empty_buffers_are_no_pieces() {
        let memory = memory();
        let chain = collect(&memory, &[(0x2000, 0, READ), (0x3000, 4, READ)]).unwrap();
        assert_eq!(chain.request.len(), 4);
        assert_eq!(chain.request.io_vectors().len(), 1);
    }
}
