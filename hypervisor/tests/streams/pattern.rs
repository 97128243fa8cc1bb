//! Bytes whose place in a stream can be told from their value: the guest makes them, the host checks them, and the
//! other way round, at the speed of a copy.

/// A prime, so that no packet, page or pipe size is in step with it.
const BLOCK: usize = 65_521;

/// A position in the endless pattern.
pub struct Pattern {
    block: Vec<u8>,
    at: usize,
    /// Bytes made or checked so far.
    pub total: u64,
}

impl Pattern {
    /// The start. Each seed has a pattern of its own.
    pub fn new(seed: u32) -> Self {
        let mut state = u64::from(seed) << 1 | 1;
        let block = (0..BLOCK).map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            state.to_be_bytes()[0]
        });
        Self { block: block.collect(), at: 0, total: 0 }
    }

    /// The next bytes.
    pub fn fill(&mut self, mut bytes: &mut [u8]) {
        while !bytes.is_empty() {
            let count = bytes.len().min(BLOCK - self.at);
            bytes[..count].copy_from_slice(&self.block[self.at..self.at + count]);
            bytes = &mut bytes[count..];
            self.advance(count);
        }
    }

    /// Whether `bytes` are the next ones.
    pub fn check(&mut self, mut bytes: &[u8]) -> bool {
        while !bytes.is_empty() {
            let count = bytes.len().min(BLOCK - self.at);
            if bytes[..count] != self.block[self.at..self.at + count] {
                return false;
            }
            bytes = &bytes[count..];
            self.advance(count);
        }
        true
    }

    fn advance(&mut self, count: usize) {
        self.at = (self.at + count) % BLOCK;
        self.total += count as u64;
    }
}
