//! Signals, and what is left when one of our own processes is killed.

use std::fs;
use std::io::Read;
use std::process::Stdio;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::fixture::{BUSYBOX, host};

/// The processes of a container's pod whose command line has a word in it.
pub fn processes(word: &str) -> Vec<Pid> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let Ok(pid) = entry.file_name().to_string_lossy().parse() else { continue };
        let command = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        if String::from_utf8_lossy(&command).contains(word) {
            found.push(Pid::from_raw(pid));
        }
    }
    found
}

/// Waits until a condition is met that nobody announces.
pub fn wait_for(what: &str, deadline: Duration, mut met: impl FnMut() -> bool) {
    let started = Instant::now();
    while !met() {
        assert!(started.elapsed() < deadline, "{what} did not come within {deadline:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn signals_reach_the_init() {
    let host = host();
    for (signal, code) in [("SIGKILL", 137), ("SIGTERM", 7)] {
        let id = host.id();
        let line = "trap 'exit 7' TERM; echo ready; while :; do sleep 0.1; done";
        let runtime = vmshim_tests::containerd::VMSHIM;
        let mut command = host.ctr(["run", "--rm", "--runtime", runtime, BUSYBOX, &id, "sh", "-c", line]);
        let mut ctr = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
        let mut ready = [0; 6];
        ctr.stdout.take().unwrap().read_exact(&mut ready).unwrap();
        host.ctr_ok(["task", "kill", "--signal", signal, &id]).unwrap();
        assert_eq!(ctr.wait().unwrap().code(), Some(code));
    }
    host.assert_nothing_left();
}

#[test]
fn the_pid_lives_as_long_as_the_task() {
    let host = host();
    let pid;
    {
        let container = host.background(&[]);
        pid = container.pid();
        assert!(fs::exists(format!("/proc/{pid}")).unwrap());
    }
    assert!(!fs::exists(format!("/proc/{pid}")).unwrap());
    host.assert_nothing_left();
}

/// What takes a second at most on hardware may take this long where KVM itself is emulated.
const SECOND: Duration = Duration::from_secs(5);

#[test]
fn a_killed_vmm_stops_the_task_within_a_second() {
    let host = host();
    {
        let container = host.background(&[]);
        for vmm in processes("vmshim-vmm") {
            kill(vmm, Signal::SIGKILL).unwrap();
        }
        wait_for("the task's exit", SECOND, || host.events().contains("/tasks/exit"));
        wait_for("the stop", Duration::from_secs(5), || container.status() == "STOPPED");
    }
    host.assert_nothing_left();
}

/// What must be answered at once may take this long with an emulated CPU, `ctr`'s own start included.
const AT_ONCE: Duration = Duration::from_secs(5);

#[test]
fn a_frozen_vmm_keeps_nobody_waiting() {
    let host = host();
    {
        let container = host.background(&[]);
        let vmms = processes("vmshim-vmm");
        vmms.iter().for_each(|vmm| kill(*vmm, Signal::SIGSTOP).unwrap());
        let asked = Instant::now();
        assert_eq!(container.status(), "RUNNING");
        assert!(asked.elapsed() < AT_ONCE, "State took {:?}", asked.elapsed());
        let asked = Instant::now();
        host.ctr_ok(["task", "kill", "--signal", "SIGUSR1", &container.id]).unwrap();
        host.ctr_ok(["task", "kill", "--signal", "SIGKILL", &container.id]).unwrap();
        assert!(asked.elapsed() < 2 * AT_ONCE, "Kill took {:?}", asked.elapsed());
        wait_for("the task's exit", Duration::from_secs(30), || host.events().contains("/tasks/exit"));
        wait_for("the stop", AT_ONCE, || container.status() == "STOPPED");
    }
    host.assert_nothing_left();
}

#[test]
fn an_exec_that_is_killed_in_a_frozen_guest_ends() {
    let host = host();
    {
        let container = host.background(&[]);
        let arguments = ["task", "exec", "--exec-id", "e1", &container.id, "sleep", "10000"];
        let mut exec = host.ctr(arguments).stdin(std::process::Stdio::null()).spawn().unwrap();
        wait_for("the exec", Duration::from_secs(60), || host.events().contains("/tasks/exec-started"));
        processes("vmshim-vmm").iter().for_each(|vmm| kill(*vmm, Signal::SIGSTOP).unwrap());
        host.ctr_ok(["task", "kill", "--exec-id", "e1", "--signal", "SIGKILL", &container.id]).unwrap();
        let mut status = None;
        wait_for("the exec's end", Duration::from_secs(60), || {
            status = exec.try_wait().unwrap();
            status.is_some()
        });
        assert_eq!(status.unwrap().code(), Some(137));
    }
    host.assert_nothing_left();
}

#[test]
fn a_killed_shim_leaves_nothing() {
    let host = host();
    {
        let container = host.background(&[]);
        let pid = format!("\"pid\":{},", container.pid());
        for shim in processes("containerd-shim-vmshim-v2") {
            kill(shim, Signal::SIGKILL).unwrap();
        }
        let is_exit = |line: &str| line.contains("/tasks/exit ") && line.contains(&pid);
        wait_for("the exit of the pid", Duration::from_secs(10), || host.events().lines().any(is_exit));
        wait_for("the task's end", Duration::from_secs(10), || {
            !host.ctr_ok(["task", "ls"]).unwrap().contains(&format!("{} ", container.id))
        });
    }
    host.assert_nothing_left();
}

#[test]
fn a_killed_shim_and_vmm_leave_nothing() {
    let host = host();
    {
        let container = host.background(&[]);
        for word in ["containerd-shim-vmshim-v2", "vmshim-vmm"] {
            for process in processes(word) {
                // The VMM may have followed its shim already.
                let _ = kill(process, Signal::SIGKILL);
            }
        }
        wait_for("the task's end", Duration::from_secs(10), || {
            !host.ctr_ok(["task", "ls"]).unwrap().contains(&format!("{} ", container.id))
        });
    }
    host.assert_nothing_left();
}

#[test]
fn a_panicking_guest_is_told_with_its_last_words() {
    let host = host();
    {
        let container = host.background(&["--privileged"]);
        container.exec("crash", &["sh", "-c", "echo c > /proc/sysrq-trigger"]);
        wait_for("the stop", Duration::from_secs(10), || container.status() == "STOPPED");
        assert!(host.log().contains("sysrq triggered crash"), "the console's last lines are not in the log");
    }
    host.assert_nothing_left();
}
