//! What a hostile guest does.

use std::fs;
use std::os::unix::fs::symlink;

use nix::libc;
use nix::sys::resource::{Resource, getrlimit};
use proptest::prelude::*;
use vm_memory::{ByteValued, Bytes, GuestAddress};

use super::driver::*;
use crate::devices::virtio::VirtioDevice;
use crate::devices::virtio::fs::tree::{Limits, NodeId, Tree};
use crate::devices::virtio::fs::wire::{self, opcode};

const ROOT: NodeId = NodeId::ROOT;

#[test]
fn there_is_no_way_up() {
    let mut guest = Guest::new();
    fs::create_dir(guest.path("d")).unwrap();
    fs::write(guest.path("f"), "").unwrap();
    let dir = guest.walk("d").unwrap();
    for name in ["..", ".", "", "/", "../f", "d/..", "/etc", "f/", "\u{0}"] {
        for parent in [ROOT, dir] {
            let refused = Err(libc::EINVAL);
            assert_eq!(guest.lookup(parent, name), refused, "{name:?}");
            assert_eq!(guest.create(parent, name, libc::O_RDWR, 0o600), Err(libc::EINVAL));
            assert_eq!(guest.mkdir(parent, name, 0o700), refused);
            assert_eq!(guest.mknod(parent, name, libc::S_IFIFO), refused);
            for remove in [opcode::UNLINK, opcode::RMDIR] {
                assert_eq!(guest.request(remove, parent, &[&c(name)], 0), Err(libc::EINVAL));
            }
            let made = guest.ask::<wire::EntryOut>(opcode::SYMLINK, parent, &[&c(name), &c("x")]);
            assert_eq!(made, refused);
            let link = wire::LinkIn { oldnodeid: 1 };
            let made = guest.ask::<wire::EntryOut>(opcode::LINK, parent, &[link.as_slice(), &c(name)]);
            assert_eq!(made, refused);
            let rename = wire::RenameIn { newdir: 1 };
            for (from, to) in [(name, "x"), ("f", name)] {
                let body: [&[u8]; 3] = [rename.as_slice(), &c(from), &c(to)];
                assert_eq!(guest.request(opcode::RENAME, parent, &body, 0), Err(libc::EINVAL));
            }
        }
    }
    assert_eq!(guest.lookup(ROOT, &"x".repeat(256)), Err(libc::ENAMETOOLONG));
}

#[test]
fn links_lead_nowhere() {
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("secret"), "secret").unwrap();
    let mut guest = Guest::new();
    symlink(outside.path(), guest.path("l")).unwrap();
    let link = guest.walk("l").unwrap();
    assert_eq!(guest.lookup(link, "secret"), Err(libc::ENOTDIR));
    assert_eq!(guest.create(link, "new", libc::O_RDWR, 0o600), Err(libc::ENOTDIR));
    assert_eq!(guest.ask::<wire::OpenOut>(opcode::OPENDIR, link, &[&[0; 8]]), Err(libc::ENOTDIR));
    // Flags that would open a path instead of a file, or a directory's unnamed file.
    for flags in [libc::O_PATH, libc::O_CREAT, libc::O_TMPFILE, libc::O_DIRECTORY, !0, libc::O_ACCMODE] {
        let _ = guest.open(link, flags).unwrap_err();
        let _ = guest.create(ROOT, "l", flags, 0o600).unwrap_err();
    }
    assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 1);
}

#[test]
fn ids_that_were_not_handed_out_are_refused() {
    let mut guest = Guest::new();
    let (entry, open) = guest.create(ROOT, "a", libc::O_RDWR, 0o600).unwrap();
    let (other, _) = guest.create(ROOT, "b", libc::O_RDWR, 0o600).unwrap();
    let node = NodeId(entry.nodeid);
    for bad in [0, entry.nodeid + 100, u64::MAX] {
        assert_eq!(guest.getattr(NodeId(bad)), Err(libc::ESTALE));
        assert_eq!(guest.lookup(NodeId(bad), "a"), Err(libc::ESTALE));
        assert_eq!(guest.read(node, bad, 0, 10), Err(libc::EBADF));
        assert_eq!(guest.write(node, bad, 0, b"x"), Err(libc::EBADF));
        assert_eq!(guest.release(node, bad), Err(libc::EBADF));
    }
    // A handle belongs to its inode.
    assert_eq!(guest.read(NodeId(other.nodeid), open.fh, 0, 10), Err(libc::EBADF));
    assert_eq!(guest.release(NodeId(other.nodeid), open.fh), Err(libc::EBADF));
    assert_eq!(guest.lookup(node, "x"), Err(libc::ENOTDIR));
    assert_eq!(guest.open(ROOT, libc::O_RDONLY), Err(libc::EISDIR));
    let body = wire::IoIn { fh: open.fh, size: 4096, ..Default::default() };
    let listed = guest.request(opcode::READDIR, node, &[body.as_slice()], 4096);
    assert_eq!(listed, Err(libc::ENOTDIR));
}

#[test]
fn lookups_cannot_be_taken_back_more_often_than_given() {
    let mut guest = Guest::new();
    let (entry, open) = guest.create(ROOT, "a", libc::O_RDWR, 0o600).unwrap();
    let node = NodeId(entry.nodeid);
    guest.forget(node, u64::MAX);
    guest.forget(node, u64::MAX);
    guest.forget(ROOT, u64::MAX);
    guest.forget(NodeId(0), 1);
    guest.forget(NodeId(12345), 1);
    assert_eq!(guest.getattr(node), Err(libc::ESTALE));
    // The file is open, and stays so.
    guest.write(node, open.fh, 0, b"x").unwrap();
    guest.getattr(ROOT).unwrap();
}

#[test]
fn sizes_that_lie_are_refused() {
    let mut guest = Guest::new();
    let (entry, open) = guest.create(ROOT, "a", libc::O_RDWR, 0o600).unwrap();
    let node = NodeId(entry.nodeid);
    for size in [11, (1 << 20) + 1, u32::MAX] {
        let body = wire::IoIn { fh: open.fh, size, ..Default::default() };
        let written = guest.ask::<wire::WriteOut>(opcode::WRITE, node, &[body.as_slice(), &[0; 10]]);
        assert_eq!(written, Err(libc::EINVAL));
    }
    assert_eq!(guest.write(node, open.fh, u64::MAX, b"x"), Err(libc::EINVAL));
    assert_eq!(guest.read(node, open.fh, u64::MAX, 1), Err(libc::EINVAL));
    guest.write(node, open.fh, 0, &[7; 5000]).unwrap();
    // A read of more than there is room for fills the room.
    let body = wire::IoIn { fh: open.fh, size: u32::MAX, ..Default::default() };
    assert_eq!(guest.request(opcode::READ, node, &[body.as_slice()], 100).unwrap(), [7; 100]);
    let setxattr = wire::SetxattrIn { size: u32::MAX, ..Default::default() };
    let body: [&[u8]; 3] = [setxattr.as_slice(), &c("user.x"), b"abc"];
    assert_eq!(guest.request(opcode::SETXATTR, node, &body, 0), Err(libc::EINVAL));
    assert!(guest.get_xattr(node, "user.x", u32::MAX).is_err());
    // A name without its end.
    assert_eq!(guest.ask::<wire::EntryOut>(opcode::LOOKUP, ROOT, &[b"abc"]), Err(libc::EINVAL));
    // A body longer than any.
    let big = vec![0; 1 << 20];
    assert_eq!(guest.request(opcode::LOOKUP, ROOT, &[&big], 0), Err(libc::E2BIG));
    // A header that says more than there is, or less than itself.
    for len in [0, 39, 100, u32::MAX] {
        let header = wire::InHeader { len, ..guest.header(opcode::GETATTR, ROOT, 0) };
        let pieces = [Piece::Read(header.as_slice()), Piece::Write(200)];
        let (reply, used) = guest.chain(REQUESTS, &pieces);
        assert_eq!((used, message::<wire::OutHeader>(&reply).error), (16, -libc::EINVAL));
    }
    assert!(guest.device.statistics().errors >= 4);
}

#[test]
fn chains_without_room_or_request_are_returned() {
    let mut guest = Guest::new();
    let header = guest.header(opcode::GETATTR, ROOT, 16);
    let body = [0; 16];
    let request = || [Piece::Read(header.as_slice()), Piece::Read(&body)];
    for room in [None, Some(0), Some(15)] {
        let pieces: Vec<_> = request().into_iter().chain(room.map(Piece::Write)).collect();
        assert_eq!(guest.chain(REQUESTS, &pieces).1, 0);
    }
    // Room for the error, not for the attributes.
    let pieces: Vec<_> = request().into_iter().chain([Piece::Write(50)]).collect();
    let (reply, used) = guest.chain(REQUESTS, &pieces);
    assert_eq!((used, message::<wire::OutHeader>(&reply).error), (16, -libc::EOVERFLOW));
    for pieces in [vec![Piece::Write(100)], vec![Piece::Read(&body)], vec![]] {
        assert_eq!(guest.chain(REQUESTS, &pieces).1, 0);
    }
    // Readable behind writable.
    let pieces = [Piece::Write(100), Piece::Read(header.as_slice()), Piece::Read(&body)];
    assert_eq!(guest.chain(REQUESTS, &pieces).1, 0);
    // A chain that runs in a circle, and one that points outside of memory.
    let descriptor = |addr, len| virtio_queue::desc::split::Descriptor::new(addr, len, 1, 0);
    for bad in [descriptor(0x10_0000, 40), descriptor(1 << 40, 40), descriptor(u64::MAX, 40)] {
        guest.ram.write_obj(bad, GuestAddress(0x2_0000)).unwrap();
        assert_eq!(guest.publish(REQUESTS, 0), 0);
    }
    guest.getattr(ROOT).unwrap();
}

#[test]
fn unknown_requests_are_not_implemented() {
    let mut guest = Guest::new();
    for opcode in [0, 7, 19, 31, 34, 37, 39, 40, 41, 48, 49, 52, 4096, u32::MAX] {
        assert_eq!(guest.request(opcode, ROOT, &[&[0; 64]], 256), Err(libc::ENOSYS), "{opcode}");
    }
    let mut guest = Guest::unmounted();
    for opcode in [opcode::LOOKUP, opcode::WRITE, opcode::GETATTR, opcode::CREATE] {
        assert_eq!(guest.request(opcode, ROOT, &[&[0; 64]], 256), Err(libc::ENOTCONN));
    }
}

#[test]
fn what_the_guest_can_hold_is_bounded() {
    let mut guest = Guest::unmounted();
    let limits = Limits { inodes: 10, handles: 5 };
    *guest.device.session.tree() = Tree::new(open_path(guest.directory.path()), limits).unwrap();
    guest.init(u32::MAX);
    let mut nodes = Vec::new();
    for i in 0..9 {
        fs::write(guest.path(&format!("f{i}")), "").unwrap();
        nodes.push(guest.walk(&format!("f{i}")).unwrap());
    }
    fs::write(guest.path("one-more"), "").unwrap();
    assert_eq!(guest.lookup(ROOT, "one-more"), Err(libc::ENFILE));
    // Listing goes on, without attributes.
    assert_eq!(guest.list(ROOT, true, 4096).len(), 12);
    let handles: Vec<_> = (0..5).map(|_| guest.open(nodes[0], libc::O_RDONLY).unwrap().fh).collect();
    assert_eq!(guest.open(nodes[0], libc::O_RDONLY), Err(libc::ENFILE));
    assert_eq!(guest.create(ROOT, "x", libc::O_RDWR, 0o600), Err(libc::ENFILE));
    guest.release(nodes[0], handles[0]).unwrap();
    guest.open(nodes[0], libc::O_RDONLY).unwrap();
    guest.forget(nodes[1], 1);
    guest.walk("one-more").unwrap();
}

#[test]
fn the_guest_gets_less_than_the_process_has() {
    let limits = crate::devices::virtio::fs::limits().unwrap();
    let (soft, _) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    assert!(u64::try_from(limits.inodes + limits.handles).unwrap() < soft);
}

/// A request of a kind, with a body that is sometimes right.
fn frame() -> impl Strategy<Value = (u32, u64, Vec<u8>, u32)> {
    let name = prop_oneof![
        Just("a"),
        Just("sub"),
        Just("link"),
        Just(".."),
        Just("../outside"),
        Just("/etc/passwd"),
        Just("new"),
    ];
    let head =
        prop::collection::vec(prop_oneof![Just(0u8), Just(1), Just(2), Just(0xff), any::<u8>()], 0..96);
    let body = (head, prop::collection::vec(name, 0..3)).prop_map(|(mut bytes, names)| {
        for name in names {
            bytes.extend(c(name));
        }
        bytes
    });
    (0u32..56, 0u64..8, body, 0u32..5000)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Whatever is sent, every head comes back, nothing panics, and nothing outside of the directory is touched.
    #[test]
    fn any_bytes_are_survived(frames in prop::collection::vec(frame(), 1..60)) {
        let parent = tempfile::tempdir().unwrap();
        fs::write(parent.path().join("outside"), "untouched").unwrap();
        let mut guest = Guest::unmounted();
        let shared = parent.path().join("shared");
        fs::create_dir_all(shared.join("sub")).unwrap();
        fs::write(shared.join("a"), "text").unwrap();
        symlink("../outside", shared.join("link")).unwrap();
        let limits = Limits { inodes: 16, handles: 8 };
        *guest.device.session.tree() = Tree::new(open_path(&shared), limits).unwrap();
        guest.init(u32::MAX);
        for (opcode, node, body, room) in frames {
            // Syncing the whole machine tests nothing and takes long.
            if opcode == opcode::SYNCFS {
                continue;
            }
            let header = guest.header(opcode, NodeId(node), body.len());
            let pieces = [Piece::Read(header.as_slice()), Piece::Read(&body), Piece::Write(room)];
            let (_, used) = guest.chain(REQUESTS, &pieces);
            prop_assert!(used <= room);
            prop_assert!(guest.device.session.tree().descriptors() <= 24);
        }
        prop_assert_eq!(fs::read_to_string(parent.path().join("outside")).unwrap(), "untouched");
        prop_assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 2);
    }

    /// The same without a valid header.
    #[test]
    fn any_chain_is_survived(first: Vec<u8>, second: Vec<u8>, room in 0u32..300) {
        let mut guest = Guest::new();
        let pieces = [Piece::Read(&first), Piece::Read(&second), Piece::Write(room)];
        let (_, used) = guest.chain(REQUESTS, &pieces);
        prop_assert!(used <= room);
        guest.init(u32::MAX);
        guest.getattr(ROOT).unwrap();
    }
}
