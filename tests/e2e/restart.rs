//! containerd going away under running containers.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use vmshim_tests::containerd::{Containerd, VMSHIM};

use crate::fixture::{BUSYBOX, directory, host, stderr, stdout};

/// How long a line of output, or an exit, may take.
const PATIENCE: Duration = Duration::from_secs(20);

fn lines(log: &Path) -> usize {
    fs::read_to_string(log).unwrap_or_default().lines().count()
}

fn wait_until(what: &str, is_so: impl Fn() -> bool) {
    let started = Instant::now();
    while !is_so() {
        assert!(started.elapsed() < PATIENCE, "in vain: until {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_newer_containerd_finds_what_an_older_one_ran() {
    let Some(older) = std::env::var_os("VMSHIM_TEST_CONTAINERD_OLDER") else { return };
    let host = host();
    let scratch = directory("VMSHIM_TEST_DIR").join("upgraded");
    let mut daemon = Containerd::start(Path::new(&older), &scratch).unwrap();
    daemon.import(&directory("VMSHIM_TEST_IMAGES").join("busybox.tar"), "overlayfs").unwrap();
    let log = scratch.join("container-log");
    let (uri, id) = (format!("file://{}", log.display()), host.id());
    let line = "trap 'exit 7' TERM; while :; do echo tick; sleep 0.2; done";
    daemon
        .ctr_ok(["run", "-d", "--runtime", VMSHIM, "--log-uri", &uri, BUSYBOX, &id, "sh", "-c", line])
        .unwrap();
    daemon.ctr_ok(["task", "exec", "-d", "--exec-id", "long", &id, "sleep", "1000"]).unwrap();
    let before = daemon.ctr_ok(["task", "ls"]).unwrap();

    daemon.kill_and_upgrade(&directory("VMSHIM_TEST_CONTAINERD")).unwrap();

    assert_eq!(daemon.ctr_ok(["task", "ls"]).unwrap(), before);
    let seen = lines(&log);
    wait_until("there is more output", || lines(&log) > seen);
    assert!(daemon.ctr_ok(["task", "ps", &id]).unwrap().contains("long"));
    let exec = daemon.ctr(["task", "exec", "--exec-id", "new", &id, "echo", "here"]).output().unwrap();
    assert_eq!(stdout(&exec), "here\n");
    daemon.ctr_ok(["task", "kill", "--signal", "SIGTERM", &id]).unwrap();
    wait_until("the task stops", || daemon.ctr_ok(["task", "ls"]).unwrap().contains("STOPPED"));
    let said = stderr(&daemon.ctr(["task", "delete", &id]).output().unwrap());
    assert!(said.contains("exit code 7"), "{said}");
    daemon.ctr_ok(["container", "rm", &id]).unwrap();
    drop(daemon);
    host.assert_nothing_left();
}

#[test]
fn a_killed_containerd_finds_everything_again() {
    let mut host = host();
    let scratch = tempfile::tempdir().unwrap();
    let log = scratch.path().join("log");
    let uri = format!("file://{}", log.display());
    let id = host.id();
    let line = "trap 'exit 7' TERM; while :; do echo tick; sleep 0.2; done";
    host.ctr_ok(["run", "-d", "--runtime", VMSHIM, "--log-uri", &uri, BUSYBOX, &id, "sh", "-c", line])
        .unwrap();
    host.ctr_ok(["task", "exec", "-d", "--exec-id", "long", &id, "sleep", "1000"]).unwrap();
    let before = host.ctr_ok(["task", "ls"]).unwrap();

    host.kill_and_restart().unwrap();

    assert_eq!(host.ctr_ok(["task", "ls"]).unwrap(), before);
    let seen = lines(&log);
    wait_until("there is more output", || lines(&log) > seen);
    let processes = host.ctr_ok(["task", "ps", &id]).unwrap();
    assert!(processes.contains("long"), "{processes}");
    let exec = host
        .ctr(["task", "exec", "--exec-id", "new", &id, "sh", "-c", "echo here; exit 5"])
        .output()
        .unwrap();
    assert_eq!((stdout(&exec).as_str(), exec.status.code()), ("here\n", Some(5)));
    host.ctr_ok(["task", "kill", "--signal", "SIGTERM", &id]).unwrap();
    wait_until("the task stops", || host.ctr_ok(["task", "ls"]).unwrap().contains("STOPPED"));
    let deleted = host.ctr(["task", "delete", &id]).output().unwrap();
    let said = stderr(&deleted);
    assert!(deleted.status.success() && said.contains("exit code 7"), "{said}");
    host.ctr_ok(["container", "rm", &id]).unwrap();
    host.assert_nothing_left();
}
