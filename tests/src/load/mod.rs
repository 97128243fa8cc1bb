//! What the benchmark has done in a pod, by a program of its own (`bench-load`), so that it is the same work under each
//! runtime, and needs nothing of the image.

pub mod network;

use std::time::Duration;

const MIB: usize = 1 << 20;

/// MB/s.
fn megabytes_a_second(bytes: u64, elapsed: Duration) -> f64 {
    Duration::from_micros(bytes).as_secs_f64() / elapsed.as_secs_f64()
}
