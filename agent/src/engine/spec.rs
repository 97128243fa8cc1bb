//! What a spec asks for that this guest cannot give: each answered by an error that names the field.

use super::error::{Error, Result};
use oci_spec::runtime::{Linux, LinuxNamespaceType, Process, Spec};
use vmshim_protocol::agent::{CONTAINER_NAMESPACE, POD_NAMESPACE};

/// Namespaces of a container, as `CLONE_NEW*` flags.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Namespaces {
    /// To be made.
    pub new: i32,
    /// Of another container.
    pub joined: i32,
}

impl Namespaces {
    /// Whether the container has one of this kind, new or joined, apart from the guest's.
    pub fn has(self, flag: i32) -> bool {
        (self.new | self.joined) & flag != 0
    }

    /// All that a process must be in to be in the container.
    pub fn all(self) -> i32 {
        self.new | self.joined
    }

    /// Adds one namespace of a spec. The guest is the pod, and its network is the pod's: a container's network
    /// namespace, new or given by a path, is the guest's own, or comes with the pod's users.
    pub fn add(&mut self, kind: LinuxNamespaceType, path: Option<&str>) -> Result<()> {
        let flag = match kind {
            LinuxNamespaceType::Network => return Ok(()),
            LinuxNamespaceType::Mount => libc::CLONE_NEWNS,
            LinuxNamespaceType::Cgroup => libc::CLONE_NEWCGROUP,
            LinuxNamespaceType::Uts => libc::CLONE_NEWUTS,
            LinuxNamespaceType::Ipc => libc::CLONE_NEWIPC,
            LinuxNamespaceType::User => libc::CLONE_NEWUSER,
            LinuxNamespaceType::Pid => libc::CLONE_NEWPID,
            LinuxNamespaceType::Time => libc::CLONE_NEWTIME,
        };
        let field = format!("linux.namespaces[{kind}]");
        if self.has(flag) {
            return Err(Error::invalid(field, "is given twice"));
        }
        match path.filter(|path| !path.is_empty()) {
            None => self.new |= flag,
            Some(_) if flag == libc::CLONE_NEWNS => {
                return Err(Error::unsupported(
                    format!("{field}.path"),
                    "each container has mounts of its own",
                ));
            }
            // They own the pod's network, too.
            Some(POD_NAMESPACE) if flag == libc::CLONE_NEWUSER => self.joined |= flag | libc::CLONE_NEWNET,
            Some(path) if path == POD_NAMESPACE || path.starts_with(CONTAINER_NAMESPACE) => {
                self.joined |= flag;
            }
            Some(_) => {
                return Err(Error::unsupported(
                    format!("{field}.path"),
                    format!(
                        "only a namespace of a container of the same pod (\"{CONTAINER_NAMESPACE}<id>\") can be joined"
                    ),
                ));
            }
        }
        Ok(())
    }
}

/// Checks the whole spec.
pub fn check(spec: &Spec) -> Result<(&Linux, &Process, Namespaces)> {
    let linux = spec.linux().as_ref().ok_or_else(|| Error::invalid("linux", "is missing"))?;
    let process = spec.process().as_ref().ok_or_else(|| Error::invalid("process", "is missing"))?;
    let mut namespaces = Namespaces::default();
    for namespace in linux.namespaces().iter().flatten() {
        let path = namespace.path().as_deref().map(|path| path.to_string_lossy().into_owned());
        namespaces.add(namespace.typ(), path.as_deref())?;
    }
    check_linux(linux, namespaces)?;
    check_process(process)?;
    if spec.hostname().as_ref().is_some_and(|name| !name.is_empty()) && !namespaces.has(libc::CLONE_NEWUTS) {
        return Err(Error::invalid("hostname", "needs a uts namespace"));
    }
    if spec.domainname().as_ref().is_some_and(|name| !name.is_empty()) && !namespaces.has(libc::CLONE_NEWUTS)
    {
        return Err(Error::invalid("domainname", "needs a uts namespace"));
    }
    let hooks = spec.hooks().as_ref().and_then(|hooks| hooks.create_container().as_ref());
    if hooks.is_some_and(|hooks| !hooks.is_empty()) {
        return Err(Error::unsupported(
            "hooks.createContainer",
            "its program lies on the host, the container's namespaces do not",
        ));
    }
    Ok((linux, process, namespaces))
}

fn check_linux(linux: &Linux, namespaces: Namespaces) -> Result<()> {
    if !namespaces.has(libc::CLONE_NEWNS) {
        return Err(Error::unsupported(
            "linux.namespaces",
            "a container without a mount namespace would change the guest",
        ));
    }
    let mapped = |maps: &Option<Vec<_>>| maps.as_ref().is_some_and(|maps| !maps.is_empty());
    let maps = mapped(linux.uid_mappings()) || mapped(linux.gid_mappings());
    if maps && !namespaces.has(libc::CLONE_NEWUSER) {
        return Err(Error::invalid("linux.uidMappings", "needs a user namespace"));
    }
    if linux.time_offsets().as_ref().is_some_and(|offsets| !offsets.is_empty())
        && namespaces.new & libc::CLONE_NEWTIME == 0
    {
        return Err(Error::invalid("linux.timeOffsets", "needs a time namespace"));
    }
    if linux.mount_label().as_ref().is_some_and(|label| !label.is_empty()) {
        return Err(Error::unsupported("linux.mountLabel", "its kernel has no SELinux"));
    }
    if linux.intel_rdt().is_some() {
        return Err(Error::unsupported("linux.intelRdt", "cache allocation is the host's"));
    }
    if linux.memory_policy().is_some() {
        return Err(Error::unsupported("linux.memoryPolicy", "it has one memory node"));
    }
    if linux.net_devices().as_ref().is_some_and(|devices| !devices.is_empty()) {
        return Err(Error::unsupported("linux.netDevices", "a host's interface cannot be moved into it"));
    }
    check_sysctls(linux, namespaces)
}

/// A process object, of a container or an exec.
pub fn check_process(process: &Process) -> Result<()> {
    let profile = process.apparmor_profile().as_deref().unwrap_or_default();
    if !matches!(profile, "" | "unconfined") {
        return Err(Error::unsupported("process.apparmorProfile", "its kernel has no AppArmor"));
    }
    if process.selinux_label().as_ref().is_some_and(|label| !label.is_empty()) {
        return Err(Error::unsupported("process.selinuxLabel", "its kernel has no SELinux"));
    }
    if !process.cwd().is_absolute() {
        return Err(Error::invalid("process.cwd", "is not an absolute path"));
    }
    if let Some(score) = process.oom_score_adj()
        && !(-1000..=1000).contains(&score)
    {
        return Err(Error::invalid("process.oomScoreAdj", "is not between -1000 and 1000"));
    }
    Ok(())
}

/// Only settings that belong to a namespace of the container, or to the pod's network, may be changed.
fn check_sysctls(linux: &Linux, namespaces: Namespaces) -> Result<()> {
    linux
        .sysctl()
        .iter()
        .flat_map(|sysctls| sysctls.keys())
        .try_for_each(|name| check_sysctl(name, namespaces))
}

/// Whether a setting belongs to the network namespace.
pub fn is_of_network(name: &str) -> bool {
    name.replace('/', ".").starts_with("net.")
}

/// Checks a setting of the pod as a whole.
pub fn check_pod_sysctl(name: &str) -> Result<()> {
    check_sysctl(name, Namespaces { new: libc::CLONE_NEWIPC | libc::CLONE_NEWUTS, joined: 0 })
}

fn check_sysctl(name: &str, namespaces: Namespaces) -> Result<()> {
    const IPC: &[&str] = &[
        "kernel.msgmax",
        "kernel.msgmnb",
        "kernel.msgmni",
        "kernel.sem",
        "kernel.shmall",
        "kernel.shmmax",
        "kernel.shmmni",
        "kernel.shm_rmid_forced",
    ];
    let field = format!("linux.sysctl[{name}]");
    let dotted = name.replace('/', ".");
    if dotted.split('.').any(|part| part.is_empty()) {
        return Err(Error::invalid(field, "is no name of a setting"));
    }
    let ipc = IPC.contains(&dotted.as_str()) || dotted.starts_with("fs.mqueue.");
    let allowed = is_of_network(name)
        || (ipc && namespaces.has(libc::CLONE_NEWIPC))
        || (dotted == "kernel.domainname" && namespaces.has(libc::CLONE_NEWUTS));
    if !allowed {
        return Err(Error::invalid(field, "is not in a separate kernel namespace"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(linux: &str) -> Spec {
        serde_json::from_str(&format!(
            r#"{{"ociVersion":"1.0.2","process":{{"user":{{"uid":0,"gid":0}},"cwd":"/","args":["x"]}},"linux":{linux}}}"#
        ))
        .unwrap()
    }

    fn refusal(linux: &str) -> String {
        check(&spec(linux)).unwrap_err().to_string()
    }

    #[test]
    fn the_network_is_the_guests() {
        let spec = spec(
            r#"{"namespaces":[{"type":"mount"},{"type":"pid"},{"type":"network","path":"/run/netns/x"}]}"#,
        );
        let (_, _, namespaces) = check(&spec).unwrap();
        assert_eq!(namespaces.all(), libc::CLONE_NEWNS | libc::CLONE_NEWPID);
    }

    #[test]
    fn a_host_namespace_is_refused_by_name() {
        let said = refusal(r#"{"namespaces":[{"type":"mount"},{"type":"ipc","path":"/proc/7/ns/ipc"}]}"#);
        assert!(said.starts_with("linux.namespaces[ipc].path is not supported"), "{said}");
        assert!(refusal(r#"{"namespaces":[]}"#).contains("mount namespace"));
    }

    #[test]
    fn a_pods_namespace_is_joined() {
        let spec = spec(r#"{"namespaces":[{"type":"mount"},{"type":"ipc","path":"vmshim-container:pod"}]}"#);
        assert_eq!(check(&spec).unwrap().2.joined, libc::CLONE_NEWIPC);
    }

    #[test]
    fn the_pods_users_are_joined_with_their_network() {
        let spec = spec(
            r#"{"namespaces":[{"type":"mount"},{"type":"user","path":"vmshim-pod"}],"uidMappings":[{"containerID":0,"hostID":1,"size":2}]}"#,
        );
        assert_eq!(check(&spec).unwrap().2.joined, libc::CLONE_NEWUSER | libc::CLONE_NEWNET);
    }

    #[test]
    fn a_pods_settings_keep_to_its_namespaces() {
        assert!(check_pod_sysctl("kernel.shm_rmid_forced").is_ok());
        assert!(check_pod_sysctl("net.core.somaxconn").is_ok());
        for name in ["vm.swappiness", "kernel.hostname", "net/../x", ""] {
            assert!(check_pod_sysctl(name).is_err(), "{name}");
        }
    }

    #[test]
    fn sysctls_keep_to_their_namespace() {
        let with = |name: &str| format!(r#"{{"namespaces":[{{"type":"mount"}}],"sysctl":{{"{name}":"1"}}}}"#);
        assert!(check(&spec(&with("net.ipv4.ip_forward"))).is_ok());
        for name in ["kernel.shmmax", "vm.swappiness", "net..x", "../x"] {
            assert!(check(&spec(&with(name))).is_err(), "{name}");
        }
    }
}
