//! Pods whose limits change while they run: the machine becomes as large as they need, and smaller again.

use std::fs;
use std::time::{Duration, Instant};

use vmshim_tests::cri::{LinuxContainerResources, NamespaceMode, PodSandboxConfig, Refusal};

use crate::fixture::{Host, host};
use crate::pods::{FOREVER, Pod};

const MIB: i64 = 1 << 20;

/// How long a guest may take to give memory back, where KVM itself is emulated.
const PATIENCE: Duration = Duration::from_secs(60);

/// Small machines, so that little has to be used until one has to grow; removed when dropped.
struct SmallMachines;

impl SmallMachines {
    const PATH: &str = "/etc/vmshim/config.d/resize.toml";

    fn new(more: &str) -> Self {
        let text = format!(
            "[hypervisor]\ndefault_memory_mib = 96\nmin_memory_mib = 96\nmemory_growth_mib = 512\n{more}\n"
        );
        fs::write(Self::PATH, text).unwrap();
        Self
    }
}

impl Drop for SmallMachines {
    fn drop(&mut self) {
        let _ = fs::remove_file(Self::PATH);
    }
}

fn memory(mib: i64) -> LinuxContainerResources {
    LinuxContainerResources { memory_limit_in_bytes: mib * MIB, ..Default::default() }
}

fn pod(host: &Host, handler: &str) -> Pod {
    Pod::configured(host, handler, NamespaceMode::CONTAINER, PodSandboxConfig::default())
}

fn started(pod: &Pod, name: &str, limits: LinuxContainerResources) -> String {
    let id = pod.create_limited(name, FOREVER, &[], limits).unwrap();
    pod.call("StartContainer", &id);
    id
}

fn number(pod: &Pod, id: &str, line: &str) -> i64 {
    pod.exec(id, line).parse().unwrap()
}

/// MiB of memory that the guest's kernel has.
fn guest_mib(pod: &Pod, id: &str) -> i64 {
    number(pod, id, "awk '/MemTotal/ { print int($2 / 1024) }' /proc/meminfo")
}

/// MiB that the only VMM has of the host's memory.
fn resident_mib() -> i64 {
    let is_vmm = |path: &std::path::Path| {
        fs::read_link(path.join("exe")).is_ok_and(|exe| exe.to_string_lossy().contains("vmshim-vmm"))
    };
    let processes = fs::read_dir("/proc").unwrap().flatten().map(|entry| entry.path());
    let vmm = processes.filter(|path| is_vmm(path)).next().expect("a VMM");
    let pages = fs::read_to_string(vmm.join("statm")).unwrap();
    pages.split(' ').nth(1).unwrap().parse::<i64>().unwrap() * 4096 / MIB
}

fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < deadline, "not in time: {what}");
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// Uses at once more memory than a machine has that has not grown, and lets go of it.
const USE_56_MIB: &str = "dd if=/dev/zero of=/dev/null bs=56M count=1 2>&1";

fn memory_comes_and_goes(handler: &str) {
    let host = host();
    let _machines = SmallMachines::new("");
    let pod = pod(&host, handler);
    let id = started(&pod, "c", memory(32));
    let before = guest_mib(&pod, &id);
    assert!(before < 96, "{before} MiB");
    let idle = resident_mib();

    pod.attempt_update(&id, memory(128)).unwrap();
    assert_eq!(pod.exec(&id, "cat /sys/fs/cgroup/memory.max"), (128 * MIB).to_string());
    let grown = guest_mib(&pod, &id);
    assert!((before + 96..before + 104).contains(&grown), "{before} MiB have become {grown}");
    pod.exec(&id, USE_56_MIB);
    // What is free is reported some seconds later.
    let peak = resident_mib();
    assert!(peak > idle + 40, "{idle} MiB have become {peak}");

    pod.attempt_update(&id, memory(32)).unwrap();
    assert_eq!(pod.exec(&id, "cat /sys/fs/cgroup/memory.max"), (32 * MIB).to_string());
    until("the guest has given memory back", || guest_mib(&pod, &id) == before);
    until("the host has it back", || resident_mib() < idle + 20);
    pod.end();
    host.assert_nothing_left();
}

#[test]
fn memory_comes_and_goes_with_limits() {
    memory_comes_and_goes("vmshim");
}

#[test]
fn memory_comes_and_goes_with_limits_in_a_sandbox_of_the_shims() {
    if host().sandboxes_are_the_shims() {
        memory_comes_and_goes("vmshim-sandbox");
    }
}

#[test]
fn a_pod_has_memory_for_containers_that_come_and_none_for_those_that_went() {
    let host = host();
    let _machines = SmallMachines::new("");
    let pod = pod(&host, "vmshim");
    let first = started(&pod, "first", memory(32));
    let before = guest_mib(&pod, &first);
    let second = started(&pod, "second", memory(200));
    assert!(guest_mib(&pod, &first) > before + 100);
    pod.stop(&second);
    pod.call("RemoveContainer", &second);
    until("the guest has given memory back", || guest_mib(&pod, &first) == before);
    // More than it can grow by, which is a limit that is never reached.
    started(&pod, "third", memory(4096));
    assert!(guest_mib(&pod, &first) > before + 400);
    pod.end();
    host.assert_nothing_left();
}

#[test]
fn a_limit_that_the_machine_cannot_meet_is_refused_and_changes_nothing() {
    let host = host();
    let _machines = SmallMachines::new("");
    let pod = pod(&host, "vmshim");
    let id = started(&pod, "c", memory(32));
    let before = guest_mib(&pod, &id);
    for mib in [600, 1 << 20, i64::MAX / MIB] {
        let error = pod.attempt_update(&id, memory(mib)).unwrap_err();
        let text = &error.downcast_ref::<Refusal>().unwrap().message;
        assert!(text.contains("it has room for 536 MiB: choose a smaller limit"), "{text}");
    }
    assert_eq!(pod.exec(&id, "cat /sys/fs/cgroup/memory.max"), (32 * MIB).to_string());
    assert_eq!(guest_mib(&pod, &id), before);
    // No limit is nothing that the machine grows for.
    pod.attempt_update(&id, LinuxContainerResources { memory_limit_in_bytes: -1, ..Default::default() })
        .unwrap();
    assert_eq!(pod.exec(&id, "cat /sys/fs/cgroup/memory.max"), "max");
    assert_eq!(guest_mib(&pod, &id), before);
    pod.end();
    host.assert_nothing_left();
}

/// Hundredths of a CPU.
fn cpus(hundredths: i64) -> LinuxContainerResources {
    LinuxContainerResources { cpu_period: 100_000, cpu_quota: hundredths * 1000, ..Default::default() }
}

/// A pod whose containers are told of as the kubelet tells of them.
fn pod_with_cpus(host: &Host, handler: &str, hundredths: i64) -> Pod {
    let mut config = PodSandboxConfig::default();
    config.linux.mut_or_insert_default().resources = Some(cpus(hundredths)).into();
    Pod::configured(host, handler, NamespaceMode::CONTAINER, config)
}

fn cpus_come_and_go(handler: &str) {
    let host = host();
    let _machines = SmallMachines::new("vcpu_growth = 2");
    let pod = pod_with_cpus(&host, handler, 50);
    let id = started(&pod, "c", cpus(50));
    assert_eq!(pod.exec(&id, "nproc"), "1");
    pod.attempt_update(&id, cpus(150)).unwrap();
    assert_eq!(pod.exec(&id, "nproc"), "2");
    assert_eq!(pod.exec(&id, "cat /sys/fs/cgroup/cpu.max"), "150000 100000");
    // Programs run there, too.
    assert_eq!(pod.exec(&id, "taskset 2 sh -c 'awk \"{ print \\$39 }\" /proc/self/stat'"), "1");
    let other = started(&pod, "other", cpus(100));
    assert_eq!(pod.exec(&id, "nproc"), "3");
    // More than it can have: a limit that is never reached.
    pod.attempt_update(&id, cpus(100_000)).unwrap();
    assert_eq!(pod.exec(&id, "nproc"), "3");
    pod.stop(&other);
    pod.call("RemoveContainer", &other);
    pod.attempt_update(&id, cpus(50)).unwrap();
    until("only one CPU is left", || pod.exec(&id, "nproc") == "1");
    pod.end();
    host.assert_nothing_left();
}

#[test]
fn cpus_come_and_go_with_limits() {
    cpus_come_and_go("vmshim");
}

#[test]
fn cpus_come_and_go_with_limits_in_a_sandbox_of_the_shims() {
    if host().sandboxes_are_the_shims() {
        cpus_come_and_go("vmshim-sandbox");
    }
}
