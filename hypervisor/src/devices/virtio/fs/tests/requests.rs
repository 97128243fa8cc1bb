//! What a well-meaning guest does.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, symlink};

use nix::libc;
use vm_memory::ByteValued;

use super::driver::*;
use crate::devices::virtio::VirtioDevice;
use crate::devices::virtio::fs::tree::NodeId;
use crate::devices::virtio::fs::wire::{self, fopen, init, opcode, setattr};

const ROOT: NodeId = NodeId::ROOT;

#[test]
fn the_tag_and_the_number_of_queues_are_in_the_configuration_space() {
    let guest = Guest::unmounted();
    let mut space = [0xff; 44];
    guest.device.read_config(0, &mut space);
    assert_eq!(&space[..7], b"shared\0");
    assert_eq!(&space[36..44], &[1, 0, 0, 0, 0, 0, 0, 0]);
    guest.device.read_config(u32::MAX, &mut space);
    assert_eq!(space, [0; 44]);
    assert_eq!(guest.device.device_type(), 26);
}

#[test]
fn init_agrees_on_what_both_know() {
    let mut guest = Guest::unmounted();
    let out = guest.init(u32::MAX);
    let flags = u64::from(out.flags);
    assert_eq!((out.major, out.max_write, out.max_pages, out.time_gran), (7, 1 << 20, 256, 1));
    assert!(flags & init::POSIX_ACL != 0 && flags & init::HANDLE_KILLPRIV_V2 != 0);
    // Write-back caching, and locks that only one guest would see.
    assert_eq!(out.flags & (1 << 16 | 1 << 1 | 1 << 10), 0);
    assert_eq!(guest.init(1).flags, 1);
}

#[test]
fn a_newer_major_version_is_told_ours_and_an_old_one_is_refused() {
    let mut guest = Guest::unmounted();
    let hello = |major, minor| wire::InitIn { major, minor, ..Default::default() };
    let out: wire::InitOut = guest.ask(opcode::INIT, ROOT, &[hello(8, 0).as_slice()]).unwrap();
    assert_eq!((out.major, out.flags), (7, 0));
    assert_eq!(guest.getattr(ROOT), Err(libc::ENOTCONN));
    let out = guest.ask::<wire::InitOut>(opcode::INIT, ROOT, &[hello(7, 27).as_slice()]);
    assert_eq!(out, Err(libc::EPROTO));
}

#[test]
fn a_file_is_made_written_read_and_removed() {
    let mut guest = Guest::new();
    let (entry, open) = guest.create(ROOT, "a", libc::O_RDWR, 0o666).unwrap();
    let node = NodeId(entry.nodeid);
    assert_eq!(entry.attr.mode, libc::S_IFREG | 0o644);
    let data: Vec<u8> = (0..300_000u32).map(|i| (i % 251) as u8).collect();
    assert_eq!(guest.write(node, open.fh, 5, &data), Ok(300_000));
    assert_eq!(fs::read(guest.path("a")).unwrap()[5..], data);
    assert_eq!(guest.read(node, open.fh, 6, 1000).unwrap(), data[1..1001]);
    assert_eq!(guest.read(node, open.fh, 300_000, 4096).unwrap(), data[299_995..]);
    assert!(guest.read(node, open.fh, 400_000, 4096).unwrap().is_empty());
    // A file without a name is still there for who has it open.
    guest.request(opcode::UNLINK, ROOT, &[&c("a")], 0).unwrap();
    assert_eq!(guest.lookup(ROOT, "a"), Err(libc::ENOENT));
    assert_eq!(guest.read(node, open.fh, 6, 10).unwrap(), data[1..11]);
    assert_eq!(guest.getattr(node).unwrap().attr.nlink, 0);
    guest.release(node, open.fh).unwrap();
    assert_eq!(guest.read(node, open.fh, 0, 1), Err(libc::EBADF));
    let statistics = guest.device.statistics();
    assert_eq!((statistics.read_bytes, statistics.written_bytes), (1000 + 5 + 10, 300_000));
}

#[test]
fn create_opens_what_is_there_unless_it_must_not() {
    let mut guest = Guest::new();
    fs::write(guest.path("a"), "old").unwrap();
    symlink("/etc/passwd", guest.path("l")).unwrap();
    let (entry, open) = guest.create(ROOT, "a", libc::O_RDWR, 0o600).unwrap();
    assert_eq!(guest.read(NodeId(entry.nodeid), open.fh, 0, 10).unwrap(), b"old");
    assert_eq!(guest.create(ROOT, "a", libc::O_RDWR | libc::O_EXCL, 0o600), Err(libc::EEXIST));
    assert_eq!(guest.create(ROOT, "l", libc::O_RDWR, 0o600), Err(libc::ESTALE));
}

#[test]
fn appending_is_a_property_of_the_write() {
    let mut guest = Guest::new();
    let (entry, open) = guest.create(ROOT, "log", libc::O_WRONLY | libc::O_APPEND, 0o600).unwrap();
    let node = NodeId(entry.nodeid);
    guest.write_with(node, open.fh, 0, b"one", 0, libc::O_APPEND).unwrap();
    // Somebody else appends; the guest does not know the new end.
    fs::write(guest.path("log"), "one-host").unwrap();
    guest.write_with(node, open.fh, 3, b"+two", 0, libc::O_APPEND).unwrap();
    assert_eq!(fs::read_to_string(guest.path("log")).unwrap(), "one-host+two");
    // What comes from a mapping goes where it belongs, though the handle was opened for appending.
    guest.write_with(node, open.fh, 0, b"ONE", wire::WRITE_CACHE, libc::O_APPEND).unwrap();
    assert_eq!(fs::read_to_string(guest.path("log")).unwrap(), "ONE-host+two");
}

#[test]
fn truncation_by_open_and_by_setattr() {
    let mut guest = Guest::new();
    fs::write(guest.path("a"), "0123456789").unwrap();
    let node = guest.walk("a").unwrap();
    let change = |size| wire::SetattrIn { valid: setattr::SIZE, size, ..Default::default() };
    assert_eq!(guest.setattr(node, change(4)).unwrap().attr.size, 4);
    let open = guest.open(node, libc::O_RDWR).unwrap();
    let by_handle = wire::SetattrIn { valid: setattr::SIZE | setattr::FH, fh: open.fh, ..change(1 << 20) };
    assert_eq!(guest.setattr(node, by_handle).unwrap().attr.size, 1 << 20);
    assert_eq!(guest.setattr(node, change(u64::MAX)), Err(libc::EFBIG));
    guest.open(node, libc::O_RDWR | libc::O_TRUNC).unwrap();
    assert_eq!(guest.getattr(node).unwrap().attr.size, 0);
    let dir = guest.mkdir(ROOT, "d", 0o755).unwrap();
    assert_eq!(guest.setattr(NodeId(dir.nodeid), change(0)), Err(libc::EINVAL));
}

#[test]
fn owner_mode_and_times_are_set() {
    let mut guest = Guest::new();
    fs::write(guest.path("a"), "").unwrap();
    symlink("a", guest.path("l")).unwrap();
    let (node, link) = (guest.walk("a").unwrap(), guest.walk("l").unwrap());
    let times = wire::SetattrIn {
        valid: setattr::MODE | setattr::ATIME | setattr::MTIME,
        mode: 0o4711,
        atime: 1_000_000_000,
        atimensec: 5,
        mtime: (-3i64).cast_unsigned(),
        ..Default::default()
    };
    let attr = guest.setattr(node, times).unwrap().attr;
    assert_eq!((attr.mode, attr.atime, attr.atimensec), (libc::S_IFREG | 0o4711, 1_000_000_000, 5));
    assert_eq!(attr.mtime.cast_signed(), -3);
    let now = wire::SetattrIn { valid: setattr::MTIME | setattr::MTIME_NOW, ..times };
    assert!(guest.setattr(node, now).unwrap().attr.mtime > 1_700_000_000);
    // Times of a link are its own.
    let attr =
        guest.setattr(link, wire::SetattrIn { valid: setattr::MTIME, mtime: 7, ..times }).unwrap().attr;
    assert_eq!((attr.mtime, attr.mode & libc::S_IFMT), (7, libc::S_IFLNK));
    assert!(fs::metadata(guest.path("a")).unwrap().mtime() > 7);
    if !is_root() {
        return;
    }
    let chown = |valid| wire::SetattrIn { valid, uid: 4711, gid: 4712, ..Default::default() };
    let attr = guest.setattr(node, chown(setattr::UID | setattr::GID)).unwrap().attr;
    // As on any Linux, set-user-id bits go with the owner.
    assert_eq!((attr.uid, attr.gid, attr.mode & 0o7777), (4711, 4712, 0o711));
    let both = wire::SetattrIn { mode: 0o6755, ..chown(setattr::UID | setattr::MODE) };
    assert_eq!(guest.setattr(node, both).unwrap().attr.mode & 0o7777, 0o6755);
    assert_eq!(guest.setattr(link, chown(setattr::GID)).unwrap().attr.gid, 4712);
}

#[test]
fn what_is_made_belongs_to_the_caller() {
    if !is_root() {
        return;
    }
    let mut guest = Guest::new();
    (guest.uid, guest.gid) = (1000, 1001);
    // A directory that only a supplementary group may write, which FUSE does not tell about.
    let dir = guest.path("d");
    fs::create_dir(&dir).unwrap();
    std::os::unix::fs::chown(&dir, Some(0), Some(2000)).unwrap();
    let parent = guest.walk("d").unwrap();
    guest
        .setattr(parent, wire::SetattrIn { valid: setattr::MODE, mode: 0o2770, ..Default::default() })
        .unwrap();
    let (file, _) = guest.create(parent, "f", libc::O_RDWR, 0o666).unwrap();
    let sub = guest.mkdir(parent, "s", 0o755).unwrap();
    assert_eq!((file.attr.uid, file.attr.gid, file.attr.mode & 0o7777), (1000, 2000, 0o644));
    assert_eq!((sub.attr.uid, sub.attr.gid, sub.attr.mode & 0o7777), (1000, 2000, 0o2755));
    let fifo = guest.mknod(ROOT, "p", libc::S_IFIFO | 0o640).unwrap();
    assert_eq!((fifo.attr.uid, fifo.attr.gid), (1000, 1001));
    (guest.uid, guest.gid) = (0, 0);
    assert_eq!(guest.mkdir(ROOT, "r", 0o755).unwrap().attr.uid, 0);
    (guest.uid, guest.gid) = (u32::MAX, 0);
    assert_eq!(guest.mkdir(ROOT, "x", 0o755), Err(libc::EINVAL));
}

#[test]
fn set_id_bits_go_when_a_file_is_changed() {
    let mut guest = Guest::new();
    let (entry, open) = guest.create(ROOT, "a", libc::O_RDWR, 0o644).unwrap();
    let node = NodeId(entry.nodeid);
    let set = wire::SetattrIn { valid: setattr::MODE, mode: 0o6755, ..Default::default() };
    let truncate = wire::SetattrIn { valid: setattr::SIZE, ..Default::default() };
    for change in 0..4 {
        assert_eq!(guest.setattr(node, set).unwrap().attr.mode & 0o7777, 0o6755);
        match change {
            0 => drop(guest.write(node, open.fh, 0, b"x").unwrap()),
            1 => drop(guest.setattr(node, truncate).unwrap()),
            2 => drop(
                guest
                    .setattr(
                        node,
                        wire::SetattrIn { valid: setattr::SIZE | setattr::FH, fh: open.fh, ..truncate },
                    )
                    .unwrap(),
            ),
            _ => drop(guest.open(node, libc::O_WRONLY | libc::O_TRUNC).unwrap()),
        }
        assert_eq!(guest.getattr(node).unwrap().attr.mode & 0o7777, 0o755, "{change}");
    }
}

#[test]
fn directories_are_listed_in_pieces() {
    let mut guest = Guest::new();
    let mut expected: Vec<String> = (0..500).map(|i| format!("file-{i}-{}", "x".repeat(i % 200))).collect();
    for name in &expected {
        fs::write(guest.path(name), "").unwrap();
    }
    fs::create_dir(guest.path("sub")).unwrap();
    expected.extend(["sub", ".", ".."].map(str::to_owned));
    expected.sort();
    for (plus, size) in [(false, 4096), (true, 4096), (false, 300), (true, 1 << 20)] {
        let entries = guest.list(ROOT, plus, size);
        let mut names: Vec<_> = entries.iter().map(|(name, ..)| name.clone()).collect();
        names.sort();
        assert_eq!(names, expected, "{plus} {size}");
        let sub = entries.iter().find(|(name, ..)| name == "sub").unwrap();
        assert_eq!((sub.1, sub.2), (u32::from(libc::DT_DIR), 0));
    }
}

#[test]
fn a_root_file_system_may_be_remembered_and_the_rest_not() {
    let mut guest = Guest::new();
    fs::create_dir_all(guest.path("c1/rootfs/etc")).unwrap();
    fs::create_dir_all(guest.path("volumes/v")).unwrap();
    for file in ["c1/rootfs/etc/passwd", "volumes/v/config"] {
        fs::write(guest.path(file), "x").unwrap();
    }
    let parent = guest.walk("c1").unwrap();
    let container = guest.lookup(parent, "rootfs").unwrap();
    // Which file system is there may change; what it holds does not.
    assert_eq!(container.entry_valid, 0);
    let etc = guest.lookup(NodeId(container.nodeid), "etc").unwrap();
    assert!(etc.entry_valid > 3600 && etc.attr_valid > 3600);
    let none = guest.lookup(NodeId(etc.nodeid), "shadow").unwrap();
    assert!(none.nodeid == 0 && none.entry_valid > 3600);
    let passwd = guest.walk("c1/rootfs/etc/passwd").unwrap();
    assert!(guest.getattr(passwd).unwrap().attr_valid > 3600);
    assert_eq!(guest.open(passwd, 0).unwrap().open_flags, fopen::KEEP_CACHE | fopen::NOFLUSH);
    // Set-id bits may go with any write, so they are asked for.
    let set_id = wire::SetattrIn { valid: setattr::MODE, mode: 0o4755, ..Default::default() };
    assert_eq!(guest.setattr(passwd, set_id).unwrap().attr_valid, 0);
    assert_eq!(guest.getattr(passwd).unwrap().attr_valid, 0);
    let listed = guest.list(NodeId(etc.nodeid), true, 4096);
    assert!(listed.iter().any(|(name, _, node)| name == "passwd" && *node == passwd.0));

    let volume = guest.walk("volumes/v").unwrap();
    let config = guest.lookup(volume, "config").unwrap();
    assert_eq!((config.entry_valid, config.attr_valid), (0, 0));
    assert_eq!(guest.lookup(volume, "none"), Err(libc::ENOENT));
    assert_eq!(guest.getattr(NodeId(config.nodeid)).unwrap().attr_valid, 0);
    assert_eq!(guest.open(NodeId(config.nodeid), 0).unwrap().open_flags, 0);
}

#[test]
fn a_config_map_update_is_seen_at_once() {
    let mut guest = Guest::new();
    for (version, text) in [("..1", "old"), ("..2", "new")] {
        fs::create_dir(guest.path(version)).unwrap();
        fs::write(guest.path(version).join("key"), text).unwrap();
    }
    symlink("..1", guest.path("..data")).unwrap();
    let link = guest.lookup(ROOT, "..data").unwrap();
    assert_eq!(guest.request(opcode::READLINK, NodeId(link.nodeid), &[], 4096).unwrap(), b"..1");
    symlink("..2", guest.path("..tmp")).unwrap();
    fs::rename(guest.path("..tmp"), guest.path("..data")).unwrap();
    let new = guest.lookup(ROOT, "..data").unwrap();
    assert_ne!(new.nodeid, link.nodeid);
    assert_eq!(guest.request(opcode::READLINK, NodeId(new.nodeid), &[], 4096).unwrap(), b"..2");
    // In place, too.
    let node = guest.walk("..2/key").unwrap();
    fs::write(guest.path("..2/key"), "newer").unwrap();
    assert_eq!(guest.getattr(node).unwrap().attr.size, 5);
}

#[test]
fn links_and_renames() {
    let mut guest = Guest::new();
    let (a, _) = guest.create(ROOT, "a", libc::O_RDWR, 0o644).unwrap();
    let (b, _) = guest.create(ROOT, "b", libc::O_RDWR, 0o644).unwrap();
    let body = wire::LinkIn { oldnodeid: a.nodeid };
    let linked: wire::EntryOut = guest.ask(opcode::LINK, ROOT, &[body.as_slice(), &c("a2")]).unwrap();
    assert_eq!((linked.nodeid, linked.attr.nlink), (a.nodeid, 2));
    let exists = guest.ask::<wire::EntryOut>(opcode::LINK, ROOT, &[body.as_slice(), &c("b")]);
    assert_eq!(exists, Err(libc::EEXIST));
    let rename = |guest: &mut Guest, from: &str, to: &str, flags: u32| {
        let body = wire::Rename2In { newdir: 1, flags, padding: 0 };
        guest.request(opcode::RENAME2, ROOT, &[body.as_slice(), &c(from), &c(to)], 0)
    };
    assert_eq!(rename(&mut guest, "a", "b", libc::RENAME_NOREPLACE), Err(libc::EEXIST));
    assert_eq!(rename(&mut guest, "a", "b", libc::RENAME_WHITEOUT), Err(libc::EINVAL));
    rename(&mut guest, "a", "b", libc::RENAME_EXCHANGE).unwrap();
    assert_eq!(guest.lookup(ROOT, "a").unwrap().nodeid, b.nodeid);
    rename(&mut guest, "b", "a", 0).unwrap();
    assert_eq!(guest.lookup(ROOT, "a").unwrap().nodeid, a.nodeid);
    let old = wire::RenameIn { newdir: 1 };
    guest.request(opcode::RENAME, ROOT, &[old.as_slice(), &c("a"), &c("c")], 0).unwrap();
    assert_eq!(guest.lookup(ROOT, "c").unwrap().nodeid, a.nodeid);
}

#[test]
fn special_files_are_made_but_devices_are_not() {
    let mut guest = Guest::new();
    guest.mknod(ROOT, "fifo", libc::S_IFIFO | 0o600).unwrap();
    guest.mknod(ROOT, "sock", libc::S_IFSOCK | 0o600).unwrap();
    assert!(fs::symlink_metadata(guest.path("fifo")).unwrap().file_type().is_fifo());
    assert!(fs::symlink_metadata(guest.path("sock")).unwrap().file_type().is_socket());
    for kind in [libc::S_IFCHR, libc::S_IFBLK] {
        assert_eq!(guest.mknod(ROOT, "dev", kind | 0o600), Err(libc::EPERM));
    }
    assert_eq!(guest.mknod(ROOT, "dir", libc::S_IFDIR | 0o600), Err(libc::EINVAL));
    // The host's end of a FIFO is never opened: it could wait for ever.
    let fifo = guest.walk("fifo").unwrap();
    assert_eq!(guest.open(fifo, libc::O_RDONLY), Err(libc::ENXIO));
    let link: wire::EntryOut = guest.ask(opcode::SYMLINK, ROOT, &[&c("l"), &c("../../etc/passwd")]).unwrap();
    assert_eq!(guest.open(NodeId(link.nodeid), libc::O_RDONLY), Err(libc::ENXIO));
    assert_eq!(fs::read_link(guest.path("l")).unwrap().to_str(), Some("../../etc/passwd"));
}

#[test]
fn sparse_files_keep_their_holes() {
    let mut guest = Guest::new();
    let (entry, open) = guest.create(ROOT, "a", libc::O_RDWR, 0o644).unwrap();
    let node = NodeId(entry.nodeid);
    guest.write(node, open.fh, 1 << 20, &[1; 4096]).unwrap();
    let seek = |guest: &mut Guest, offset, whence: i32| {
        let whence = whence.cast_unsigned();
        let body = wire::LseekIn { fh: open.fh, offset, whence, padding: 0 };
        guest.ask::<wire::LseekOut>(opcode::LSEEK, node, &[body.as_slice()]).map(|out| out.offset)
    };
    assert_eq!(seek(&mut guest, 0, libc::SEEK_DATA), Ok(1 << 20));
    assert_eq!(seek(&mut guest, 1 << 20, libc::SEEK_HOLE), Ok((1 << 20) + 4096));
    assert_eq!(seek(&mut guest, 0, libc::SEEK_SET), Err(libc::EINVAL));
    let allocate = |guest: &mut Guest, mode: i32, offset, length| {
        let mode = mode.cast_unsigned();
        let body = wire::FallocateIn { fh: open.fh, offset, length, mode, padding: 0 };
        guest.request(opcode::FALLOCATE, node, &[body.as_slice()], 0).map(drop)
    };
    let punch = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    allocate(&mut guest, punch, 1 << 20, 4096).unwrap();
    assert_eq!(seek(&mut guest, 0, libc::SEEK_DATA), Err(libc::ENXIO));
    allocate(&mut guest, 0, 0, 2 << 20).unwrap();
    assert_eq!(guest.getattr(node).unwrap().attr.size, 2 << 20);
    assert_eq!(allocate(&mut guest, libc::FALLOC_FL_COLLAPSE_RANGE, 0, 4096), Err(libc::EOPNOTSUPP));
    assert_eq!(allocate(&mut guest, 0, u64::MAX, 1), Err(libc::EINVAL));
}

#[test]
fn files_are_copied_on_the_host() {
    let mut guest = Guest::new();
    fs::write(guest.path("a"), "0123456789").unwrap();
    let a = guest.walk("a").unwrap();
    let from = guest.open(a, libc::O_RDONLY).unwrap();
    let (b, to) = guest.create(ROOT, "b", libc::O_RDWR, 0o644).unwrap();
    let body = wire::CopyFileRangeIn {
        fh_in: from.fh,
        off_in: 2,
        nodeid_out: b.nodeid,
        fh_out: to.fh,
        off_out: 1,
        len: 100,
        flags: 0,
    };
    let out: wire::WriteOut = guest.ask(opcode::COPY_FILE_RANGE, a, &[body.as_slice()]).unwrap();
    assert_eq!(out.size, 8);
    assert_eq!(fs::read(guest.path("b")).unwrap(), b"\x0023456789");
}

#[test]
fn a_file_without_a_name_gets_one_later() {
    let mut guest = Guest::new();
    let flags = (libc::O_RDWR | libc::O_TMPFILE).cast_unsigned();
    let body = wire::CreateIn { flags, mode: 0o640, umask: 0, open_flags: 0 };
    let reply = match guest.request(opcode::TMPFILE, ROOT, &[body.as_slice(), &c("")], 4096) {
        // Not every file system has them.
        Err(libc::EOPNOTSUPP) => return,
        reply => reply.unwrap(),
    };
    let (entry, open): (wire::EntryOut, wire::OpenOut) = (message(&reply), message(&reply[128..]));
    let node = NodeId(entry.nodeid);
    assert_eq!((entry.attr.nlink, entry.attr.mode & 0o7777), (0, 0o640));
    guest.write(node, open.fh, 0, b"text").unwrap();
    let body = wire::LinkIn { oldnodeid: entry.nodeid };
    guest.ask::<wire::EntryOut>(opcode::LINK, ROOT, &[body.as_slice(), &c("named")]).unwrap();
    assert_eq!(fs::read(guest.path("named")).unwrap(), b"text");
}

#[test]
fn extended_attributes_pass_unless_they_are_the_hosts() {
    let mut guest = Guest::new();
    fs::write(guest.path("a"), "").unwrap();
    let node = guest.walk("a").unwrap();
    match guest.set_xattr(node, "user.colour", b"blue") {
        // Not every file system has them.
        Err(libc::EOPNOTSUPP) => return,
        result => result.unwrap(),
    };
    let length: wire::XattrSize = message(&guest.get_xattr(node, "user.colour", 0).unwrap());
    assert_eq!(length.size, 4);
    assert_eq!(guest.get_xattr(node, "user.colour", 100).unwrap(), b"blue");
    assert_eq!(guest.get_xattr(node, "user.colour", 3), Err(libc::ERANGE));
    assert_eq!(guest.get_xattr(node, "user.none", 3), Err(libc::ENODATA));
    for hidden in ["trusted.overlay.opaque", "user.overlay.opaque", "security.selinux"] {
        assert_eq!(guest.set_xattr(node, hidden, b"y"), Err(libc::EPERM));
        assert_eq!(guest.get_xattr(node, hidden, 10), Err(libc::ENODATA));
        let removed = guest.request(opcode::REMOVEXATTR, node, &[&c(hidden)], 0);
        assert_eq!(removed, Err(libc::EPERM));
    }
    assert_eq!(guest.set_xattr(node, "system.other", b"y"), Err(libc::EOPNOTSUPP));
    assert_eq!(guest.get_xattr(node, "system.posix_acl_access", 100), Err(libc::ENODATA));
    let list = |guest: &mut Guest, size| {
        let body = wire::XattrSize { size, padding: 0 };
        guest.request(opcode::LISTXATTR, node, &[body.as_slice()], 4096)
    };
    assert_eq!(list(&mut guest, 100).unwrap(), b"user.colour\0");
    assert_eq!(message::<wire::XattrSize>(&list(&mut guest, 0).unwrap()).size, 12);
    assert_eq!(list(&mut guest, 11), Err(libc::ERANGE));
    guest.request(opcode::REMOVEXATTR, node, &[&c("user.colour")], 0).unwrap();
    assert_eq!(list(&mut guest, 100).unwrap(), b"");
}

#[test]
fn file_capabilities_are_set_and_die_with_a_write() {
    if !is_root() {
        return;
    }
    let mut guest = Guest::new();
    let (entry, open) = guest.create(ROOT, "a", libc::O_RDWR, 0o755).unwrap();
    let node = NodeId(entry.nodeid);
    // Version 2, effective, CAP_NET_RAW.
    let value = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    if guest.set_xattr(node, "security.capability", &value) == Err(libc::EOPNOTSUPP) {
        return;
    }
    assert_eq!(guest.get_xattr(node, "security.capability", 100).unwrap(), value);
    guest.write(node, open.fh, 0, b"x").unwrap();
    assert_eq!(guest.get_xattr(node, "security.capability", 100), Err(libc::ENODATA));
}

#[test]
fn a_default_access_control_list_stands_in_for_the_umask() {
    let mut guest = Guest::new();
    let dir = NodeId(guest.mkdir(ROOT, "d", 0o755).unwrap().nodeid);
    // Version 2: user rwx, group rwx, other r-x.
    let mut acl = vec![2, 0, 0, 0];
    for (tag, permissions) in [(1u16, 7u16), (4, 7), (0x20, 5)] {
        acl.extend(tag.to_le_bytes());
        acl.extend(permissions.to_le_bytes());
        acl.extend(u32::MAX.to_le_bytes());
    }
    if guest.set_xattr(dir, "system.posix_acl_default", &acl) == Err(libc::EOPNOTSUPP) {
        return;
    }
    let (file, _) = guest.create(dir, "f", libc::O_RDWR, 0o666).unwrap();
    assert_eq!(file.attr.mode & 0o7777, 0o664);
    let (file, _) = guest.create(ROOT, "f", libc::O_RDWR, 0o666).unwrap();
    assert_eq!(file.attr.mode & 0o7777, 0o644);
}

#[test]
fn figures_and_syncs() {
    let mut guest = Guest::new();
    let figures: wire::StatfsOut = guest.ask(opcode::STATFS, ROOT, &[]).unwrap();
    assert!(figures.blocks > 0 && figures.bsize >= 512 && figures.namelen == 255);
    let (entry, open) = guest.create(ROOT, "a", libc::O_RDWR, 0o644).unwrap();
    let node = NodeId(entry.nodeid);
    for fsync_flags in [0, 1] {
        let body = wire::FsyncIn { fh: open.fh, fsync_flags, padding: 0 };
        guest.request(opcode::FSYNC, node, &[body.as_slice()], 0).unwrap();
    }
    let body = wire::FlushIn { fh: open.fh, ..Default::default() };
    guest.request(opcode::FLUSH, node, &[body.as_slice()], 0).unwrap();
    guest.request(opcode::SYNCFS, ROOT, &[&[0; 8]], 0).unwrap();
}

#[test]
fn what_is_forgotten_is_closed_and_what_is_not_keeps_its_id() {
    let mut guest = Guest::new();
    fs::write(guest.path("a"), "").unwrap();
    let first = guest.lookup(ROOT, "a").unwrap();
    assert_eq!(guest.lookup(ROOT, "a").unwrap().nodeid, first.nodeid);
    assert_eq!(guest.device.session.tree().descriptors(), 2);
    guest.forget(NodeId(first.nodeid), 1);
    guest.getattr(NodeId(first.nodeid)).unwrap();
    guest.forget(NodeId(first.nodeid), 1);
    assert_eq!(guest.getattr(NodeId(first.nodeid)), Err(libc::ESTALE));
    assert_eq!(guest.device.session.tree().descriptors(), 1);
    let again = guest.lookup(ROOT, "a").unwrap();
    assert_ne!(again.nodeid, first.nodeid);
    let batch = wire::BatchForgetIn { count: 2, dummy: 0 };
    let ones =
        [wire::ForgetOne { nodeid: again.nodeid, nlookup: 1 }, wire::ForgetOne { nodeid: 77, nlookup: 1 }];
    let header = guest.header(opcode::BATCH_FORGET, NodeId(0), 40);
    let pieces = [header.as_slice(), batch.as_slice(), ones[0].as_slice(), ones[1].as_slice()];
    guest.chain(HIPRIO, &pieces.map(Piece::Read));
    assert_eq!(guest.device.session.tree().descriptors(), 1);
}

#[test]
fn a_new_mount_and_a_reset_close_everything() {
    let mut guest = Guest::new();
    guest.create(ROOT, "a", libc::O_RDWR, 0o644).unwrap();
    assert_eq!(guest.device.session.tree().descriptors(), 3);
    guest.init(u32::MAX);
    assert_eq!(guest.device.session.tree().descriptors(), 1);
    guest.walk("a").unwrap();
    guest.request(opcode::DESTROY, NodeId(0), &[], 0).unwrap();
    assert_eq!(guest.device.session.tree().descriptors(), 1);
    assert_eq!(guest.lookup(ROOT, "a"), Err(libc::ENOTCONN));
    guest.init(u32::MAX);
    guest.walk("a").unwrap();
    guest.device.reset();
    assert_eq!(guest.device.session.tree().descriptors(), 1);
    guest.device.on_queue(REQUESTS);
    guest.activate();
    guest.init(u32::MAX);
    guest.walk("a").unwrap();
}
