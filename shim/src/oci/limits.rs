//! CPU and memory limits of a pod, from the sandbox's annotations or the container's own resources.

use serde_json::Value;

use super::Spec;

/// Limits as the spec writes them; 0 or less is no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Limits {
    /// CPU time in each period, in microseconds.
    pub quota: i64,
    /// The period, in microseconds.
    pub period: u64,
    /// Bytes of memory.
    pub memory: i64,
    /// The limits are of containers yet to come, not all of which need have one.
    pub partial: bool,
}

impl Limits {
    /// The limits that a pod's first container tells. A sandbox carries the sum of its members' in annotations.
    pub fn of(spec: &Spec) -> Self {
        let annotated = |name: &str| spec.annotation(&format!("io.kubernetes.cri.sandbox-{name}"));
        let resource = |path| spec.resource(path).and_then(Value::as_i64).unwrap_or(0);
        let signed = |name, path| match annotated(name) {
            Some(text) => text.parse().unwrap_or(0),
            None => resource(path),
        };
        let period = signed("cpu-period", ["cpu", "period"]);
        Self {
            quota: signed("cpu-quota", ["cpu", "quota"]),
            period: u64::try_from(period).unwrap_or(0),
            memory: signed("memory", ["memory", "limit"]),
            partial: spec.sandbox_id().is_some(),
        }
    }

    /// A container's own.
    pub fn of_container(spec: &Spec) -> Self {
        let resource = |path| spec.resource(path).and_then(Value::as_i64).unwrap_or(0);
        Self {
            quota: resource(["cpu", "quota"]),
            period: u64::try_from(resource(["cpu", "period"])).unwrap_or(0),
            memory: resource(["memory", "limit"]),
            partial: false,
        }
    }

    /// These after an update, whose OCI resources leave out or set to 0 what they do not change. What is none of that is
    /// the guest's to refuse.
    pub fn updated(self, resources: &[u8]) -> Self {
        let resources: Value = serde_json::from_slice(resources).unwrap_or_default();
        let changed = |group: &str, name: &str| {
            let value = resources.get(group)?.get(name)?.as_i64();
            value.filter(|value| *value != 0)
        };
        let period = changed("cpu", "period").and_then(|period| u64::try_from(period).ok());
        Self {
            quota: changed("cpu", "quota").unwrap_or(self.quota),
            period: period.unwrap_or(self.period),
            memory: changed("memory", "limit").unwrap_or(self.memory),
            partial: self.partial,
        }
    }

    /// Of both, the larger of each kind.
    pub fn or_larger(self, other: Self) -> Self {
        let cpu = if self.milli_cpus() >= other.milli_cpus() { self } else { other };
        Self { memory: self.memory.max(other.memory), ..cpu }
    }

    /// Whole CPUs that the limit lets run at once.
    pub fn cpus(&self) -> Option<u64> {
        let (quota, period) = self.cpu_time()?;
        Some(quota.div_ceil(period))
    }

    /// The same in thousandths, so that the limits of several containers add up.
    pub fn milli_cpus(&self) -> Option<u64> {
        let (quota, period) = self.cpu_time()?;
        Some(quota.saturating_mul(1000).div_ceil(period))
    }

    fn cpu_time(&self) -> Option<(u64, u64)> {
        const DEFAULT_PERIOD: u64 = 100_000;
        let quota = u64::try_from(self.quota).ok().filter(|quota| *quota > 0)?;
        Some((quota, if self.period == 0 { DEFAULT_PERIOD } else { self.period }))
    }

    /// The memory limit.
    pub fn memory_bytes(&self) -> Option<u64> {
        u64::try_from(self.memory).ok().filter(|bytes| *bytes > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(text: &str) -> Limits {
        Limits::of(&Spec::parse(text.as_bytes()).unwrap())
    }

    #[test]
    fn annotations_come_before_resources() {
        let resources =
            r#""linux":{"resources":{"cpu":{"quota":200000,"period":100000},"memory":{"limit":1024}}}"#;
        let own = limits(&format!(r#"{{"process":{{"args":["a"]}},{resources}}}"#));
        assert_eq!((own.cpus(), own.memory_bytes()), (Some(2), Some(1024)));
        let annotations = r#""annotations":{"io.kubernetes.cri.sandbox-cpu-quota":"300000","io.kubernetes.cri.sandbox-cpu-period":"100000","io.kubernetes.cri.sandbox-memory":"0"}"#;
        let pod = limits(&format!(r#"{{"process":{{"args":["a"]}},{resources},{annotations}}}"#));
        assert_eq!((pod.cpus(), pod.memory_bytes()), (Some(3), None));
    }

    #[test]
    fn a_members_limits_are_its_own_and_are_updated_in_part() {
        let spec = r#"{"process":{"args":["a"]},"linux":{"resources":{"cpu":{"quota":200000},"memory":{"limit":1024}}},
            "annotations":{"io.kubernetes.cri.sandbox-memory":"5"}}"#;
        let limits = Limits::of_container(&Spec::parse(spec.as_bytes()).unwrap());
        assert_eq!((limits.cpus(), limits.memory_bytes()), (Some(2), Some(1024)));
        let update = |text: &str| {
            let limits = limits.updated(text.as_bytes());
            (limits.cpus(), limits.memory_bytes())
        };
        assert_eq!(update(r#"{"memory":{"limit":2048},"cpu":{"shares":5}}"#), (Some(2), Some(2048)));
        assert_eq!(update(r#"{"memory":{"limit":0},"cpu":{"quota":-1,"period":0}}"#), (None, Some(1024)));
        assert_eq!(
            update(r#"{"memory":{"limit":-1},"cpu":{"quota":50000,"period":10000}}"#),
            (Some(5), None)
        );
        for strange in ["", "[]", "{", r#"{"memory":{"limit":"x"},"cpu":7}"#] {
            assert_eq!(update(strange), (Some(2), Some(1024)), "{strange}");
        }
    }

    #[test]
    fn the_larger_of_each_kind() {
        let limits = |quota, period, memory| Limits { quota, period, memory, partial: false };
        let larger = limits(150_000, 0, 5).or_larger(limits(20_000, 10_000, 3));
        assert_eq!((larger.milli_cpus(), larger.memory_bytes()), (Some(2000), Some(5)));
        assert_eq!(limits(-1, 0, -1).or_larger(limits(0, 7, 9)).milli_cpus(), None);
        assert_eq!(limits(i64::MAX, 1, 0).milli_cpus(), Some(u64::MAX));
    }

    #[test]
    fn no_limit_is_none() {
        let none = limits(r#"{"process":{"args":["a"]},"linux":{"resources":{"cpu":{"quota":-1}}}}"#);
        assert_eq!((none.cpus(), none.memory_bytes()), (None, None));
    }
}
