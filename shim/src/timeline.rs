//! When a container's life passed which mark, for whoever asks where the time goes.
//!
//! Logged at debug level when the pod's first container is deleted; `scripts/bench` reads it.

use std::sync::atomic::{AtomicU64, Ordering};

use nix::time::{ClockId, clock_gettime};
use vmshim_protocol::control::Statistics;

/// A mark, in the order in which they are passed.
#[derive(Debug, Clone, Copy)]
pub enum Mark {
    /// `start` was executed.
    ShimStarted,
    /// The VMM was executed.
    VmmStarted,
    /// `Create` arrived.
    CreateCalled,
    /// `Create` is answered.
    Created,
    /// `Start` is answered.
    TaskStarted,
    /// The exit of the init process was heard of.
    Exited,
    /// `Delete` is answered.
    Deleted,
}

const NAMES: [&str; 7] =
    ["shim_started", "vmm_started", "create_called", "created", "task_started", "exited", "deleted"];

/// Nanoseconds of `CLOCK_MONOTONIC`; 0 where a mark has not been passed.
static MARKS: [AtomicU64; NAMES.len()] = [const { AtomicU64::new(0) }; NAMES.len()];

/// What the VMM measured itself.
static FIRST_INSTRUCTION: AtomicU64 = AtomicU64::new(0);
static AGENT_DIALLED: AtomicU64 = AtomicU64::new(0);

/// Notes that a mark is passed now. Only the first time counts.
pub fn pass(mark: Mark) {
    let _ = MARKS[mark as usize].compare_exchange(0, now(), Ordering::Relaxed, Ordering::Relaxed);
}

/// Takes over the VMM's own marks.
pub fn take_over(statistics: &Statistics) {
    FIRST_INSTRUCTION.store(statistics.first_instruction_ns, Ordering::Relaxed);
    AGENT_DIALLED.store(statistics.first_dial_ns, Ordering::Relaxed);
}

/// Writes the marks into the log.
pub fn log() {
    let marks = NAMES.iter().copied().zip(&MARKS);
    let vmm = [("first_instruction", &FIRST_INSTRUCTION), ("agent_dialled", &AGENT_DIALLED)];
    let fields: Vec<_> =
        marks.chain(vmm).map(|(name, mark)| format!("\"{name}\":{}", mark.load(Ordering::Relaxed))).collect();
    log::debug!("timeline {{{}}}", fields.join(","));
}

fn now() -> u64 {
    let Ok(time) = clock_gettime(ClockId::CLOCK_MONOTONIC) else { return 0 };
    let seconds = u64::try_from(time.tv_sec()).unwrap_or(0);
    let nanoseconds = u64::try_from(time.tv_nsec()).unwrap_or(0);
    seconds.saturating_mul(1_000_000_000).saturating_add(nanoseconds)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_first_pass_counts() {
        pass(Mark::Created);
        let first = MARKS[Mark::Created as usize].load(Ordering::Relaxed);
        pass(Mark::Created);
        assert_ne!(first, 0);
        assert_eq!(MARKS[Mark::Created as usize].load(Ordering::Relaxed), first);
    }
}
