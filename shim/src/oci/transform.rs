//! From the host's spec to the guest's: everything that names something of the host is replaced, resolved or taken
//! out, here and nowhere else.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};
use vmshim_protocol::agent::{CONTAINER_NAMESPACE, POD_NAMESPACE, POD_SHARED_MEMORY, SOCKET_SOURCE};
use vmshim_protocol::shared::SOURCE_PREFIX;

use super::devices::{self, BlockDevice};
use super::process;
use super::spec::{Mount, Namespace};
use super::{Spec, SpecError};
use crate::hooks::Hooks;
use crate::ids::Name;
use crate::storage::{IdMap, Mapping};

/// A file or directory of the host that the container shall see.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostBind {
    /// Where it is on the host.
    pub source: PathBuf,
    /// Its name below the container's `mounts` directory.
    pub name: String,
    /// With everything mounted below it.
    pub recursive: bool,
    /// Not to be written through this mount.
    pub read_only: bool,
    /// Nor through anything mounted below it.
    pub recursive_read_only: bool,
    /// No programs to be run.
    pub no_exec: bool,
    /// Other owners than on the host.
    pub id_map: Option<IdMap>,
}

/// What the spec asks of the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostParts {
    /// Files and directories.
    pub binds: Vec<HostBind>,
    /// Unix sockets, in the order of their numbers.
    pub sockets: Vec<PathBuf>,
    /// Block devices.
    pub devices: Vec<BlockDevice>,
    /// Programs.
    pub hooks: Hooks,
}

/// The type of a mount that is a Unix socket of the host.
const SOCKET: &str = "uds";

/// What limits the host's devices, caches or network classes, and how it is called in errors.
const HOST_RESOURCES: [(&str, &str); 4] = [
    ("blockIO", "linux.resources.blockIO"),
    ("network", "linux.resources.network"),
    ("rdma", "linux.resources.rdma"),
    ("intelRdt", "linux.intelRdt"),
];

/// Where a container is among the others of its guest.
#[derive(Debug, Clone, Copy)]
pub enum Place<'a> {
    /// Its namespaces are its own: it is alone, or it is the container that holds those of its pod.
    Alone,
    /// In a pod whose namespaces the container `sandbox` holds, for which the process `pid` stands on the host.
    Member {
        /// The container's id.
        sandbox: &'a Name,
        /// A process id of the host.
        pid: u32,
    },
    /// In a pod that holds its namespaces itself.
    Sandboxed,
}

/// Rewrites the spec for the guest and says what it needs of the host.
///
/// # Errors
/// When the spec asks for what a guest cannot have; the field is named.
pub fn for_guest(
    spec: &mut Spec,
    bundle: &Path,
    id: &Name,
    place: Place<'_>,
) -> Result<HostParts, SpecError> {
    let shared_memory = SharedMemory::of(spec, place);
    let (mut binds, mut sockets) = (Vec::new(), Vec::new());
    for mount in &mut spec.mounts {
        if shared_memory.transform(mount) {
            continue;
        }
        if mount.kind == SOCKET {
            let host = std::mem::replace(&mut mount.source, format!("{SOCKET_SOURCE}{}", sockets.len()));
            sockets.push(bundle.join(host));
            mount.kind = "bind".to_owned();
            mount.options.push("bind".to_owned());
            continue;
        }
        if let Some(bind) = bind_of_host(mount, bundle, binds.len())? {
            mount.source = shared_source(id, &bind.name);
            binds.push(bind);
        }
    }
    refuse_later_network(spec)?;
    let has_users = spec.users().is_some();
    spec.linux
        .namespaces
        .iter_mut()
        .try_for_each(|namespace| transform_namespace(namespace, place, has_users))?;
    // The network is the whole guest's, so a container has none of its own.
    spec.linux.namespaces.retain(|namespace| namespace.kind != "network");
    localise(&mut spec.linux.resources, &mut spec.linux.rest)?;
    spec.linux.cgroups_path = format!("/{id}");
    let devices = devices::take(spec)?;
    process::for_guest(&mut spec.process.rest)?;
    process::take_label(&mut spec.linux.rest, "mountLabel", "linux.mountLabel");
    let hooks = Hooks::take(&mut spec.hooks)?;
    Ok(HostParts { binds, sockets, devices, hooks })
}

/// Leaves it to the host that a volume is read-only. For the guest it is one mount with all that is mounted below, which
/// may be writable.
pub fn leave_read_only_to_host(spec: &mut Spec, id: &Name, volumes: &[String]) {
    for name in volumes {
        let source = shared_source(id, name);
        for mount in spec.mounts.iter_mut().filter(|mount| mount.source == source) {
            mount.options.retain(|option| option != "ro");
        }
    }
}

/// How the agent is told of a volume.
fn shared_source(id: &Name, name: &str) -> String {
    format!("{SOURCE_PREFIX}{id}/mounts/{name}")
}

/// The memory that a pod's containers share at `/dev/shm`, which is the guest's. Whatever else is mounted there is a volume
/// as any other.
struct SharedMemory {
    /// Where containerd has the pod's on the host, from the directory of all pods on; none where the container is in none.
    pods: Option<PathBuf>,
    /// The ipc namespace is the host's, and so is the memory; the guest is its host.
    hosts: bool,
    /// A tmpfs at `/dev/shm` is meant to be the pod's, since the ipc namespace is.
    joined: bool,
}

impl SharedMemory {
    fn of(spec: &Spec, place: Place<'_>) -> Self {
        let ipc = spec.linux.namespaces.iter().find(|namespace| namespace.kind == "ipc");
        Self {
            pods: spec.sandbox_id().map(|id| Path::new("sandboxes").join(id).join("shm")),
            hosts: ipc.is_none(),
            joined: matches!(place, Place::Sandboxed) && ipc.is_some_and(|ipc| !ipc.path.is_empty()),
        }
    }

    /// Rewrites the mount of the pod's; false for any other.
    fn transform(&self, mount: &mut Mount) -> bool {
        if Path::new(&mount.destination) != Path::new("/dev/shm") || !self.is_pods(mount) {
            return false;
        }
        mount.kind = "bind".to_owned();
        mount.source = POD_SHARED_MEMORY.to_owned();
        mount.options = ["rbind", "nosuid", "noexec", "nodev"].map(str::to_owned).to_vec();
        true
    }

    fn is_pods(&self, mount: &Mount) -> bool {
        if !is_bind(mount) {
            return self.joined && mount.kind == "tmpfs";
        }
        let Some(pods) = &self.pods else { return false };
        let source = Path::new(&mount.source);
        source.ends_with(pods) || self.hosts && source == Path::new("/dev/shm")
    }
}

fn is_bind(mount: &Mount) -> bool {
    mount.kind == "bind" || mount.options.iter().any(|option| option == "bind" || option == "rbind")
}

/// What the mount needs of the host.
fn bind_of_host(mount: &mut Mount, bundle: &Path, index: usize) -> Result<Option<HostBind>, SpecError> {
    if !is_bind(mount) {
        return Ok(None);
    }
    let has = |name: &str| mount.options.iter().any(|option| option == name);
    if has("shared") || has("rshared") {
        log::warn!("what is mounted in {} will not be seen by the host: it is in a guest", mount.destination);
    }
    let bind = HostBind {
        source: bundle.join(&mount.source),
        name: index.to_string(),
        recursive: has("rbind"),
        read_only: has("ro") || has("rro"),
        recursive_read_only: has("rro"),
        no_exec: has("noexec"),
        id_map: None,
    };
    Ok(Some(HostBind { id_map: take_id_map(mount)?, ..bind }))
}

/// Owners are mapped on the host, whose file system knows how; the guest sees them as they are then.
fn take_id_map(mount: &mut Mount) -> Result<Option<IdMap>, SpecError> {
    let refused = |problem: String| SpecError::Field { field: "mounts", problem };
    let mut take = |name: &str| -> Result<Vec<Mapping>, SpecError> {
        let value = mount.rest.remove(name).unwrap_or(Value::Array(Vec::new()));
        serde_json::from_value(value).map_err(|error| refused(format!("have malformed {name}: {error}")))
    };
    let map = IdMap { uids: take("uidMappings")?, gids: take("gidMappings")? };
    let asked = mount.options.iter().any(|option| matches!(option.as_str(), "idmap" | "ridmap"));
    mount.options.retain(|option| !matches!(option.as_str(), "idmap" | "ridmap"));
    match (map == IdMap::default(), map.is_valid()) {
        (true, _) if !asked => Ok(None),
        (false, true) => Ok(Some(map)),
        _ => {
            let problem =
                format!("need uidMappings and gidMappings of 1 to 340 entries for {}", mount.destination);
            Err(refused(problem))
        }
    }
}

/// containerd 1.7 has a pod with users of its own make its network namespace, which it configures when that pod's container
/// has been created, as that of the container's process.
fn refuse_later_network(spec: &Spec) -> Result<(), SpecError> {
    let made = |kind: &str| {
        spec.linux.namespaces.iter().any(|namespace| namespace.kind == kind && namespace.path.is_empty())
    };
    if spec.is_sandbox() && made("network") && made("user") {
        let problem = "leave the network of a pod with a user namespace to be configured after its container is created; \
                       use containerd 2.0 or newer, which configures it before"
            .to_owned();
        return Err(SpecError::Field { field: "linux.namespaces", problem });
    }
    Ok(())
}

/// Namespaces are the guest's own; a path on the host can only mean one of the pod's. What there is to a user namespace are
/// its maps, so one of the host's that the spec tells the maps of is as good when it is the guest's. It is always the
/// pod's, which has the network along with it.
fn transform_namespace(
    namespace: &mut Namespace,
    place: Place<'_>,
    has_users: bool,
) -> Result<(), SpecError> {
    let is_users = namespace.kind == "user";
    if is_users && has_users && matches!(place, Place::Alone) {
        POD_NAMESPACE.clone_into(&mut namespace.path);
        return Ok(());
    }
    if namespace.path.is_empty() || matches!(namespace.kind.as_str(), "network" | "cgroup") {
        namespace.path.clear();
        return Ok(());
    }
    let can_be_pods = is_users || matches!(namespace.kind.as_str(), "ipc" | "uts" | "pid");
    match place {
        // It may be a placeholder, and is never looked at.
        Place::Sandboxed if can_be_pods => POD_NAMESPACE.clone_into(&mut namespace.path),
        Place::Member { sandbox, pid }
            if can_be_pods && namespace.path == format!("/proc/{pid}/ns/{}", namespace.kind) =>
        {
            namespace.path =
                if is_users { POD_NAMESPACE.to_owned() } else { format!("{CONTAINER_NAMESPACE}{sandbox}") };
        }
        _ => {
            let problem = format!(
                "joins the {} namespace {}, which is not one of its pod's; a VM cannot join others",
                namespace.kind, namespace.path
            );
            return Err(SpecError::Field { field: "linux.namespaces", problem });
        }
    }
    Ok(())
}

/// Limits of a container that runs, as the JSON of an OCI `LinuxResources`, without what means the host's.
///
/// # Errors
/// When it is none, or asks for what only the host could give.
pub fn resources_for_guest(json: &[u8]) -> Result<Vec<u8>, SpecError> {
    let mut resources: Map<_, _> = serde_json::from_slice(json).map_err(SpecError::Resources)?;
    localise(&mut resources, &mut Map::new())?;
    serde_json::to_vec(&resources).map_err(SpecError::Resources)
}

fn localise(resources: &mut Map<String, Value>, linux: &mut Map<String, Value>) -> Result<(), SpecError> {
    for (name, field) in HOST_RESOURCES {
        let asked = [resources.remove(name), linux.remove(name)];
        if asked.iter().flatten().any(asks_for_something) {
            let problem = "limits what is the host's, which processes of a guest do not use".to_owned();
            return Err(SpecError::Field { field, problem });
        }
    }
    if let Some(cpu) = resources.get_mut("cpu").and_then(|cpu| cpu.as_object_mut()) {
        for name in ["realtimeRuntime", "realtimePeriod"] {
            // Kubelets set them for whole nodes; a pod must not fail of it.
            if cpu.remove(name).as_ref().is_some_and(asks_for_something) {
                log::warn!(
                    "linux.resources.cpu.{name} means the host's CPUs and is not applied in the guest"
                );
            }
        }
    }
    Ok(())
}

/// Whether a value is more than the absence of one.
fn asks_for_something(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Bool(value) => *value,
        Value::Number(number) => number.as_f64() != Some(0.0),
        Value::String(text) => !text.is_empty(),
        Value::Array(list) => !list.is_empty(),
        Value::Object(fields) => fields.values().any(asks_for_something),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn transform(spec: Value) -> Result<(Value, Vec<HostBind>), SpecError> {
        transform_in(spec, Place::Alone)
    }

    fn transform_in(spec: Value, place: Place<'_>) -> Result<(Value, Vec<HostBind>), SpecError> {
        let mut spec = Spec::parse(spec.to_string().as_bytes()).unwrap();
        let parts = for_guest(&mut spec, Path::new("/bundle"), &Name::new("c1").unwrap(), place)?;
        Ok((serde_json::to_value(spec).unwrap(), parts.binds))
    }

    fn with_namespace(kind: &str, path: &str) -> Value {
        json!({ "process": { "args": ["a"] }, "linux": { "namespaces": [{ "type": kind, "path": path }] } })
    }

    fn shared_memory(mount: Value, annotations: Value, namespaces: Value, place: Place<'_>) -> Value {
        let spec = json!({
            "process": { "args": ["a"] }, "mounts": [mount], "annotations": annotations,
            "linux": { "namespaces": namespaces },
        });
        transform_in(spec, place).unwrap().0["mounts"][0].clone()
    }

    fn with_mounts(mounts: Value) -> Value {
        json!({ "process": { "args": ["a"] }, "mounts": mounts })
    }

    #[test]
    fn bind_mounts_are_staged_and_others_are_the_guests() {
        let (spec, binds) = transform(with_mounts(json!([
            { "destination": "/proc", "type": "proc", "source": "proc" },
            { "destination": "/data", "type": "bind", "source": "/srv", "options": ["rbind", "ro", "noexec"] },
            { "destination": "/etc/hosts", "source": "hosts", "options": ["bind", "rro"] },
        ])))
        .unwrap();
        assert_eq!(spec["mounts"][0]["source"], "proc");
        assert_eq!(spec["mounts"][1]["source"], "vmshim-shared:c1/mounts/0");
        assert_eq!(spec["mounts"][2]["source"], "vmshim-shared:c1/mounts/1");
        assert_eq!(
            binds,
            [
                HostBind {
                    source: "/srv".into(),
                    name: "0".into(),
                    recursive: true,
                    read_only: true,
                    recursive_read_only: false,
                    no_exec: true,
                    id_map: None,
                },
                HostBind {
                    source: "/bundle/hosts".into(),
                    name: "1".into(),
                    recursive: false,
                    read_only: true,
                    recursive_read_only: true,
                    no_exec: false,
                    id_map: None,
                },
            ]
        );
    }

    #[test]
    fn a_volume_that_is_read_only_in_part_is_so_by_the_host_alone() {
        let mount = |to: &str| json!({ "destination": to, "type": "bind", "source": "/s", "options": ["rbind", "ro"] });
        let mut spec =
            Spec::parse(with_mounts(json!([mount("/a"), mount("/b")])).to_string().as_bytes()).unwrap();
        let id = Name::new("c1").unwrap();
        let parts = for_guest(&mut spec, Path::new("/bundle"), &id, Place::Alone).unwrap();
        assert!(parts.binds.iter().all(|bind| bind.read_only));
        leave_read_only_to_host(&mut spec, &id, &["1".to_owned()]);
        let spec = serde_json::to_value(spec).unwrap();
        assert_eq!(spec["mounts"][0]["options"], json!(["rbind", "ro"]));
        assert_eq!(spec["mounts"][1]["options"], json!(["rbind"]));
    }

    #[test]
    fn owners_are_mapped_on_the_host() {
        let map = json!([{ "containerID": 0, "hostID": 1000, "size": 5 }]);
        let mount = |uids: Value, options: Value| {
            with_mounts(json!([{
                "destination": "/d", "type": "bind", "source": "/s", "options": options,
                "uidMappings": uids, "gidMappings": map,
            }]))
        };
        let (spec, binds) = transform(mount(map.clone(), json!(["rbind", "ridmap"]))).unwrap();
        let expected = vec![Mapping { container: 0, host: 1000, size: 5 }];
        assert_eq!(binds[0].id_map, Some(IdMap { uids: expected.clone(), gids: expected }));
        assert_eq!(spec["mounts"][0]["options"], json!(["rbind"]));
        assert!(spec["mounts"][0].get("uidMappings").is_none());
        for bad in [json!([]), json!([{ "containerID": -1 }]), json!("x")] {
            let error = transform(mount(bad, json!(["bind"]))).unwrap_err().to_string();
            assert!(error.starts_with("config.json: mounts ") && error.contains("uidMappings"), "{error}");
        }
    }

    #[test]
    fn sockets_of_the_host_are_numbered() {
        let mut spec = Spec::parse(
            with_mounts(json!([
                { "destination": "/run/a", "type": "uds", "source": "/host/a" },
                { "destination": "/run/b", "type": "uds", "source": "b", "options": ["ro"] },
            ]))
            .to_string()
            .as_bytes(),
        )
        .unwrap();
        let parts =
            for_guest(&mut spec, Path::new("/bundle"), &Name::new("c1").unwrap(), Place::Alone).unwrap();
        assert_eq!(parts.sockets, [PathBuf::from("/host/a"), PathBuf::from("/bundle/b")]);
        assert!(parts.binds.is_empty());
        let spec = serde_json::to_value(spec).unwrap();
        assert_eq!(spec["mounts"][1]["source"], "vmshim-socket:1");
        assert_eq!(
            (&spec["mounts"][1]["type"], &spec["mounts"][1]["options"]),
            (&json!("bind"), &json!(["ro", "bind"]))
        );
    }

    #[test]
    fn what_names_the_host_is_gone() {
        let (spec, _) = transform(json!({
            "process": { "args": ["a"], "apparmorProfile": "cri-containerd.apparmor.d", "selinuxLabel": "l" },
            "hooks": { "prestart": [] },
            "linux": {
                "cgroupsPath": "system.slice:a:b",
                "mountLabel": "m",
                "namespaces": [
                    { "type": "pid" }, { "type": "ipc" },
                    { "type": "network", "path": "/run/netns/x" }
                ],
                "devices": [
                    { "path": "/dev/null", "type": "c", "major": 1, "minor": 3 },
                    { "path": "/dev/sda", "type": "b", "major": 8, "minor": 0 },
                    { "path": "/dev/ram", "type": "b", "major": 1, "minor": 3 },
                ],
                "resources": {
                    "cpu": { "quota": 5, "cpus": "7", "realtimeRuntime": 9 }, "blockIO": {}, "pids": { "limit": 3 },
                },
            },
        }))
        .unwrap();
        assert_eq!(spec["linux"]["namespaces"], json!([{ "type": "pid" }, { "type": "ipc" }]));
        assert_eq!(spec["linux"]["cgroupsPath"], "/c1");
        assert_eq!(spec["linux"]["devices"].as_array().unwrap().len(), 1);
        assert_eq!(
            spec["linux"]["resources"],
            json!({ "cpu": { "quota": 5, "cpus": "7" }, "pids": { "limit": 3 } })
        );
        assert_eq!(spec["process"], json!({ "args": ["a"] }));
        assert!(spec.get("hooks").is_none() && spec["linux"].get("mountLabel").is_none());
    }

    #[test]
    fn later_limits_are_taken_as_the_first_are() {
        let update =
            |json: &str| resources_for_guest(json.as_bytes()).map(|json| String::from_utf8(json).unwrap());
        let kept = update(r#"{"cpu":{"cpus":"1","realtimePeriod":7},"pids":{"limit":3}}"#).unwrap();
        assert_eq!(kept, r#"{"cpu":{"cpus":"1"},"pids":{"limit":3}}"#);
        assert!(update(r#"{"blockIO":{"weight":10}}"#).unwrap_err().to_string().contains("blockIO"));
        for none in ["", "[]", "7"] {
            assert!(matches!(update(none), Err(SpecError::Resources(_))), "{none}");
        }
    }

    #[test]
    fn limits_of_what_is_the_hosts_are_refused_by_name() {
        let spec = |linux: Value| json!({ "process": { "args": ["a"] }, "linux": linux });
        let refused = [
            (json!({ "resources": { "blockIO": { "weight": 10 } } }), "linux.resources.blockIO"),
            (json!({ "resources": { "rdma": { "mlx5_1": { "hcaHandles": 3 } } } }), "linux.resources.rdma"),
            (json!({ "intelRdt": { "closID": "x" } }), "linux.intelRdt"),
        ];
        for (linux, field) in refused {
            let error = transform_in(spec(linux), Place::Alone).unwrap_err().to_string();
            assert!(error.contains(field), "{error}");
        }
        let nothing =
            json!({ "resources": { "blockIO": { "weight": 0, "leafWeight": null }, "network": {} } });
        assert_eq!(transform_in(spec(nothing), Place::Alone).unwrap().0["linux"]["resources"], json!({}));
    }

    #[test]
    fn namespaces_of_the_pod_are_joined() {
        let sandbox = Name::new("pod").unwrap();
        let member = Place::Member { sandbox: &sandbox, pid: 7 };
        for kind in ["ipc", "uts", "pid"] {
            let spec = with_namespace(kind, &format!("/proc/7/ns/{kind}"));
            let path = |place| {
                transform_in(spec.clone(), place).unwrap().0["linux"]["namespaces"][0]["path"].clone()
            };
            assert_eq!(path(member), "vmshim-container:pod");
            assert_eq!(path(Place::Sandboxed), "vmshim-pod");
        }
        let users = with_namespace("user", "/proc/7/ns/user");
        for place in [member, Place::Sandboxed] {
            let path =
                transform_in(users.clone(), place).unwrap().0["linux"]["namespaces"][0]["path"].clone();
            assert_eq!(path, "vmshim-pod");
        }
        let (network, _) = transform_in(with_namespace("network", "/run/netns/x"), member).unwrap();
        assert_eq!(network["linux"]["namespaces"], json!([]));
    }

    #[test]
    fn namespaces_of_others_are_refused_by_name() {
        let sandbox = Name::new("pod").unwrap();
        let member = Place::Member { sandbox: &sandbox, pid: 7 };
        let foreign = [
            ("user", "/proc/8/ns/user", member),
            ("user", "/proc/1/ns/user", Place::Alone),
            ("ipc", "/proc/8/ns/ipc", member),
            ("ipc", "/proc/7/ns/uts", member),
            ("pid", "/proc/7/ns/pid", Place::Alone),
            ("mount", "/proc/7/ns/mnt", Place::Sandboxed),
        ];
        for (kind, path, place) in foreign {
            let error = transform_in(with_namespace(kind, path), place).unwrap_err().to_string();
            assert!(error.contains("linux.namespaces") && error.contains(path), "{error}");
        }
    }

    #[test]
    fn users_of_its_own_are_the_pods_by_their_maps() {
        let map = json!([{ "containerID": 0, "hostID": 1000, "size": 9 }]);
        for path in ["", "/run/pinned"] {
            let spec = json!({ "process": { "args": ["a"] }, "linux": {
                "namespaces": [{ "type": "user", "path": path }], "uidMappings": map, "gidMappings": map,
            } });
            let linux = transform_in(spec, Place::Alone).unwrap().0["linux"].clone();
            assert_eq!(linux["namespaces"], json!([{ "type": "user", "path": "vmshim-pod" }]));
            assert_eq!(linux["uidMappings"], map);
        }
    }

    #[test]
    fn a_network_that_comes_later_is_refused() {
        let spec = |kind: &str, path: &str| {
            json!({
                "process": { "args": ["a"] },
                "annotations": { "io.kubernetes.cri.container-type": kind },
                "linux": { "namespaces": [{ "type": "user" }, { "type": "network", "path": path }] },
            })
        };
        let error = transform_in(spec("sandbox", ""), Place::Alone).unwrap_err().to_string();
        assert!(error.contains("containerd 2.0"), "{error}");
        assert!(transform_in(spec("sandbox", "/run/netns/x"), Place::Alone).is_ok());
        assert!(transform_in(spec("container", ""), Place::Alone).is_ok());
    }

    #[test]
    fn shared_memory_is_the_pods_or_a_volume() {
        let bind = |source: &str| json!({ "destination": "/dev/shm", "type": "bind", "source": source, "options": ["rbind", "ro"] });
        let tmpfs =
            json!({ "destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["size=1k"] });
        let cri = json!({ "io.kubernetes.cri.sandbox-id": "pod" });
        let (hosts, own) = (json!([]), json!([{ "type": "ipc" }]));
        let joined = json!([{ "type": "ipc", "path": "/proc/1/ns/ipc" }]);
        let alone = Place::Alone;
        let pods = "/run/containerd/io.containerd.grpc.v1.cri/sandboxes/pod/shm";
        for (source, ipc) in [(pods, &own), (pods, &hosts), ("/dev/shm", &hosts)] {
            let mount = shared_memory(bind(source), cri.clone(), ipc.clone(), alone);
            assert_eq!((&mount["type"], &mount["source"]), (&"bind".into(), &"/dev/shm".into()));
        }
        let volume = "vmshim-shared:c1/mounts/0";
        for (source, annotations, ipc) in [
            ("/var/lib/kubelet/pods/x/volumes/kubernetes.io~empty-dir/shm", &cri, &own),
            ("/srv/pod/shm", &cri, &own),
            ("/dev/shm", &cri, &own),
            ("/dev/shm", &json!({}), &hosts),
            ("/srv", &json!({}), &own),
        ] {
            let mount = shared_memory(bind(source), annotations.clone(), ipc.clone(), alone);
            assert_eq!((&mount["source"], &mount["options"]), (&volume.into(), &json!(["rbind", "ro"])));
        }
        let sandboxed = Place::Sandboxed;
        let shared = shared_memory(tmpfs.clone(), json!({}), joined, sandboxed);
        assert_eq!(shared["source"], "/dev/shm");
        let private = shared_memory(tmpfs.clone(), json!({}), json!([]), sandboxed);
        assert_eq!(private, tmpfs);
    }

    proptest! {
        #[test]
        fn no_bind_mount_keeps_a_source_of_the_host(
            mounts in proptest::collection::vec(("/[a-z/]{0,9}", "(bind|tmpfs|)", "[a-z/.]{0,9}", "(rbind|bind|ro)"), 0..6)
        ) {
            let mounts: Vec<Value> = mounts
                .into_iter()
                .map(|(to, kind, from, option)| json!({ "destination": to, "type": kind, "source": from, "options": [option] }))
                .collect();
            let (spec, binds) = transform(with_mounts(mounts.into())).unwrap();
            let staged = spec["mounts"].as_array().unwrap().iter().filter(|mount| {
                mount["source"].as_str().is_some_and(|source| source.starts_with("vmshim-shared:c1/mounts/"))
            });
            prop_assert_eq!(staged.count(), binds.len());
        }
    }
}
