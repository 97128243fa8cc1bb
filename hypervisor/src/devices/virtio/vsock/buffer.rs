//! Bytes of one connection that its sink has not taken yet.

use vm_memory::VolatileSlice;

/// A ring of bounded capacity. Its memory exists only while it holds something, so that idle connections cost none.
#[derive(Debug)]
pub struct Buffer {
    capacity: usize,
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl Buffer {
    /// An empty buffer for up to `capacity` bytes.
    pub fn new(capacity: usize) -> Self {
        Self { capacity, bytes: Vec::new(), start: 0, len: 0 }
    }

    /// Bytes held.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing is held.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Appends `slices` without their first `skip` bytes; `false`, and nothing appended, when they do not fit.
    #[must_use]
    pub fn push(&mut self, slices: &[VolatileSlice<'_>], mut skip: usize) -> bool {
        let total: usize = slices.iter().map(VolatileSlice::len).sum();
        if total.saturating_sub(skip) > self.capacity - self.len {
            return false;
        }
        for slice in slices {
            let passed = skip.min(slice.len());
            skip -= passed;
            if let Ok(rest) = slice.offset(passed) {
                self.append(rest);
            }
        }
        true
    }

    fn append(&mut self, mut slice: VolatileSlice<'_>) {
        if self.bytes.is_empty() && !slice.is_empty() {
            self.bytes = vec![0; self.capacity];
        }
        while !slice.is_empty() {
            let end = self.start + self.len;
            let gap = if end < self.capacity {
                &mut self.bytes[end..]
            } else {
                &mut self.bytes[end - self.capacity..self.start]
            };
            let count = slice.copy_to(gap);
            let Ok(rest) = slice.offset(count) else { return };
            if count == 0 {
                return;
            }
            self.len += count;
            slice = rest;
        }
    }

    /// What is held, oldest first, in two pieces of which the second is empty unless the ring has wrapped.
    pub fn slices(&mut self) -> [VolatileSlice<'_>; 2] {
        let (wrapped, straight) = self.bytes.split_at_mut(self.start);
        let first = self.len.min(straight.len());
        [VolatileSlice::from(&mut straight[..first]), VolatileSlice::from(&mut wrapped[..self.len - first])]
    }

    /// Drops the oldest `count` bytes.
    pub fn consume(&mut self, count: usize) {
        self.len -= count.min(self.len);
        if self.len == 0 {
            self.bytes = Vec::new();
            self.start = 0;
            return;
        }
        self.start += count;
        if self.start >= self.capacity {
            self.start -= self.capacity;
        }
    }

    /// Drops everything.
    pub fn clear(&mut self) {
        self.consume(self.len);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;

    use super::*;

    fn contents(buffer: &mut Buffer) -> Vec<u8> {
        let mut all = Vec::new();
        for slice in buffer.slices() {
            let mut bytes = vec![0; slice.len()];
            slice.copy_to(&mut bytes);
            all.extend(bytes);
        }
        all
    }

    #[test]
    fn memory_goes_with_the_last_byte() {
        let mut buffer = Buffer::new(8);
        assert!(buffer.push(&[VolatileSlice::from(&mut b"abc"[..].to_vec()[..])], 1));
        assert_eq!(contents(&mut buffer), b"bc");
        assert_eq!(buffer.bytes.len(), 8);
        buffer.consume(2);
        assert_eq!(buffer.bytes.capacity(), 0);
        buffer.clear();
        assert!(buffer.is_empty());
    }

    proptest! {
        #[test]
        fn behaves_like_a_queue(
            steps in prop::collection::vec((prop::collection::vec(any::<u8>(), 0..12), 0usize..4, 0usize..20), 0..60),
        ) {
            let mut buffer = Buffer::new(16);
            let mut model = VecDeque::<u8>::new();
            for (mut bytes, skip, consume) in steps {
                let skip = skip.min(bytes.len());
                let fits = model.len() + bytes.len() - skip <= 16;
                let (front, back) = bytes.split_at_mut(skip / 2);
                let pushed = buffer.push(&[VolatileSlice::from(front), VolatileSlice::from(back)], skip);
                prop_assert_eq!(pushed, fits);
                if fits {
                    model.extend(&bytes[skip..]);
                }
                prop_assert_eq!(contents(&mut buffer), model.iter().copied().collect::<Vec<_>>());
                let consume = consume.min(model.len());
                buffer.consume(consume);
                model.drain(..consume);
                prop_assert_eq!(buffer.len(), model.len());
            }
        }
    }
}
