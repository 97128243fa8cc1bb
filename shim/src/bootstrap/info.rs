//! `-info`: what the runtime is and can do.

use std::collections::HashMap;

use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{Message, MessageField};
use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use serde_json::json;

use super::VERSION;

const ALLOWED_MOUNTS_KEY: &str = "containerd.io/runtime-allow-mounts";

const FEATURES_TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";

/// Mounts that containerd 2.2 and newer shall not make on the host: the guest does, from disks.
const ALLOWED_MOUNTS: &str = "mkdir/*,format/*,erofs";

/// Mount options that a container's mounts can have.
const MOUNT_OPTIONS: [&str; 23] = [
    "atime",
    "bind",
    "defaults",
    "dev",
    "diratime",
    "exec",
    "noatime",
    "nodev",
    "nodiratime",
    "noexec",
    "norelatime",
    "nosuid",
    "private",
    "rbind",
    "relatime",
    "ro",
    "rprivate",
    "rro",
    "rshared",
    "rslave",
    "rw",
    "strictatime",
    "suid",
];

/// The message for standard output.
///
/// # Errors
/// When it cannot be encoded.
pub fn info() -> Result<Vec<u8>, protobuf::Error> {
    let features = json!({
        "ociVersionMin": "1.0.0",
        "ociVersionMax": "1.2.0",
        "mountOptions": MOUNT_OPTIONS,
        "linux": {
            "namespaces": ["cgroup", "ipc", "mount", "network", "pid", "user", "uts"],
            "cgroup": { "v1": false, "v2": true, "systemd": false, "rdma": false },
            "seccomp": { "enabled": true },
            "apparmor": { "enabled": false },
            "selinux": { "enabled": false },
            "mountExtensions": { "idmap": { "enabled": true } },
        },
    });
    let info = RuntimeInfo {
        name: "io.containerd.vmshim.v2".to_owned(),
        version: MessageField::some(RuntimeVersion {
            version: VERSION.to_owned(),
            ..RuntimeVersion::default()
        }),
        features: MessageField::some(Any {
            type_url: FEATURES_TYPE.to_owned(),
            value: features.to_string().into_bytes(),
            ..Any::default()
        }),
        annotations: HashMap::from([(ALLOWED_MOUNTS_KEY.to_owned(), ALLOWED_MOUNTS.to_owned())]),
        ..RuntimeInfo::default()
    };
    info.write_to_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_mounts_and_user_namespaces_need_is_announced() {
        let info = RuntimeInfo::parse_from_bytes(&info().unwrap()).unwrap();
        assert_eq!((info.name.as_str(), info.version.version.as_str()), ("io.containerd.vmshim.v2", VERSION));
        let features: serde_json::Value = serde_json::from_slice(&info.features.value).unwrap();
        let options = features["mountOptions"].as_array().unwrap();
        assert!(options.contains(&json!("rro")));
        // Those of file systems mean nothing for a bind mount, and what is mounted has its options for good.
        for refused in ["acl", "async", "dirsync", "mand", "remount", "sync"] {
            assert!(!options.contains(&json!(refused)), "{refused}");
        }
        // Both together are what CRI calls user namespaces for pods.
        assert!(features["linux"]["namespaces"].as_array().unwrap().contains(&json!("user")));
        assert_eq!(features["linux"]["mountExtensions"]["idmap"]["enabled"], true);
        assert_eq!(info.annotations["containerd.io/runtime-allow-mounts"], "mkdir/*,format/*,erofs");
    }
}
