//! Time.

use nix::time::{ClockId, clock_gettime};

/// Nanoseconds of `CLOCK_MONOTONIC`, which the shim reads too.
pub fn monotonic_ns() -> u64 {
    // Fails for unknown clocks only.
    let Ok(now) = clock_gettime(ClockId::CLOCK_MONOTONIC) else { return 0 };
    let (seconds, nanoseconds) = (u64::try_from(now.tv_sec()), u64::try_from(now.tv_nsec()));
    seconds.unwrap_or(0).saturating_mul(1_000_000_000).saturating_add(nanoseconds.unwrap_or(0))
}
