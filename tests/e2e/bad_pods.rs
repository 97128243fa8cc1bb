//! Wrong input of pods: CRI tells in one clear sentence, and nothing is left behind.

use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

use vmshim_tests::containerd::LINK_BELOW;
use vmshim_tests::cri::{PodSandboxConfig, Refusal};

use crate::fixture::{Host, host};
use crate::pods::{FOREVER, Pod, named};

/// A user must not wait longer than this for any refusal.
const DEADLINE: Duration = Duration::from_secs(40);

/// What is complained of, in one sentence.
fn complaint<T>(attempt: impl FnOnce() -> anyhow::Result<T>) -> String {
    let started = Instant::now();
    let error = attempt().err().expect("it was not refused");
    assert!(started.elapsed() < DEADLINE, "took {:?}", started.elapsed());
    let text = &error.downcast_ref::<Refusal>().unwrap_or_else(|| panic!("no answer: {error:#}")).message;
    let dump = ["Error {", "backtrace", "%0A", "panicked"].into_iter().find(|word| text.contains(word));
    assert!(dump.is_none(), "a debug dump: {text}");
    text.clone()
}

/// What is complained of when a pod is run, of which nothing is left.
fn refused(host: &Host, handler: &str, config: &PodSandboxConfig) -> String {
    let text = complaint(|| Pod::attempt(host, handler, config.clone()));
    host.assert_nothing_left();
    text
}

/// Those of a pod-sandbox, and the shim's own where containerd knows of these.
fn handlers(host: &Host) -> &'static [&'static str] {
    if host.sandboxes_are_the_shims() { &["vmshim", "vmshim-sandbox"] } else { &["vmshim"] }
}

/// A part of the configuration, removed when dropped.
struct DropIn;

impl DropIn {
    const PATH: &str = "/etc/vmshim/config.d/pods.toml";

    fn new(text: &str) -> Self {
        fs::write(Self::PATH, text).unwrap();
        Self
    }
}

impl Drop for DropIn {
    fn drop(&mut self) {
        let _ = fs::remove_file(Self::PATH);
    }
}

#[test]
fn an_annotation_that_is_out_of_range_or_not_left_to_pods() {
    let host = host();
    let drop_in = DropIn::new("[runtime]\nleft_to_pods = [\"hypervisor.default_vcpus\"]\n");
    for (key, value, complaint) in [
        ("default_vcpus", "200", "must be from 1 to 64"),
        ("default_vcpus", "many", "must be"),
        ("default_memory_mib", "512", "is not left to pods on this node"),
        ("default_vcpu", "2", "did you mean io.vmshim.hypervisor.default_vcpus?"),
    ] {
        for handler in handlers(&host) {
            let mut config = named(PodSandboxConfig::default(), &host.id());
            config.annotations.insert(format!("io.vmshim.hypervisor.{key}"), value.to_owned());
            let text = refused(&host, handler, &config);
            assert!(text.contains(key) && text.contains(complaint), "{text}");
        }
    }
    drop(drop_in);
}

/// What the interfaces of pods without an address stand on, deleted when dropped.
struct Below;

impl Below {
    fn new() -> Self {
        assert!(ip(&["link", "add", LINK_BELOW, "type", "dummy"]));
        Self
    }
}

impl Drop for Below {
    fn drop(&mut self) {
        ip(&["link", "delete", LINK_BELOW]);
    }
}

/// Runs `ip`; whether it has done what it should.
pub fn ip(arguments: &[&str]) -> bool {
    Command::new("ip").args(arguments).status().unwrap().success()
}

#[test]
fn an_interface_without_an_address() {
    let _below = Below::new();
    let host = host();
    let text = refused(&host, "vmshim-unaddressed", &named(PodSandboxConfig::default(), &host.id()));
    assert!(text.contains("failed to find network info"), "{text}");
}

#[test]
fn of_two_pods_that_race_for_a_name_one_gets_it() {
    let host = host();
    let config = named(PodSandboxConfig::default(), &host.id());
    let attempt = || Pod::attempt(&host, "vmshim", config.clone());
    let (first, second) = std::thread::scope(|scope| {
        let rival = scope.spawn(attempt);
        (attempt(), rival.join().unwrap())
    });
    let (winner, loser) = if first.is_ok() { (first.unwrap(), second) } else { (second.unwrap(), first) };
    let text = complaint(|| loser);
    assert!(text.contains("is reserved for"), "{text}");
    winner.started("c", FOREVER, &[]);
    winner.end();
    host.assert_nothing_left();
}

#[test]
fn a_volume_that_is_gone_when_its_container_starts_or_runs() {
    let host = host();
    for handler in handlers(&host) {
        let pod = Pod::attempt(&host, handler, named(PodSandboxConfig::default(), &host.id())).unwrap();
        let volume = tempfile::tempdir().unwrap();
        let place = volume.path().to_owned();
        let gone = pod.attempt_create("gone", FOREVER, &[(&place, "/data")]).unwrap();
        fs::remove_dir(&place).unwrap();
        let text = complaint(|| pod.attempt_call("StartContainer", &gone));
        assert!(text.contains(place.to_str().unwrap()) && text.contains("No such file"), "{text}");

        fs::create_dir(&place).unwrap();
        let going = pod.started("going", FOREVER, &[(&place, "/data")]);
        fs::remove_dir(&place).unwrap();
        assert_eq!(pod.exec(&going, "ls /data; touch /data/file 2>/dev/null || echo refused"), "refused");
        pod.end();
    }
    host.assert_nothing_left();
}

#[test]
fn limits_beyond_what_the_host_has_make_the_largest_machine_that_it_can_have() {
    let host = host();
    let drop_in = DropIn::new("[hypervisor]\nmax_vcpus = 2\n");
    for handler in handlers(&host) {
        let mut config = named(PodSandboxConfig::default(), &host.id());
        let limits = config.linux.mut_or_insert_default().resources.mut_or_insert_default();
        limits.memory_limit_in_bytes = 1 << 50;
        (limits.cpu_period, limits.cpu_quota) = (100_000, 100_000_000);
        let pod = Pod::attempt(&host, handler, config).unwrap();
        let container = pod.started("c", FOREVER, &[]);
        let total = |text: &str| {
            let words = text.lines().find_map(|line| line.strip_prefix("MemTotal:")).unwrap();
            words.split_whitespace().next().unwrap().parse::<u64>().unwrap()
        };
        let guests = total(&pod.exec(&container, "cat /proc/meminfo"));
        let hosts = total(&fs::read_to_string("/proc/meminfo").unwrap());
        assert!(guests <= hosts && guests > hosts / 2, "{guests} of {hosts} KiB");
        assert_eq!(pod.exec(&container, "nproc"), "2");
        pod.end();
    }
    drop(drop_in);
    host.assert_nothing_left();
}

#[test]
fn a_network_namespace_that_goes_while_its_pod_runs() {
    let host = host();
    for handler in handlers(&host) {
        let others = netns_names();
        let pod = Pod::attempt(&host, handler, named(PodSandboxConfig::default(), &host.id())).unwrap();
        pod.started("c", FOREVER, &[]);
        let own = netns_names().into_iter().find(|name| !others.contains(name)).unwrap();
        assert!(ip(&["netns", "delete", &own]));
        pod.end();
    }
    host.assert_nothing_left();
}

/// The named network namespaces of the host.
pub fn netns_names() -> Vec<String> {
    let names = fs::read_dir("/run/netns").into_iter().flatten().flatten();
    names.map(|entry| entry.file_name().into_string().unwrap()).collect()
}
