//! Limits of what passes a device in a second.
//!
//! A device asks before each request and charges it when it is known how large it was, so what passes at once is a burst
//! and the rest of one request. Who has been refused is woken by a timer, at the time when something may pass again:
//! nothing is polled, and a device without a limit has neither clock nor timer.

use std::io;
use std::num::NonZeroU64;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use vmshim_protocol::control::RateLimit;

use crate::clock;

/// A level counts in billionths of a unit, so that a rate a second is a whole number of them each nanosecond.
const UNIT: u128 = 1_000_000_000;

/// How long whoever is refused waits beyond the first nanosecond at which something could pass, so as not to be woken for
/// each request: a millisecond, or less where half a burst comes in sooner.
const REST_NS: u64 = 1_000_000;

/// A bucket that what passes is poured into, and that leaks. As long as it is not full something may pass.
#[derive(Debug)]
pub struct Bucket {
    /// Billionths of a unit that leak each nanosecond.
    rate: NonZeroU64,
    capacity: u128,
    level: u128,
    /// When the level was that, in nanoseconds.
    at: u64,
}

impl Bucket {
    /// An empty bucket from which `rate` units leak each second, and which is full with `burst` of them.
    pub fn new(rate: NonZeroU64, burst: NonZeroU64) -> Self {
        Self { rate, capacity: u128::from(burst.get()) * UNIT, level: 0, at: 0 }
    }

    /// How many nanoseconds from `now` on nothing may pass. None where something may.
    pub fn wait(&mut self, now: u64) -> Option<u64> {
        let rate = u128::from(self.rate.get());
        self.level = self.level.saturating_sub(rate * u128::from(now.saturating_sub(self.at)));
        self.at = self.at.max(now);
        let above = self.level.checked_sub(self.capacity)?;
        let rest = u128::from(REST_NS).min(self.capacity / 2 / rate);
        Some(u64::try_from(above / rate + 1 + rest).unwrap_or(u64::MAX))
    }

    /// Pours in what has passed.
    pub fn charge(&mut self, units: u64) {
        self.level = self.level.saturating_add(u128::from(units) * UNIT);
    }
}

/// What passes a device in one direction: as much as there is, or as much as a limit allows.
#[derive(Debug)]
pub struct Throttle(Option<Limited>);

#[derive(Debug)]
struct Limited {
    bucket: Bucket,
    timer: TimerFd,
}

impl Throttle {
    /// As much as there is.
    pub const fn none() -> Self {
        Self(None)
    }

    /// As much as `limit` says.
    ///
    /// # Errors
    /// When the process has no descriptors left.
    pub fn new(limit: Option<RateLimit>) -> io::Result<Self> {
        let Some(limit) = limit else { return Ok(Self::none()) };
        let flags = TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK;
        let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, flags)?;
        Ok(Self(Some(Limited { bucket: Bucket::new(limit.bytes_per_second, limit.burst_bytes), timer })))
    }

    /// Whether something may pass now. Otherwise the timer fires when it is worth asking again.
    pub fn admits(&mut self) -> bool {
        let Some(Limited { bucket, timer }) = &mut self.0 else { return true };
        let Some(wait) = bucket.wait(clock::monotonic_ns()) else { return true };
        let expiration = Expiration::OneShot(Duration::from_nanos(wait).into());
        // Rather no limit than a device that nothing wakes.
        timer.set(expiration, TimerSetTimeFlags::empty()).is_err()
    }

    /// So many bytes have passed.
    pub fn charge(&mut self, bytes: u64) {
        if let Some(Limited { bucket, .. }) = &mut self.0 {
            bucket.charge(bytes);
        }
    }

    /// The timer to wait for, where there is a limit.
    pub fn timer(&self) -> Option<BorrowedFd<'_>> {
        self.0.as_ref().map(|limited| limited.timer.as_fd())
    }

    /// The timer has fired.
    pub fn on_timer(&self) {
        if let Some(limited) = &self.0 {
            // Fails when it has been set anew since, which is as good.
            let _ = limited.timer.wait();
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bucket(rate: u64, burst: u64) -> Bucket {
        Bucket::new(NonZeroU64::new(rate).unwrap(), NonZeroU64::new(burst).unwrap())
    }

    /// Lets requests of these sizes pass one after the other, each as soon as it may. Returns what has passed and when
    /// the last one did.
    fn pass(bucket: &mut Bucket, sizes: &[u64]) -> (u64, u64) {
        let (mut now, mut passed) = (0, 0);
        for size in sizes {
            while let Some(wait) = bucket.wait(now) {
                now += wait;
            }
            bucket.charge(*size);
            passed += size;
        }
        (passed, now)
    }

    #[test]
    fn a_burst_passes_at_once_and_then_as_much_as_the_rate_allows() {
        let mut bucket = bucket(1 << 20, 1 << 16);
        for _ in 0..64 {
            assert_eq!(bucket.wait(5), None);
            bucket.charge(1 << 10);
        }
        // A KiB takes the 1024th part of a second; so long is no rest needed beyond the millisecond.
        assert_eq!(bucket.wait(5), Some(1 + REST_NS));
        assert_eq!(bucket.wait(4), Some(1 + REST_NS));
        assert_eq!(bucket.wait(6), None);
        bucket.charge(1 << 20);
        assert!(bucket.wait(900_000_000).is_some());
        assert_eq!(bucket.wait(1_000_000_006), None);
    }

    #[test]
    fn what_was_not_used_is_lost_but_for_a_burst() {
        let mut bucket = bucket(1000, 10);
        assert_eq!(bucket.wait(u64::MAX / 2), None);
        bucket.charge(10);
        assert!(bucket.wait(u64::MAX / 2).is_some());
    }

    #[test]
    fn absurd_numbers_neither_overflow_nor_stall() {
        for (rate, burst) in [(1, 1), (u64::MAX, u64::MAX), (1, u64::MAX), (u64::MAX, 1)] {
            let mut bucket = bucket(rate, burst);
            for now in [0, u64::MAX, 1] {
                (0..3).for_each(|_| bucket.charge(u64::MAX));
                assert!(bucket.wait(now).is_none_or(|wait| wait > 0));
            }
        }
    }

    #[test]
    fn the_timer_fires_when_something_may_pass() {
        use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
        let limit = |rate, burst| RateLimit {
            bytes_per_second: NonZeroU64::new(rate).unwrap(),
            burst_bytes: NonZeroU64::new(burst).unwrap(),
        };
        let mut throttle = Throttle::new(Some(limit(1 << 20, 1 << 10))).unwrap();
        assert!(throttle.admits());
        throttle.charge(11 << 10);
        assert!(!throttle.admits());
        let mut timer = [PollFd::new(throttle.timer().unwrap(), PollFlags::POLLIN)];
        assert_eq!(poll(&mut timer, PollTimeout::from(10_000u16)).unwrap(), 1);
        throttle.on_timer();
        assert!(throttle.admits());
        assert!(Throttle::none().admits() && Throttle::new(None).unwrap().timer().is_none());
    }

    proptest! {
        #[test]
        fn what_passes_is_the_rate_a_burst_and_one_request_and_no_less(
            rate in 1u64..1 << 40,
            burst in 1u64..1 << 32,
            sizes in prop::collection::vec(0u64..1 << 24, 1..200),
        ) {
            let (passed, elapsed) = pass(&mut bucket(rate, burst), &sizes);
            let in_time = u128::from(rate) * u128::from(elapsed) / UNIT;
            let last = u128::from(*sizes.last().unwrap());
            let largest = u128::from(*sizes.iter().max().unwrap());
            prop_assert!(u128::from(passed) - last <= in_time + u128::from(burst) + largest);
            // Whoever always wants more gets all that the rate gives, but for the last rest and the nanoseconds begun.
            let rest = u128::from(rate) * u128::from(REST_NS) / UNIT + u128::from(burst) / 2;
            let begun = (u128::from(rate) / UNIT + 1) * u128::try_from(sizes.len()).unwrap();
            prop_assert!(u128::from(passed) + rest + begun >= in_time);
        }

        #[test]
        fn any_numbers_in_any_order_end_in_passing(
            rate in 1u64.., burst in 1u64..,
            steps in prop::collection::vec((any::<u64>(), any::<u64>()), 0..20),
        ) {
            let mut bucket = bucket(rate, burst);
            let mut latest = 0;
            for (now, units) in steps {
                latest = latest.max(now);
                let wait = bucket.wait(now);
                prop_assert!(wait != Some(0));
                if let Some(then) = wait.and_then(|wait| latest.checked_add(wait)) {
                    prop_assert_eq!(bucket.wait(then), None);
                    latest = then;
                }
                bucket.charge(units);
            }
        }
    }
}
