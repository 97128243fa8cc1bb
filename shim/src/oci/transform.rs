//! From the host's spec to the guest's: everything that names something of the host is replaced, resolved or taken
//! out, here and nowhere else.

use std::path::{Path, PathBuf};

use serde_json::Value;
use vmshim_protocol::agent::SOCKET_SOURCE;

use super::spec::{Device, Mount};
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
    /// Programs.
    pub hooks: Hooks,
}

/// Devices whose numbers mean the same in every kernel, so that a node of them is right in the guest too.
const UNIVERSAL_DEVICES: [(i64, i64); 10] =
    [(1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (1, 11), (5, 0), (5, 1), (5, 2), (10, 229)];

/// The type of a mount that is a Unix socket of the host.
const SOCKET: &str = "uds";

/// Controllers whose limits name the host's devices, CPUs or network classes.
const HOST_RESOURCES: [&str; 4] = ["blockIO", "network", "rdma", "intelRdt"];

/// Rewrites the spec for the guest and says what it needs of the host.
///
/// # Errors
/// When the spec asks for what a guest cannot have; the field is named.
pub fn for_guest(spec: &mut Spec, bundle: &Path, id: &Name) -> Result<HostParts, SpecError> {
    let (mut binds, mut sockets) = (Vec::new(), Vec::new());
    for mount in &mut spec.mounts {
        if mount.kind == SOCKET {
            let host = std::mem::replace(&mut mount.source, format!("{SOCKET_SOURCE}{}", sockets.len()));
            sockets.push(bundle.join(host));
            mount.kind = "bind".to_owned();
            mount.options.push("bind".to_owned());
            continue;
        }
        if let Some(bind) = transform_mount(mount, bundle, binds.len())? {
            mount.source = format!("vmshim-shared:{id}/mounts/{}", bind.name);
            binds.push(bind);
        }
    }
    transform_namespaces(spec)?;
    transform_resources(spec);
    spec.linux.cgroups_path = format!("/{id}");
    spec.linux.devices.retain(is_universal);
    // The host's security modules are not in the guest.
    spec.process.rest.remove("apparmorProfile");
    spec.process.rest.remove("selinuxLabel");
    spec.linux.rest.remove("mountLabel");
    let hooks = Hooks::take(&mut spec.hooks)?;
    Ok(HostParts { binds, sockets, hooks })
}

/// Whether the mount needs something of the host; rewrites those that only seem to.
fn transform_mount(mount: &mut Mount, bundle: &Path, index: usize) -> Result<Option<HostBind>, SpecError> {
    let has = |name: &str| mount.options.iter().any(|option| option == name);
    if mount.kind != "bind" && !has("bind") && !has("rbind") {
        return Ok(None);
    }
    if Path::new(&mount.destination) == Path::new("/dev/shm") {
        // Shared memory cannot be shared with the host's processes.
        mount.kind = "tmpfs".to_owned();
        mount.source = "shm".to_owned();
        mount.options = ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"].map(str::to_owned).to_vec();
        return Ok(None);
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

/// Namespaces are the guest's own. The network is the whole guest's, so a container has none of its own.
fn transform_namespaces(spec: &mut Spec) -> Result<(), SpecError> {
    spec.linux.namespaces.retain(|namespace| namespace.kind != "network");
    for namespace in &mut spec.linux.namespaces {
        if namespace.kind == "user" && !namespace.path.is_empty() {
            let problem = format!("joins the host's user namespace {}, which a VM cannot", namespace.path);
            return Err(SpecError::Field { field: "linux.namespaces", problem });
        }
        namespace.path.clear();
    }
    Ok(())
}

fn transform_resources(spec: &mut Spec) {
    let resources = &mut spec.linux.resources;
    for name in HOST_RESOURCES {
        resources.remove(name);
        spec.linux.rest.remove(name);
    }
    if let Some(cpu) = resources.get_mut("cpu").and_then(|cpu| cpu.as_object_mut()) {
        for name in ["cpus", "mems", "realtimeRuntime", "realtimePeriod"] {
            cpu.remove(name);
        }
    }
}

fn is_universal(device: &Device) -> bool {
    device.kind == "p" || UNIVERSAL_DEVICES.contains(&(device.major, device.minor)) && device.kind != "b"
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn transform(spec: Value) -> Result<(Value, Vec<HostBind>), SpecError> {
        let mut spec = Spec::parse(spec.to_string().as_bytes()).unwrap();
        let parts = for_guest(&mut spec, Path::new("/bundle"), &Name::new("c1").unwrap())?;
        Ok((serde_json::to_value(spec).unwrap(), parts.binds))
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
            { "destination": "/dev/shm", "type": "bind", "source": "/run/shm", "options": ["rbind"] },
        ])))
        .unwrap();
        assert_eq!(spec["mounts"][0]["source"], "proc");
        assert_eq!(spec["mounts"][1]["source"], "vmshim-shared:c1/mounts/0");
        assert_eq!(spec["mounts"][2]["source"], "vmshim-shared:c1/mounts/1");
        assert_eq!(spec["mounts"][3]["type"], "tmpfs");
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
        let parts = for_guest(&mut spec, Path::new("/bundle"), &Name::new("c1").unwrap()).unwrap();
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
            "process": { "args": ["a"], "apparmorProfile": "p", "selinuxLabel": "l" },
            "hooks": { "prestart": [] },
            "linux": {
                "cgroupsPath": "system.slice:a:b",
                "mountLabel": "m",
                "namespaces": [
                    { "type": "pid" }, { "type": "ipc", "path": "/proc/7/ns/ipc" },
                    { "type": "network", "path": "/run/netns/x" }
                ],
                "devices": [
                    { "path": "/dev/null", "type": "c", "major": 1, "minor": 3 },
                    { "path": "/dev/sda", "type": "b", "major": 8, "minor": 0 },
                    { "path": "/dev/ram", "type": "b", "major": 1, "minor": 3 },
                ],
                "resources": {
                    "cpu": { "quota": 5, "cpus": "7" }, "blockIO": {}, "pids": { "limit": 3 },
                },
            },
        }))
        .unwrap();
        assert_eq!(spec["linux"]["namespaces"], json!([{ "type": "pid" }, { "type": "ipc" }]));
        assert_eq!(spec["linux"]["cgroupsPath"], "/c1");
        assert_eq!(spec["linux"]["devices"].as_array().unwrap().len(), 1);
        assert_eq!(spec["linux"]["resources"], json!({ "cpu": { "quota": 5 }, "pids": { "limit": 3 } }));
        assert_eq!(spec["process"], json!({ "args": ["a"] }));
        assert!(spec.get("hooks").is_none() && spec["linux"].get("mountLabel").is_none());
    }

    #[test]
    fn a_foreign_user_namespace_is_refused_by_name() {
        let error = transform(json!({
            "process": { "args": ["a"] },
            "linux": { "namespaces": [{ "type": "user", "path": "/proc/1/ns/user" }] },
        }))
        .unwrap_err();
        assert!(error.to_string().contains("linux.namespaces"));
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
