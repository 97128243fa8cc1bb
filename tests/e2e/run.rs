//! `ctr run`: what comes out of a container, and how it ended.

use crate::fixture::{BUSYBOX, host, stderr, stdout, succeeded};

#[test]
fn prints_what_the_container_prints() {
    let host = host();
    assert_eq!(succeeded(&host.run(&[], BUSYBOX, &["echo", "hello", "world"])), "hello world\n");
    host.assert_nothing_left();
}

#[test]
fn keeps_stdout_and_stderr_apart() {
    let host = host();
    let output = host.sh(&[], "echo out; echo err >&2");
    assert_eq!((stdout(&output), stderr(&output)), ("out\n".into(), "err\n".into()));
}

#[test]
fn runs_on_a_kernel_of_its_own() {
    let host = host();
    let guest = succeeded(&host.run(&[], BUSYBOX, &["uname", "-r"]));
    let own = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    assert_ne!(guest.trim(), own.trim());
    assert!(guest.contains("vmshim"), "{guest}");
}

#[test]
fn exit_codes_pass_through() {
    let host = host();
    for code in [0, 1, 42] {
        assert_eq!(host.sh(&[], &format!("exit {code}")).status.code(), Some(code));
    }
    assert_eq!(host.sh(&[], "no-such-command").status.code(), Some(127));
    assert_eq!(host.sh(&[], "sh -c 'kill -9 $$'; exit $?").status.code(), Some(137));
    host.assert_nothing_left();
}

#[test]
fn environment_directory_user_and_hostname_are_the_spec_s() {
    let host = host();
    let options = ["--env", "COLOUR=blue", "--cwd", "/tmp", "--user", "12:34"];
    let text = succeeded(&host.sh(&options, "echo $COLOUR; pwd; id -u; id -g"));
    assert_eq!(text, "blue\n/tmp\n12\n34\n");
}

#[test]
fn what_is_written_to_the_rootfs_can_be_read_back() {
    let host = host();
    let line = "mkdir -p /a/b && echo text > /a/b/c && mv /a/b/c /a/d && ln /a/d /a/e && chown 5:6 /a/e && \
                stat -c '%u:%g %h' /a/d && cat /a/e";
    assert_eq!(succeeded(&host.sh(&[], line)), "5:6 2\ntext\n");
}

#[test]
fn a_host_directory_is_live_both_ways() {
    let host = host();
    let shared = tempfile::tempdir_in(crate::fixture::directory("VMSHIM_TEST_DIR")).unwrap();
    std::fs::write(shared.path().join("in"), "from the host\n").unwrap();
    let mount = format!("type=bind,src={},dst=/mnt,options=rbind:rw", shared.path().display());
    let text = succeeded(&host.sh(&["--mount", &mount], "cat /mnt/in; echo from the guest > /mnt/out"));
    assert_eq!(text, "from the host\n");
    assert_eq!(std::fs::read_to_string(shared.path().join("out")).unwrap(), "from the guest\n");
    host.assert_nothing_left();
}

#[test]
fn a_read_only_host_directory_refuses_writes() {
    let host = host();
    let shared = tempfile::tempdir_in(crate::fixture::directory("VMSHIM_TEST_DIR")).unwrap();
    let mount = format!("type=bind,src={},dst=/mnt,options=rbind:ro", shared.path().display());
    assert_ne!(host.sh(&["--mount", &mount], "echo x > /mnt/out").status.code(), Some(0));
    assert_eq!(std::fs::read_dir(shared.path()).unwrap().count(), 0);
}

#[test]
fn every_snapshotter_gives_a_writable_rootfs() {
    let host = host();
    let archive = crate::fixture::directory("VMSHIM_TEST_IMAGES").join("busybox.tar");
    let mut snapshotters = vec!["overlayfs", "native", "blockfile"];
    if host.is_version_2().unwrap() {
        snapshotters.push("erofs");
    }
    for snapshotter in snapshotters {
        host.import(&archive, snapshotter).unwrap();
        let options = ["--snapshotter", snapshotter];
        let text = succeeded(&host.sh(&options, "echo kept > /file && cat /file && grep ' / ' /proc/mounts"));
        assert!(text.starts_with("kept\n"), "{snapshotter}: {text}");
        let is_disk = text.contains(" ext4 ");
        assert_eq!(is_disk, snapshotter == "blockfile", "{snapshotter}: {text}");
    }
    host.assert_nothing_left();
}
