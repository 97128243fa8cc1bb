//! `config.json`.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value};

use crate::storage::IdMap;

/// CRI's annotation for the pod of a container.
const SANDBOX_ID: &str = "io.kubernetes.cri.sandbox-id";

/// CRI's annotation for what a container is to its pod.
const CONTAINER_TYPE: &str = "io.kubernetes.cri.container-type";

/// Why a spec cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// No file.
    #[error("the bundle has no config.json: {} does not exist", .0.display())]
    Missing(PathBuf),
    /// A file that cannot be read.
    #[error("{} cannot be read: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file that is not a spec.
    #[error("{} is not an OCI runtime spec: {source}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Why.
        source: serde_json::Error,
    },
    /// Limits that are none.
    #[error("the limits are no OCI LinuxResources: {0}")]
    Resources(serde_json::Error),
    /// A field that is missing, wrong, or not supported.
    #[error("config.json: {field} {problem}")]
    Field {
        /// Its path.
        field: &'static str,
        /// What is wrong, completing "field …".
        problem: String,
    },
}

/// The spec.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Spec {
    #[serde(default)]
    pub(super) root: Root,
    #[serde(default, deserialize_with = "null_is_default")]
    pub(super) mounts: Vec<Mount>,
    pub(super) process: Process,
    #[serde(default)]
    pub(super) linux: Linux,
    #[serde(default, deserialize_with = "null_is_default")]
    annotations: BTreeMap<String, String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) hooks: Option<Value>,
    #[serde(flatten)]
    rest: Map<String, Value>,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct Root {
    #[serde(default)]
    pub(super) path: String,
    #[serde(flatten)]
    rest: Map<String, Value>,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct Mount {
    pub(super) destination: String,
    #[serde(default, rename = "type", skip_serializing_if = "String::is_empty")]
    pub(super) kind: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub(super) source: String,
    #[serde(default, deserialize_with = "null_is_default")]
    pub(super) options: Vec<String>,
    #[serde(flatten)]
    pub(super) rest: Map<String, Value>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Process {
    #[serde(default, deserialize_with = "null_is_default")]
    pub(super) args: Vec<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) oom_score_adj: Option<i32>,
    #[serde(flatten)]
    pub(super) rest: Map<String, Value>,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Linux {
    #[serde(default, deserialize_with = "null_is_default")]
    pub(super) namespaces: Vec<Namespace>,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub(super) cgroups_path: String,
    #[serde(default, deserialize_with = "null_is_default")]
    pub(super) devices: Vec<Device>,
    #[serde(default, deserialize_with = "null_is_default")]
    pub(super) resources: Map<String, Value>,
    #[serde(flatten)]
    pub(super) rest: Map<String, Value>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Namespace {
    #[serde(rename = "type")]
    pub(super) kind: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub(super) path: String,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Device {
    #[serde(rename = "type")]
    pub(super) kind: String,
    #[serde(default)]
    pub(super) major: i64,
    #[serde(default)]
    pub(super) minor: i64,
    #[serde(flatten)]
    pub(super) rest: Map<String, Value>,
}

/// Go writes an empty list or map as null.
fn null_is_default<'de, D: Deserializer<'de>, T: Default + Deserialize<'de>>(
    input: D,
) -> Result<T, D::Error> {
    Ok(Option::deserialize(input)?.unwrap_or_default())
}

impl Spec {
    /// Reads the bundle's `config.json`.
    ///
    /// # Errors
    /// When it is missing or not a spec.
    pub fn read(bundle: &Path) -> Result<Self, SpecError> {
        let path = bundle.join("config.json");
        match std::fs::read(&path) {
            Ok(bytes) => Self::parse(&bytes).map_err(|error| match error {
                ParseError::Json(source) => SpecError::Malformed { path, source },
                ParseError::Spec(error) => error,
            }),
            Err(error) if error.kind() == ErrorKind::NotFound => Err(SpecError::Missing(path)),
            Err(source) => Err(SpecError::Read { path, source }),
        }
    }

    pub(super) fn parse(bytes: &[u8]) -> Result<Self, ParseError> {
        let spec: Self = serde_json::from_slice(bytes)?;
        if spec.process.args.is_empty() {
            let problem = "must name the program to run".to_owned();
            return Err(ParseError::Spec(SpecError::Field { field: "process.args", problem }));
        }
        Ok(spec)
    }

    /// The container's root directory on the host.
    pub fn root_path(&self, bundle: &Path) -> PathBuf {
        bundle.join(if self.root.path.is_empty() { "rootfs" } else { &self.root.path })
    }

    /// The cgroup asked for; none where it is left to the runtime.
    pub fn cgroups_path(&self) -> Option<&str> {
        Some(self.linux.cgroups_path.as_str()).filter(|path| !path.is_empty())
    }

    /// The `oom_score_adj` asked for.
    pub fn oom_score(&self) -> Option<i32> {
        self.process.oom_score_adj
    }

    /// The pod that CRI puts the container in.
    pub fn sandbox_id(&self) -> Option<&str> {
        self.annotation(SANDBOX_ID).filter(|id| !id.is_empty())
    }

    /// The maps of a user namespace that the container is in, if it is in one and they are usable.
    pub fn users(&self) -> Option<IdMap> {
        self.linux.namespaces.iter().find(|namespace| namespace.kind == "user")?;
        let maps = |name: &str| serde_json::from_value(self.linux.rest.get(name)?.clone()).ok();
        let map = IdMap { uids: maps("uidMappings")?, gids: maps("gidMappings")? };
        map.is_valid().then_some(map)
    }

    /// Whether the container is the one that stands for its pod.
    pub fn is_sandbox(&self) -> bool {
        self.annotation(CONTAINER_TYPE) == Some("sandbox")
    }

    /// The pod that has to be there before the container is.
    pub fn member_of(&self) -> Option<&str> {
        self.sandbox_id().filter(|_| self.annotation(CONTAINER_TYPE) == Some("container"))
    }

    /// Adds a bind mount, unless something is mounted there.
    pub fn bind_by_default(&mut self, source: &Path, destination: &Path) {
        if self.mounts.iter().any(|mount| Path::new(&mount.destination) == destination) {
            return;
        }
        self.mounts.push(Mount {
            destination: destination.to_string_lossy().into_owned(),
            kind: "bind".to_owned(),
            source: source.to_string_lossy().into_owned(),
            options: vec!["rbind".to_owned(), "rprivate".to_owned()],
            rest: Map::new(),
        });
    }

    /// The network namespace to join; none where the container is to have a new one, or the host's.
    pub fn network_namespace(&self) -> Option<&Path> {
        let network = self.linux.namespaces.iter().find(|namespace| namespace.kind == "network")?;
        Some(Path::new(&network.path)).filter(|path| !path.as_os_str().is_empty())
    }

    /// Whether the container is to share the host's network.
    pub fn wants_host_network(&self) -> bool {
        !self.linux.namespaces.iter().any(|namespace| namespace.kind == "network")
    }

    /// An annotation's value.
    pub fn annotation(&self, name: &str) -> Option<&str> {
        self.annotations.get(name).map(String::as_str)
    }

    /// All annotations.
    pub fn annotations(&self) -> &BTreeMap<String, String> {
        &self.annotations
    }

    /// A number below `linux.resources`, such as `["cpu", "quota"]`.
    pub(super) fn resource(&self, path: [&str; 2]) -> Option<&Value> {
        self.linux.resources.get(path[0])?.get(path[1])
    }
}

#[derive(Debug, thiserror::Error)]
pub(super) enum ParseError {
    #[error(transparent)]
    Json(#[from] serde_json::Error),
    #[error(transparent)]
    Spec(SpecError),
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn unknown_fields_survive() {
        let text = r#"{"ociVersion":"9","process":{"args":["a"],"novel":1},"linux":{"intelRdt":{"x":1}},"root":{"path":"r","readonly":true}}"#;
        let spec = Spec::parse(text.as_bytes()).unwrap();
        let value = serde_json::to_value(&spec).unwrap();
        assert_eq!(value["process"]["novel"], 1);
        assert_eq!(value["linux"]["intelRdt"]["x"], 1);
        assert_eq!((&value["root"]["readonly"], &value["ociVersion"]), (&true.into(), &"9".into()));
        assert_eq!(spec.root_path(Path::new("/b")), Path::new("/b/r"));
    }

    #[test]
    fn a_file_that_is_missing_or_wrong_is_named() {
        let bundle = tempfile::tempdir().unwrap();
        assert!(matches!(Spec::read(bundle.path()), Err(SpecError::Missing(_))));
        std::fs::write(bundle.path().join("config.json"), "{").unwrap();
        assert!(Spec::read(bundle.path()).unwrap_err().to_string().contains("not an OCI runtime spec"));
        std::fs::write(bundle.path().join("config.json"), r#"{"process":{"args":[]}}"#).unwrap();
        assert_eq!(
            Spec::read(bundle.path()).unwrap_err().to_string(),
            "config.json: process.args must name the program to run"
        );
    }

    #[test]
    fn a_default_mount_gives_way() {
        let text = r#"{"process":{"args":["a"]},"mounts":[{"destination":"/etc/hosts","source":"own"}]}"#;
        let mut spec = Spec::parse(text.as_bytes()).unwrap();
        for name in ["/etc/hosts", "/etc/hostname"] {
            spec.bind_by_default(Path::new("/pod/file"), Path::new(name));
        }
        let sources: Vec<_> = spec.mounts.iter().map(|mount| mount.source.as_str()).collect();
        assert_eq!(sources, ["own", "/pod/file"]);
    }

    #[test]
    fn a_network_namespace_is_joined_new_or_the_hosts() {
        let spec = |namespaces: &str| {
            let linux = format!(r#"{{"process":{{"args":["a"]}},"linux":{{"namespaces":[{namespaces}]}}}}"#);
            Spec::parse(linux.as_bytes()).unwrap()
        };
        let joined = spec(r#"{"type":"pid"},{"type":"network","path":"/run/netns/x"}"#);
        assert_eq!(joined.network_namespace(), Some(Path::new("/run/netns/x")));
        let own = spec(r#"{"type":"network"}"#);
        assert_eq!((own.network_namespace(), own.wants_host_network()), (None, false));
        assert!(spec(r#"{"type":"pid"}"#).wants_host_network());
    }

    #[test]
    fn gos_nulls_are_empty_lists() {
        let text = r#"{"process":{"args":["a"]},"mounts":null,"linux":{"namespaces":null,"devices":null}}"#;
        assert!(Spec::parse(text.as_bytes()).unwrap().mounts.is_empty());
    }

    proptest! {
        #[test]
        fn any_text_is_a_spec_or_an_error(text in r#"[{}\[\]",:a-z0-9]{0,80}"#) {
            let _ = Spec::parse(text.as_bytes());
        }
    }
}
