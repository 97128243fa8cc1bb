//! The FUSE protocol as Linux speaks it (`include/uapi/linux/fuse.h`, protocol 7.31 and later), little-endian like the
//! machine on both sides.
//!
//! Plain data without padding, so every pattern of bytes is a value. What the numbers mean is checked by who uses them.

use vm_memory::ByteValued;

/// The protocol's major version.
pub const MAJOR: u32 = 7;

/// The newest minor version whose messages are understood here.
pub const MINOR: u32 = 41;

/// The oldest minor version spoken: it introduced `max_pages` and the 64-byte `INIT` (7.28), and `max_write` above
/// 128 KiB is built on it.
pub const OLDEST_MINOR: u32 = 28;

/// The node id of the root directory.
pub const ROOT_ID: u64 = 1;

/// Names a message's layout without making every field a line of boilerplate.
macro_rules! message {
    ($(#[$doc:meta])* $name:ident { $($field:ident: $kind:ty),* $(,)? }) => {
        $(#[$doc])*
        #[repr(C)]
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
        pub struct $name { $(pub $field: $kind),* }

        // SAFETY: integers and arrays of integers only, laid out without padding (checked below), so any bytes are a
        // valid value and all bytes are initialised.
        unsafe impl ByteValued for $name {}

        const _: () = assert!(size_of::<$name>() == 0 $(+ size_of::<$kind>())*);
    };
}

message!(
    /// Before every request.
    InHeader {
        len: u32, opcode: u32, unique: u64, nodeid: u64, uid: u32, gid: u32, pid: u32, total_extlen: u16, padding: u16,
    }
);
message!(
    /// Before every reply.
    OutHeader { len: u32, error: i32, unique: u64 }
);
message!(
    /// An inode's attributes.
    Attr {
        ino: u64, size: u64, blocks: u64, atime: u64, mtime: u64, ctime: u64, atimensec: u32, mtimensec: u32,
        ctimensec: u32, mode: u32, nlink: u32, uid: u32, gid: u32, rdev: u32, blksize: u32, flags: u32,
    }
);
message!(
    /// A name that was found; node id 0 says that there is none and that this may be remembered.
    EntryOut {
        nodeid: u64, generation: u64, entry_valid: u64, attr_valid: u64, entry_valid_nsec: u32, attr_valid_nsec: u32,
        attr: Attr,
    }
);
message!(GetattrIn { getattr_flags: u32, dummy: u32, fh: u64 });
message!(AttrOut { attr_valid: u64, attr_valid_nsec: u32, dummy: u32, attr: Attr });
message!(SetattrIn {
    valid: u32,
    padding: u32,
    fh: u64,
    size: u64,
    lock_owner: u64,
    atime: u64,
    mtime: u64,
    ctime: u64,
    atimensec: u32,
    mtimensec: u32,
    ctimensec: u32,
    mode: u32,
    unused4: u32,
    uid: u32,
    gid: u32,
    unused5: u32,
});
message!(MknodIn { mode: u32, rdev: u32, umask: u32, padding: u32 });
message!(MkdirIn { mode: u32, umask: u32 });
message!(RenameIn { newdir: u64 });
message!(Rename2In { newdir: u64, flags: u32, padding: u32 });
message!(LinkIn { oldnodeid: u64 });
message!(OpenIn { flags: u32, open_flags: u32 });
message!(CreateIn { flags: u32, mode: u32, umask: u32, open_flags: u32 });
message!(OpenOut { fh: u64, open_flags: u32, backing_id: i32 });
message!(ReleaseIn { fh: u64, flags: u32, release_flags: u32, lock_owner: u64 });
message!(FlushIn { fh: u64, unused: u32, padding: u32, lock_owner: u64 });
message!(
    /// Also the layout of `WRITE`, whose `io_flags` are its write flags.
    IoIn { fh: u64, offset: u64, size: u32, io_flags: u32, lock_owner: u64, flags: u32, padding: u32 }
);
message!(WriteOut { size: u32, padding: u32 });
message!(StatfsOut {
    blocks: u64,
    bfree: u64,
    bavail: u64,
    files: u64,
    ffree: u64,
    bsize: u32,
    namelen: u32,
    frsize: u32,
    padding: u32,
    spare: [u32; 6],
});
message!(FsyncIn { fh: u64, fsync_flags: u32, padding: u32 });
message!(
    /// With [`init::SETXATTR_EXT`].
    SetxattrIn { size: u32, flags: u32, setxattr_flags: u32, padding: u32 }
);
message!(
    /// Without [`init::SETXATTR_EXT`].
    SetxattrInShort { size: u32, flags: u32 }
);
message!(
    /// Both the request's buffer size and the reply's needed size, for `GETXATTR` and `LISTXATTR`.
    XattrSize { size: u32, padding: u32 }
);
message!(InitIn { major: u32, minor: u32, max_readahead: u32, flags: u32, flags2: u32, unused: [u32; 11] });
message!(
    /// What `INIT` was before the second word of flags.
    InitInShort { major: u32, minor: u32, max_readahead: u32, flags: u32 }
);
message!(InitOut {
    major: u32,
    minor: u32,
    max_readahead: u32,
    flags: u32,
    max_background: u16,
    congestion_threshold: u16,
    max_write: u32,
    time_gran: u32,
    max_pages: u16,
    map_alignment: u16,
    flags2: u32,
    max_stack_depth: u32,
    unused: [u32; 6],
});
message!(LseekIn { fh: u64, offset: u64, whence: u32, padding: u32 });
message!(LseekOut { offset: u64 });
message!(FallocateIn { fh: u64, offset: u64, length: u64, mode: u32, padding: u32 });
message!(CopyFileRangeIn {
    fh_in: u64,
    off_in: u64,
    nodeid_out: u64,
    fh_out: u64,
    off_out: u64,
    len: u64,
    flags: u64,
});
message!(ForgetIn { nlookup: u64 });
message!(BatchForgetIn { count: u32, dummy: u32 });
message!(ForgetOne { nodeid: u64, nlookup: u64 });
message!(
    /// Before the name of a directory entry, padded to 8 bytes; in `READDIRPLUS` it follows an [`EntryOut`].
    Dirent { ino: u64, off: u64, namelen: u32, kind: u32 }
);

/// Requests. Any number that is not here is answered with `ENOSYS`, which tells the guest's kernel to do without.
pub mod opcode {
    pub const LOOKUP: u32 = 1;
    pub const FORGET: u32 = 2;
    pub const GETATTR: u32 = 3;
    pub const SETATTR: u32 = 4;
    pub const READLINK: u32 = 5;
    pub const SYMLINK: u32 = 6;
    pub const MKNOD: u32 = 8;
    pub const MKDIR: u32 = 9;
    pub const UNLINK: u32 = 10;
    pub const RMDIR: u32 = 11;
    pub const RENAME: u32 = 12;
    pub const LINK: u32 = 13;
    pub const OPEN: u32 = 14;
    pub const READ: u32 = 15;
    pub const WRITE: u32 = 16;
    pub const STATFS: u32 = 17;
    pub const RELEASE: u32 = 18;
    pub const FSYNC: u32 = 20;
    pub const SETXATTR: u32 = 21;
    pub const GETXATTR: u32 = 22;
    pub const LISTXATTR: u32 = 23;
    pub const REMOVEXATTR: u32 = 24;
    pub const FLUSH: u32 = 25;
    pub const INIT: u32 = 26;
    pub const OPENDIR: u32 = 27;
    pub const READDIR: u32 = 28;
    pub const RELEASEDIR: u32 = 29;
    pub const FSYNCDIR: u32 = 30;
    pub const CREATE: u32 = 35;
    pub const INTERRUPT: u32 = 36;
    pub const DESTROY: u32 = 38;
    pub const BATCH_FORGET: u32 = 42;
    pub const FALLOCATE: u32 = 43;
    pub const READDIRPLUS: u32 = 44;
    pub const RENAME2: u32 = 45;
    pub const LSEEK: u32 = 46;
    pub const COPY_FILE_RANGE: u32 = 47;
    pub const SYNCFS: u32 = 50;
    pub const TMPFILE: u32 = 51;
}

/// Flags of `INIT`; those above bit 31 travel in its second word.
pub mod init {
    pub const ASYNC_READ: u64 = 1 << 0;
    pub const ATOMIC_O_TRUNC: u64 = 1 << 3;
    pub const BIG_WRITES: u64 = 1 << 5;
    pub const DONT_MASK: u64 = 1 << 6;
    pub const AUTO_INVAL_DATA: u64 = 1 << 12;
    pub const DO_READDIRPLUS: u64 = 1 << 13;
    pub const READDIRPLUS_AUTO: u64 = 1 << 14;
    pub const ASYNC_DIO: u64 = 1 << 15;
    pub const PARALLEL_DIROPS: u64 = 1 << 18;
    pub const POSIX_ACL: u64 = 1 << 20;
    pub const MAX_PAGES: u64 = 1 << 22;
    pub const CACHE_SYMLINKS: u64 = 1 << 23;
    pub const HANDLE_KILLPRIV_V2: u64 = 1 << 28;
    pub const SETXATTR_EXT: u64 = 1 << 29;
    pub const INIT_EXT: u64 = 1 << 30;
}

/// Which fields of [`SetattrIn`] count.
pub mod setattr {
    pub const MODE: u32 = 1 << 0;
    pub const UID: u32 = 1 << 1;
    pub const GID: u32 = 1 << 2;
    pub const SIZE: u32 = 1 << 3;
    pub const ATIME: u32 = 1 << 4;
    pub const MTIME: u32 = 1 << 5;
    pub const FH: u32 = 1 << 6;
    pub const ATIME_NOW: u32 = 1 << 7;
    pub const MTIME_NOW: u32 = 1 << 8;
}

/// [`GetattrIn::getattr_flags`]: the handle counts.
pub const GETATTR_FH: u32 = 1 << 0;

/// [`IoIn::io_flags`] of a write that comes from the guest's page cache, at a time and through a handle of its choice.
pub const WRITE_CACHE: u32 = 1 << 0;

/// [`FsyncIn::fsync_flags`]: data only.
pub const FSYNC_FDATASYNC: u32 = 1 << 0;

/// [`SetxattrIn::setxattr_flags`]: an access ACL is set by a process that may not keep the set-group-id bit.
pub const SETXATTR_ACL_KILL_SGID: u32 = 1 << 0;

/// What [`OpenOut::open_flags`] tells the guest's kernel to do.
pub mod fopen {
    pub const KEEP_CACHE: u32 = 1 << 1;
    pub const CACHE_DIR: u32 = 1 << 3;
    pub const NOFLUSH: u32 = 1 << 5;
}
