//! The guest's time of day, kept in step with the host's.
//!
//! The kernel takes it from the host once, early in its boot, and loses what passes until it has a clock that goes on
//! without interrupts: milliseconds, or seconds where the machine is emulated. From then on it goes as fast as the
//! host's, but knows nothing of the corrections that the host makes. KVM shows the host's clock as a PTP device, on
//! hosts whose own clock is the TSC; on others the guest's is left as it is.

use crate::log;
use crate::sys::check;
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_gettime, clock_settime};
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::time::Duration;

/// What the device is called by its driver.
const DEVICE_NAME: &str = "KVM virtual PTP";

/// How often the clocks are compared. Two good ones part by less than a millisecond in that time.
const INTERVAL: Duration = Duration::from_secs(60);

/// Corrected at once rather than bit by bit: the kernel would need minutes for more.
const STEP_NS: i64 = 100_000_000;

/// The host's clock.
pub struct HostClock {
    device: File,
}

/// What is done about a difference.
#[derive(Debug, PartialEq, Eq)]
enum Correction {
    /// The clock jumps to the host's time.
    Step,
    /// It goes faster or slower until it has made up for so many microseconds.
    Slew(i64),
}

impl HostClock {
    /// The clock, where the host shows it.
    pub fn find() -> Option<Self> {
        let name = fs::read_to_string("/sys/class/ptp/ptp0/clock_name").ok()?;
        if name.trim_end() != DEVICE_NAME {
            return None;
        }
        Some(Self { device: File::open("/dev/ptp0").ok()? })
    }

    /// Puts the guest's clock right. What fails is said, and tried again the next time.
    pub fn apply(&self) {
        if let Err(error) = self.correct() {
            log::error(&format!("the clock cannot be set by the host's: {error}"));
        }
    }

    /// Keeps the guest's clock right.
    pub async fn follow(self) {
        loop {
            tokio::time::sleep(INTERVAL).await;
            self.apply();
        }
    }

    fn correct(&self) -> io::Result<()> {
        let (host, own) = (clock_gettime(self.id())?, clock_gettime(ClockId::CLOCK_REALTIME)?);
        match correction(host, own) {
            Correction::Step => Ok(clock_settime(ClockId::CLOCK_REALTIME, host)?),
            Correction::Slew(micros) => slew(micros),
        }
    }

    /// By which the kernel knows the clock behind a descriptor.
    fn id(&self) -> ClockId {
        ClockId::from_raw(!self.device.as_raw_fd() << 3 | 3)
    }
}

fn correction(host: TimeSpec, own: TimeSpec) -> Correction {
    let seconds = host.tv_sec().saturating_sub(own.tv_sec());
    let nanos = seconds.saturating_mul(1_000_000_000).saturating_add(host.tv_nsec() - own.tv_nsec());
    if (-STEP_NS..=STEP_NS).contains(&nanos) { Correction::Slew(nanos / 1000) } else { Correction::Step }
}

fn slew(micros: i64) -> io::Result<()> {
    // SAFETY: `timex` is a plain structure, all zero is a valid value of it.
    let mut request: libc::timex = unsafe { std::mem::zeroed() };
    request.modes = libc::ADJ_OFFSET_SINGLESHOT;
    request.offset = micros;
    // SAFETY: the call takes and fills a pointer to this structure.
    check(unsafe { libc::adjtimex(&raw mut request) }.into()).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_small_difference_is_made_up_for_and_a_large_one_jumped() {
        let own = TimeSpec::new(1_000, 999_999_000);
        assert_eq!(correction(TimeSpec::new(1_001, 0), own), Correction::Slew(1));
        assert_eq!(correction(TimeSpec::new(1_000, 949_999_000), own), Correction::Slew(-50_000));
        for host in [TimeSpec::new(1_001, 200_000_000), TimeSpec::new(999, 0), TimeSpec::new(i64::MAX, 0)] {
            assert_eq!(correction(host, own), Correction::Step);
        }
    }
}
