//! What `ctr` does with a running task besides running it.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use vmshim_tests::containerd::{VMSHIM, tail};

use crate::fixture::{BUSYBOX, Host, host, stderr, stdout, succeeded};

/// How long a frozen container is watched, and how often the one below would have written by then.
const WATCHED: Duration = Duration::from_secs(2);

fn length(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |metadata| metadata.len())
}

fn grows(path: &Path) -> bool {
    let before = length(path);
    let started = std::time::Instant::now();
    while started.elapsed() < 10 * WATCHED {
        if length(path) > before {
            return true;
        }
        std::thread::sleep(WATCHED / 20);
    }
    false
}

#[test]
fn pause_stops_every_process_and_resume_lets_them_go_on() {
    let host = host();
    let scratch = tempfile::tempdir().unwrap();
    let ticks = scratch.path().join("ticks");
    {
        let mount = format!("type=bind,src={},dst=/data,options=rbind:rw", scratch.path().display());
        let container = host.background(&["--mount", &mount]);
        let ticking = "while :; do echo x >> /data/ticks; sleep 0.1; done";
        let words = ["task", "exec", "-d", "--exec-id", "ticking", &container.id, "sh", "-c", ticking];
        host.ctr_ok(words).unwrap();
        assert!(grows(&ticks));
        host.ctr_ok(["task", "pause", &container.id]).unwrap();
        assert_eq!(container.status(), "PAUSED");
        // A write that was on its way when the container froze may still come through.
        std::thread::sleep(WATCHED / 4);
        let frozen = length(&ticks);
        std::thread::sleep(WATCHED);
        assert_eq!(length(&ticks), frozen);
        let refused = container.exec("refused", &["true"]);
        assert!(stderr(&refused).contains("paused"), "{}", stderr(&refused));
        let again = host.ctr(["task", "pause", &container.id]).output().unwrap();
        assert!(stderr(&again).contains("cannot pause a paused process"), "{}", stderr(&again));
        host.ctr_ok(["task", "resume", &container.id]).unwrap();
        assert_eq!(container.status(), "RUNNING");
        assert!(grows(&ticks));
    }
    host.assert_nothing_left();
}

#[test]
fn metrics_are_those_of_the_containers_cgroup() {
    let host = host();
    {
        let container = host.background(&["--memory-limit", "100663296"]);
        let text = host.ctr_ok(["task", "metrics", "--format", "json", &container.id]).unwrap();
        let metrics: serde_json::Value = serde_json::from_str(&text).unwrap();
        let memory = &metrics["memory"];
        assert_eq!(memory["usage_limit"].as_u64(), Some(96 << 20), "{text}");
        assert!(memory["usage"].as_u64().is_some_and(|usage| usage > 0 && usage < 32 << 20), "{text}");
        assert_eq!(metrics["pids"]["current"].as_u64(), Some(1), "{text}");
        assert!(metrics["cpu"]["usage_usec"].as_u64().is_some_and(|usage| usage > 0), "{text}");
    }
    host.assert_nothing_left();
}

#[test]
fn every_process_in_the_guest_is_listed() {
    let host = host();
    {
        let container = host.background(&[]);
        let line = "sleep 1001 & sleep 1002 & wait";
        host.ctr_ok(["task", "exec", "-d", "--exec-id", "three", &container.id, "sh", "-c", line]).unwrap();
        let count = || host.ctr_ok(["task", "ps", &container.id]).unwrap().lines().skip(1).count();
        let started = std::time::Instant::now();
        // The shell has yet to start the other two.
        while count() < 4 && started.elapsed() < 10 * WATCHED {
            std::thread::sleep(WATCHED / 20);
        }
        let listed = host.ctr_ok(["task", "ps", &container.id]).unwrap();
        assert_eq!(listed.lines().skip(1).count(), 4, "{listed}");
        assert_eq!(listed.matches("three").count(), 1, "{listed}");
        shim_tells_its_state(&host, container.pid());
        let pid = container.pid().to_string();
        assert!(listed.lines().skip(1).all(|line| line.starts_with(&pid)), "{listed}");
    }
    host.assert_nothing_left();
}

/// By SIGUSR1, at which containerd's own shims dump their stacks.
fn shim_tells_its_state(host: &Host, vmm: u32) {
    let status = fs::read_to_string(format!("/proc/{vmm}/status")).unwrap();
    let shim = status.lines().find_map(|line| line.strip_prefix("PPid:")).unwrap().trim().parse().unwrap();
    kill(Pid::from_raw(shim), Signal::SIGUSR1).unwrap();
    let started = std::time::Instant::now();
    let expected = "process \\\"three\\\": running";
    while !host.log().contains(expected) {
        assert!(started.elapsed() < 10 * WATCHED, "{}", tail(&host.log()));
        std::thread::sleep(WATCHED / 20);
    }
}

#[test]
fn a_checkpoint_is_refused_in_a_sentence() {
    let host = host();
    {
        let container = host.background(&[]);
        let output = host.ctr(["task", "checkpoint", &container.id]).output().unwrap();
        let said = stderr(&output);
        assert!(!output.status.success() && said.contains("not supported by this runtime"), "{said}");
        assert_eq!(container.status(), "RUNNING");
    }
    host.assert_nothing_left();
}

#[test]
fn a_loggers_program_gets_the_output() {
    let host = host();
    let scratch = tempfile::tempdir().unwrap();
    let (program, log) = (scratch.path().join("logger"), scratch.path().join("log"));
    // Ready when descriptor 5 is closed; what comes on 3 and 4 is the container's.
    // The last of it is written when the container is long gone, but for the delete that waits for the logger.
    let script = "#!/bin/sh\nexec 5>&-\n\
                  { echo \"$1 $2 $CONTAINER_NAMESPACE\"; cat <&3; sleep 0.5; sed 's/^/E /' <&4; } > \"$2\"\n";
    fs::write(&program, script).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    let uri = format!("binary://{}?to={}", program.display(), log.display());
    let id = host.id();
    let line = "echo out; echo err >&2";
    let words = ["run", "--rm", "--runtime", VMSHIM, "--log-uri", &uri, BUSYBOX, &id, "sh", "-c", line];
    let output = host.ctr(words).output().unwrap();
    assert_eq!(succeeded(&output), "");
    let expected = format!("to {} default\nout\nE err\n", log.display());
    assert_eq!(fs::read_to_string(&log).unwrap(), expected);
    host.assert_nothing_left();
}

#[test]
fn a_reader_that_goes_takes_nothing_with_it() {
    let host = host();
    {
        let container = host.background(&[]);
        // Attached, detached by its death, and the process none the worse.
        let line = "trap 'echo ended; exit 4' TERM; while :; do echo tick; sleep 0.1; done";
        let mut words = vec!["task", "exec", "--exec-id", "talker", &container.id, "sh", "-c", line];
        let mut first = host.ctr(words.clone()).stdout(std::process::Stdio::piped()).spawn().unwrap();
        std::io::Read::read_exact(&mut first.stdout.take().unwrap(), &mut [0; 10]).unwrap();
        first.kill().unwrap();
        first.wait().unwrap();
        words[3] = "other";
        words[7] = "echo still here";
        assert_eq!(stdout(&host.ctr(words).output().unwrap()), "still here\n");
        let listed = host.ctr_ok(["task", "ps", &container.id]).unwrap();
        assert!(listed.contains("talker"), "{listed}");
    }
    host.assert_nothing_left();
}
