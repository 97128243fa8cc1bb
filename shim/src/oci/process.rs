//! What a process object, of a container or of an exec, asks of the host's kernel.

use serde_json::{Map, Value};

use super::SpecError;

/// The AppArmor profiles that containerd, nerdctl and Docker give every container.
const DEFAULT_PROFILES: [&str; 5] =
    ["", "unconfined", "cri-containerd.apparmor.d", "nerdctl-default", "docker-default"];

/// The sets of `process.capabilities`.
const CAPABILITY_SETS: [&str; 5] = ["bounding", "effective", "inheritable", "permitted", "ambient"];

/// Every capability that Linux has had up to 6.12 (linux/capability.h), without "CAP_".
const CAPABILITIES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// Takes out what the guest's kernel does not know, with a warning where nothing is lost by it.
///
/// # Errors
/// When somebody has chosen an AppArmor profile.
pub fn for_guest(process: &mut Map<String, Value>) -> Result<(), SpecError> {
    take_apparmor_profile(process)?;
    take_label(process, "selinuxLabel", "process.selinuxLabel");
    take_unknown_capabilities(process);
    Ok(())
}

/// Takes out an SELinux label, which confines processes of the host only.
pub fn take_label(fields: &mut Map<String, Value>, name: &str, shown: &str) {
    let label = fields.remove(name);
    if label.as_ref().and_then(Value::as_str).is_some_and(|label| !label.is_empty()) {
        log::warn!("{shown} is not applied: the guest has no SELinux");
    }
}

/// A profile that is everybody's confines the host's processes, of which a guest has none; one that somebody chose is
/// more than can be given.
fn take_apparmor_profile(process: &mut Map<String, Value>) -> Result<(), SpecError> {
    let profile = process.remove("apparmorProfile");
    match profile.as_ref().and_then(Value::as_str) {
        Some(profile) if !DEFAULT_PROFILES.contains(&profile) => {
            let problem =
                format!("names the profile {profile}, which a guest without AppArmor cannot enforce");
            Err(SpecError::Field { field: "process.apparmorProfile", problem })
        }
        _ => Ok(()),
    }
}

/// As the OCI runtime spec has it, a capability that is not known is a warning.
fn take_unknown_capabilities(process: &mut Map<String, Value>) {
    let Some(Value::Object(sets)) = process.get_mut("capabilities") else { return };
    let mut unknown = Vec::new();
    for set in CAPABILITY_SETS {
        let Some(Value::Array(names)) = sets.get_mut(set) else { continue };
        names.retain(|name| {
            let Some(name) = name.as_str() else { return true };
            let known = name.strip_prefix("CAP_").is_some_and(|name| CAPABILITIES.contains(&name));
            if !known && !unknown.iter().any(|seen| seen == name) {
                unknown.push(name.to_owned());
            }
            known
        });
    }
    if !unknown.is_empty() {
        log::warn!("process.capabilities: unknown ones are not applied: {}", unknown.join(", "));
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn cleaned(process: Value) -> Result<Value, SpecError> {
        let Value::Object(mut process) = process else { panic!("an object") };
        for_guest(&mut process).map(|()| process.into())
    }

    #[test]
    fn unknown_capabilities_are_left_out() {
        let process = json!({ "capabilities": {
            "bounding": ["CAP_KILL", "CAP_FUTURE", "KILL"], "ambient": null, "effective": ["CAP_CHECKPOINT_RESTORE"],
        } });
        let expected = json!({ "capabilities": {
            "bounding": ["CAP_KILL"], "ambient": null, "effective": ["CAP_CHECKPOINT_RESTORE"],
        } });
        assert_eq!(cleaned(process).unwrap(), expected);
    }

    #[test]
    fn a_profile_of_everybodys_and_a_label_are_left_out() {
        let process = json!({ "apparmorProfile": "docker-default", "selinuxLabel": "a:b", "cwd": "/" });
        assert_eq!(cleaned(process).unwrap(), json!({ "cwd": "/" }));
    }

    #[test]
    fn a_chosen_apparmor_profile_is_refused_by_name() {
        let error = cleaned(json!({ "apparmorProfile": "k8s-nginx" })).unwrap_err().to_string();
        assert!(error.contains("process.apparmorProfile") && error.contains("k8s-nginx"), "{error}");
    }
}
