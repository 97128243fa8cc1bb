//! The container engine: makes a container, or a process in one, by the OCI runtime spec.
//!
//! An engine process is a short-lived, single-threaded run of the agent's own program (`vmshim-agent engine`). The agent
//! has threads and an event loop, and what a copy of it may do before it executes a program is next to nothing; the
//! engine's copy may do all it wants. It reads a plan, does the work that may block (mounts, cgroup files), clones the
//! new process into the container's namespaces and cgroup as a child of the agent, and ends. The new process sets up
//! the container from inside, waits to be let go, and becomes the user's program. [`wire`] is their conversation.
//!
//! Why not libcontainer (youki): with it the agent would be larger than the 5 MB it may have (4.78 MB before a line of
//! our own, against 2.93 without), it has no answer for a missing program before start, none for a process's terminal
//! but a socket path, and its errors do not name the field that asks too much.
//!
//! Hostile: the root file system's content, and once [`rootfs::enter`] is done every path. The spec is trusted to be
//! meant, not to be right.

mod added;
mod blocks;
pub mod error;
mod files;
mod first;
mod hooks;
mod idmap;
mod partition;
mod pod;
pub mod process;
pub mod rootfs;
mod seccomp;
pub mod spec;
mod storage;
pub mod wire;

use crate::sys;
use crate::sys::process::prctl;
use error::{Context, Error, Result};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nix::unistd::{Gid, Uid, setresgid, setresuid};
use oci_spec::runtime::{Linux, Process};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::process::ExitCode;
use wire::{Document, Plan, Report, Task};

/// The name under which the agent's program is an engine.
pub const COMMAND: &str = "engine";

/// What came with the plan.
struct Descriptors(std::vec::IntoIter<OwnedFd>);

impl Descriptors {
    fn next(&mut self) -> Result<OwnedFd> {
        self.0.next().ok_or_else(|| Error::invalid("plan", "came with too few descriptors"))
    }

    fn stdio(&mut self, plan: &Plan) -> Result<Option<[OwnedFd; 3]>> {
        match plan.terminal {
            Some(_) => Ok(None),
            None => Ok(Some([self.next()?, self.next()?, self.next()?])),
        }
    }
}

/// The program's `main` as an engine.
pub fn main() -> ExitCode {
    let agent = match take_socket() {
        Ok(agent) => agent,
        Err(_) => return ExitCode::FAILURE,
    };
    match run(agent.as_fd()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Nobody else is there to be told.
            let _ = wire::report(agent.as_fd(), &wire::failed(error), None);
            ExitCode::FAILURE
        }
    }
}

/// Takes descriptor 0 to where the stdio of the new process will not be in its way.
fn take_socket() -> std::io::Result<OwnedFd> {
    const FIRST_FREE: libc::c_int = 10;
    let stdin = std::io::stdin();
    let fd = nix::fcntl::fcntl(&stdin, nix::fcntl::FcntlArg::F_DUPFD_CLOEXEC(FIRST_FREE))?;
    // SAFETY: the kernel has just made this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn run(agent: BorrowedFd<'_>) -> Result<()> {
    // Nobody in a container may look into a process that is about to be in it.
    prctl(libc::PR_SET_DUMPABLE, 0).doing(|| "hide the engine's memory")?;
    let (_, fds) = wire::receive(agent).doing(|| "receive the plan")?;
    let mut fds = Descriptors(fds.into_iter());
    let document = fds.next()?;
    let again = document.try_clone().doing(|| "read the plan")?;
    // The task decides what the document's body is.
    let (plan, _): (Plan, serde::de::IgnoredAny) = Document::read(again, "config.json")?;
    match &plan.task {
        Task::Create { directory, root, join, devices } => {
            let (_, mut spec) = Document::read(document, "config.json")?;
            blocks::add(&mut spec, devices)?;
            first::make(agent, &plan, &spec, directory, root, join, fds)
        }
        Task::Exec { namespaces } => {
            let (_, process) = Document::read(document, "process")?;
            added::make(agent, &plan, &process, *namespaces, fds)
        }
        Task::Files { namespaces, path, direction } => {
            files::carry(*namespaces, path, *direction, fds)?;
            wire::report(agent, &Report::Done, None).doing(|| "answer the agent")
        }
        Task::Pod(pod) => pod::make(agent, &plan.shared, pod),
    }
}

/// Sets the engine's OOM score, which the new process inherits. From within a user namespace it could not be lowered.
fn set_oom_score(score: i32) -> Result<()> {
    std::fs::write("/proc/self/oom_score_adj", score.to_string()).doing(|| "set process.oomScoreAdj")
}

/// Gives a new process its stdio where it is in a user namespace: from inside of that nobody may.
fn own_stdio(stdio: Option<&[OwnedFd; 3]>, owner: &Process, linux: &Linux) -> Result<()> {
    let maps = linux.uid_mappings().as_deref().unwrap_or_default();
    let Some(uid) = idmap::outside(maps, owner.user().uid()) else { return Ok(()) };
    stdio.into_iter().flatten().try_for_each(|stream| process::give_stream(stream.as_fd(), uid))
}

/// Joins each of the namespaces, that of users last: what could be done before it cannot be done after.
fn join(namespaces: impl IntoIterator<Item = (i32, OwnedFd)>) -> Result<()> {
    let (users, others): (Vec<_>, Vec<_>) =
        namespaces.into_iter().partition(|(flags, _)| flags & libc::CLONE_NEWUSER != 0);
    for (flags, pidfd) in others.into_iter().chain(users) {
        sys::process::join_namespaces(pidfd.as_fd(), flags).doing(|| "join a namespace of the pod")?;
    }
    Ok(())
}

/// Changes a setting whose name has been checked.
fn set_sysctl(name: &str, value: &str) -> Result<()> {
    let path = Path::new("/proc/sys").join(name.replace('.', "/"));
    std::fs::write(path, value).doing(|| format!("set linux.sysctl[{name}]"))
}

/// A process in a user namespace has the rights of its root only as that user.
fn become_root() -> Result<()> {
    let doing = || "become root of the container";
    setresgid(Gid::from_raw(0), Gid::from_raw(0), Gid::from_raw(0)).doing(doing)?;
    setresuid(Uid::from_raw(0), Uid::from_raw(0), Uid::from_raw(0)).doing(doing)
}

/// The new process's last steps, the same for each: say so, wait, go.
fn finish(agent: BorrowedFd<'_>, prepared: process::Prepared, before: impl FnOnce() -> Result<()>) -> Error {
    let waiting = wire::report(agent, &Report::Ready, None).doing(|| "answer the agent").and_then(|()| {
        // Without the agent's word the process must not run.
        match nix::unistd::read(agent, &mut [0]) {
            Ok(1) => before(),
            _ => Err(Error::Stopped),
        }
    });
    match waiting {
        Ok(()) => prepared.run(),
        Err(error) => error,
    }
}

/// Ends the new process with the reason why it did not become the program.
fn give_up(agent: BorrowedFd<'_>, error: Error) -> ! {
    let _ = wire::report(agent, &wire::failed(error), None);
    // SAFETY: ends the process without running what the engine has registered for its own end.
    unsafe { libc::_exit(127) }
}

/// Every descriptor but stdio closes when the program begins.
fn seal_descriptors() -> Result<()> {
    sys::mountfd::close_on_exec_from(3).doing(|| "close descriptors")
}

/// A pair of connected ends, by which two engine processes wait for each other.
fn signal_pair() -> Result<(OwnedFd, OwnedFd)> {
    socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
        .doing(|| "make a socket pair")
}

fn duplicate_stdio(stdio: Option<[OwnedFd; 3]>) -> Result<()> {
    let Some(stdio) = stdio else { return Ok(()) };
    // A source among 0 to 2 would be overwritten before it is used.
    let moved = stdio
        .into_iter()
        .map(|fd| if fd.as_raw_fd() > 2 { Ok(fd) } else { fd.try_clone() })
        .collect::<std::io::Result<Vec<_>>>()
        .doing(|| "set up stdio")?;
    match moved.as_slice() {
        [stdin, stdout, stderr] => process::set_stdio([stdin.as_fd(), stdout.as_fd(), stderr.as_fd()]),
        _ => Ok(()),
    }
}
