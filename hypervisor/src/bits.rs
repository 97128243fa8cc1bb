//! Halves of 64-bit values, as registers and tokens come in 32.

/// Bits 0 to 31.
pub fn low(value: u64) -> u32 {
    let [a, b, c, d, ..] = value.to_le_bytes();
    u32::from_le_bytes([a, b, c, d])
}

/// Bits 32 to 63.
pub fn high(value: u64) -> u32 {
    low(value >> 32)
}

/// `value` with other bits 0 to 31.
pub fn with_low(value: u64, low: u32) -> u64 {
    value & !u64::from(u32::MAX) | u64::from(low)
}

/// `value` with other bits 32 to 63.
pub fn with_high(value: u64, high: u32) -> u64 {
    value & u64::from(u32::MAX) | u64::from(high) << 32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_make_the_whole() {
        let value = 0x1234_5678_9abc_def0;
        assert_eq!((low(value), high(value)), (0x9abc_def0, 0x1234_5678));
        assert_eq!(with_high(with_low(u64::MAX, low(value)), high(value)), value);
    }
}
