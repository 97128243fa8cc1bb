//! A pod whose namespaces no container holds.

use crate::shim::{Shim, script, soon};
use serde_json::{Value, json};
use ttrpc::Code;
use vmshim_protocol::agent::SetUpPodRequest;

fn member(line: &str) -> Value {
    let mut spec = script(line);
    spec["linux"]["namespaces"] = json!([{"type": "mount"}, {"type": "cgroup"}, {"type": "uts", "path": "vmshim-pod"},
        {"type": "pid", "path": "vmshim-pod"}, {"type": "ipc", "path": "vmshim-pod"}]);
    spec.as_object_mut().unwrap().remove("hostname");
    spec
}

pub async fn a_pods_own_namespaces_outlive_its_containers(mut shim: Shim) {
    let early = shim.create("c", &member("true"), false).await.map(drop);
    assert!(
        matches!(early, Err(ttrpc::Error::RpcStatus(status)) if status.code() == Code::FAILED_PRECONDITION)
    );
    let mut request = SetUpPodRequest { hostname: "pod".into(), ..Default::default() };
    request.sysctls.insert("kernel.shmmni".into(), "78".into());
    shim.agent.set_up_pod(soon(), &request).await.unwrap();
    // What is changed later changes nothing.
    shim.agent.set_up_pod(soon(), &SetUpPodRequest::default()).await.unwrap();

    let line =
        "hostname; cat /proc/sys/kernel/shmmni; ls -A /proc/1/root/ /proc/1/fd; readlink /proc/self/ns/ipc";
    let (_, first, err) = shim.sh(&member(line)).await;
    assert!(first.starts_with("pod\n78\n"), "{first} {err}");
    assert_eq!(first.lines().filter(|line| !line.is_empty() && !line.starts_with("/proc/1/")).count(), 3);
    let (_, second, _) = shim.sh(&member(line)).await;
    assert_eq!(first, second);

    // In a guest it ends with the guest.
    let own = std::fs::read_to_string("/proc/thread-self/children").unwrap_or_default();
    for child in own.split_whitespace().filter_map(|pid| pid.parse().ok()) {
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(child), nix::sys::signal::SIGKILL).unwrap();
    }
}
