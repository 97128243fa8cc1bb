//! What a pod's interfaces may carry.

use std::num::NonZeroU64;

use vmshim_protocol::control::RateLimit;

use super::Hypervisor;

impl Hypervisor {
    /// The limit of what each interface receives.
    pub fn receive_limit(&self) -> Option<RateLimit> {
        self.limit(self.receive_kib_per_second, self.max_receive_kib_per_second)
    }

    /// The limit of what each interface sends.
    pub fn send_limit(&self) -> Option<RateLimit> {
        self.limit(self.send_kib_per_second, self.max_send_kib_per_second)
    }

    fn limit(&self, rate: u32, most: u32) -> Option<RateLimit> {
        let rate = if rate == 0 { most } else { rate };
        let bytes = |kib: u32| NonZeroU64::new(u64::from(kib) << 10);
        Some(RateLimit { bytes_per_second: bytes(rate)?, burst_bytes: bytes(self.network_burst_kib)? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_limited_unless_somebody_says_so() {
        let mut settings = Hypervisor::default();
        assert_eq!((settings.receive_limit(), settings.send_limit()), (None, None));
        settings.receive_kib_per_second = 1024;
        let limit = settings.receive_limit().unwrap();
        assert_eq!((limit.bytes_per_second.get(), limit.burst_bytes.get()), (1 << 20, 256 << 10));
        assert_eq!(settings.send_limit(), None);
    }
}
