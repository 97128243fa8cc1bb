//! What a container must not be able to reach, in its guest and on the host.

use std::fs;

use crate::fixture::{host, stderr, stdout, succeeded};

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
