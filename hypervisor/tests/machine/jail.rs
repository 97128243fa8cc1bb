//! What the VMM is left with while a guest runs, seen from outside.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::path::Path;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use vmshim_protocol::control::FdRole;

use crate::driver::{Guest, Running};

/// The files' capabilities, see `fs::needs`.
const OVER_FILES: &str = "00000000800001df";
const NONE: &str = "0000000000000000";

fn field(status: &str, name: &str) -> String {
    let line = status.lines().find(|line| line.starts_with(name)).unwrap();
    line[name.len()..].split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Name and status of each thread.
fn threads(pid: u32) -> Vec<(String, String)> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    tasks
        .map(|task| {
            let status = fs::read_to_string(task.unwrap().path().join("status")).unwrap();
            (field(&status, "Name:"), status)
        })
        .collect()
}

/// Another identity, no capability that counts on the host, filtered system calls, namespaces of its own: every thread.
fn assert_confined(pid: u32, guest: &Guest) {
    let threads = threads(pid);
    for (name, status) in &threads {
        let (uid, gid) = (guest.config.uid, guest.config.gid);
        assert_eq!(field(status, "Uid:"), format!("{uid} {uid} {uid} {uid}"), "{name}");
        assert_eq!(field(status, "Gid:"), format!("{gid} {gid} {gid} {gid}"), "{name}");
        assert_eq!(field(status, "Groups:"), "", "{name}");
        let effective = field(status, "CapEff:");
        let permitted = field(status, "CapPrm:");
        if name == "fs" {
            assert_eq!(permitted, OVER_FILES);
        } else {
            assert_eq!((effective.as_str(), permitted.as_str()), (NONE, NONE), "{name}");
        }
        assert_eq!(field(status, "CapInh:"), NONE, "{name}");
        assert_eq!(field(status, "CapAmb:"), NONE, "{name}");
        assert_eq!(field(status, "NoNewPrivs:"), "1", "{name}");
        assert_eq!(field(status, "Seccomp:"), "2", "{name}");
    }
    for kind in ["user", "mnt", "ipc", "uts", "net", "cgroup"] {
        let of = |process: &str| fs::read_link(format!("/proc/{process}/ns/{kind}")).unwrap();
        assert_ne!(of(&pid.to_string()), of("self"), "{kind}");
    }
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    assert_eq!(field(&limits, "Max core file size"), "0 0 bytes");
}

#[test]
#[ignore = "needs KVM"]
fn without_a_shared_directory_there_is_no_file_at_all() {
    let mut guest = Guest::default();
    guest.config.vcpus = 2;
    guest.config.disk_slots = 1;
    let running = Running::start(&guest, |_| ());
    let pid = running.vmm.pid();
    assert_confined(pid, &guest);
    let mut names: Vec<_> = threads(pid).into_iter().map(|(name, _)| name).collect();
    // A worker that newer kernels run in the process of each machine.
    names.retain(|name| !name.starts_with("kvm-"));
    assert_eq!(names, ["vmshim-vmm", "vcpu0", "vcpu1", "blk"]);
    let root = format!("/proc/{pid}/root");
    assert_eq!(fs::read_dir(&root).unwrap().count(), 0);
    assert_eq!(fs::read_to_string(format!("/proc/{pid}/mounts")).unwrap().lines().count(), 1);
}

#[test]
#[ignore = "needs KVM"]
fn the_shared_directory_is_the_root_and_takes_mounts_from_the_host() {
    let scratch = tempfile::tempdir().unwrap();
    let shared = scratch.path();
    // As the shim does: a mount that passes on what is mounted below it.
    mount(Some(shared), shared, None::<&str>, MsFlags::MS_BIND, None::<&str>).unwrap();
    mount(None::<&str>, shared, None::<&str>, MsFlags::MS_SHARED, None::<&str>).unwrap();
    fs::write(shared.join("early"), "one").unwrap();
    for place in ["late", "before"] {
        fs::create_dir(shared.join(place)).unwrap();
    }
    let tmpfs = |place: &str| {
        let at = shared.join(place);
        mount(Some("tmpfs"), &at, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
        fs::write(at.join("file"), place).unwrap();
    };
    tmpfs("before");

    let guest = Guest::default();
    let directory = File::open(shared).unwrap();
    let mut running = Running::start_with(&guest, &[(FdRole::SharedDirectory, directory.as_fd())], |_| ());
    let pid = running.vmm.pid();
    assert_confined(pid, &guest);
    assert_eq!(running.tell("mount-shared"), "done");
    assert_eq!(running.tell("cat /shared/early"), "one");
    assert_eq!(running.tell("cat /shared/before/file"), "before");
    tmpfs("late");
    assert_eq!(running.tell("cat /shared/late/file"), "late");
    assert_eq!(running.tell("echo two /shared/late/answer"), "done");
    assert_eq!(fs::read_to_string(shared.join("late/answer")).unwrap(), "two");
    assert_eq!(running.tell("echo three /shared/made"), "done");
    assert_eq!(fs::read_to_string(shared.join("made")).unwrap(), "three");

    // Nothing of the host is left, and nothing goes back to it.
    let mounts = fs::read_to_string(format!("/proc/{pid}/mounts")).unwrap();
    let places: Vec<_> = mounts.lines().map(|line| line.split_whitespace().nth(1).unwrap()).collect();
    assert_eq!(places, ["/", "/before", "/late"]);
    let own = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert_eq!(own.matches(shared.to_str().unwrap()).count(), 3, "{own}");

    umount2(&shared.join("late"), MntFlags::MNT_DETACH).unwrap();
    assert!(running.tell("cat /shared/late/file").starts_with("error"));
    drop(running);
    for place in [shared.join("before"), Path::new(shared).into()] {
        umount2(&place, MntFlags::MNT_DETACH).unwrap();
    }
}
