//! What programs in containers do to their files. Each scenario is given an empty directory.

use std::ffi::{CStr, CString};
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt, chown, symlink};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Command;

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, Flock, FlockArg, RenameFlags, renameat2};
use nix::libc;
use nix::sys::stat::{Mode, SFlag, makedev, mknod, umask};

use crate::Result;

/// Runs one.
pub fn run(name: &str, directory: &Path) -> Result<()> {
    match name {
        "names" => names(directory),
        "data" => data(directory),
        "mappings" => mappings(directory),
        "holes" => holes(directory),
        "special" => special(directory),
        "locks" => locks(directory),
        "owners" => owners(directory),
        "attributes" => attributes(directory),
        "many" => many(directory),
        _ => Err(format!("no scenario {name}").into()),
    }
}

fn ensure(condition: bool, what: &str) -> Result<()> {
    if condition { Ok(()) } else { Err(what.into()) }
}

fn read_write(path: &Path) -> Result<File> {
    Ok(OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?)
}

fn c(path: &Path) -> Result<CString> {
    Ok(CString::new(path.as_os_str().as_bytes())?)
}

fn errno(code: libc::c_int) -> Result<()> {
    Ok(Errno::result(code).map(drop)?)
}

fn names(dir: &Path) -> Result<()> {
    let [a, b, l] = ["a", "b", "l"].map(|name| dir.join(name));
    fs::write(&a, "a")?;
    fs::write(&b, "b")?;
    let rename = |from: &Path, to: &Path, flags| renameat2(AT_FDCWD, from, AT_FDCWD, to, flags);
    ensure(rename(&a, &b, RenameFlags::RENAME_NOREPLACE) == Err(Errno::EEXIST), "NOREPLACE replaced")?;
    rename(&a, &b, RenameFlags::RENAME_EXCHANGE)?;
    ensure(fs::read_to_string(&a)? == "b", "EXCHANGE did not exchange")?;
    fs::hard_link(&a, &l)?;
    ensure(fs::metadata(&l)?.ino() == fs::metadata(&a)?.ino(), "a hard link is another inode")?;
    ensure(fs::metadata(&a)?.nlink() == 2, "a hard link is not counted")?;
    // As dpkg does it: a link to the old version, and the new one moved over it.
    fs::write(dir.join("new"), "new")?;
    fs::rename(dir.join("new"), &a)?;
    ensure(fs::read_to_string(&l)? == "b" && fs::read_to_string(&a)? == "new", "replacing failed")?;
    symlink("a", dir.join("s"))?;
    ensure(fs::read_to_string(dir.join("s"))? == "new", "a symbolic link leads elsewhere")?;
    ensure(fs::read_link(dir.join("s"))?.to_str() == Some("a"), "a symbolic link has another target")?;
    fs::create_dir_all(dir.join("x/y/z"))?;
    fs::rename(dir.join("x/y"), dir.join("w"))?;
    ensure(dir.join("w/z").is_dir() && !dir.join("x/y").exists(), "a directory did not move")?;
    ensure(fs::remove_dir(dir.join("w")).is_err(), "a full directory was removed")?;
    ensure(fs::metadata(dir.join("x/../a"))?.is_file(), "the parent of a directory is another one")?;
    fs::remove_dir_all(dir.join("w"))?;
    let long = "x".repeat(255);
    fs::write(dir.join(&long), "")?;
    ensure(fs::write(dir.join(long + "x"), "").is_err(), "a name of 256 bytes was taken")
}

fn data(dir: &Path) -> Result<()> {
    let pattern: Vec<u8> = (0..1_500_000u32).map(|i| (i % 249) as u8).collect();
    let path = dir.join("a");
    fs::write(&path, &pattern)?;
    ensure(fs::read(&path)? == pattern, "a file reads other than written")?;
    // Past the guest's cache.
    let direct = OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(&path)?;
    let mut block = Block([0; 8192]);
    direct.read_exact_at(&mut block.0, 4096)?;
    ensure(block.0 == pattern[4096..4096 + 8192], "O_DIRECT reads something else")?;
    block.0.fill(1);
    direct.write_all_at(&block.0, 8192)?;
    let mut through = [0; 8192];
    File::open(&path)?.read_exact_at(&mut through, 8192)?;
    ensure(through == block.0, "what O_DIRECT wrote is not read")?;
    // A file without a name.
    let mut file = read_write(&dir.join("gone"))?;
    file.write_all(b"still here")?;
    fs::remove_file(dir.join("gone"))?;
    file.seek(SeekFrom::Start(0))?;
    let mut text = String::new();
    file.read_to_string(&mut text)?;
    ensure(text == "still here" && file.metadata()?.nlink() == 0, "an unlinked file was lost")?;
    // Two that append, each without knowing of the other.
    let mut logs = [0, 1].map(|_| OpenOptions::new().append(true).create(true).open(dir.join("log")));
    for round in 0..100 {
        let log = logs[round % 2].as_mut().map_err(|error| error.to_string())?;
        writeln!(log, "{round:03}")?;
    }
    let log = fs::read_to_string(dir.join("log"))?;
    ensure(log.lines().eq((0..100).map(|round| format!("{round:03}"))), "appending lost lines")?;
    let file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&path)?;
    ensure(file.metadata()?.len() == 0, "O_TRUNC did not truncate")?;
    file.sync_all()?;
    file.sync_data()?;
    File::open(dir)?.sync_all()?;
    // SAFETY: touches no memory.
    unsafe { libc::sync() };
    Ok(())
}

#[repr(align(4096))]
struct Block([u8; 8192]);

fn mappings(dir: &Path) -> Result<()> {
    const SIZE: usize = 256 * 1024;
    let path = dir.join("m");
    let mut file = OpenOptions::new().read(true).append(true).create(true).open(&path)?;
    file.set_len(SIZE as u64)?;
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: maps memory of its own.
    let map = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            SIZE,
            protection,
            libc::MAP_SHARED,
            read_write(&path)?.as_raw_fd(),
            0,
        )
    };
    ensure(map != libc::MAP_FAILED, "a file cannot be mapped")?;
    // SAFETY: the mapping is that long, and is used by nobody else.
    let bytes = unsafe { std::slice::from_raw_parts_mut(map.cast::<u8>(), SIZE) };
    bytes[0] = 1;
    bytes[SIZE - 1] = 2;
    let mut last = [0];
    file.read_exact_at(&mut last, SIZE as u64 - 1)?;
    ensure(last == [2], "a mapping's writes are not read")?;
    file.write_all(b"end")?;
    bytes[1] = 3;
    // SAFETY: the range is the mapping.
    errno(unsafe { libc::msync(map, SIZE, libc::MS_SYNC) })?;
    let content = fs::read(&path)?;
    ensure(content.len() == SIZE + 3 && &content[SIZE..] == b"end", "a mapping's pages were appended")?;
    ensure(content[..2] == [1, 3], "a mapping's pages were lost")?;
    // A program is mapped, too.
    fs::copy("/init", dir.join("program"))?;
    fs::set_permissions(dir.join("program"), fs::Permissions::from_mode(0o755))?;
    let status = Command::new(dir.join("program")).arg("--exit").status()?;
    ensure(status.success(), "a program does not run")?;
    // SAFETY: nothing refers to the mapping any more.
    errno(unsafe { libc::munmap(map, SIZE) })
}

fn holes(dir: &Path) -> Result<()> {
    let file = read_write(&dir.join("h"))?;
    file.write_all_at(&[1; 4096], 1 << 20)?;
    ensure(file.metadata()?.blocks() < 64, "a hole takes room")?;
    // SAFETY: these calls touch no memory.
    let seek = |offset, whence| unsafe { libc::lseek(file.as_raw_fd(), offset, whence) };
    ensure(seek(0, libc::SEEK_DATA) == 1 << 20, "SEEK_DATA finds something else")?;
    ensure(seek(1 << 20, libc::SEEK_HOLE) == (1 << 20) + 4096, "SEEK_HOLE finds something else")?;
    let punch = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    // SAFETY: as above.
    errno(unsafe { libc::fallocate(file.as_raw_fd(), punch, 1 << 20, 4096) })?;
    let mut byte = [1];
    file.read_exact_at(&mut byte, 1 << 20)?;
    ensure(byte == [0], "a punched hole has data")?;
    // SAFETY: as above.
    errno(unsafe { libc::fallocate(file.as_raw_fd(), 0, 0, 3 << 20) })?;
    ensure(file.metadata()?.len() == 3 << 20, "fallocate did not grow the file")?;
    let source = read_write(&dir.join("source"))?;
    source.write_all_at(b"0123456789", 0)?;
    let target = read_write(&dir.join("target"))?;
    let (mut from, mut to) = (2i64, 0i64);
    // SAFETY: the offsets are ours.
    let copied = unsafe {
        let (from, to) = (&raw mut from, &raw mut to);
        libc::syscall(libc::SYS_copy_file_range, source.as_raw_fd(), from, target.as_raw_fd(), to, 100, 0)
    };
    ensure(
        copied == 8 && fs::read(dir.join("target"))? == b"23456789",
        "copy_file_range copied something else",
    )?;
    let unnamed = OpenOptions::new().read(true).write(true).custom_flags(libc::O_TMPFILE).open(dir)?;
    unnamed.write_all_at(b"named now", 0)?;
    let link = CString::new(format!("/proc/self/fd/{}", unnamed.as_raw_fd()))?;
    let name = c(&dir.join("named"))?;
    // SAFETY: both strings are terminated.
    errno(unsafe {
        let follow = libc::AT_SYMLINK_FOLLOW;
        libc::linkat(libc::AT_FDCWD, link.as_ptr(), libc::AT_FDCWD, name.as_ptr(), follow)
    })?;
    ensure(fs::read(dir.join("named"))? == b"named now", "an unnamed file got another's name")
}

fn special(dir: &Path) -> Result<()> {
    let fifo = dir.join("fifo");
    nix::unistd::mkfifo(&fifo, Mode::from_bits_truncate(0o640))?;
    ensure(fs::metadata(&fifo)?.file_type().is_fifo(), "a FIFO is something else")?;
    let writer = {
        let fifo = fifo.clone();
        std::thread::spawn(move || fs::write(fifo, "through a pipe"))
    };
    ensure(fs::read_to_string(&fifo)? == "through a pipe", "a FIFO passes something else")?;
    writer.join().map_err(|_| "the writer panicked")??;
    let listener = UnixListener::bind(dir.join("socket"))?;
    let mut client = UnixStream::connect(dir.join("socket"))?;
    client.write_all(b"x")?;
    let mut byte = [0];
    listener.accept()?.0.read_exact(&mut byte)?;
    ensure(&byte == b"x", "a socket passes something else")?;
    for (kind, device) in
        [(SFlag::S_IFCHR, makedev(1, 3)), (SFlag::S_IFBLK, makedev(254, 0)), (SFlag::S_IFCHR, 0)]
    {
        let made = mknod(&dir.join("device"), kind, Mode::from_bits_truncate(0o600), device);
        ensure(made == Err(Errno::EPERM), "a device node was made")?;
    }
    Ok(())
}

fn locks(dir: &Path) -> Result<()> {
    let open = || read_write(&dir.join("lock"));
    let held = Flock::lock(open()?, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| errno)?;
    let second = Flock::lock(open()?, FlockArg::LockExclusiveNonblock);
    ensure(matches!(second, Err((_, Errno::EWOULDBLOCK))), "flock gave one lock to two")?;
    drop(held);
    Flock::lock(open()?, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| errno)?;
    // SAFETY: an all-zero flock is a value of that type: the whole file.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = libc::c_short::try_from(libc::F_WRLCK)?;
    let (first, second) = (open()?, open()?);
    // SAFETY: the kernel reads the lock.
    let set = |file: &File| unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) };
    errno(set(&first))?;
    ensure(set(&second) == -1, "fcntl gave one lock to two")
}

/// Runs `act` as another user, in a process of its own.
fn as_user(uid: u32, gid: u32, groups: &[u32], act: impl FnOnce() -> Result<()>) -> Result<()> {
    // SAFETY: the child uses nothing but its own memory and ends at once.
    match unsafe { libc::fork() } {
        -1 => Err(Errno::last().into()),
        0 => {
            // SAFETY: the kernel reads so many groups.
            let entered = unsafe {
                libc::setgroups(groups.len(), groups.as_ptr()) == 0
                    && libc::setresgid(gid, gid, gid) == 0
                    && libc::setresuid(uid, uid, uid) == 0
            };
            let result = if entered { act() } else { Err("cannot change the user".into()) };
            if let Err(error) = &result {
                let _ = fs::write("/dev/kmsg", format!("<0>shared: as user {uid}: {error}"));
            }
            std::process::exit(i32::from(result.is_err()))
        }
        child => {
            let mut status = 0;
            // SAFETY: the status is ours.
            unsafe { libc::waitpid(child, &raw mut status, 0) };
            ensure(status == 0, "failed as another user, see the console")
        }
    }
}

fn owners(dir: &Path) -> Result<()> {
    let mode = |path: &Path| Ok::<_, std::io::Error>(fs::metadata(path)?.mode() & 0o7777);
    let chmod = |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode));
    fs::write(dir.join("f"), "")?;
    chown(dir.join("f"), Some(1234), Some(4321))?;
    let meta = fs::metadata(dir.join("f"))?;
    ensure((meta.uid(), meta.gid()) == (1234, 4321), "a file has another owner")?;
    // A pod's volume: the group of fsGroup, and inherited.
    let volume = dir.join("volume");
    fs::create_dir(&volume)?;
    chown(&volume, Some(0), Some(2000))?;
    chmod(&volume, 0o2775)?;
    as_user(1000, 1000, &[2000], || {
        fs::write(volume.join("f"), "x")?;
        fs::create_dir(volume.join("d"))?;
        ensure(fs::write(dir.join("forbidden"), "").is_err(), "a user wrote to root's directory")
    })?;
    let meta = fs::metadata(volume.join("f"))?;
    ensure((meta.uid(), meta.gid()) == (1000, 2000), "a file in a volume has another owner")?;
    ensure(mode(&volume.join("d"))? == 0o2755, "a directory did not inherit the group's bit")?;
    // Set-user-id bits die with a stranger's write.
    let program = dir.join("program");
    fs::write(&program, "x")?;
    chmod(&program, 0o6777)?;
    as_user(1000, 1000, &[], || Ok(OpenOptions::new().append(true).open(&program)?.write_all(b"x")?))?;
    ensure(mode(&program)? == 0o777, "a stranger's write left set-user-id bits")?;
    chmod(&program, 0o4755)?;
    chown(&program, Some(5), None)?;
    ensure(mode(&program)? == 0o755, "a new owner left set-user-id bits")?;
    // Sticky directories.
    let tmp = dir.join("tmp");
    fs::create_dir(&tmp)?;
    chmod(&tmp, 0o1777)?;
    fs::write(tmp.join("roots"), "")?;
    as_user(1000, 1000, &[], || {
        fs::write(tmp.join("mine"), "")?;
        ensure(fs::remove_file(tmp.join("roots")).is_err(), "a sticky directory does not stick")?;
        Ok(fs::remove_file(tmp.join("mine"))?)
    })?;
    let old = umask(Mode::from_bits_truncate(0o027));
    fs::write(dir.join("masked"), "")?;
    fs::create_dir(dir.join("masked-dir"))?;
    umask(old);
    ensure(
        mode(&dir.join("masked"))? == 0o640 && mode(&dir.join("masked-dir"))? == 0o750,
        "the umask is lost",
    )
}

fn attributes(dir: &Path) -> Result<()> {
    let path = dir.join("f");
    fs::write(&path, "")?;
    let set = |path: &Path, name: &CStr, value: &[u8]| -> Result<()> {
        let path = c(path)?;
        // SAFETY: the strings are terminated and the value is that long.
        errno(unsafe { libc::setxattr(path.as_ptr(), name.as_ptr(), value.as_ptr().cast(), value.len(), 0) })
    };
    let get = |name: &CStr| -> Result<Vec<u8>> {
        let (path, mut value) = (c(&path)?, vec![0; 256]);
        // SAFETY: as above.
        let size = unsafe { libc::getxattr(path.as_ptr(), name.as_ptr(), value.as_mut_ptr().cast(), 256) };
        value.truncate(usize::try_from(Errno::result(size)?)?);
        Ok(value)
    };
    set(&path, c"user.colour", b"blue")?;
    ensure(get(c"user.colour")? == b"blue", "an attribute has another value")?;
    ensure(set(&path, c"trusted.overlay.opaque", b"y").is_err(), "an attribute of the host's was set")?;
    // CAP_NET_BIND_SERVICE, effective.
    let capability = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    set(&path, c"security.capability", &capability)?;
    ensure(get(c"security.capability")? == capability, "file capabilities have changed")?;
    fs::write(&path, "changed")?;
    ensure(get(c"security.capability").is_err(), "file capabilities survive a write")?;
    // rw for user 1000, whom the mode would refuse.
    let mut acl = 2u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in
        [(1u16, 6u16, u32::MAX), (2, 6, 1000), (4, 0, u32::MAX), (0x10, 6, u32::MAX), (0x20, 0, u32::MAX)]
    {
        acl.extend(tag.to_le_bytes());
        acl.extend(permissions.to_le_bytes());
        acl.extend(id.to_le_bytes());
    }
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
    set(&path, c"system.posix_acl_access", &acl)?;
    as_user(1000, 1000, &[], || Ok(fs::read(&path).map(drop)?))?;
    as_user(1001, 1001, &[], || ensure(fs::read(&path).is_err(), "an access list let a stranger in"))
}

fn many(dir: &Path) -> Result<()> {
    const COUNT: usize = 100;
    for i in 0..COUNT {
        fs::write(dir.join(format!("file-{i}")), i.to_string())?;
    }
    let mut seen = 0;
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let (meta, ino) = (entry.metadata()?, std::os::unix::fs::DirEntryExt::ino(&entry));
        ensure(meta.is_file() && meta.ino() == ino, "an entry and its file disagree")?;
        seen += 1;
    }
    ensure(seen == COUNT, "a listing has not all entries")?;
    // Removing while reading.
    for entry in fs::read_dir(dir)? {
        fs::remove_file(entry?.path())?;
    }
    ensure(fs::read_dir(dir)?.next().is_none(), "something is left")
}
