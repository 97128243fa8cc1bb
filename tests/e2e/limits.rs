//! Limits of the spec hold in the guest.

use crate::fixture::{BUSYBOX, host, stderr, stdout};
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
fn a_read_only_rootfs_refuses_writes() {
    let host = host();
    let output = host.sh(&["--read-only"], "echo x > /file");
    assert_ne!(output.status.code(), Some(0));
    assert!(stderr(&output).contains("Read-only file system"), "{}", stderr(&output));
    host.assert_nothing_left();
}
