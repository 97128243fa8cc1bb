//! Limits of the spec hold in the guest.

use crate::fixture::{BUSYBOX, host, stderr, stdout, succeeded};
use crate::shim::spec_run;

#[test]
fn allocating_past_the_memory_limit_is_an_oom_kill() {
    let host = host();
    // tail keeps everything up to the first newline in memory, and /dev/zero has none.
    let options = ["--memory-limit", "67108864"];
    let output = host.run(&options, BUSYBOX, &["tail", "/dev/zero"]);
    assert_eq!(output.status.code(), Some(137), "{}{}", stdout(&output), stderr(&output));
    let events = host.events();
    let (oom, exit) = (events.find("/tasks/oom"), events.find("/tasks/exit"));
    assert!(oom.is_some() && oom < exit, "no OOM event before the exit: {events}");
    host.assert_nothing_left();
}

#[test]
fn forking_past_the_pids_limit_fails_inside_only() {
    let host = host();
    let output = spec_run(
        &host,
        &["sh", "-c", "for i in $(seq 30); do sleep 3 & done; wait; echo survived"],
        |spec| spec["linux"]["resources"]["pids"] = serde_json::json!({ "limit": 10 }),
    );
    assert!(stderr(&output).contains("can't fork"), "{}{}", stdout(&output), stderr(&output));
    host.assert_nothing_left();
}

#[test]
fn a_pod_may_change_what_is_left_to_it_and_no_more() {
    let host = host();
    let vcpus = "io.vmshim.hypervisor.default_vcpus";
    let refused = host.sh(&["--annotation", &format!("{vcpus}=2")], "nproc");
    assert!(stderr(&refused).contains("is not left to pods on this node"), "{}", stderr(&refused));
    let drop_in = std::path::Path::new("/etc/vmshim/config.d/pods.toml");
    std::fs::write(drop_in, "[runtime]\nleft_to_pods = [\"hypervisor.default_vcpus\"]\n").unwrap();
    let granted = host.sh(&["--annotation", &format!("{vcpus}=2")], "nproc");
    let beyond = host.sh(&["--annotation", &format!("{vcpus}=200")], "nproc");
    std::fs::remove_file(drop_in).unwrap();
    assert_eq!(succeeded(&granted), "2\n");
    assert!(stderr(&beyond).contains("must be from 1 to 64"), "{}", stderr(&beyond));
    host.assert_nothing_left();
}

#[test]
fn a_read_only_rootfs_refuses_writes() {
    let host = host();
    let output = host.sh(&["--read-only"], "echo x > /file");
    assert_ne!(output.status.code(), Some(0));
    assert!(stderr(&output).contains("Read-only file system"), "{}", stderr(&output));
    host.assert_nothing_left();
}
