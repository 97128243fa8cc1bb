//! What the agent and an engine process say to each other.
//!
//! Each process that is made has one `SOCK_SEQPACKET` pair. The engine finds its end as descriptor 0:
//!
//! 1. agent → engine: one byte, with descriptors: the [`Document`], then those that [`Plan`] names, in its order.
//! 2. engine → agent: [`Report::Spawned`] with a pidfd, then from the new process itself [`Report::Terminal`] with the
//!    terminal's master (where one is asked for), [`Report::Servers`] (where the host's network is shared) and
//!    [`Report::Ready`]; or [`Report::Failed`] at any point.
//! 3. agent → new process: one byte, which lets it run.
//! 4. new process → agent: [`Report::Failed`], or the end of the stream, by which the program is running.
//!
//! Both ends are the agent's own program, but the new process runs among a container's: what it says is bounded and
//! parsed, never trusted to arrive.

use super::error::{Context, Error, Result};
use crate::failure::Failure;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, RecvMsg, UnixAddr, recvmsg, sendmsg};
use oci_spec::runtime::LinuxIdMapping;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Write};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

/// A report is small; longer ones are cut off and so refused.
const LONGEST_REPORT: usize = 16 * 1024;
/// A user's sentence is never longer.
const LONGEST_SENTENCE: usize = 4096;
/// No message carries more descriptors.
const MOST_DESCRIPTORS: usize = 16;

/// What an engine process shall do.
#[derive(Debug, Serialize, Deserialize)]
pub struct Plan {
    /// The container's id.
    pub container: String,
    /// The container's cgroup, an absolute path.
    pub cgroup: PathBuf,
    /// A terminal of this size instead of three descriptors for stdin, stdout and stderr.
    pub terminal: Option<Size>,
    /// Where the shared virtio-fs directory is mounted.
    pub shared: PathBuf,
    /// Processes share the host's network: where they are about to listen, the agent is asked.
    pub host_network: bool,
    /// What to make.
    pub task: Task,
}

/// What an engine process makes.
#[derive(Debug, Serialize, Deserialize)]
pub enum Task {
    /// A container and its first process; the document's body is the OCI spec. Descriptors: stdin, stdout and stderr
    /// unless there is a terminal, then a pidfd for each of `join`.
    Create {
        /// The container's own directory, which exists and is empty.
        directory: PathBuf,
        /// Where the root file system comes from.
        root: Root,
        /// Namespaces (`CLONE_NEW*`) of other containers' first processes, or of the pod's.
        join: Vec<i32>,
        /// Disks that it finds as device nodes.
        devices: Vec<BlockDevice>,
    },
    /// One more process; the document's body is the OCI process object. Descriptors: stdin, stdout and stderr unless
    /// there is a terminal, then a pidfd of the container's first process, then the container's own document.
    Exec {
        /// Namespaces (`CLONE_NEW*`) to join.
        namespaces: i32,
    },
    /// Files into a container or out of it; the document has no body. Descriptors: a pidfd of the container's first
    /// process, then the stream.
    Files {
        /// Namespaces (`CLONE_NEW*`) that the container has of its own.
        namespaces: i32,
        /// An absolute path in the container.
        path: PathBuf,
        /// Which way.
        direction: Direction,
    },
    /// The process that holds the pod's own namespaces; the document has no body, and no descriptors come along.
    Pod(Pod),
}

/// The pod's own namespaces.
#[derive(Debug, Serialize, Deserialize)]
pub struct Pod {
    /// The name of its uts namespace; the guest's where empty.
    pub hostname: String,
    /// Settings of its ipc namespace and of the network.
    pub sysctls: BTreeMap<String, String>,
    /// The maps of its user namespace, where it has one.
    pub users: Option<IdMaps>,
}

/// What ids of a user namespace are outside of it.
#[derive(Debug, Serialize, Deserialize)]
pub struct IdMaps {
    /// Users.
    pub uids: Vec<LinuxIdMapping>,
    /// Groups.
    pub gids: Vec<LinuxIdMapping>,
}

/// Which way files go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Direction {
    /// What the tar stream has is made below the directory.
    Import {
        /// With the owners that the stream names.
        preserve_ownership: bool,
    },
    /// What is there goes into a tar stream.
    Export {
        /// Without what is below a directory.
        no_walk: bool,
    },
}

/// A terminal's size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Size {
    /// Columns.
    pub width: u16,
    /// Rows.
    pub height: u16,
}

/// A root file system.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Root {
    /// A directory below the shared virtio-fs directory.
    Shared(PathBuf),
    /// A disk.
    Disk(Disk),
    /// Layers of disks.
    Overlay {
        /// Topmost first.
        lowers: Vec<Disk>,
        /// Where changes go; a tmpfs where absent.
        upper: Option<Box<Upper>>,
        /// The overlay's own, as in mount(8).
        options: Vec<String>,
    },
}

/// A file system on a virtio-blk slot.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Disk {
    /// The slot, which the device's serial number names.
    pub slot: u32,
    /// "ext4" or "erofs".
    pub filesystem: String,
    /// As in mount(8).
    pub options: Vec<String>,
    /// Where on the device it lies; all of it where absent.
    pub part: Option<Part>,
}

/// A virtio-blk slot that a container finds as a device node.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct BlockDevice {
    /// The slot, which the device's serial number names.
    pub slot: u32,
    /// Where the node is in the container.
    pub path: PathBuf,
    /// Letters of "rwm".
    pub access: String,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// A part of a device, in sectors of 512 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// Where it begins.
    pub first_sector: u64,
    /// How long it is.
    pub sectors: u64,
}

/// The writable disk of an overlay.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Upper {
    /// The disk.
    pub disk: Disk,
    /// The upper directory on it.
    pub upper: PathBuf,
    /// The work directory on it.
    pub work: PathBuf,
    /// To be made before, in this order, where they are missing.
    pub directories: Vec<Directory>,
}

/// A directory to be made.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Directory {
    /// Where, below the root of its disk.
    pub path: PathBuf,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// What an engine process, or the process it has made, tells the agent.
#[derive(Debug, Serialize, Deserialize)]
pub enum Report {
    /// The process exists, with this id in the agent's pid namespace; a pidfd comes along.
    Spawned(u32),
    /// The master of the process's terminal comes along.
    Terminal,
    /// The listener of the filter that asks where the process and its children listen comes along.
    Servers,
    /// The process is prepared and waits to be let go.
    Ready,
    /// There was no process to make, and all is done.
    Done,
    /// It has come to nothing.
    Failed(Failure),
}

/// A [`Plan`] and the JSON it is about, in a sealed memory file.
pub struct Document;

impl Document {
    /// Writes a document.
    pub fn write(plan: &Plan, body: &[u8]) -> io::Result<OwnedFd> {
        let header = serde_json::to_vec(plan)?;
        let length = u32::try_from(header.len()).map_err(|_| io::Error::from_raw_os_error(libc::E2BIG))?;
        let fd = memfd_create(c"plan", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
        let mut file = File::from(fd);
        file.write_all(&length.to_le_bytes())?;
        file.write_all(&header)?;
        file.write_all(body)?;
        let seals = nix::fcntl::SealFlag::all();
        nix::fcntl::fcntl(&file, nix::fcntl::FcntlArg::F_ADD_SEALS(seals))?;
        Ok(file.into())
    }

    /// Reads a document back.
    pub fn read<T: DeserializeOwned>(fd: OwnedFd, what: &str) -> Result<(Plan, T)> {
        let bytes = contents(&File::from(fd)).doing(|| "read the plan")?;
        let cut_short = || Error::invalid("plan", "is cut short");
        let (length, rest) = bytes.split_first_chunk::<4>().ok_or_else(cut_short)?;
        let length = usize::try_from(u32::from_le_bytes(*length)).map_err(|_| cut_short())?;
        let (header, body) = rest.split_at_checked(length).ok_or_else(cut_short)?;
        let plan = serde_json::from_slice(header).map_err(|e| Error::invalid("plan", e.to_string()))?;
        let body = serde_json::from_slice(body).map_err(|e| Error::invalid(what, e.to_string()))?;
        Ok((plan, body))
    }
}

/// All of a sealed file, wherever its offset is: a container's document is one open file in all the engines that add a
/// process to the container at the same time.
fn contents(file: &File) -> io::Result<Vec<u8>> {
    let length = usize::try_from(file.metadata()?.len()).map_err(io::Error::other)?;
    let mut bytes = vec![0; length];
    file.read_exact_at(&mut bytes, 0)?;
    Ok(bytes)
}

/// Sends a message with descriptors.
pub fn send(socket: BorrowedFd<'_>, message: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control = if raw.is_empty() { &[][..] } else { &rights[..] };
    sendmsg::<UnixAddr>(socket.as_raw_fd(), &[IoSlice::new(message)], control, MsgFlags::MSG_NOSIGNAL, None)?;
    Ok(())
}

/// Receives a message with its descriptors; an empty message is the end of the stream.
pub fn receive(socket: BorrowedFd<'_>) -> io::Result<(Vec<u8>, Vec<OwnedFd>)> {
    let mut bytes = vec![0; LONGEST_REPORT];
    let mut control = nix::cmsg_space!([RawFd; MOST_DESCRIPTORS]);
    let (length, flags, fds) = {
        let mut parts = [IoSliceMut::new(&mut bytes)];
        let message: RecvMsg<'_, '_, UnixAddr> =
            recvmsg(socket.as_raw_fd(), &mut parts, Some(&mut control), MsgFlags::MSG_CMSG_CLOEXEC)?;
        let mut fds = Vec::new();
        for control in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(raw) = control {
                // SAFETY: the kernel has just installed these descriptors for us.
                fds.extend(raw.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
            }
        }
        (message.bytes, message.flags, fds)
    };
    if flags.intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC) {
        return Err(io::Error::from_raw_os_error(libc::EMSGSIZE));
    }
    bytes.truncate(length);
    Ok((bytes, fds))
}

/// Sends a report with at most one descriptor. One without is a plain write(2), which even the narrowest seccomp filter
/// lets a process do.
pub fn report(socket: BorrowedFd<'_>, report: &Report, fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let message = serde_json::to_vec(report)?;
    match fd {
        None => Ok(nix::unistd::write(socket, &message).map(drop)?),
        fd => send(socket, &message, fd.as_slice()),
    }
}

/// The report of a failure, its sentence cut to a bearable length.
pub fn failed(error: Error) -> Report {
    let mut failure = Failure::from(error);
    if failure.message.len() > LONGEST_SENTENCE {
        let end = (0..=LONGEST_SENTENCE).rev().find(|at| failure.message.is_char_boundary(*at));
        failure.message.truncate(end.unwrap_or(0));
    }
    Report::Failed(failure)
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
    use std::os::fd::AsFd;

    fn pair() -> (OwnedFd, OwnedFd) {
        socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap()
    }

    #[test]
    fn a_document_survives_the_journey() {
        let plan = Plan {
            container: "a".into(),
            cgroup: "/sys/fs/cgroup/a".into(),
            terminal: Some(Size { width: 80, height: 24 }),
            shared: "/shared".into(),
            host_network: false,
            task: Task::Exec { namespaces: 7 },
        };
        let fd = Document::write(&plan, b"[1,2]").unwrap();
        let (plan, body): (Plan, Vec<u8>) = Document::read(fd, "list").unwrap();
        assert_eq!(plan.terminal, Some(Size { width: 80, height: 24 }));
        assert_eq!(body, [1, 2]);
    }

    fn exec() -> Plan {
        Plan {
            container: "a".into(),
            cgroup: "/".into(),
            terminal: None,
            shared: "/".into(),
            host_network: false,
            task: Task::Exec { namespaces: 0 },
        }
    }

    #[test]
    fn a_document_is_read_by_many_at_a_time() {
        let file = File::from(Document::write(&exec(), &[b'1'; 5000]).unwrap());
        let whole = contents(&file).unwrap();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    // A duplicate, as each engine gets it, has the offset of all others.
                    let file = file.try_clone().unwrap();
                    (0..5000).for_each(|_| assert_eq!(contents(&file).unwrap(), whole));
                });
            }
        });
    }

    #[test]
    fn a_malformed_body_is_named() {
        let fd = Document::write(&exec(), b"{").unwrap();
        let error = Document::read::<Vec<u8>>(fd, "config.json").unwrap_err();
        assert!(error.to_string().starts_with("config.json: "), "{error}");
    }

    #[test]
    fn descriptors_travel_along() {
        let (a, b) = pair();
        let (read, write) = nix::unistd::pipe().unwrap();
        report(a.as_fd(), &Report::Terminal, Some(write.as_fd())).unwrap();
        drop(write);
        let (bytes, fds) = receive(b.as_fd()).unwrap();
        assert!(matches!(serde_json::from_slice(&bytes).unwrap(), Report::Terminal));
        assert_eq!(nix::unistd::write(&fds[0], b"x").unwrap(), 1);
        drop(fds);
        let mut got = [0; 2];
        assert_eq!(nix::unistd::read(&read, &mut got).unwrap(), 1);
        drop(a);
        assert!(receive(b.as_fd()).unwrap().0.is_empty());
    }

    #[test]
    fn a_long_sentence_is_cut_at_a_letter() {
        let Report::Failed(failure) = failed(Error::Program("ä".repeat(5000))) else { unreachable!() };
        assert!(failure.message.len() <= LONGEST_SENTENCE);
    }
}
