//! The driver's side of the device: raw FUSE frames through real rings in mock guest memory.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use nix::libc;
use nix::sys::epoll::EpollTimeout;
use tempfile::TempDir;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueT};
use vm_memory::{ByteValued, Bytes, GuestAddress};

use crate::devices::virtio::fs::tree::NodeId;
use crate::devices::virtio::fs::wire::{self, opcode};
use crate::devices::virtio::fs::{QUEUE_SIZES, SharedDirectory, VirtioFs};
use crate::devices::virtio::{Activation, Interrupt, VirtioDevice};
use crate::event_loop::{EventLoop, Handler, Readiness};
use crate::memory::GuestRam;

/// Index of the request queue.
pub const REQUESTS: usize = 1;

/// Index of the queue that carries `FORGET`.
pub const HIPRIO: usize = 0;

/// Where the rings of each queue are, and where buffers begin.
const RINGS: [u64; 2] = [0x1_0000, 0x2_0000];
const AVAIL: u64 = 0x4000;
const USED: u64 = 0x8000;
const BUFFERS: u64 = 0x10_0000;

/// A piece of a chain.
pub enum Piece<'a> {
    Read(&'a [u8]),
    Write(u32),
}

/// Keeps what the event loop reports for [`Guest::turn`].
#[derive(Default)]
struct Events(Mutex<Vec<(u32, Readiness)>>);

impl Handler for Events {
    fn on_ready(&self, token: u32, readiness: Readiness) {
        self.0.lock().unwrap().push((token, readiness));
    }
}

/// A guest with the device, a shared directory and a mount.
pub struct Guest {
    pub device: VirtioFs,
    pub ram: GuestRam,
    pub interrupt: Interrupt,
    pub directory: TempDir,
    event_loop: EventLoop,
    events: Arc<Events>,
    published: [u16; 2],
    unique: u64,
    pub uid: u32,
    pub gid: u32,
}

pub fn open_path(path: &Path) -> OwnedFd {
    let flags = libc::O_PATH | libc::O_DIRECTORY;
    File::options().read(true).custom_flags(flags).open(path).unwrap().into()
}

pub fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

fn share(path: &Path) -> SharedDirectory {
    SharedDirectory {
        root: open_path(path),
        proc_self_fd: open_path(Path::new("/proc/self/fd")),
        mount_table: Some(File::open("/proc/thread-self/mountinfo").unwrap().into()),
    }
}

impl Guest {
    /// With the file system mounted.
    pub fn new() -> Self {
        let mut guest = Self::unmounted();
        guest.init(u32::MAX);
        guest
    }

    pub fn unmounted() -> Self {
        let directory = TempDir::new().unwrap();
        let device = VirtioFs::new(share(directory.path())).unwrap();
        let mut guest = Self {
            device,
            ram: GuestRam::new(64 << 20).unwrap(),
            interrupt: Interrupt::new().unwrap(),
            directory,
            event_loop: EventLoop::new().unwrap(),
            events: Arc::default(),
            published: [0; 2],
            unique: 100,
            uid: nix::unistd::geteuid().as_raw(),
            gid: nix::unistd::getegid().as_raw(),
        };
        guest.activate();
        guest
    }

    pub fn activate(&mut self) {
        let queues = (0..2).map(|index| self.queue(index)).collect();
        self.published = [0; 2];
        self.device
            .activate(Activation {
                memory: self.ram.clone(),
                queues,
                features: self.device.features(),
                interrupt: self.interrupt.clone(),
                registrar: self.event_loop.registrar(self.events.clone()),
            })
            .unwrap();
    }

    fn queue(&self, index: usize) -> Queue {
        let base = RINGS[index];
        self.ram.write_slice(&[0; 0x1_0000], GuestAddress(base)).unwrap();
        let mut queue = Queue::new(QUEUE_SIZES[index]).unwrap();
        queue.set_size(QUEUE_SIZES[index]);
        queue.try_set_desc_table_address(GuestAddress(base)).unwrap();
        queue.try_set_avail_ring_address(GuestAddress(base + AVAIL)).unwrap();
        queue.try_set_used_ring_address(GuestAddress(base + USED)).unwrap();
        queue.set_ready(true);
        queue
    }

    /// Handles what is ready in the event loop, and returns how many events that were.
    pub fn turn(&mut self) -> usize {
        let mut count = 0;
        while self.event_loop.turn(EpollTimeout::ZERO).unwrap() > 0 {
            let events = std::mem::take(&mut *self.events.0.lock().unwrap());
            for (token, readiness) in events {
                self.device.on_event(token, readiness);
                count += 1;
            }
        }
        count
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Sends a chain as it is, and returns what was written and how long the device says that is.
    pub fn chain(&mut self, queue: usize, pieces: &[Piece<'_>]) -> (Vec<u8>, u32) {
        let base = RINGS[queue];
        let mut addr = BUFFERS;
        let mut room = Vec::new();
        for (index, piece) in pieces.iter().enumerate() {
            let index = u16::try_from(index).unwrap();
            let next = if usize::from(index) + 1 < pieces.len() { 1 } else { 0 };
            let (length, flags) = match piece {
                Piece::Read(bytes) => {
                    self.ram.write_slice(bytes, GuestAddress(addr)).unwrap();
                    (u32::try_from(bytes.len()).unwrap(), next)
                }
                Piece::Write(length) => {
                    self.ram.write_slice(&vec![0xee; *length as usize], GuestAddress(addr)).unwrap();
                    room.push((addr, *length as usize));
                    (*length, next | 2)
                }
            };
            let descriptor = Descriptor::new(addr, length, flags, index + 1);
            self.ram.write_obj(descriptor, GuestAddress(base + u64::from(index) * 16)).unwrap();
            // Pages apart, so that a transfer has several pieces.
            addr += u64::from(length).next_multiple_of(4096) + 4096;
        }
        let used = self.publish(queue, 0);
        let mut reply = Vec::new();
        for (addr, length) in room {
            let start = reply.len();
            reply.resize(start + length, 0);
            self.ram.read_slice(&mut reply[start..], GuestAddress(addr)).unwrap();
        }
        reply.truncate(used as usize);
        (reply, used)
    }

    /// Makes one head available, rings the bell, and returns the used length.
    pub fn publish(&mut self, queue: usize, head: u16) -> u32 {
        let base = RINGS[queue];
        let slot = self.published[queue] % QUEUE_SIZES[queue];
        self.ram.write_obj(head, GuestAddress(base + AVAIL + 4 + u64::from(slot) * 2)).unwrap();
        self.published[queue] = self.published[queue].wrapping_add(1);
        self.ram.write_obj(self.published[queue], GuestAddress(base + AVAIL + 2)).unwrap();
        self.device.on_queue(queue);
        let used_index: u16 = self.ram.read_obj(GuestAddress(base + USED + 2)).unwrap();
        assert_eq!(used_index, self.published[queue], "the device must return every head");
        self.ram.read_obj(GuestAddress(base + USED + 4 + u64::from(slot) * 8 + 4)).unwrap()
    }

    pub fn header(&mut self, opcode: u32, node: NodeId, body: usize) -> wire::InHeader {
        self.unique += 2;
        wire::InHeader {
            len: u32::try_from(size_of::<wire::InHeader>() + body).unwrap(),
            opcode,
            unique: self.unique,
            nodeid: node.0,
            uid: self.uid,
            gid: self.gid,
            ..Default::default()
        }
    }

    /// Sends a request, and returns the reply without its header, or the error.
    pub fn request(&mut self, opcode: u32, node: NodeId, body: &[&[u8]], room: u32) -> Result<Vec<u8>, i32> {
        let header = self.header(opcode, node, body.iter().map(|part| part.len()).sum());
        let mut pieces = vec![Piece::Read(header.as_slice())];
        pieces.extend(body.iter().map(|part| Piece::Read(part)));
        pieces.push(Piece::Write(16));
        if room > 0 {
            // In two, so that replies are scattered.
            pieces.extend([Piece::Write(room / 2), Piece::Write(room - room / 2)]);
        }
        let (reply, used) = self.chain(REQUESTS, &pieces);
        let (head, rest) = reply.split_at(16);
        let mut out = wire::OutHeader::default();
        out.as_mut_slice().copy_from_slice(head);
        assert_eq!((out.len, out.unique), (used, header.unique));
        if out.error == 0 { Ok(rest.to_vec()) } else { Err(-out.error) }
    }

    /// A request whose reply is one message.
    pub fn ask<T: ByteValued + Default>(
        &mut self,
        opcode: u32,
        node: NodeId,
        body: &[&[u8]],
    ) -> Result<T, i32> {
        let reply = self.request(opcode, node, body, 4096)?;
        assert_eq!(reply.len(), size_of::<T>());
        Ok(message(&reply))
    }

    pub fn init(&mut self, flags: u32) -> wire::InitOut {
        let hello = wire::InitIn { major: 7, minor: 41, max_readahead: 1 << 17, flags, ..Default::default() };
        self.ask(opcode::INIT, NodeId(0), &[hello.as_slice()]).unwrap()
    }

    pub fn lookup(&mut self, parent: NodeId, name: &str) -> Result<wire::EntryOut, i32> {
        self.ask(opcode::LOOKUP, parent, &[&c(name)])
    }

    /// Looks a path up from the root.
    pub fn walk(&mut self, path: &str) -> Result<NodeId, i32> {
        path.split('/').try_fold(NodeId::ROOT, |node, name| Ok(NodeId(self.lookup(node, name)?.nodeid)))
    }

    pub fn open(&mut self, node: NodeId, flags: i32) -> Result<wire::OpenOut, i32> {
        let body = wire::OpenIn { flags: flags.cast_unsigned(), open_flags: 0 };
        self.ask(opcode::OPEN, node, &[body.as_slice()])
    }

    pub fn create(
        &mut self,
        parent: NodeId,
        name: &str,
        flags: i32,
        mode: u32,
    ) -> Result<(wire::EntryOut, wire::OpenOut), i32> {
        let body = wire::CreateIn { flags: flags.cast_unsigned(), mode, umask: 0o22, open_flags: 0 };
        let reply = self.request(opcode::CREATE, parent, &[body.as_slice(), &c(name)], 4096)?;
        let (entry, open) = reply.split_at(size_of::<wire::EntryOut>());
        Ok((message(entry), message(open)))
    }

    pub fn mkdir(&mut self, parent: NodeId, name: &str, mode: u32) -> Result<wire::EntryOut, i32> {
        let body = wire::MkdirIn { mode, umask: 0 };
        self.ask(opcode::MKDIR, parent, &[body.as_slice(), &c(name)])
    }

    pub fn mknod(&mut self, parent: NodeId, name: &str, mode: u32) -> Result<wire::EntryOut, i32> {
        let body = wire::MknodIn { mode, rdev: 0x103, umask: 0, padding: 0 };
        self.ask(opcode::MKNOD, parent, &[body.as_slice(), &c(name)])
    }

    pub fn write(&mut self, node: NodeId, fh: u64, offset: u64, data: &[u8]) -> Result<u32, i32> {
        self.write_with(node, fh, offset, data, 0, 0)
    }

    pub fn write_with(
        &mut self,
        node: NodeId,
        fh: u64,
        offset: u64,
        data: &[u8],
        io_flags: u32,
        flags: i32,
    ) -> Result<u32, i32> {
        let size = u32::try_from(data.len()).unwrap();
        let flags = flags.cast_unsigned();
        let body = wire::IoIn { fh, offset, size, io_flags, flags, ..Default::default() };
        let (first, second) = data.split_at(data.len() / 2);
        Ok(self.ask::<wire::WriteOut>(opcode::WRITE, node, &[body.as_slice(), first, second])?.size)
    }

    pub fn read(&mut self, node: NodeId, fh: u64, offset: u64, size: u32) -> Result<Vec<u8>, i32> {
        let body = wire::IoIn { fh, offset, size, ..Default::default() };
        self.request(opcode::READ, node, &[body.as_slice()], size)
    }

    pub fn release(&mut self, node: NodeId, fh: u64) -> Result<Vec<u8>, i32> {
        let body = wire::ReleaseIn { fh, ..Default::default() };
        self.request(opcode::RELEASE, node, &[body.as_slice()], 0)
    }

    pub fn getattr(&mut self, node: NodeId) -> Result<wire::AttrOut, i32> {
        self.ask(opcode::GETATTR, node, &[wire::GetattrIn::default().as_slice()])
    }

    pub fn setattr(&mut self, node: NodeId, change: wire::SetattrIn) -> Result<wire::AttrOut, i32> {
        self.ask(opcode::SETATTR, node, &[change.as_slice()])
    }

    pub fn forget(&mut self, node: NodeId, nlookup: u64) {
        let body = wire::ForgetIn { nlookup };
        let header = self.header(opcode::FORGET, node, 8);
        let (_, used) = self.chain(HIPRIO, &[Piece::Read(header.as_slice()), Piece::Read(body.as_slice())]);
        assert_eq!(used, 0);
    }

    /// All entries of a directory as (name, type, node id), with `READDIR` or `READDIRPLUS`.
    pub fn list(&mut self, node: NodeId, plus: bool, size: u32) -> Vec<(String, u32, u64)> {
        let open: wire::OpenOut = self.ask(opcode::OPENDIR, node, &[&[0; 8]]).unwrap();
        let opcode = if plus { opcode::READDIRPLUS } else { opcode::READDIR };
        let (mut offset, mut entries) = (0, Vec::new());
        loop {
            let body = wire::IoIn { fh: open.fh, offset, size, ..Default::default() };
            let reply = self.request(opcode, node, &[body.as_slice()], size).unwrap();
            if reply.is_empty() {
                break;
            }
            let mut rest = &reply[..];
            while !rest.is_empty() {
                let mut entry = wire::EntryOut::default();
                if plus {
                    entry = message(&rest[..128]);
                    rest = &rest[128..];
                }
                let dirent: wire::Dirent = message(&rest[..24]);
                let name = &rest[24..24 + dirent.namelen as usize];
                entries.push((String::from_utf8(name.to_vec()).unwrap(), dirent.kind, entry.nodeid));
                offset = dirent.off;
                rest = &rest[(24 + name.len()).next_multiple_of(8)..];
            }
        }
        let body = wire::ReleaseIn { fh: open.fh, ..Default::default() };
        self.request(opcode::RELEASEDIR, node, &[body.as_slice()], 0).unwrap();
        entries
    }

    pub fn set_xattr(&mut self, node: NodeId, name: &str, value: &[u8]) -> Result<Vec<u8>, i32> {
        let size = u32::try_from(value.len()).unwrap();
        let body = wire::SetxattrIn { size, ..Default::default() };
        self.request(opcode::SETXATTR, node, &[body.as_slice(), &c(name), value], 0)
    }

    pub fn get_xattr(&mut self, node: NodeId, name: &str, size: u32) -> Result<Vec<u8>, i32> {
        let body = wire::XattrSize { size, padding: 0 };
        self.request(opcode::GETXATTR, node, &[body.as_slice(), &c(name)], 4096)
    }
}

/// A terminated string.
pub fn c(name: &str) -> Vec<u8> {
    let mut bytes = name.as_bytes().to_vec();
    bytes.push(0);
    bytes
}

/// A message at the start of `bytes`.
pub fn message<T: ByteValued + Default>(bytes: &[u8]) -> T {
    let mut message = T::default();
    message.as_mut_slice().copy_from_slice(&bytes[..size_of::<T>()]);
    message
}
