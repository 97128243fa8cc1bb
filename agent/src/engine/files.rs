//! Files into a container and out of it, as tar streams.
//!
//! The engine process enters the container's mount namespace, whose root is the container's, so that no path and no link
//! leads anywhere else; it stays out of the pid namespace, so that the container's /proc knows nothing of it. Streams
//! and files are of any length and never held in memory.

use super::error::{Context, Error, Result};
use super::wire::Direction;
use super::{Descriptors, become_root};
use crate::sys::process::join_namespaces;
use nix::fcntl::OFlag;
use nix::sys::stat::Mode;
use std::fs::{self, DirBuilder, File, Metadata};
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt};
use std::path::{Path, PathBuf};

/// A stream is read and written in pieces of this.
const PIECE: usize = 64 * 1024;

/// Permissions of directories that are made.
const MODE: u32 = 0o755;

/// Carries files between the stream and a path of the container.
pub fn carry(namespaces: i32, path: &Path, direction: Direction, mut fds: Descriptors) -> Result<()> {
    let first = fds.next()?;
    let stream = blocking(fds.next()?).doing(|| "read the stream of files")?;
    let wanted = namespaces & (libc::CLONE_NEWNS | libc::CLONE_NEWUSER);
    if wanted & libc::CLONE_NEWNS == 0 {
        return Err(Error::unsupported("a transfer of files", "the container has no mount namespace"));
    }
    join_namespaces(first.as_fd(), wanted).map_err(|error| match error.raw_os_error() {
        Some(libc::ESRCH) => Error::Stopped,
        _ => Error::System { action: "join the container's namespaces".into(), source: error },
    })?;
    if wanted & libc::CLONE_NEWUSER != 0 {
        become_root()?;
    }
    match direction {
        Direction::Import { preserve_ownership } => {
            nix::sys::stat::umask(Mode::empty());
            unpack(BufReader::with_capacity(PIECE, stream), path, preserve_ownership)
        }
        Direction::Export { no_walk } => pack(BufWriter::with_capacity(PIECE, stream), path, !no_walk),
    }
}

/// The agent's event loop has no more to do with the stream.
fn blocking(stream: OwnedFd) -> io::Result<File> {
    let flags = OFlag::from_bits_retain(nix::fcntl::fcntl(&stream, nix::fcntl::FcntlArg::F_GETFL)?);
    nix::fcntl::fcntl(&stream, nix::fcntl::FcntlArg::F_SETFL(flags & !OFlag::O_NONBLOCK))?;
    Ok(stream.into())
}

fn unpack(mut stream: impl Read, path: &Path, preserve_ownership: bool) -> Result<()> {
    make_directory(path)?;
    let mut archive = tar::Archive::new(&mut stream);
    archive.set_preserve_permissions(true);
    archive.set_preserve_ownerships(preserve_ownership);
    archive.unpack(path).doing(|| format!("unpack to {}", path.display()))?;
    // What follows the archive's end is read as well, or its sender could not tell that all has arrived.
    io::copy(&mut stream, &mut io::sink()).doing(|| "read the stream of files").map(drop)
}

/// Makes a directory and those above it, where they are missing.
fn make_directory(path: &Path) -> Result<()> {
    match DirBuilder::new().recursive(true).mode(MODE).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            Err(Error::invalid(path.display().to_string(), "is not a directory to unpack to"))
        }
        made => made.doing(|| format!("make the directory {}", path.display())),
    }
}

fn pack(stream: impl Write, path: &Path, walk: bool) -> Result<()> {
    let metadata = fs::symlink_metadata(path).map_err(|error| not_there(path, error))?;
    let name = path.file_name().map_or_else(|| PathBuf::from("."), PathBuf::from);
    let doing = || format!("pack {}", path.display());
    let mut archive = tar::Builder::new(stream);
    let mut found = vec![(path.to_owned(), name, metadata)];
    while let Some((path, name, metadata)) = found.pop() {
        append(&mut archive, &path, &name, &metadata).doing(|| format!("pack {}", path.display()))?;
        if walk && metadata.is_dir() {
            for entry in fs::read_dir(&path).doing(doing)? {
                let entry = entry.doing(doing)?;
                // What is gone by now was not to be had.
                let Ok(metadata) = entry.metadata() else { continue };
                found.push((entry.path(), name.join(entry.file_name()), metadata));
            }
        }
    }
    archive.into_inner().and_then(|mut stream| stream.flush()).doing(doing)
}

fn append<W: Write>(
    archive: &mut tar::Builder<W>,
    path: &Path,
    name: &Path,
    metadata: &Metadata,
) -> io::Result<()> {
    let kind = metadata.file_type();
    let mut header = tar::Header::new_gnu();
    header.set_metadata_in_mode(metadata, tar::HeaderMode::Complete);
    if kind.is_socket() {
        // No tar can hold one.
        return Ok(());
    }
    if kind.is_symlink() {
        header.set_size(0);
        return archive.append_link(&mut header, name, fs::read_link(path)?);
    }
    if !kind.is_file() {
        header.set_size(0);
        return archive.append_data(&mut header, name, io::empty());
    }
    // Whatever the container makes of the path in the meantime: nothing is followed, and nothing waited for.
    let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK;
    let file = File::from(nix::fcntl::open(path, flags, Mode::empty())?);
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Ok(());
    }
    header.set_metadata_in_mode(&metadata, tar::HeaderMode::Complete);
    // A file that grows or shrinks while it is read must not put the archive out of step.
    let length = metadata.len();
    archive.append_data(&mut header, name, file.chain(io::repeat(0)).take(length))
}

fn not_there(path: &Path, error: io::Error) -> Error {
    match error.kind() {
        io::ErrorKind::NotFound => {
            Error::Program(format!("{} does not exist in the container", path.display()))
        }
        _ => Error::System { action: format!("look at {}", path.display()), source: error },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

    #[test]
    fn a_tree_survives_the_journey() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let tree = from.path().join("tree");
        fs::create_dir_all(tree.join("a/b")).unwrap();
        fs::write(tree.join("a/b/file"), vec![7; 300_000]).unwrap();
        fs::set_permissions(tree.join("a/b/file"), fs::Permissions::from_mode(0o4751)).unwrap();
        fs::set_permissions(tree.join("a"), fs::Permissions::from_mode(0o555)).unwrap();
        symlink("/nowhere", tree.join("link")).unwrap();
        fs::write(tree.join("x".repeat(200)), b"long").unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(tree.join("socket")).unwrap();
        let mut stream = Vec::new();
        pack(&mut stream, &tree, true).unwrap();
        unpack(stream.as_slice(), to.path(), false).unwrap();
        let copy = to.path().join("tree");
        let file = fs::metadata(copy.join("a/b/file")).unwrap();
        assert_eq!((file.len(), file.mode() & 0o7777), (300_000, 0o4751));
        assert_eq!(fs::metadata(copy.join("a")).unwrap().mode() & 0o7777, 0o555);
        assert_eq!(fs::read_link(copy.join("link")).unwrap(), Path::new("/nowhere"));
        assert_eq!(fs::read(copy.join("x".repeat(200))).unwrap(), b"long");
        assert!(!copy.join("socket").exists());
        // For tempfile to remove it.
        for tree in [tree, copy] {
            fs::set_permissions(tree.join("a"), fs::Permissions::from_mode(0o755)).unwrap();
        }
    }

    #[test]
    fn one_entry_is_packed_where_nothing_below_it_is_wanted() {
        let from = tempfile::tempdir().unwrap();
        fs::write(from.path().join("file"), b"x").unwrap();
        let mut stream = Vec::new();
        pack(&mut stream, from.path(), false).unwrap();
        assert_eq!(tar::Archive::new(stream.as_slice()).entries().unwrap().count(), 1);
    }

    #[test]
    fn what_is_not_there_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let missing = directory.path().join("missing");
        let message = pack(io::sink(), &missing, true).unwrap_err().to_string();
        assert!(message.ends_with("missing does not exist in the container"), "{message}");
        fs::write(&missing, b"").unwrap();
        for path in [&missing, &missing.join("below")] {
            let message = unpack(io::empty(), path, false).unwrap_err().to_string();
            assert!(message.contains("directory"), "{message}");
        }
    }

    #[test]
    fn a_directory_to_unpack_to_is_made_where_it_is_missing() {
        let directory = tempfile::tempdir().unwrap();
        let mut archive = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        header.set_size(1);
        archive.append_data(&mut header, "file", &b"x"[..]).unwrap();
        let stream = archive.into_inner().unwrap();
        for _ in ["missing", "there"] {
            unpack(stream.as_slice(), &directory.path().join("a/b"), false).unwrap();
        }
        assert_eq!(fs::read(directory.path().join("a/b/file")).unwrap(), b"x");
    }

    #[test]
    fn an_archive_stays_below_its_directory() {
        let directory = tempfile::tempdir().unwrap();
        let below = directory.path().join("below");
        fs::create_dir(&below).unwrap();
        let mut archive = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::Symlink);
        header.set_size(0);
        archive.append_link(&mut header, "up", "..").unwrap();
        let mut header = tar::Header::new_gnu();
        header.set_size(1);
        header.as_mut_bytes()[..8].copy_from_slice(b"up/outer");
        header.set_cksum();
        archive.append(&header, &b"x"[..]).unwrap();
        let stream = archive.into_inner().unwrap();
        let _ = unpack(stream.as_slice(), &below, false);
        assert!(!directory.path().join("outer").exists());
    }

    proptest! {
        #[test]
        fn any_stream_is_unpacked_or_refused(stream in proptest::collection::vec(any::<u8>(), 0..2048)) {
            let directory = tempfile::tempdir().unwrap();
            let _ = unpack(stream.as_slice(), directory.path(), false);
        }
    }
}
