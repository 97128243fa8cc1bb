//! What the shim mounts below the shared directory. Needs root; each test has a mount namespace of its own.

use std::ffi::CString;
use std::fs;
use std::path::Path;

use nix::libc;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};

use super::driver::*;
use crate::devices::virtio::fs::tree::NodeId;
use crate::devices::virtio::fs::wire::{self, opcode, setattr};
use vm_memory::ByteValued;

const ROOT: NodeId = NodeId::ROOT;
const NONE: Option<&str> = None;

/// A guest in a mount namespace that goes away with the test's thread; none where that is not allowed.
fn guest() -> Option<Guest> {
    if !is_root() {
        return None;
    }
    unshare(CloneFlags::CLONE_NEWNS).unwrap();
    mount(NONE, "/", NONE, MsFlags::MS_PRIVATE | MsFlags::MS_REC, NONE).unwrap();
    Some(Guest::new())
}

fn tmpfs(path: &Path) {
    fs::create_dir_all(path).unwrap();
    mount(Some("tmpfs"), path, Some("tmpfs"), MsFlags::empty(), Some("size=1m")).unwrap();
}

#[test]
fn file_systems_with_equal_inode_numbers_are_kept_apart() {
    let Some(mut guest) = guest() else { return };
    for name in ["a", "b"] {
        tmpfs(&guest.path(name));
        fs::write(guest.path(name).join("file"), name).unwrap();
    }
    let entries = ["a/file", "b/file"].map(|path| {
        let node = guest.walk(path).unwrap();
        (node, guest.getattr(node).unwrap().attr.ino)
    });
    let host = ["a/file", "b/file"]
        .map(|path| std::os::unix::fs::MetadataExt::ino(&fs::metadata(guest.path(path)).unwrap()));
    assert_eq!(host[0], host[1], "the premise of this test");
    assert_ne!(entries[0], entries[1]);
    assert_ne!(entries[0].1, entries[1].1);
    for ((node, _), text) in entries.into_iter().zip(["a", "b"]) {
        let open = guest.open(node, libc::O_RDONLY).unwrap();
        assert_eq!(guest.read(node, open.fh, 0, 10).unwrap(), text.as_bytes());
    }
    // Names do not move between file systems, as anywhere.
    let (a, b) = (guest.walk("a").unwrap(), guest.walk("b").unwrap());
    let body = wire::RenameIn { newdir: b.0 };
    let moved = guest.request(opcode::RENAME, a, &[body.as_slice(), &c("file"), &c("x")], 0);
    assert_eq!(moved, Err(libc::EXDEV));
}

#[test]
fn what_is_mounted_later_is_seen_and_what_is_gone_is_let_go() {
    let Some(mut guest) = guest() else { return };
    fs::create_dir_all(guest.path("c1/rootfs")).unwrap();
    let parent = guest.walk("c1").unwrap();
    let before = guest.lookup(parent, "rootfs").unwrap();
    tmpfs(&guest.path("c1/rootfs"));
    fs::write(guest.path("c1/rootfs/file"), "text").unwrap();
    let root = guest.lookup(parent, "rootfs").unwrap();
    assert_ne!(root.nodeid, before.nodeid);
    let node = guest.walk("c1/rootfs/file").unwrap();
    let open = guest.open(node, libc::O_RDWR).unwrap();
    // The kernel tells of each change of the mount table, once.
    assert!(guest.turn() > 0);
    assert_eq!(guest.turn(), 0);
    assert_eq!(guest.read(node, open.fh, 0, 10).unwrap(), b"text");

    // The guest remembers inodes of it, so it is busy, but it can be detached.
    let path = guest.path("c1/rootfs");
    assert_eq!(umount2(&path, MntFlags::empty()), Err(nix::errno::Errno::EBUSY));
    umount2(&path, MntFlags::MNT_DETACH).unwrap();
    assert!(guest.turn() > 0);
    assert_eq!(guest.read(node, open.fh, 0, 10), Err(libc::EBADF));
    assert_eq!(guest.getattr(node), Err(libc::ESTALE));
    assert_eq!(guest.lookup(parent, "rootfs").unwrap().nodeid, before.nodeid);
    assert_eq!(guest.lookup(parent, "rootfs").unwrap().attr.ino, before.attr.ino);
    // Root, c1, rootfs.
    assert_eq!(guest.device.session.tree().descriptors(), 3);
}

#[test]
fn what_is_mounted_inside_of_a_root_file_system_is_live() {
    let Some(mut guest) = guest() else { return };
    tmpfs(&guest.path("c1/rootfs"));
    tmpfs(&guest.path("c1/rootfs/volume"));
    fs::create_dir(guest.path("c1/rootfs/etc")).unwrap();
    fs::create_dir(guest.path("c1/rootfs/volume/d")).unwrap();
    let [etc, inside] = ["c1/rootfs/etc", "c1/rootfs/volume/d"].map(|path| guest.walk(path).unwrap());
    assert!(guest.getattr(etc).unwrap().attr_valid > 3600);
    assert_eq!(guest.getattr(inside).unwrap().attr_valid, 0);
}

#[test]
fn a_mount_point_may_go_before_anybody_looks() {
    let Some(mut guest) = guest() else { return };
    tmpfs(&guest.path("c1/rootfs"));
    fs::write(guest.path("c1/rootfs/file"), "").unwrap();
    guest.walk("c1/rootfs/file").unwrap();
    umount2(&guest.path("c1/rootfs"), MntFlags::MNT_DETACH).unwrap();
    fs::remove_dir_all(guest.path("c1")).unwrap();
    assert!(guest.turn() > 0);
    // Root, and the directory that the guest still remembers.
    assert_eq!(guest.device.session.tree().descriptors(), 2);
}

#[test]
fn mounts_below_a_mount_go_with_it() {
    let Some(mut guest) = guest() else { return };
    tmpfs(&guest.path("outer"));
    tmpfs(&guest.path("outer/inner"));
    fs::write(guest.path("outer/inner/file"), "").unwrap();
    guest.walk("outer/inner/file").unwrap();
    assert_eq!(guest.device.session.tree().descriptors(), 4);
    umount2(&guest.path("outer"), MntFlags::MNT_DETACH).unwrap();
    assert!(guest.turn() > 0);
    assert_eq!(guest.device.session.tree().descriptors(), 1);
}

#[test]
fn a_read_only_bind_mount_is_read_only() {
    let Some(mut guest) = guest() else { return };
    tmpfs(&guest.path("rw"));
    fs::write(guest.path("rw/file"), "text").unwrap();
    fs::create_dir(guest.path("ro")).unwrap();
    let (source, target) = (guest.path("rw"), guest.path("ro"));
    mount(Some(&source), &target, NONE, MsFlags::MS_BIND, NONE).unwrap();
    let read_only = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
    mount(NONE, &target, NONE, read_only, NONE).unwrap();

    let (dir, file) = (guest.walk("ro").unwrap(), guest.walk("ro/file").unwrap());
    // The same file through the other mount is another inode, with other rights.
    assert_ne!(guest.walk("rw/file").unwrap(), file);
    assert_eq!(guest.open(file, libc::O_RDWR), Err(libc::EROFS));
    assert!(guest.open(file, libc::O_RDONLY).is_ok());
    assert_eq!(guest.create(dir, "new", libc::O_RDWR, 0o600), Err(libc::EROFS));
    assert_eq!(guest.mkdir(dir, "new", 0o700), Err(libc::EROFS));
    assert_eq!(guest.mknod(dir, "new", libc::S_IFIFO | 0o600), Err(libc::EROFS));
    assert_eq!(guest.request(opcode::UNLINK, dir, &[&c("file")], 0), Err(libc::EROFS));
    assert_eq!(guest.set_xattr(file, "user.x", b""), Err(libc::EROFS));
    for valid in [setattr::MODE, setattr::UID, setattr::SIZE, setattr::MTIME | setattr::MTIME_NOW] {
        let change = wire::SetattrIn { valid, ..Default::default() };
        assert_eq!(guest.setattr(file, change), Err(libc::EROFS), "{valid}");
    }
    // A handle that was opened for reading does not write through the other mount either.
    let open = guest.open(file, libc::O_RDONLY).unwrap();
    assert_eq!(guest.write(file, open.fh, 0, b"x"), Err(libc::EBADF));
    let link = wire::LinkIn { oldnodeid: guest.walk("rw/file").unwrap().0 };
    let linked = guest.ask::<wire::EntryOut>(opcode::LINK, dir, &[link.as_slice(), &c("l")]);
    assert!(matches!(linked, Err(libc::EROFS | libc::EXDEV)));
    assert_eq!(fs::read_to_string(guest.path("rw/file")).unwrap(), "text");
}

#[test]
fn device_nodes_of_an_image_are_shown_and_not_opened() {
    let Some(mut guest) = guest() else { return };
    tmpfs(&guest.path("image"));
    let path = CString::new(guest.path("image/null").to_str().unwrap()).unwrap();
    // SAFETY: the path is terminated.
    let made = unsafe { libc::mknod(path.as_ptr(), libc::S_IFCHR | 0o666, libc::makedev(1, 3)) };
    assert_eq!(made, 0);
    let image = guest.walk("image").unwrap();
    let entry = guest.lookup(image, "null").unwrap();
    assert_eq!((entry.attr.mode & libc::S_IFMT, entry.attr.rdev), (libc::S_IFCHR, 0x103));
    assert_eq!(guest.open(NodeId(entry.nodeid), libc::O_RDWR), Err(libc::ENXIO));
}

#[test]
fn sync_reaches_every_file_system() {
    let Some(mut guest) = guest() else { return };
    tmpfs(&guest.path("a"));
    guest.walk("a").unwrap();
    guest.request(opcode::SYNCFS, ROOT, &[&[0; 8]], 0).unwrap();
}
