//! Directories of the host that have file systems mounted below.

use std::fs;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::fixture::{directory, host, succeeded};

/// A directory of the host which shares what is mounted below, as all do where systemd runs.
struct Volume {
    directory: tempfile::TempDir,
}

impl Volume {
    fn new() -> Self {
        let volume = Self { directory: tempfile::tempdir_in(directory("VMSHIM_TEST_DIR")).unwrap() };
        let path = volume.directory.path();
        mount(Some(path), path, None::<&str>, MsFlags::MS_BIND, None::<&str>).unwrap();
        mount(None::<&str>, path, None::<&str>, MsFlags::MS_SHARED, None::<&str>).unwrap();
        fs::create_dir(volume.below()).unwrap();
        volume
    }

    fn below(&self) -> PathBuf {
        self.directory.path().join("below")
    }

    /// Mounts a file system of one file.
    fn mount_below(&self) {
        mount(Some("none"), &self.below(), Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
        fs::write(self.below().join("file"), "mounted").unwrap();
    }

    /// What `ctr` is to be told.
    fn argument(&self, options: &str) -> String {
        format!("type=bind,src={},dst=/data,options=rbind:{options}", self.directory.path().display())
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        let detach = |path: &Path| umount2(path, MntFlags::MNT_DETACH);
        // Not every test mounts something there.
        let _ = detach(&self.below());
        let _ = detach(self.directory.path());
    }
}

#[test]
fn the_end_of_a_container_unmounts_nothing_of_the_hosts() {
    let host = host();
    for options in ["rw", "rprivate", "rshared"] {
        let volume = Volume::new();
        volume.mount_below();
        let output = host.sh(&["--mount", &volume.argument(options)], "cat /data/below/file");
        assert_eq!(succeeded(&output), "mounted");
        assert_eq!(fs::read_to_string(volume.below().join("file")).unwrap(), "mounted", "{options}");
    }
    host.assert_nothing_left();
}

#[test]
fn read_only_is_a_volume_and_not_what_is_mounted_below_unless_it_is_asked_for() {
    let host = host();
    {
        let volume = Volume::new();
        volume.mount_below();
        let line = "touch /data/x; touch /data/below/x; ls /data /data/below";
        let output = host.sh(&["--mount", &volume.argument("ro")], line);
        assert_eq!(succeeded(&output), "/data:\nbelow\n\n/data/below:\nfile\nx\n");
        let output = host
            .sh(&["--mount", &volume.argument("rro")], "touch /data/y; touch /data/below/y; ls /data/below");
        assert_eq!(succeeded(&output), "file\nx\n");
    }
    host.assert_nothing_left();
}

#[test]
fn what_the_host_mounts_later_is_seen() {
    let host = host();
    {
        let volume = Volume::new();
        let container = host.background(&["--mount", &volume.argument("rslave")]);
        volume.mount_below();
        assert_eq!(succeeded(&container.exec("cat", &["cat", "/data/below/file"])), "mounted");
    }
    host.assert_nothing_left();
}

#[test]
fn the_host_can_remove_what_it_has_unmounted() {
    let host = host();
    {
        let volume = Volume::new();
        volume.mount_below();
        let container = host.background(&["--mount", &volume.argument("rprivate")]);
        assert_eq!(succeeded(&container.exec("cat", &["cat", "/data/below/file"])), "mounted");
        umount2(&volume.below(), MntFlags::MNT_DETACH).unwrap();
        fs::remove_dir(volume.below()).unwrap();
        assert_eq!(succeeded(&container.exec("ls", &["ls", "/data"])), "");
    }
    host.assert_nothing_left();
}
