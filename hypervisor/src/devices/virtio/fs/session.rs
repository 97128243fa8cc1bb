//! One FUSE session: from a request's bytes to the reply's.
//!
//! Hostile input: all of it. A request is taken apart once, into types that say what was checked; a reply is written
//! when it is complete. What a request asks for in memory is bounded by [`MAX_BODY`], by the room it brings for the
//! reply and by the limits of [`Tree`].

use std::time::Duration;

use nix::errno::Errno;
use nix::libc;
use vm_memory::ByteValued;

use super::body::Body;
use super::chain::{Buffers, Chain};
use super::tree::{
    Caller, Entry, HandleId, Listing, NewAttributes, NewTime, NodeId, Opened, Tree, Worker, Write,
};
use super::wire::{self, InitIn, init, opcode, setattr};

/// Data of one read or write, the largest that Linux makes by default.
pub const MAX_DATA: u32 = 1 << 20;

/// `max_pages` for that.
const MAX_PAGES: u16 = 256;

/// Bytes of a request beside the data of a write: an extended attribute's value and name, with room to spare.
const MAX_BODY: usize = 128 * 1024;

/// Requests that the guest keeps under way in the background, such as read-ahead.
const MAX_BACKGROUND: u16 = 64;

/// What is offered; the session has what the guest knows too.
const FEATURES: u64 = init::ASYNC_READ
    | init::ATOMIC_O_TRUNC
    | init::BIG_WRITES
    | init::DONT_MASK
    | init::AUTO_INVAL_DATA
    | init::DO_READDIRPLUS
    | init::READDIRPLUS_AUTO
    | init::ASYNC_DIO
    | init::PARALLEL_DIROPS
    | init::POSIX_ACL
    | init::MAX_PAGES
    | init::CACHE_SYMLINKS
    | init::HANDLE_KILLPRIV_V2
    | init::SETXATTR_EXT
    | init::INIT_EXT;

/// Between `INIT` and `DESTROY`, features are those that both sides know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    New,
    Serving { features: u64 },
}

/// What a request moved, for statistics.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Done {
    /// Bytes written to the reply's buffers.
    pub replied: u32,
    /// File data to the guest.
    pub read: usize,
    /// File data from the guest.
    pub written: usize,
    /// The request was not one.
    pub malformed: bool,
}

/// How a request is answered.
enum Answer {
    /// Not at all.
    Silence,
    /// What stands in [`Session::answer`].
    Bytes,
    /// With so many bytes of file data, which are in the guest's buffers already.
    Data(usize),
    /// As `Bytes`; so much file data was taken from the guest.
    Taken(usize),
}

/// The state of a mounted file system.
#[derive(Debug)]
pub struct Session {
    tree: Tree,
    state: State,
    body: Vec<u8>,
    answer: Vec<u8>,
}

/// A request without its body.
struct Request {
    header: wire::InHeader,
    node: NodeId,
    caller: Caller,
}

impl Session {
    /// Nothing is mounted yet.
    pub fn new(tree: Tree) -> Self {
        Self { tree, state: State::New, body: Vec::new(), answer: Vec::new() }
    }

    /// Back to nothing mounted; what the guest had open is closed.
    pub fn clear(&mut self) {
        self.tree.clear();
        self.state = State::New;
        self.body = Vec::new();
        self.answer = Vec::new();
    }

    /// The directory.
    pub fn tree(&mut self) -> &mut Tree {
        &mut self.tree
    }

    /// Serves one request.
    pub fn serve(&mut self, worker: &mut Worker, chain: Chain<'_>) -> Done {
        let Chain { mut request, mut reply } = chain;
        let mut header = wire::InHeader::default();
        if !request.read(header.as_mut_slice()) {
            return Done { malformed: true, ..Done::default() };
        }
        let length = usize::try_from(header.len).unwrap_or(usize::MAX);
        let Some(body) = length.checked_sub(size_of_val(&header)).filter(|&body| body <= request.len())
        else {
            let replied = respond(&mut reply, header.unique, Err(Errno::EINVAL));
            return Done { replied, malformed: true, ..Done::default() };
        };
        let mut request = request.take(body);
        // The data of a read go behind the header, which is written when it is known how many they are.
        let mut head = reply.take(size_of::<wire::OutHeader>());
        self.answer.clear();
        let answer = self.dispatch(worker, header, &mut request, &reply);
        self.conclude(&mut head, reply, header.unique, answer)
    }

    fn conclude(
        &mut self,
        head: &mut Buffers<'_>,
        mut room: Buffers<'_>,
        unique: u64,
        answer: Result<Answer, Errno>,
    ) -> Done {
        let mut done =
            Done { malformed: answer.as_ref().is_err_and(|&e| e == Errno::EINVAL), ..Done::default() };
        let outcome = match answer {
            Ok(Answer::Silence) => return done,
            Ok(Answer::Data(count)) => {
                done.read = count;
                Ok(count)
            }
            Ok(Answer::Bytes | Answer::Taken(_)) if !room.write(&self.answer) => Err(Errno::EOVERFLOW),
            Ok(Answer::Bytes) => Ok(self.answer.len()),
            Ok(Answer::Taken(count)) => {
                done.written = count;
                Ok(self.answer.len())
            }
            Err(errno) => Err(errno),
        };
        done.replied = respond(head, unique, outcome);
        done
    }

    fn dispatch(
        &mut self,
        worker: &mut Worker,
        header: wire::InHeader,
        request: &mut Buffers<'_>,
        room: &Buffers<'_>,
    ) -> Result<Answer, Errno> {
        let caller = Caller { uid: header.uid, gid: header.gid };
        let request_line = Request { header, node: NodeId(header.nodeid), caller };
        if header.opcode == opcode::WRITE {
            self.features()?;
            return self.write(&request_line, request);
        }
        if request.len() > MAX_BODY {
            return Err(Errno::E2BIG);
        }
        let mut bytes = std::mem::take(&mut self.body);
        bytes.resize(request.len(), 0);
        let complete = request.read(&mut bytes);
        let answer = if complete {
            self.dispatch_body(worker, &request_line, Body(&bytes), room)
        } else {
            Err(Errno::EINVAL)
        };
        self.body = bytes;
        answer
    }

    fn dispatch_body(
        &mut self,
        worker: &mut Worker,
        request: &Request,
        body: Body<'_>,
        room: &Buffers<'_>,
    ) -> Result<Answer, Errno> {
        match request.header.opcode {
            opcode::INIT => return self.init(body),
            opcode::DESTROY => {
                self.clear();
                return Ok(Answer::Bytes);
            }
            opcode::FORGET => return self.forget(request, body),
            opcode::BATCH_FORGET => return self.batch_forget(body),
            // A request is served or not before its interruption could be read.
            opcode::INTERRUPT => return Ok(Answer::Silence),
            _ => {}
        }
        let features = self.features()?;
        match request.header.opcode {
            opcode::LOOKUP => self.lookup(request, body),
            opcode::READ => self.read(request, body, room),
            opcode::GETATTR => self.getattr(request, body),
            opcode::SETATTR => self.setattr(worker, request, body),
            opcode::OPEN => self.open(request, body),
            opcode::CREATE => self.create(worker, request, body),
            opcode::TMPFILE => self.tmpfile(worker, request, body),
            opcode::OPENDIR => self.opendir(request),
            opcode::READDIR => self.list(request, body, room, false),
            opcode::READDIRPLUS => self.list(request, body, room, true),
            opcode::RELEASE | opcode::RELEASEDIR => self.release(request, body),
            opcode::MKDIR | opcode::MKNOD | opcode::SYMLINK | opcode::LINK => {
                self.make(worker, request, body)
            }
            opcode::UNLINK | opcode::RMDIR => self.remove(request, body),
            opcode::RENAME | opcode::RENAME2 => self.rename(request, body),
            opcode::READLINK => self.readlink(request),
            opcode::STATFS => self.statfs(request),
            opcode::FLUSH => self.flush(request, body),
            opcode::FSYNC | opcode::FSYNCDIR => self.fsync(request, body),
            opcode::SYNCFS => self.tree.sync_all().map(|()| Answer::Bytes),
            opcode::GETXATTR => self.getxattr(request, body),
            opcode::LISTXATTR => self.listxattr(request, body),
            opcode::SETXATTR => self.setxattr(worker, request, body, features),
            opcode::REMOVEXATTR => self.removexattr(request, body),
            opcode::FALLOCATE => self.fallocate(request, body),
            opcode::LSEEK => self.lseek(request, body),
            opcode::COPY_FILE_RANGE => self.copy_file_range(request, body),
            _ => Err(Errno::ENOSYS),
        }
    }

    fn features(&self) -> Result<u64, Errno> {
        match self.state {
            State::New => Err(Errno::ENOTCONN),
            State::Serving { features } => Ok(features),
        }
    }

    /// A guest that mounts anew, after a reboot for instance, has forgotten everything.
    fn init(&mut self, mut body: Body<'_>) -> Result<Answer, Errno> {
        let mut copy = body;
        let (hello, flags) = match copy.message::<InitIn>() {
            Ok(InitIn { major, minor, max_readahead, flags, flags2, .. }) => {
                let second = if u64::from(flags) & init::INIT_EXT == 0 { 0 } else { flags2 };
                let flags = u64::from(second) << 32 | u64::from(flags);
                (wire::InitInShort { major, minor, max_readahead, flags: 0 }, flags)
            }
            Err(_) => {
                let short: wire::InitInShort = body.message()?;
                (short, u64::from(short.flags) & !init::INIT_EXT)
            }
        };
        self.clear();
        if hello.major > wire::MAJOR {
            // The guest tries again with the version that it is told.
            return self.say(&wire::InitOut { major: wire::MAJOR, minor: wire::MINOR, ..Default::default() });
        }
        if hello.major < wire::MAJOR || hello.minor < wire::OLDEST_MINOR {
            return Err(Errno::EPROTO);
        }
        let features = flags & FEATURES;
        self.state = State::Serving { features };
        let [low, high] = [features & u64::from(u32::MAX), features >> 32];
        self.say(&wire::InitOut {
            major: wire::MAJOR,
            minor: wire::MINOR,
            max_readahead: hello.max_readahead,
            flags: u32::try_from(low).unwrap_or(0),
            flags2: u32::try_from(high).unwrap_or(0),
            max_background: MAX_BACKGROUND,
            congestion_threshold: MAX_BACKGROUND / 4 * 3,
            max_write: MAX_DATA,
            time_gran: 1,
            max_pages: MAX_PAGES,
            ..Default::default()
        })
    }

    fn forget(&mut self, request: &Request, mut body: Body<'_>) -> Result<Answer, Errno> {
        if let Ok(wire::ForgetIn { nlookup }) = body.message() {
            self.tree.forget(request.node, nlookup);
        }
        Ok(Answer::Silence)
    }

    fn batch_forget(&mut self, mut body: Body<'_>) -> Result<Answer, Errno> {
        let Ok(wire::BatchForgetIn { count, .. }) = body.message() else { return Ok(Answer::Silence) };
        for _ in 0..count {
            // The count may say anything; the body ends where it ends.
            let Ok(wire::ForgetOne { nodeid, nlookup }) = body.message() else { break };
            self.tree.forget(NodeId(nodeid), nlookup);
        }
        Ok(Answer::Silence)
    }

    fn lookup(&mut self, request: &Request, mut body: Body<'_>) -> Result<Answer, Errno> {
        let entry = self.tree.lookup(request.node, body.name()?)?;
        self.say(&entry)
    }

    fn make(&mut self, worker: &mut Worker, request: &Request, mut body: Body<'_>) -> Result<Answer, Errno> {
        let (tree, caller, parent) = (&mut self.tree, request.caller, request.node);
        let entry = match request.header.opcode {
            opcode::MKDIR => {
                let wire::MkdirIn { mode, umask } = body.message()?;
                tree.mkdir(worker, caller, parent, body.name()?, mode, umask)
            }
            opcode::MKNOD => {
                let wire::MknodIn { mode, umask, .. } = body.message()?;
                tree.mknod(worker, caller, parent, body.name()?, mode, umask)
            }
            opcode::SYMLINK => {
                let name = body.name()?;
                tree.symlink(worker, caller, parent, name, body.string()?)
            }
            _ => {
                let wire::LinkIn { oldnodeid } = body.message()?;
                tree.link(NodeId(oldnodeid), parent, body.name()?)
            }
        };
        self.say_entry(&entry?)
    }

    fn remove(&mut self, request: &Request, mut body: Body<'_>) -> Result<Answer, Errno> {
        let name = body.name()?;
        match request.header.opcode {
            opcode::RMDIR => self.tree.rmdir(request.node, name)?,
            _ => self.tree.unlink(request.node, name)?,
        }
        Ok(Answer::Bytes)
    }

    fn rename(&mut self, request: &Request, mut body: Body<'_>) -> Result<Answer, Errno> {
        let (newdir, flags) = if request.header.opcode == opcode::RENAME2 {
            let wire::Rename2In { newdir, flags, .. } = body.message()?;
            (newdir, flags)
        } else {
            (body.message::<wire::RenameIn>()?.newdir, 0)
        };
        let from = (request.node, body.name()?);
        self.tree.rename(from, (NodeId(newdir), body.name()?), flags)?;
        Ok(Answer::Bytes)
    }

    fn readlink(&mut self, request: &Request) -> Result<Answer, Errno> {
        self.tree.readlink(request.node, &mut self.answer)?;
        Ok(Answer::Bytes)
    }

    fn getattr(&mut self, request: &Request, mut body: Body<'_>) -> Result<Answer, Errno> {
        let wire::GetattrIn { getattr_flags, fh, .. } = body.message()?;
        let handle = (getattr_flags & wire::GETATTR_FH != 0).then_some(HandleId(fh));
        let (attr, lasts) = self.tree.getattr(request.node, handle)?;
        self.say_attr(attr, lasts)
    }

    fn setattr(&mut self, worker: &Worker, request: &Request, mut body: Body<'_>) -> Result<Answer, Errno> {
        let message: wire::SetattrIn = body.message()?;
        let handle = (message.valid & setattr::FH != 0).then_some(HandleId(message.fh));
        let (attr, lasts) = self.tree.setattr(worker, request.node, handle, &new_attributes(&message))?;
        self.say_attr(attr, lasts)
    }

    fn statfs(&mut self, request: &Request) -> Result<Answer, Errno> {
        let figures = self.tree.statfs(request.node)?;
        self.say(&figures)
    }

    fn open(&mut self, request: &Request, mut body: Body<'_>) -> Result<Answer, Errno> {
        let wire::OpenIn { flags, .. } = body.message()?;
        let opened = self.tree.open(request.node, flags)?;
        self.say(&open_out(opened))
    }

    fn opendir(&mut self, request: &Request) -> Result<Answer, Errno> {
        let opened = self.tree.opendir(request.node)?;
        self.say(&open_out(opened))
    }

    fn create(
        &mut self,
        worker: &mut Worker,
        request: &Request,
        mut body: Body<'_>,
    ) -> Result<Answer, Errno> {
        let wire::CreateIn { flags, mode, umask, .. } = body.message()?;
        let how = (flags, mode, umask);
        let (entry, opened) = self.tree.create(worker, request.caller, request.node, body.name()?, how)?;
        self.say_entry(&entry)?;
        self.say(&open_out(opened))
    }

    fn tmpfile(
        &mut self,
        worker: &mut Worker,
        request: &Request,
        mut body: Body<'_>,
    ) -> Result<Answer, Errno> {
        let wire::CreateIn { flags, mode, umask, .. } = body.message()?;
        let (entry, opened) =
            self.tree.tmpfile(worker, request.caller, request.node, (flags, mode, umask))?;
        self.say_entry(&entry)?;
        self.say(&open_out(opened))
    }

    fn release(&mut self, request: &Request, mut body: Body<'_>) -> Result<Answer, Errno> {
        let wire::ReleaseIn { fh, .. } = body.message()?;
        self.tree.release(request.node, HandleId(fh))?;
        Ok(Answer::Bytes)
    }

    fn read(&mut self, request: &Request, mut body: Body<'_>, room: &Buffers<'_>) -> Result<Answer, Errno> {
        let wire::IoIn { fh, offset, size, .. } = body.message()?;
        let size = usize::try_from(size.min(MAX_DATA)).map_err(|_| Errno::EINVAL)?;
        let buffers = room.prefix(size);
        let count = self.tree.read(request.node, HandleId(fh), &buffers, offset)?;
        Ok(Answer::Data(count))
    }

    fn write(&mut self, request: &Request, body: &mut Buffers<'_>) -> Result<Answer, Errno> {
        let mut message = wire::IoIn::default();
        if !body.read(message.as_mut_slice()) {
            return Err(Errno::EINVAL);
        }
        let size = usize::try_from(message.size).map_err(|_| Errno::EINVAL)?;
        if message.size > MAX_DATA || size > body.len() {
            return Err(Errno::EINVAL);
        }
        let from_cache = message.io_flags & wire::WRITE_CACHE != 0;
        let write = Write {
            node: request.node,
            handle: HandleId(message.fh),
            offset: message.offset,
            append: !from_cache && message.flags & libc::O_APPEND.unsigned_abs() != 0,
        };
        let count = self.tree.write(write, &body.take(size))?;
        let size = u32::try_from(count).map_err(|_| Errno::EIO)?;
        self.say(&wire::WriteOut { size, padding: 0 })?;
        Ok(Answer::Taken(count))
    }

    fn list(
        &mut self,
        request: &Request,
        mut body: Body<'_>,
        room: &Buffers<'_>,
        plus: bool,
    ) -> Result<Answer, Errno> {
        let wire::IoIn { fh, offset, size, .. } = body.message()?;
        let size = usize::try_from(size).map_err(|_| Errno::EINVAL)?.min(room.len());
        let listing = Listing { node: request.node, handle: HandleId(fh), offset, size, plus };
        self.tree.list(listing, &mut self.answer)?;
        Ok(Answer::Bytes)
    }

    fn flush(&mut self, request: &Request, mut body: Body<'_>) -> Result<Answer, Errno> {
        let wire::FlushIn { fh, .. } = body.message()?;
        self.tree.flush(request.node, HandleId(fh))?;
        Ok(Answer::Bytes)
    }

    fn fsync(&mut self, request: &Request, mut body: Body<'_>) -> Result<Answer, Errno> {
        let wire::FsyncIn { fh, fsync_flags, .. } = body.message()?;
        self.tree.fsync(request.node, HandleId(fh), fsync_flags & wire::FSYNC_FDATASYNC != 0)?;
        Ok(Answer::Bytes)
    }

    fn getxattr(&mut self, request: &Request, mut body: Body<'_>) -> Result<Answer, Errno> {
        let wire::XattrSize { size, .. } = body.message()?;
        let size = usize::try_from(size).map_err(|_| Errno::EINVAL)?;
        let length = self.tree.getxattr(request.node, body.string()?, &mut self.answer, size)?;
        self.say_xattr(size, length)
    }

    fn listxattr(&mut self, request: &Request, mut body: Body<'_>) -> Result<Answer, Errno> {
        let wire::XattrSize { size, .. } = body.message()?;
        let size = usize::try_from(size).map_err(|_| Errno::EINVAL)?;
        let length = self.tree.listxattr(request.node, &mut self.answer, size)?;
        self.say_xattr(size, length)
    }

    fn setxattr(
        &mut self,
        worker: &Worker,
        request: &Request,
        mut body: Body<'_>,
        features: u64,
    ) -> Result<Answer, Errno> {
        let message = if features & init::SETXATTR_EXT == 0 {
            let wire::SetxattrInShort { size, flags } = body.message()?;
            wire::SetxattrIn { size, flags, ..Default::default() }
        } else {
            body.message()?
        };
        let name = body.string()?;
        let value = body.bytes(usize::try_from(message.size).map_err(|_| Errno::EINVAL)?)?;
        let privileged = message.setxattr_flags & wire::SETXATTR_ACL_KILL_SGID == 0;
        self.tree.setxattr(worker, request.node, name, value, message.flags, privileged)?;
        Ok(Answer::Bytes)
    }

    fn removexattr(&mut self, request: &Request, mut body: Body<'_>) -> Result<Answer, Errno> {
        self.tree.removexattr(request.node, body.string()?)?;
        Ok(Answer::Bytes)
    }

    fn fallocate(&mut self, request: &Request, mut body: Body<'_>) -> Result<Answer, Errno> {
        let wire::FallocateIn { fh, offset, length, mode, .. } = body.message()?;
        self.tree.fallocate(request.node, HandleId(fh), mode, offset, length)?;
        Ok(Answer::Bytes)
    }

    fn lseek(&mut self, request: &Request, mut body: Body<'_>) -> Result<Answer, Errno> {
        let wire::LseekIn { fh, offset, whence, .. } = body.message()?;
        let offset = self.tree.lseek(request.node, HandleId(fh), offset, whence)?;
        self.say(&wire::LseekOut { offset })
    }

    fn copy_file_range(&mut self, request: &Request, mut body: Body<'_>) -> Result<Answer, Errno> {
        let message: wire::CopyFileRangeIn = body.message()?;
        if message.flags != 0 {
            return Err(Errno::EINVAL);
        }
        let from = (request.node, HandleId(message.fh_in), message.off_in);
        let to = (NodeId(message.nodeid_out), HandleId(message.fh_out), message.off_out);
        let count = self.tree.copy(from, to, message.len)?;
        let size = u32::try_from(count).map_err(|_| Errno::EIO)?;
        self.say(&wire::WriteOut { size, padding: 0 })
    }

    fn say<T: ByteValued>(&mut self, message: &T) -> Result<Answer, Errno> {
        self.answer.extend_from_slice(message.as_slice());
        Ok(Answer::Bytes)
    }

    fn say_entry(&mut self, entry: &Entry) -> Result<Answer, Errno> {
        let message = self.tree.entry_out(entry);
        self.say(&message)
    }

    fn say_attr(&mut self, attr: wire::Attr, lasts: Duration) -> Result<Answer, Errno> {
        self.say(&wire::AttrOut { attr_valid: lasts.as_secs(), attr, ..Default::default() })
    }

    /// The length where the guest brought no room for the value, and the value where it did.
    fn say_xattr(&mut self, room: usize, length: usize) -> Result<Answer, Errno> {
        if room > 0 {
            return Ok(Answer::Bytes);
        }
        let size = u32::try_from(length).map_err(|_| Errno::E2BIG)?;
        self.say(&wire::XattrSize { size, padding: 0 })
    }
}

/// Writes a reply's header; `outcome` is the length of what follows it. Returns the bytes used, 0 where there was no
/// room for a header.
fn respond(head: &mut Buffers<'_>, unique: u64, outcome: Result<usize, Errno>) -> u32 {
    const HEADER: u32 = 16;
    let (length, error) = match outcome {
        Ok(length) => (u32::try_from(length).unwrap_or(0).saturating_add(HEADER), 0),
        Err(errno) => (HEADER, -(errno as i32)),
    };
    let header = wire::OutHeader { len: length, error, unique };
    if head.write(header.as_slice()) { length } else { 0 }
}

fn open_out(opened: Opened) -> wire::OpenOut {
    wire::OpenOut { fh: opened.handle.0, open_flags: opened.flags, backing_id: 0 }
}

fn new_attributes(message: &wire::SetattrIn) -> NewAttributes {
    let has = |bit| message.valid & bit != 0;
    let time = |given, now, seconds: u64, nanoseconds| match (has(given), has(now)) {
        (_, true) => NewTime::Now,
        (true, false) => NewTime::At(seconds.cast_signed(), nanoseconds),
        (false, false) => NewTime::Keep,
    };
    NewAttributes {
        mode: has(setattr::MODE).then_some(message.mode),
        uid: has(setattr::UID).then_some(message.uid),
        gid: has(setattr::GID).then_some(message.gid),
        size: has(setattr::SIZE).then_some(message.size),
        atime: time(setattr::ATIME, setattr::ATIME_NOW, message.atime, message.atimensec),
        mtime: time(setattr::MTIME, setattr::MTIME_NOW, message.mtime, message.mtimensec),
    }
}
