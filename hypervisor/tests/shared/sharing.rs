//! What guest and host see of each other's files.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::time::Instant;

use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::rig::Rig;

fn scenarios(place: &str) {
    let mut rig = Rig::start();
    let names = ["names", "data", "mappings", "holes", "special", "locks", "owners", "attributes", "many"];
    for name in names {
        let directory = format!("{place}/{name}");
        fs::create_dir(rig.path(&directory)).unwrap();
        let start = Instant::now();
        rig.tell(&format!("scenario {name} {directory}"));
        println!("{name}: {:.1} s", start.elapsed().as_secs_f64());
    }
}

#[test]
#[ignore = "needs KVM"]
fn programs_find_what_they_expect_in_a_root_file_system() {
    scenarios("c1/rootfs");
}

#[test]
#[ignore = "needs KVM"]
fn programs_find_what_they_expect_in_a_volume() {
    scenarios("c1/mounts/v");
}

#[test]
#[ignore = "needs KVM"]
fn what_the_host_changes_in_a_volume_is_seen_at_once() {
    let mut rig = Rig::start();
    let volume = rig.path("c1/mounts/v");
    fs::write(volume.join("a"), "one").unwrap();
    assert_eq!(rig.tell("read c1/mounts/v/a"), "one");
    fs::write(volume.join("a"), "two, longer").unwrap();
    assert_eq!(rig.tell("read c1/mounts/v/a"), "two, longer");
    // Of the same length, and in a file that is open.
    rig.tell("hold c1/mounts/v/a");
    assert_eq!(rig.tell("reread"), "two, longer");
    fs::write(volume.join("a"), "now, longer").unwrap();
    assert_eq!(rig.tell("reread"), "now, longer");
    rig.refused("read c1/mounts/v/b");
    fs::write(volume.join("b"), "there").unwrap();
    assert_eq!(rig.tell("read c1/mounts/v/b"), "there");
    fs::remove_file(volume.join("b")).unwrap();
    rig.refused("read c1/mounts/v/b");
    // As the kubelet updates a ConfigMap.
    for (version, text) in [("..1", "old"), ("..2", "new")] {
        fs::create_dir(volume.join(version)).unwrap();
        fs::write(volume.join(version).join("key"), text).unwrap();
    }
    symlink("..1", volume.join("..data")).unwrap();
    symlink("..data/key", volume.join("key")).unwrap();
    assert_eq!(rig.tell("read c1/mounts/v/key"), "old");
    symlink("..2", volume.join("..tmp")).unwrap();
    fs::rename(volume.join("..tmp"), volume.join("..data")).unwrap();
    assert_eq!(rig.tell("read c1/mounts/v/key"), "new");
    assert_eq!(rig.tell("readlink c1/mounts/v/..data"), "..2");
    // And the other way.
    rig.tell("write c1/mounts/v/from-guest text");
    assert_eq!(fs::read_to_string(volume.join("from-guest")).unwrap(), "text");
}

fn tmpfs(path: &Path) {
    fs::create_dir_all(path).unwrap();
    mount(Some("tmpfs"), path, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
}

#[test]
#[ignore = "needs KVM"]
fn what_is_mounted_while_the_guest_runs_appears_and_goes() {
    let mut rig = Rig::start();
    rig.refused("read late/rootfs/file");
    let late = rig.path("late/rootfs");
    tmpfs(&late);
    fs::write(late.join("file"), "text").unwrap();
    assert_eq!(rig.tell("read late/rootfs/file"), "text");
    rig.tell("hold late/rootfs/file");
    // Same number on the host, and another one in the guest.
    tmpfs(&rig.path("other"));
    fs::write(rig.path("other/file"), "other").unwrap();
    assert_ne!(rig.tell("inode late/rootfs/file"), rig.tell("inode other/file"));

    // The guest remembers and has open what is there; the host takes it away all the same.
    assert!(umount2(&late, MntFlags::empty()).is_err());
    umount2(&late, MntFlags::MNT_DETACH).unwrap();
    rig.refused("read late/rootfs/file");
    rig.tell("drop");
    assert_eq!(rig.tell("count late/rootfs"), "0");
    // Again at the same place.
    tmpfs(&late);
    fs::write(late.join("file"), "anew").unwrap();
    assert_eq!(rig.tell("read late/rootfs/file"), "anew");

    // A guest that unmounts leaves nothing that would be in the way.
    rig.tell("umount");
    umount2(&late, MntFlags::empty()).unwrap();
    umount2(&rig.path("other"), MntFlags::empty()).unwrap();
    rig.tell("mount");
    rig.tell("write c1/mounts/v/a text");
}
