//! Settings that a pod may change for itself. Annotations come from whoever may make a pod: only what the administrator
//! has named is taken, and only what this list has can be named.

use std::collections::BTreeMap;

use toml::de::{DeTable, DeValue};

use super::load::{ConfigError, nearest};
use super::schema::{Config, KeyError};
use super::value::{Setting, article};

/// Before the section and the key in an annotation's name.
const PREFIX: &str = "io.vmshim.";

/// What can be left to pods: nothing of the host's, and nothing that a pod could use up of another's.
const POSSIBLE: [&str; 8] = [
    "hypervisor.boot_timeout_seconds",
    "hypervisor.default_memory_mib",
    "hypervisor.default_vcpus",
    "hypervisor.kernel_params",
    "hypervisor.nic_slots",
    "hypervisor.overhead_memory_mib",
    "hypervisor.receive_kib_per_second",
    "hypervisor.send_kib_per_second",
];

/// Bytes of the longest value.
const LONGEST_VALUE: usize = 4096;

/// The settings that are left to pods.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LeftToPods(Vec<&'static str>);

impl Setting for LeftToPods {
    fn read(value: &DeValue<'_>) -> Result<Self, String> {
        let list =
            value.as_array().ok_or_else(|| format!("must be a list of names, not {}", article(value)))?;
        let known = |name: &DeValue<'_>| {
            let name = name.as_str().unwrap_or_default();
            let found = POSSIBLE.into_iter().find(|possible| *possible == name);
            found.ok_or_else(|| format!("can have {}, not {name:?}", POSSIBLE.join(", ")))
        };
        list.iter().map(|name| known(name.get_ref())).collect::<Result<_, _>>().map(Self)
    }

    #[cfg(test)]
    fn show(&self) -> String {
        format!("{:?}", self.0)
    }
}

impl Config {
    /// The settings of a pod with these annotations.
    ///
    /// # Errors
    /// An annotation with our prefix that is not left to pods, or whose value does not fit.
    pub fn for_pod(&self, annotations: &BTreeMap<String, String>) -> Result<Self, ConfigError> {
        let mut config = self.clone();
        for (annotation, value) in annotations {
            if let Some(name) = annotation.strip_prefix(PREFIX) {
                self.check_left_to_pods(name).and_then(|()| config.set_from(name, value)).map_err(|why| {
                    ConfigError::Annotation { name: annotation.chars().take(128).collect(), why }
                })?;
            }
        }
        config.check()?;
        Ok(config)
    }

    fn check_left_to_pods(&self, name: &str) -> Result<(), String> {
        let LeftToPods(names) = &self.runtime.left_to_pods;
        if names.contains(&name) {
            return Ok(());
        }
        if POSSIBLE.contains(&name) {
            return Err("is not left to pods on this node (`left_to_pods`)".to_owned());
        }
        Err(match nearest(name, &POSSIBLE) {
            Some(near) => format!("is unknown; did you mean {PREFIX}{near}?"),
            None => "is unknown".to_owned(),
        })
    }

    fn set_from(&mut self, name: &str, value: &str) -> Result<(), String> {
        let (section, key) = name.split_once('.').ok_or("is unknown")?;
        if value.len() > LONGEST_VALUE {
            return Err(format!("has more than {LONGEST_VALUE} bytes"));
        }
        // A string needs no quotes here; a number has to be one.
        let text = serde_json::Value::from(value).to_string();
        let text = if value.parse::<u64>().is_ok() { value } else { &text };
        let text = format!("value = {text}");
        let table = DeTable::parse(&text).map_err(|_| "has a value that is not understood".to_owned())?;
        let value = table.get_ref().get("value").ok_or("has no value")?;
        self.set(section, key, value.get_ref()).map_err(|error| match error {
            KeyError::Unknown => "is unknown".to_owned(),
            KeyError::Value(why) => why,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn node(names: &str) -> Config {
        Config::parse("c.toml", &format!("[runtime]\nleft_to_pods = {names}\n")).unwrap()
    }

    fn pod(config: &Config, name: &str, value: &str) -> Result<Config, String> {
        let annotations = BTreeMap::from([(name.to_owned(), value.to_owned()), ("other".into(), "x".into())]);
        config.for_pod(&annotations).map_err(|error| error.to_string())
    }

    #[test]
    fn what_is_left_to_pods_is_taken_in_its_range() {
        let node = node(r#"["hypervisor.default_vcpus", "hypervisor.kernel_params"]"#);
        let vcpus = "io.vmshim.hypervisor.default_vcpus";
        assert_eq!(pod(&node, vcpus, "4").unwrap().hypervisor.default_vcpus, 4);
        let params = pod(&node, "io.vmshim.hypervisor.kernel_params", "a=\"b c\"\\ 7").unwrap();
        assert_eq!(params.hypervisor.kernel_params, "a=\"b c\"\\ 7");
        assert_eq!(
            pod(&node, vcpus, "0").unwrap_err(),
            "the annotation io.vmshim.hypervisor.default_vcpus must be from 1 to 64"
        );
        assert!(pod(&node, vcpus, "two").unwrap_err().contains("must be a whole number"));
        assert!(pod(&node, vcpus, "1\n[runtime]\nstate_dir = '/x'").unwrap_err().contains("whole number"));
        // The administrator's maximum is one for annotations, too.
        assert!(pod(&node, vcpus, "64").unwrap_err().contains("larger than `max_vcpus`"));
    }

    #[test]
    fn a_pods_rate_is_never_above_the_maximum() {
        let name = "io.vmshim.hypervisor.send_kib_per_second";
        let text = "[hypervisor]\nmax_send_kib_per_second = 2000\nsend_kib_per_second = 1000\n\
                    [runtime]\nleft_to_pods = [\"hypervisor.send_kib_per_second\"]\n";
        let node = Config::parse("c.toml", text).unwrap();
        let rate = |value| {
            let limit = pod(&node, name, value).unwrap().hypervisor.send_limit().unwrap();
            limit.bytes_per_second.get() >> 10
        };
        // Without a limit of its own a pod has the maximum.
        assert_eq!((rate("1"), rate("2000"), rate("0")), (1, 2000, 2000));
        assert!(pod(&node, name, "2001").unwrap_err().contains("larger than `max_send_kib_per_second`"));
        assert!(pod(&node, name, "-1").unwrap_err().contains("must be a whole number"));
        let other = "io.vmshim.hypervisor.receive_kib_per_second";
        assert!(pod(&node, other, "1").unwrap_err().contains("is not left to pods"));
    }

    #[test]
    fn the_rest_is_refused_by_name() {
        let node = node("[]");
        let error = pod(&node, "io.vmshim.hypervisor.default_vcpus", "2").unwrap_err();
        assert!(error.ends_with("is not left to pods on this node (`left_to_pods`)"), "{error}");
        let error = pod(&node, "io.vmshim.hypervisor.default_vcpu", "2").unwrap_err();
        assert!(error.ends_with("did you mean io.vmshim.hypervisor.default_vcpus?"), "{error}");
        assert!(pod(&node, "io.vmshim.runtime.state_dir", "/x").unwrap_err().ends_with("is unknown"));
        assert_eq!(pod(&node, "io.kata.x", "1").unwrap(), node);
    }

    #[test]
    fn nothing_of_the_hosts_can_be_left_to_pods() {
        let error = Config::parse("c", "[runtime]\nleft_to_pods = [\"hypervisor.path\"]\n").unwrap_err();
        assert!(error.to_string().contains("not \"hypervisor.path\""), "{error}");
        let error = Config::parse("c", "[runtime]\nleft_to_pods = 3\n").unwrap_err();
        assert!(error.to_string().contains("must be a list of names, not an integer"), "{error}");
    }

    proptest! {
        #[test]
        fn any_value_is_taken_or_refused(name in "io.vmshim[.a-z_]{0,30}", value in ".{0,50}") {
            let all = format!("{POSSIBLE:?}");
            let _ = pod(&node(&all), &name, &value);
            let _ = pod(&node(&all), "io.vmshim.hypervisor.kernel_params", &value);
        }
    }
}
