//! What makes a process this process: from a copy of the engine to the user's program.

mod capabilities;
mod limits;
mod program;
pub mod terminal;
mod user;

pub use limits::{parse_cpus, set_affinity};
pub use user::give_stream;

use super::error::{Context, Error, Result};
use super::seccomp::Filter;
use super::wire::{self, Report};
use crate::sys::process::prctl;
use crate::sys::seccomp;
use capabilities::Sets;
use oci_spec::runtime::{LinuxPersonality, Process};
use program::Program;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

/// What the container, not its process, decides for each of its processes.
pub struct Surroundings<'a> {
    /// The compiled seccomp filter.
    pub filter: Option<Filter>,
    /// The execution domain.
    pub personality: Option<&'a LinuxPersonality>,
    /// For a process that is added, not the first.
    pub added: bool,
    /// Who is asked where the process is about to listen.
    pub asked: Option<BorrowedFd<'a>>,
}

/// A process that only has to be let go.
pub struct Prepared {
    program: Program,
    filter: Option<Filter>,
}

/// Takes on everything that the process object asks for, in an order in which each step may still be done.
pub fn prepare(process: &Process, around: Surroundings<'_>) -> Result<Prepared> {
    let user = process.user();
    limits::set_rlimits(process.rlimits().as_deref().unwrap_or_default())?;
    if let Some(priority) = process.io_priority() {
        limits::set_io_priority(priority)?;
    }
    if let Some(scheduler) = process.scheduler() {
        limits::set_scheduler(scheduler)?;
    }
    if let Some(personality) = around.personality {
        limits::set_personality(personality)?;
    }
    let affinity = process.exec_cpu_affinity().as_ref().filter(|_| around.added);
    if let Some(list) = affinity.and_then(|affinity| affinity.cpu_affinity_final().as_deref()) {
        limits::set_affinity(list, "process.execCPUAffinity.final")?;
    }
    let umask = nix::sys::stat::Mode::from_bits_truncate(user.umask().unwrap_or(0o022));
    nix::sys::stat::umask(umask);

    let no_new_privileges = process.no_new_privileges().unwrap_or(false);
    if no_new_privileges {
        prctl(libc::PR_SET_NO_NEW_PRIVS, 1).doing(|| "set process.noNewPrivileges")?;
    }
    if let Some(agent) = around.asked {
        ask_for_servers(agent)?;
    }
    let mut filter = around.filter;
    if !no_new_privileges && let Some(filter) = filter.take() {
        // Without no_new_privs only a privileged process may load a filter, so it has to be now.
        filter.load()?;
    }
    let sets = Sets::of(process.capabilities().as_ref());
    sets.bound()?;
    user::own_stdio(user)?;
    // A directory that only root may enter is no reason to fail, nor is one that only the user may enter.
    let early = std::env::set_current_dir(process.cwd());
    user::become_user(user)?;
    if early.is_err() {
        std::env::set_current_dir(process.cwd())
            .doing(|| format!("chdir to process.cwd {}", process.cwd().display()))?;
    }
    check_directory()?;
    sets.apply()?;
    let given = process.env().as_deref().unwrap_or_default();
    let environment = program::environment(given, || user::home(user.uid()));
    let program = Program::find(process.args().as_deref().unwrap_or_default(), &environment)?;
    Ok(Prepared { program, filter })
}

/// Before the container's own filter, which may forbid even this, and while the process is privileged.
fn ask_for_servers(agent: BorrowedFd<'_>) -> Result<()> {
    let doing = || "watch for servers";
    let servers = seccomp::ask_for(libc::SYS_listen).doing(doing)?;
    wire::report(agent, &Report::Servers, Some(servers.as_fd())).doing(doing)
}

impl Prepared {
    /// Becomes the program. Returns only with the reason why not.
    pub fn run(self) -> Error {
        if let Some(filter) = self.filter
            && let Err(error) = filter.load()
        {
            return error;
        }
        self.program.execute()
    }
}

/// Puts descriptors in the places of stdin, stdout and stderr, where they survive the execution.
pub fn set_stdio(fds: [BorrowedFd<'_>; 3]) -> Result<()> {
    for (fd, place) in fds.into_iter().zip(0..) {
        if fd.as_raw_fd() == place {
            nix::fcntl::fcntl(fd, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::empty()))
                .doing(|| "set up stdio")?;
            continue;
        }
        // SAFETY: plain integers; the places are this process's stdio, which nothing else owns.
        crate::sys::check(unsafe { libc::dup2(fd.as_raw_fd(), place) }.into()).doing(|| "set up stdio")?;
    }
    Ok(())
}

/// A working directory that leads out of the root by way of an open descriptor (`/proc/self/fd/…`, which an image may
/// name) is one that the kernel calls "(unreachable)…". The C library would try to find a better name.
fn check_directory() -> Result<()> {
    let mut path = [0u8; libc::PATH_MAX as usize];
    // SAFETY: the buffer is valid for its length.
    crate::sys::check(unsafe { libc::syscall(libc::SYS_getcwd, path.as_mut_ptr(), path.len()) })
        .doing(|| "look at process.cwd")?;
    if path.starts_with(b"/") {
        return Ok(());
    }
    Err(Error::invalid("process.cwd", "is outside of the container's root"))
}
