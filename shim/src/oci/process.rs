//! What a process object, of a container or of an exec, asks of the host's kernel.

use serde_json::{Map, Value};

use super::SpecError;

/// The AppArmor profiles that containerd, nerdctl and Docker give every container.
const DEFAULT_PROFILES: [&str; 5] =
    ["", "unconfined", "cri-containerd.apparmor.d", "nerdctl-default", "docker-default"];

/// Takes out what names the host's security modules, with a warning where something is lost by it.
///
/// # Errors
/// When somebody has chosen an AppArmor profile.
pub fn for_guest(process: &mut Map<String, Value>) -> Result<(), SpecError> {
    take_apparmor_profile(process)?;
    take_label(process, "selinuxLabel", "process.selinuxLabel");
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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn cleaned(process: Value) -> Result<Value, SpecError> {
        let Value::Object(mut process) = process else { panic!("an object") };
        for_guest(&mut process).map(|()| process.into())
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
