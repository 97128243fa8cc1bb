//! What a container must not be able to reach, in its guest and on the host.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::process::Command;

use nix::sys::stat::{major, minor};
use serde_json::{Value, json};

use crate::fixture::{host, stderr, stdout, succeeded};
use crate::shim::spec_run;

#[test]
fn mknod_does_not_reach_the_guest_s_disks() {
    let host = host();
    let archive = crate::fixture::directory("VMSHIM_TEST_IMAGES").join("busybox.tar");
    host.import(&archive, "blockfile").unwrap();
    let line = "mknod /disk b $(cat /sys/class/block/vda/dev | tr : ' ') && dd if=/disk bs=512 count=1";
    let output = host.sh(&["--snapshotter", "blockfile"], line);
    assert!(!output.status.success());
    assert!(stderr(&output).contains("Operation not permitted"), "{}{}", stdout(&output), stderr(&output));
}

#[test]
fn capabilities_seccomp_and_masked_paths_are_those_of_the_spec() {
    let host = host();
    let text = succeeded(
        &host.sh(&["--seccomp"], "grep -E '^(CapEff|CapBnd|Seccomp|NoNewPrivs):' /proc/self/status"),
    );
    assert!(text.contains("CapEff:\t00000000a80425fb"), "{text}");
    assert!(text.contains("Seccomp:\t2") && text.contains("NoNewPrivs:\t1"), "{text}");
    assert_eq!(succeeded(&host.sh(&[], "cat /proc/kcore | wc -c")), "0\n");
    assert!(!host.sh(&[], "echo 1 > /proc/sys/kernel/panic").status.success());
}

#[test]
fn limits_ids_and_sysctls_are_those_of_the_spec() {
    let host = host();
    let line = "ulimit -n; ulimit -Hn; id -u; id -g; id -G; umask; cat /proc/sys/kernel/shm_rmid_forced \
                /proc/sys/net/ipv4/ip_unprivileged_port_start /proc/self/oom_score_adj";
    let output = spec_run(&host, &["sh", "-c", line], |spec| {
        spec["process"]["rlimits"] =
            serde_json::json!([{ "type": "RLIMIT_NOFILE", "soft": 123, "hard": 456 }]);
        spec["process"]["user"] =
            serde_json::json!({ "uid": 7, "gid": 8, "additionalGids": [9, 10], "umask": 63 });
        spec["process"]["oomScoreAdj"] = 250.into();
        spec["linux"]["sysctl"] = serde_json::json!({
            "kernel.shm_rmid_forced": "1", "net.ipv4.ip_unprivileged_port_start": "80"
        });
    });
    assert_eq!(succeeded(&output), "123\n456\n7\n8\n8 9 10\n0077\n1\n80\n250\n");
    host.assert_nothing_left();
}

/// A loop device of the host over a file of its own.
struct Loop {
    _file: tempfile::NamedTempFile,
    device: String,
}

impl Loop {
    fn holding(text: &str) -> Self {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), format!("{text:4096}")).unwrap();
        let output = Command::new("losetup").args(["--find", "--show"]).arg(file.path()).output().unwrap();
        Self { device: succeeded(&output).trim().to_owned(), _file: file }
    }

    /// As an entry of `linux.devices`, and as a rule.
    fn described(&self, path: &str, access: &str) -> (Value, Value) {
        let number = fs::metadata(&self.device).unwrap().rdev();
        let (major, minor) = (major(number), minor(number));
        let mut device = json!({ "path": path, "type": "b", "major": major, "minor": minor });
        let rule = json!({ "allow": true, "type": "b", "major": major, "minor": minor, "access": access });
        (device["fileMode"], device["uid"], device["gid"]) = (0o640.into(), 7.into(), 8.into());
        (device, rule)
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        // The census of the test tells if it stays.
        let _ = Command::new("losetup").args(["--detach", &self.device]).status();
    }
}

#[test]
fn block_devices_and_capabilities_of_the_spec_are_the_containers_where_they_can_be() {
    let host = host();
    {
        let (writable, read_only) = (Loop::holding("first"), Loop::holding("second"));
        let line = "cd /dev; for disk in w r; do stat -c '%A %u:%g' $disk; dd if=$disk bs=6 count=1 2>/dev/null; echo; \
                    echo third | dd of=$disk conv=fsync 2>/dev/null || echo refused; done";
        let output = spec_run(&host, &["sh", "-c", line], |spec| {
            let bounding = spec["process"]["capabilities"]["bounding"].as_array_mut().unwrap();
            bounding.push("CAP_FROM_THE_FUTURE".into());
            let described = [writable.described("/dev/w", "rwm"), read_only.described("/dev/r", "rm")];
            let linux = &mut spec["linux"];
            let rules = linux["resources"]["devices"].as_array_mut().unwrap();
            rules.extend(described.iter().map(|(_, rule)| rule.clone()));
            linux["devices"] = described.into_iter().map(|(device, _)| device).collect();
        });
        let node = "brw-r----- 7:8";
        let expected = format!("{node}\nfirst \n{node}\nsecond\nrefused\n");
        assert_eq!(succeeded(&output), expected);
        assert!(fs::read(&writable.device).unwrap().starts_with(b"third\n"));
        assert!(fs::read(&read_only.device).unwrap().starts_with(b"second"));
        assert!(host.log().contains("CAP_FROM_THE_FUTURE"));
    }
    host.assert_nothing_left();
}

#[test]
fn a_user_namespace_maps_as_the_spec_says() {
    let host = host();
    // A raw socket is for root in the user namespace that the network belongs to.
    let line = "id -u; cat /proc/self/uid_map; ping -c 1 -W 60 127.0.0.1 >/dev/null && echo pong";
    let output = spec_run(&host, &["sh", "-c", line], |spec| {
        let namespaces = spec["linux"]["namespaces"].as_array_mut().unwrap();
        namespaces.push(serde_json::json!({ "type": "user" }));
        let mapping = serde_json::json!([{ "containerID": 0, "hostID": 100_000, "size": 65536 }]);
        spec["linux"]["uidMappings"] = mapping.clone();
        spec["linux"]["gidMappings"] = mapping;
    });
    let text = succeeded(&output);
    assert_eq!(text.split_whitespace().collect::<Vec<_>>(), ["0", "0", "100000", "65536", "pong"]);
    host.assert_nothing_left();
}

#[test]
fn what_the_guest_cannot_do_is_refused_by_its_field() {
    let host = host();
    let output = spec_run(&host, &["true"], |spec| {
        spec["linux"]["sysctl"] = serde_json::json!({ "kernel.panic": "1" });
    });
    assert!(!output.status.success() && stderr(&output).contains("kernel.panic"), "{}", stderr(&output));
    let output = spec_run(&host, &["true"], |spec| {
        spec["linux"]["intelRdt"] = serde_json::json!({ "closID": "x" });
    });
    assert!(!output.status.success() && stderr(&output).contains("intelRdt"), "{}", stderr(&output));
    let output = spec_run(&host, &["true"], |spec| {
        spec["linux"]["devices"] = json!([{ "path": "/dev/gpu", "type": "c", "major": 195, "minor": 0 }]);
        let rules = spec["linux"]["resources"]["devices"].as_array_mut().unwrap();
        rules.push(json!({ "allow": true, "type": "c", "major": 195, "minor": 0, "access": "rw" }));
    });
    assert!(!output.status.success() && stderr(&output).contains("/dev/gpu"), "{}", stderr(&output));
    host.assert_nothing_left();
}

#[test]
fn the_vmm_is_jailed() {
    let host = host();
    {
        let _container = host.background(&[]);
        let mut seen = 0;
        for entry in fs::read_dir("/proc").unwrap().flatten() {
            let path = entry.path();
            let command = fs::read(path.join("cmdline")).unwrap_or_default();
            if !String::from_utf8_lossy(&command).contains("vmshim-vmm") {
                continue;
            }
            seen += 1;
            let status = fs::read_to_string(path.join("status")).unwrap();
            let field = |name: &str| {
                let line = status.lines().find(|line| line.starts_with(name)).unwrap();
                line.split_whitespace().nth(1).unwrap().to_owned()
            };
            assert_ne!(field("Uid:"), "0");
            assert_eq!(field("NoNewPrivs:"), "1");
            assert_eq!(field("Seccomp:"), "2");
            for namespace in ["user", "mnt", "ipc", "uts"] {
                let theirs = fs::read_link(path.join("ns").join(namespace)).unwrap();
                let ours = fs::read_link(format!("/proc/self/ns/{namespace}")).unwrap();
                assert_ne!(theirs, ours, "{namespace}");
            }
        }
        assert_eq!(seen, 1);
    }
    host.assert_nothing_left();
}
