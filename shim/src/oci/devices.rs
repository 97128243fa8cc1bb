//! The devices of a spec: which of them a guest has, which it is given, and which are refused.
//!
//! A device is asked for by name where the spec has a rule that allows it and no other: that is what CRI's `devices`
//! (volumeDevices, device plugins) and `ctr --device` become. A privileged container gets a node for everything the host
//! has and one rule that allows all of it; what of that is the host's is left out.

use serde::Deserialize;
use serde_json::Value;

use super::spec::{Device, Linux};
use super::{Spec, SpecError};

/// Devices whose numbers mean the same in every kernel, so that a node of them is right in the guest too.
const UNIVERSAL: [(i64, i64); 10] =
    [(1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (1, 11), (5, 0), (5, 1), (5, 2), (10, 229)];

/// `/dev/net/tun`, which has a number of its own too, but is not in every kernel: the guest says whether it is in its.
const TUN: (i64, i64) = (10, 200);

/// What no rule limits.
const EVERY_ACCESS: &str = "rwm";

/// A block device of the host for the container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockDevice {
    /// Where the container finds it.
    pub path: String,
    /// Its major number on the host.
    pub major: u32,
    /// Its minor number on the host.
    pub minor: u32,
    /// What may be done with it: letters of "rwm".
    pub access: String,
    /// Permission bits of its node.
    pub mode: u32,
    /// The node's owner.
    pub uid: u32,
    /// The node's group.
    pub gid: u32,
}

impl BlockDevice {
    /// Whether nobody may write to it.
    pub fn is_read_only(&self) -> bool {
        !self.access.contains('w')
    }
}

/// One of `linux.resources.devices`.
#[derive(Debug, Deserialize)]
struct Rule {
    #[serde(default)]
    allow: bool,
    #[serde(default, rename = "type")]
    kind: Option<String>,
    #[serde(default)]
    major: Option<i64>,
    #[serde(default)]
    minor: Option<i64>,
    #[serde(default)]
    access: Option<String>,
}

impl Rule {
    fn is_for(&self, device: &Device) -> bool {
        let kind = self.kind.as_deref().unwrap_or_default();
        let same_kind = kind == device.kind || (kind == "c" && device.kind == "u");
        same_kind && self.major == Some(device.major) && self.minor == Some(device.minor)
    }

    fn allows_all(&self) -> bool {
        let any = |number: Option<i64>| number.is_none_or(|number| number == -1);
        self.allow
            && matches!(self.kind.as_deref(), None | Some("" | "a"))
            && any(self.major)
            && any(self.minor)
    }
}

/// Leaves in the spec the devices that are the guest's own, and takes out what it is given. Nothing is left of the rules
/// for that: the guest's numbers are others.
///
/// # Errors
/// The device that is asked for by name and cannot be given is named.
pub fn take(spec: &mut Spec) -> Result<Vec<BlockDevice>, SpecError> {
    let rules = rules(&spec.linux)?;
    let all = rules.iter().any(Rule::allows_all);
    let mut blocks = Vec::new();
    let mut kept = Vec::new();
    let mut left_out = 0_usize;
    for device in std::mem::take(&mut spec.linux.devices) {
        let mut own = rules.iter().filter(|rule| rule.allow && rule.is_for(&device));
        match own.next_back() {
            _ if is_universal(&device) => kept.push(device),
            Some(rule) if !all && device.kind == "b" => blocks.push(block(&device, rule)?),
            Some(_) if !all && (device.major, device.minor) == TUN => kept.push(device),
            Some(_) if !all => {
                return Err(refused(&device, "is a device of the host, which a VM has no access to"));
            }
            _ => left_out += 1,
        }
    }
    if left_out > 0 {
        log::warn!(
            "{left_out} of linux.devices are the host's and not asked for by a rule of their own: left out"
        );
    }
    spec.linux.devices = kept;
    forget_rules(&mut spec.linux, &blocks);
    Ok(blocks)
}

fn rules(linux: &Linux) -> Result<Vec<Rule>, SpecError> {
    let Some(rules) = linux.resources.get("devices").filter(|rules| !rules.is_null()) else {
        return Ok(Vec::new());
    };
    Vec::deserialize(rules).map_err(|error| SpecError::Field {
        field: "linux.resources.devices",
        problem: format!("is malformed: {error}"),
    })
}

fn is_universal(device: &Device) -> bool {
    device.kind == "p" || UNIVERSAL.contains(&(device.major, device.minor)) && device.kind != "b"
}

fn block(device: &Device, rule: &Rule) -> Result<BlockDevice, SpecError> {
    let number = |number: i64| u32::try_from(number).map_err(|_| refused(device, "has no device number"));
    let field = |name: &str, default: u32| match device.rest.get(name) {
        None | Some(Value::Null) => Ok(default),
        Some(value) => value
            .as_u64()
            .and_then(|value| u32::try_from(value).ok())
            .ok_or_else(|| refused(device, "has a malformed fileMode, uid or gid")),
    };
    let access = rule.access.as_deref().unwrap_or(EVERY_ACCESS);
    if !access.chars().all(|letter| EVERY_ACCESS.contains(letter)) {
        return Err(refused(device, "is allowed an access that is not of \"rwm\""));
    }
    let path = path(device);
    if !path.starts_with('/') {
        return Err(refused(device, "has no absolute path"));
    }
    Ok(BlockDevice {
        path: path.to_owned(),
        major: number(device.major)?,
        minor: number(device.minor)?,
        access: access.to_owned(),
        mode: field("fileMode", 0o666)? & 0o7777,
        uid: field("uid", 0)?,
        gid: field("gid", 0)?,
    })
}

/// The rules of what has other numbers in the guest.
fn forget_rules(linux: &mut Linux, blocks: &[BlockDevice]) {
    let Some(Value::Array(rules)) = linux.resources.get_mut("devices") else { return };
    let of_block = |rule: &Value| {
        let is = |name: &str, number: u32| rule.get(name).and_then(Value::as_u64) == Some(number.into());
        let block = |block: &BlockDevice| is("major", block.major) && is("minor", block.minor);
        rule.get("type").and_then(Value::as_str) == Some("b") && blocks.iter().any(block)
    };
    rules.retain(|rule| !of_block(rule));
}

fn path(device: &Device) -> &str {
    device.rest.get("path").and_then(Value::as_str).unwrap_or_default()
}

fn refused(device: &Device, problem: &str) -> SpecError {
    let (path, Device { kind, major, minor, .. }) = (path(device), device);
    SpecError::Field { field: "linux.devices", problem: format!("{path} ({kind} {major}:{minor}) {problem}") }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn taken(devices: Value, rules: Value) -> Result<(Vec<BlockDevice>, Spec), SpecError> {
        let linux = json!({ "devices": devices, "resources": { "devices": rules } });
        let spec = json!({ "process": { "args": ["a"] }, "linux": linux });
        let mut spec = Spec::parse(spec.to_string().as_bytes()).unwrap();
        Ok((take(&mut spec)?, spec))
    }

    fn rule(kind: &str, major: i64, minor: i64, access: &str) -> Value {
        json!({ "allow": true, "type": kind, "major": major, "minor": minor, "access": access })
    }

    fn disk() -> Value {
        json!({ "path": "/dev/xvda", "type": "b", "major": 8, "minor": 16, "fileMode": 0o660, "uid": 5, "gid": 6 })
    }

    #[test]
    fn a_block_device_with_a_rule_of_its_own_is_given() {
        let deny = json!({ "allow": false, "access": "rwm" });
        let (blocks, spec) = taken(json!([disk()]), json!([deny, rule("b", 8, 16, "r")])).unwrap();
        let expected = BlockDevice {
            path: "/dev/xvda".to_owned(),
            major: 8,
            minor: 16,
            access: "r".to_owned(),
            mode: 0o660,
            uid: 5,
            gid: 6,
        };
        assert!(expected.is_read_only());
        assert_eq!(blocks, [expected]);
        assert!(spec.linux.devices.is_empty());
        assert_eq!(spec.linux.resources["devices"], json!([deny]));
        let (blocks, _) = taken(json!([disk()]), json!([rule("b", 8, 16, "rwm")])).unwrap();
        assert!(!blocks[0].is_read_only());
    }

    #[test]
    fn a_privileged_containers_devices_of_the_host_are_left_out() {
        let flood = json!([
            disk(),
            { "path": "/dev/null", "type": "c", "major": 1, "minor": 3 },
            { "path": "/dev/net/tun", "type": "c", "major": 10, "minor": 200 },
            { "path": "/dev/kvm", "type": "c", "major": 10, "minor": 232 },
        ]);
        for all in
            [json!({ "allow": true, "access": "rwm" }), json!({ "allow": true, "type": "a", "major": -1 })]
        {
            let (blocks, spec) = taken(flood.clone(), json!([rule("b", 8, 16, "rwm"), all])).unwrap();
            assert_eq!((blocks.len(), spec.linux.devices.len()), (0, 1));
        }
        let (blocks, spec) = taken(flood, Value::Null).unwrap();
        assert_eq!((blocks.len(), spec.linux.devices.len()), (0, 1));
    }

    #[test]
    fn devices_of_the_host_that_are_asked_for_are_refused_by_name() {
        let device = json!({ "path": "/dev/nvidia0", "type": "c", "major": 195, "minor": 0 });
        let error = taken(json!([device]), json!([rule("c", 195, 0, "rw")])).unwrap_err().to_string();
        assert!(error.starts_with("config.json: linux.devices /dev/nvidia0 (c 195:0) "), "{error}");
        let tun = json!({ "path": "/dev/net/tun", "type": "c", "major": 10, "minor": 200 });
        assert_eq!(taken(json!([tun]), json!([rule("c", 10, 200, "rwm")])).unwrap().1.linux.devices.len(), 1);
    }

    #[test]
    fn what_is_no_device_is_refused() {
        for (name, value) in [("path", json!("xvda")), ("fileMode", json!("x")), ("uid", json!(-1))] {
            let mut device = disk();
            device[name] = value;
            assert!(taken(json!([device]), json!([rule("b", 8, 16, "rw")])).is_err(), "{name}");
        }
        assert!(taken(json!([disk()]), json!([rule("b", 8, 16, "rx")])).is_err());
        assert!(taken(json!([]), json!("x")).is_err());
    }

    proptest! {
        #[test]
        fn no_block_device_is_left_in_the_spec(
            devices in proptest::collection::vec(("[bcup]", -1i64..3, -1i64..4), 0..5),
            rules in proptest::collection::vec(("[abc]?", -1i64..3, -1i64..4, "[rwmx]{0,2}"), 0..5),
        ) {
            let device = |(kind, major, minor)| json!({ "path": "/d", "type": kind, "major": major, "minor": minor });
            let devices: Vec<Value> = devices.into_iter().map(device).collect();
            let rules: Vec<Value> = rules
                .into_iter()
                .map(|(kind, major, minor, access)| rule(&kind, major, minor, &access))
                .collect();
            if let Ok((_, spec)) = taken(devices.into(), rules.into()) {
                prop_assert!(spec.linux.devices.iter().all(|device| device.kind != "b"));
            }
        }
    }
}
