//! Pods, made through CRI as the kubelet makes them.

use std::fs;
use std::os::unix::fs::{MetadataExt, chown};
use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use vmshim_tests::cri::{
    ContainerConfig, ContainerRequest, ContainerState, ContainerStatsResponse, ContainerStatusResponse,
    CreateContainerRequest, CreateContainerResponse, Cri, Empty, ExecSyncRequest, ExecSyncResponse,
    IDMapping, LinuxContainerResources, Mount, NamespaceMode, PodSandboxConfig, PodSandboxRequest,
    RunPodSandboxRequest, RunPodSandboxResponse, StopContainerRequest, UpdateContainerResourcesRequest,
};

use crate::fixture::{BUSYBOX, Host, host};
use crate::kill::{processes, wait_for};

/// A pod of the tests.
pub struct Pod {
    cri: Cri,
    config: PodSandboxConfig,
    id: String,
}

impl Pod {
    fn run(host: &Host, handler: &str, pid: NamespaceMode) -> Self {
        let config = PodSandboxConfig { hostname: "pod-of-two".into(), ..Default::default() };
        Self::configured(host, handler, pid, config)
    }

    /// A pod with a configuration of its own, which gets a name here.
    pub fn configured(host: &Host, handler: &str, pid: NamespaceMode, mut config: PodSandboxConfig) -> Self {
        let linux = config.linux.mut_or_insert_default();
        let options =
            linux.security_context.mut_or_insert_default().namespace_options.mut_or_insert_default();
        options.pid = pid.into();
        Self::attempt(host, handler, named(config, &host.id())).unwrap()
    }

    /// A pod that may be refused.
    pub fn attempt(host: &Host, handler: &str, config: PodSandboxConfig) -> Result<Self> {
        let cri = Cri::connect(&host.address())?;
        let request = RunPodSandboxRequest {
            config: Some(config.clone()).into(),
            runtime_handler: handler.to_owned(),
            ..Default::default()
        };
        let id = cri.call::<RunPodSandboxResponse>("RunPodSandbox", &request)?.pod_sandbox_id;
        Ok(Self { cri, config, id })
    }

    fn create(&self, name: &str, line: &str, mounts: &[(&Path, &str)]) -> String {
        self.attempt_create(name, line, mounts).unwrap()
    }

    /// A container of busybox that runs a line, and may be refused.
    pub fn attempt_create(&self, name: &str, line: &str, mounts: &[(&Path, &str)]) -> Result<String> {
        self.create_limited(name, line, mounts, LinuxContainerResources::default())
    }

    /// A container of busybox that runs a line within limits, and may be refused.
    pub fn create_limited(
        &self,
        name: &str,
        line: &str,
        mounts: &[(&Path, &str)],
        limits: LinuxContainerResources,
    ) -> Result<String> {
        let mut config = ContainerConfig {
            command: ["sh", "-c", line].map(str::to_owned).to_vec(),
            mounts: mounts
                .iter()
                .map(|(from, to)| Mount {
                    host_path: from.to_str().unwrap().to_owned(),
                    container_path: (*to).to_owned(),
                    ..Default::default()
                })
                .collect(),
            log_path: format!("{name}.log"),
            ..Default::default()
        };
        name.clone_into(&mut config.metadata.mut_or_insert_default().name);
        BUSYBOX.clone_into(&mut config.image.mut_or_insert_default().image);
        let pods = &self.config.linux.security_context;
        config.linux.mut_or_insert_default().resources = Some(limits).into();
        let own = config.linux.mut_or_insert_default().security_context.mut_or_insert_default();
        own.namespace_options = pods.namespace_options.clone();
        own.privileged = pods.privileged;
        let request = CreateContainerRequest {
            pod_sandbox_id: self.id.clone(),
            config: Some(config).into(),
            sandbox_config: Some(self.config.clone()).into(),
            ..Default::default()
        };
        Ok(self.cri.call::<CreateContainerResponse>("CreateContainer", &request)?.container_id)
    }

    /// Changes a container's limits, unless that is refused.
    pub fn attempt_update(&self, id: &str, limits: LinuxContainerResources) -> Result<()> {
        let update = UpdateContainerResourcesRequest {
            container_id: id.to_owned(),
            linux: Some(limits).into(),
            ..Default::default()
        };
        self.cri.call::<Empty>("UpdateContainerResources", &update).map(drop)
    }

    pub fn call(&self, method: &str, id: &str) {
        self.attempt_call(method, id).unwrap();
    }

    /// A method of containers that has no answer, and may be refused.
    pub fn attempt_call(&self, method: &str, id: &str) -> Result<()> {
        let request = ContainerRequest { container_id: id.to_owned(), ..Default::default() };
        self.cri.call::<Empty>(method, &request).map(drop)
    }

    /// A container of busybox that runs a line.
    pub fn started(&self, name: &str, line: &str, mounts: &[(&Path, &str)]) -> String {
        let id = self.create(name, line, mounts);
        self.call("StartContainer", &id);
        id
    }

    pub fn stop(&self, id: &str) {
        let request = StopContainerRequest { container_id: id.to_owned(), timeout: 0, ..Default::default() };
        self.cri.call::<Empty>("StopContainer", &request).unwrap();
    }

    fn state(&self, id: &str) -> ContainerState {
        let request = ContainerRequest { container_id: id.to_owned(), ..Default::default() };
        let status = self.cri.call::<ContainerStatusResponse>("ContainerStatus", &request).unwrap();
        status.status.state.enum_value().unwrap()
    }

    /// What a line prints in a container.
    pub fn exec(&self, id: &str, line: &str) -> String {
        let done = exec(&self.cri, id, line).unwrap();
        let output = String::from_utf8_lossy(&[done.stdout, done.stderr].concat()).trim().to_owned();
        assert_eq!(done.exit_code, 0, "{line}: {output}");
        output
    }

    /// Runs a line in a container, whatever its exit status, unless that is refused.
    pub fn attempt_exec(&self, id: &str, line: &str) -> Result<()> {
        exec(&self.cri, id, line).map(drop)
    }

    /// Removes the pod.
    pub fn end(&self) {
        self.remove().unwrap();
    }

    /// Stops the pod, unless that is refused.
    pub fn attempt_stop(&self) -> Result<()> {
        self.attempt_pod_call("StopPodSandbox")
    }

    fn remove(&self) -> Result<()> {
        self.attempt_stop()?;
        self.attempt_pod_call("RemovePodSandbox")
    }

    fn attempt_pod_call(&self, method: &str) -> Result<()> {
        let request = PodSandboxRequest { pod_sandbox_id: self.id.clone(), ..Default::default() };
        self.cri.call::<Empty>(method, &request).map(drop)
    }
}

/// Runs a line in a container to its end.
pub fn exec(cri: &Cri, container: &str, line: &str) -> Result<ExecSyncResponse> {
    let request = ExecSyncRequest {
        container_id: container.to_owned(),
        cmd: ["sh", "-c", line].map(str::to_owned).to_vec(),
        timeout: 60,
        ..Default::default()
    };
    cri.call("ExecSync", &request)
}

/// Gives a pod its name, which nobody else may have.
pub fn named(mut config: PodSandboxConfig, name: &str) -> PodSandboxConfig {
    let metadata = config.metadata.mut_or_insert_default();
    for field in [&mut metadata.name, &mut metadata.uid] {
        name.clone_into(field);
    }
    "default".clone_into(&mut metadata.namespace);
    config.linux.mut_or_insert_default().security_context.mut_or_insert_default();
    config
}

impl Drop for Pod {
    fn drop(&mut self) {
        // A test that failed may have left the pod in any state; one that passed has removed it.
        let _ = self.remove();
    }
}

/// A container's line that does not end by itself.
pub const FOREVER: &str = "sleep 10000";

fn two_containers_share_a_pod(handler: &str) {
    let host = host();
    let volume = tempfile::tempdir().unwrap();
    fs::write(volume.path().join("file"), "before").unwrap();
    let pod = Pod::run(&host, handler, NamespaceMode::CONTAINER);
    let first = pod.started("first", FOREVER, &[(volume.path(), "/data")]);
    let second = pod.started("second", FOREVER, &[(volume.path(), "/data")]);

    assert_eq!(pod.exec(&first, "hostname"), "pod-of-two");
    let namespaces = "for kind in ipc uts net; do readlink /proc/self/ns/$kind; done";
    assert_eq!(pod.exec(&first, namespaces), pod.exec(&second, namespaces));
    let own = "readlink /proc/self/ns/mnt";
    assert_ne!(pod.exec(&first, own), pod.exec(&second, own));
    pod.exec(&first, "echo shared > /dev/shm/word");
    assert_eq!(pod.exec(&second, "cat /dev/shm/word"), "shared");
    assert_eq!(pod.exec(&second, "cat /data/file"), "before");
    fs::write(volume.path().join("file"), "after").unwrap();
    assert_eq!(pod.exec(&second, "cat /data/file"), "after");

    let request = ContainerRequest { container_id: first.clone(), ..Default::default() };
    let stats = pod.cri.call::<ContainerStatsResponse>("ContainerStats", &request).unwrap().stats;
    assert!(stats.memory.working_set_bytes.value > 0 && stats.cpu.usage_core_nano_seconds.value > 0);
    let limit = LinuxContainerResources { memory_limit_in_bytes: 64 << 20, ..Default::default() };
    pod.attempt_update(&first, limit).unwrap();
    assert_eq!(pod.exec(&first, "cat /sys/fs/cgroup/memory.max"), (64 << 20).to_string());

    if handler == "vmshim" {
        pausing_stops_the_whole_pod(&host, &pod, &first);
    }
    // The pod outlives its containers, one and all; to be killed, one needs a pod that goes on.
    pod.stop(&first);
    assert_eq!((pod.state(&first), pod.state(&second)), (ContainerState::EXITED, ContainerState::RUNNING));
    pod.call("RemoveContainer", &first);
    pod.stop(&second);
    let again = pod.started("again", FOREVER, &[]);
    assert_eq!(pod.exec(&again, "cat /dev/shm/word"), "shared");
    assert_eq!(pod.exec(&again, "hostname"), "pod-of-two");
    volumes_are_shared_memory(&pod);
    pod.end();
    host.assert_nothing_left();
}

/// With the container that stands for a pod all of the pod is paused; comes back with it paused.
fn pausing_stops_the_whole_pod(host: &Host, pod: &Pod, member: &str) {
    let task = |verb: &str| host.ctr_ok(["-n", "k8s.io", "task", verb, &pod.id]).unwrap();
    let vmm = processes("vmshim-vmm")[0];
    let ticks = || {
        let stat = fs::read_to_string(format!("/proc/{vmm}/stat")).unwrap();
        let fields = stat.rsplit(')').next().unwrap().split_whitespace();
        fields.skip(11).take(2).map(|ticks| ticks.parse::<u64>().unwrap()).sum::<u64>()
    };
    let busy = pod.exec(member, "while :; do :; done >/dev/null 2>&1 & echo $!");
    let begin = ticks();
    wait_for("a busy guest", Duration::from_secs(60), || ticks() > begin + 20);
    task("pause");
    let begin = ticks();
    std::thread::sleep(Duration::from_millis(500));
    assert!(ticks() - begin < 5, "{} ticks of a paused guest", ticks() - begin);
    let refused = format!("{:#}", pod.attempt_exec(member, "true").unwrap_err());
    assert!(refused.contains("paused"), "{refused}");
    task("resume");
    pod.exec(member, &format!("kill {busy}"));
    task("pause");
}

/// A medium of memory that is mounted where the pod's own shared memory would be.
fn volumes_are_shared_memory(pod: &Pod) {
    let memory = Memory::new();
    fs::write(memory.path().join("before"), "before").unwrap();
    let [third, fourth] =
        ["third", "fourth"].map(|name| pod.started(name, FOREVER, &[(memory.path(), "/dev/shm")]));
    pod.exec(&third, "echo volume > /dev/shm/word");
    assert_eq!(pod.exec(&fourth, "cat /dev/shm/word; ls /dev/shm"), "volume\nbefore\nword");
    assert_eq!(fs::read_to_string(memory.path().join("word")).unwrap(), "volume\n");
    let full = pod.exec(&fourth, "dd if=/dev/zero of=/dev/shm/big bs=64k count=32 2>&1; rm /dev/shm/big");
    assert!(full.contains("No space left"), "{full}");
    for id in [third, fourth] {
        pod.stop(&id);
        pod.call("RemoveContainer", &id);
    }
}

/// A tmpfs of the host that holds 1 MiB, as the kubelet makes them.
struct Memory(tempfile::TempDir);

impl Memory {
    fn new() -> Self {
        let memory = Self(tempfile::tempdir().unwrap());
        mount(Some("none"), memory.path(), Some("tmpfs"), MsFlags::empty(), Some("size=1m")).unwrap();
        memory
    }

    fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // The test's own census tells if it stays.
        let _ = umount2(self.path(), MntFlags::MNT_DETACH);
    }
}

#[test]
fn two_containers_share_the_pod_of_a_pause_container() {
    two_containers_share_a_pod("vmshim");
}

#[test]
fn two_containers_share_a_sandbox_of_the_shims() {
    if host().sandboxes_are_the_shims() {
        two_containers_share_a_pod("vmshim-sandbox");
    }
}

/// What the root of the tests' pods with users of their own is outside of them.
const HOST_ROOT: u32 = 100_000;

fn with_users() -> PodSandboxConfig {
    let mut config = PodSandboxConfig { hostname: "pod-of-users".into(), ..Default::default() };
    let linux = config.linux.mut_or_insert_default();
    linux.sysctls.insert("net.core.somaxconn".to_owned(), "77".to_owned());
    linux.sysctls.insert("kernel.shm_rmid_forced".to_owned(), "1".to_owned());
    let options = linux.security_context.mut_or_insert_default().namespace_options.mut_or_insert_default();
    let mapping = IDMapping { host_id: HOST_ROOT, container_id: 0, length: 65_536, ..Default::default() };
    let users = options.userns_options.mut_or_insert_default();
    users.uids = vec![mapping.clone()];
    users.gids = vec![mapping];
    config
}

fn a_pod_has_users_of_its_own(handler: &str) {
    let host = host();
    let volume = tempfile::tempdir().unwrap();
    chown(volume.path(), Some(HOST_ROOT), Some(HOST_ROOT)).unwrap();
    let pod = Pod::configured(&host, handler, NamespaceMode::CONTAINER, with_users());
    let first = pod.started("first", FOREVER, &[(volume.path(), "/data")]);
    let second = pod.started("second", FOREVER, &[]);
    for map in ["uid_map", "gid_map"] {
        let map = pod.exec(&first, &format!("cat /proc/1/{map}"));
        assert_eq!(map.split_whitespace().collect::<Vec<_>>(), ["0", "100000", "65536"]);
    }
    let namespaces = "for kind in user ipc uts; do readlink /proc/self/ns/$kind; done";
    assert_eq!(pod.exec(&first, namespaces), pod.exec(&second, namespaces));
    assert_eq!(pod.exec(&second, "hostname"), "pod-of-users");
    let settings = "cat /proc/sys/net/core/somaxconn /proc/sys/kernel/shm_rmid_forced";
    assert_eq!(pod.exec(&first, settings), "77\n1");

    // The image's files are root's, and root can do with them what root does.
    assert_eq!(pod.exec(&first, "stat -c %u:%g /bin/busybox /etc/passwd /etc/hostname"), "0:0\n0:0\n0:0");
    pod.exec(&first, "echo x >> /etc/passwd && chown 5:6 /etc/passwd && echo y > /new && chown 7 /new");
    assert_eq!(pod.exec(&first, "stat -c %u:%g /etc/passwd /new"), "5:6\n7:0");
    pod.exec(&first, "echo shared > /dev/shm/word && chown 8 /dev/shm/word");
    assert_eq!(pod.exec(&second, "cat /dev/shm/word; stat -c %u /dev/shm/word"), "shared\n8");
    pod.exec(&first, "echo x > /data/file && chown 9:10 /data/file");
    let file = fs::metadata(volume.path().join("file")).unwrap();
    assert_eq!((file.uid(), file.gid()), (HOST_ROOT + 9, HOST_ROOT + 10));
    // The pod's network belongs to its users, so its root may do there what root does.
    assert_eq!(pod.exec(&second, "ls /sys/class/net | sort"), "eth0\nlo");
    pod.exec(&first, "ip -4 address show eth0 | grep -q 'inet 10[.]88[.]'");
    pod.exec(&first, "ping -c 1 -W 60 127.0.0.1");
    // A process of a user's can open its own output anew.
    pod.exec(&first, "echo x > /dev/stderr");
    pod.end();
    host.assert_nothing_left();
}

#[test]
fn a_pod_of_a_pause_container_has_users_of_its_own() {
    // Where containerd is older it leaves the network of such a pod to be configured too late.
    if host().sandboxes_are_the_shims() {
        return a_pod_has_users_of_its_own("vmshim");
    }
    let host = host();
    let refusal = Pod::attempt(&host, "vmshim", named(with_users(), &host.id())).err().unwrap();
    let refusal = format!("{refusal:#}");
    assert!(refusal.contains("containerd 2.0"), "{refusal}");
    host.assert_nothing_left();
}

#[test]
fn a_sandbox_of_the_shims_has_users_of_its_own() {
    if host().sandboxes_are_the_shims() {
        a_pod_has_users_of_its_own("vmshim-sandbox");
    }
}

#[test]
fn a_shared_pid_namespace_has_the_processes_of_all_and_stops_one() {
    let host = host();
    let pod = Pod::run(&host, "vmshim", NamespaceMode::POD);
    let first = pod.started("first", FOREVER, &[]);
    let second = pod.started("second", "exec sleep 7654", &[]);
    assert!(pod.exec(&first, "ps").contains("sleep 7654"));
    pod.stop(&first);
    assert_eq!(pod.state(&second), ContainerState::RUNNING);
    pod.end();
    host.assert_nothing_left();
}

#[test]
fn a_pod_ends_in_any_state() {
    let host = host();
    let pod = Pod::run(&host, "vmshim", NamespaceMode::CONTAINER);
    pod.end();
    let pod = Pod::run(&host, "vmshim", NamespaceMode::CONTAINER);
    pod.create("never", FOREVER, &[]);
    pod.started("done", "true", &[]);
    pod.started("running", FOREVER, &[]);
    pod.end();
    host.assert_nothing_left();
}
