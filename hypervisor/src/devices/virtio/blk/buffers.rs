//! The guest's buffers of one request, as ranges of host addresses for `preadv` and `pwritev`.

use nix::libc::{self, c_int, iovec};
use vm_memory::{GuestAddress, GuestMemory, Permissions};

use crate::memory::GuestRam;

/// Ranges of guest RAM, which they keep mapped. They are consumed from the front.
pub struct Buffers {
    vectors: Vec<iovec>,
    /// Ranges before this one are used up.
    first: usize,
    bytes: u64,
    /// Keeps the addresses in `vectors` valid.
    memory: GuestRam,
}

impl Buffers {
    /// No bytes yet.
    pub fn new(memory: GuestRam) -> Self {
        Self { vectors: Vec::new(), first: 0, bytes: 0, memory }
    }

    /// Adds a range of guest addresses. None where a part of it is not RAM.
    pub fn push(&mut self, address: GuestAddress, len: u32, access: Permissions) -> Option<()> {
        let count = usize::try_from(len).ok()?;
        let slices = GuestMemory::get_slices(&*self.memory, address, count, access).ok()?;
        for slice in slices {
            let slice = slice.ok()?;
            let guard = slice.ptr_guard_mut();
            self.vectors.push(iovec { iov_base: guard.as_ptr().cast(), iov_len: slice.len() });
        }
        self.bytes = self.bytes.checked_add(u64::from(len))?;
        Some(())
    }

    /// Bytes pushed.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether all is used up.
    pub fn is_empty(&self) -> bool {
        self.first == self.vectors.len()
    }

    /// What comes next, at most `limit` bytes of it, for the system call. None when it is nothing.
    pub fn front(&mut self, limit: usize) -> Option<(*const iovec, c_int)> {
        let most = usize::try_from(libc::UIO_MAXIOV).unwrap_or(1);
        let mut left = limit;
        let mut count = 0;
        while let Some(vector) = self.vectors.get_mut(self.first + count)
            && left > 0
            && count < most
        {
            if vector.iov_len > left {
                let rest = iovec {
                    iov_base: vector.iov_base.wrapping_byte_add(left),
                    iov_len: vector.iov_len - left,
                };
                vector.iov_len = left;
                self.vectors.insert(self.first + count + 1, rest);
            }
            left -= self.vectors.get(self.first + count)?.iov_len;
            count += 1;
        }
        let next = self.vectors.get(self.first..).filter(|_| count > 0)?;
        Some((next.as_ptr(), c_int::try_from(count).ok()?))
    }

    /// Uses up `bytes` from the front.
    pub fn advance(&mut self, mut bytes: usize) {
        while let Some(vector) = self.vectors.get_mut(self.first) {
            if bytes < vector.iov_len {
                vector.iov_base = vector.iov_base.wrapping_byte_add(bytes);
                vector.iov_len -= bytes;
                return;
            }
            bytes -= vector.iov_len;
            self.first += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lengths(buffers: &Buffers) -> Vec<usize> {
        buffers.vectors[buffers.first..].iter().map(|vector| vector.iov_len).collect()
    }

    #[test]
    fn buffers_are_used_up_from_the_front() {
        let memory = GuestRam::new(1 << 20).unwrap();
        let mut buffers = Buffers::new(memory);
        for (address, len) in [(0, 100), (4096, 0), (8192, 50)] {
            buffers.push(GuestAddress(address), len, Permissions::Read).unwrap();
        }
        assert_eq!(buffers.bytes(), 150);
        buffers.advance(30);
        assert_eq!(lengths(&buffers), [70, 50]);
        buffers.advance(70);
        assert_eq!(lengths(&buffers), [50]);
        buffers.advance(50);
        assert!(buffers.is_empty() && buffers.front(100).is_none());
    }

    #[test]
    fn the_front_ends_where_it_must() {
        let mut buffers = Buffers::new(GuestRam::new(1 << 20).unwrap());
        for (address, len) in [(0, 100), (8192, 50)] {
            buffers.push(GuestAddress(address), len, Permissions::Read).unwrap();
        }
        assert_eq!(buffers.front(120).unwrap().1, 2);
        assert_eq!(lengths(&buffers), [100, 20, 30]);
        assert_eq!(buffers.front(40).unwrap().1, 1);
        assert_eq!(lengths(&buffers), [40, 60, 20, 30]);
        assert_eq!(buffers.front(1000).unwrap().1, 4);
        assert!(buffers.front(0).is_none());
    }

    #[test]
    fn what_is_not_ram_is_refused() {
        let mut buffers = Buffers::new(GuestRam::new(1 << 20).unwrap());
        for (address, len) in [(1 << 20, 1), ((1 << 20) - 1, 2), (u64::MAX, 2), (0, u32::MAX)] {
            assert!(buffers.push(GuestAddress(address), len, Permissions::Write).is_none());
        }
        assert!(buffers.push(GuestAddress((1 << 20) - 1), 1, Permissions::Write).is_some());
    }

    #[test]
    fn a_range_across_the_gap_is_refused() {
        use crate::memory::MMIO_GAP_START;
        let mut buffers = Buffers::new(GuestRam::new(MMIO_GAP_START + (1 << 20)).unwrap());
        assert!(buffers.push(GuestAddress(MMIO_GAP_START - 512), 1024, Permissions::Write).is_none());
    }
}
