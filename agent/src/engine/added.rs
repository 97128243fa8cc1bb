//! Makes one more process in a container.

use super::error::{Context, Error, Result};
use super::process;
use super::process::terminal::Terminal;
use super::seccomp::Filter;
use super::spec;
use super::wire::{self, Document, Plan, Report};
use super::{
    Descriptors, become_root, duplicate_stdio, finish, give_up, own_stdio, seal_descriptors, set_oom_score,
    signal_pair,
};
use crate::cgroup::Cgroup;
use crate::sys::c_string;
use crate::sys::process::{CloneRequest, Cloned, clone3, join_namespaces, join_session_keyring};
use oci_spec::runtime::{Process, Spec};
use std::convert::Infallible;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

/// The engine's side.
pub fn make(
    agent: BorrowedFd<'_>,
    plan: &Plan,
    process: &Process,
    namespaces: i32,
    mut fds: Descriptors,
) -> Result<()> {
    spec::check_process(process)?;
    let stdio = fds.stdio(plan)?;
    let first = fds.next()?;
    let (_, container): (Plan, Spec) = Document::read(fds.next()?, "config.json")?;
    let linux = container.linux().as_ref().ok_or_else(|| Error::invalid("linux", "is missing"))?;
    let filter = linux.seccomp().as_ref().map_or(Ok(None), Filter::compile)?;
    let process = inherit(process, &container);
    own_stdio(stdio.as_ref(), &process, linux)?;
    if let Some(list) =
        process.exec_cpu_affinity().as_ref().and_then(|affinity| affinity.initial().as_deref())
    {
        process::set_affinity(list, "process.execCPUAffinity.initial")?;
    }

    let cgroup = open_cgroup(plan, first.as_fd())?;
    set_oom_score(process.oom_score_adj().unwrap_or(0))?;
    // The cgroup namespace comes last: from inside it the kernel lets nobody into a cgroup from outside.
    let joined_now = namespaces & !libc::CLONE_NEWCGROUP;
    join_namespaces(first.as_fd(), joined_now).map_err(|error| match error.raw_os_error() {
        Some(libc::ESRCH) => Error::Stopped,
        _ => Error::System { action: "join the container's namespaces".into(), source: error },
    })?;
    let (ours, theirs) = signal_pair()?;
    let request = CloneRequest { namespaces: 0, cgroup: Some(cgroup.directory()), sibling: true };
    // SAFETY: an engine process has one thread.
    let cloned = unsafe { clone3(&request) }.map_err(|error| match error.raw_os_error() {
        // The pid namespace's first process has died.
        Some(libc::ENOMEM) if stopped(first.as_fd()) => Error::Stopped,
        _ => Error::System { action: "make the process".into(), source: error },
    })?;
    match cloned {
        Cloned::Child => {
            drop(ours);
            let added = Added { plan, process: &process, namespaces, container: &container };
            let Err(error) = added.become_process(agent, first.as_fd(), &theirs, stdio, filter);
            give_up(agent, error)
        }
        Cloned::Parent(pid, pidfd) => {
            drop(theirs);
            wire::report(agent, &Report::Spawned(pid), Some(pidfd.as_fd())).doing(|| "answer the agent")?;
            nix::unistd::write(&ours, b"!").doing(|| "let the process begin").map(drop)
        }
    }
}

/// What the process does not say for itself is as for the container's first process.
fn inherit(process: &Process, container: &Spec) -> Process {
    let mut process = process.clone();
    let Some(first) = container.process() else { return process };
    if process.capabilities().is_none() {
        process.set_capabilities(first.capabilities().clone());
    }
    if process.rlimits().as_ref().is_none_or(Vec::is_empty) {
        process.set_rlimits(first.rlimits().clone());
    }
    if process.no_new_privileges().is_none() {
        process.set_no_new_privileges(first.no_new_privileges());
    }
    if process.oom_score_adj().is_none() {
        process.set_oom_score_adj(first.oom_score_adj());
    }
    process
}

/// The container's cgroup, or, where its first process has divided it and moved down, the one that is now in.
fn open_cgroup(plan: &Plan, first: BorrowedFd<'_>) -> Result<Cgroup> {
    let doing = || "open the container's cgroup";
    let cgroup = Cgroup::open(&plan.cgroup).doing(doing)?;
    if !cgroup.is_divided().doing(doing)? {
        return Ok(cgroup);
    }
    let place =
        pid_of(first).and_then(|pid| std::fs::read_to_string(format!("/proc/{pid}/cgroup"))).doing(doing)?;
    // "0::/path", as seen from the agent's own cgroup namespace.
    let path = place.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or_default();
    Cgroup::open(&crate::cgroup::root().join(path)).doing(doing)
}

fn pid_of(pidfd: BorrowedFd<'_>) -> std::io::Result<u32> {
    let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", pidfd.as_raw_fd()))?;
    info.lines()
        .find_map(|line| line.strip_prefix("Pid:")?.trim().parse().ok())
        .ok_or_else(|| std::io::Error::from_raw_os_error(libc::ESRCH))
}

fn stopped(pidfd: BorrowedFd<'_>) -> bool {
    crate::sys::process::pidfd_send_signal(pidfd, 0).is_err()
}

struct Added<'a> {
    plan: &'a Plan,
    process: &'a Process,
    namespaces: i32,
    container: &'a Spec,
}

impl Added<'_> {
    /// The new process's side.
    fn become_process(
        &self,
        agent: BorrowedFd<'_>,
        first: BorrowedFd<'_>,
        outside: &OwnedFd,
        stdio: Option<[OwnedFd; 3]>,
        filter: Option<Filter>,
    ) -> Result<Infallible> {
        if nix::unistd::read(outside, &mut [0]).doing(|| "wait for the engine")? != 1 {
            return Err(Error::Stopped);
        }
        if self.namespaces & libc::CLONE_NEWCGROUP != 0 {
            join_namespaces(first, libc::CLONE_NEWCGROUP).map_err(|_| Error::Stopped)?;
        }
        if self.namespaces & libc::CLONE_NEWUSER != 0 {
            become_root()?;
        }
        nix::sys::stat::umask(nix::sys::stat::Mode::empty());
        nix::unistd::setsid().doing(|| "begin a session")?;
        let name = c_string(format!("_ses.{}", self.plan.container)).doing(|| "name the session keyring")?;
        join_session_keyring(&name).doing(|| "join a session keyring")?;
        match self.plan.terminal {
            Some(size) => {
                let terminal = Terminal::open(size, self.process)?;
                terminal.give_to(self.process.user().uid())?;
                wire::report(agent, &Report::Terminal, Some(terminal.master.as_fd()))
                    .doing(|| "hand over the terminal")?;
                terminal.take()?;
            }
            None => duplicate_stdio(stdio)?,
        }
        seal_descriptors()?;
        let personality = self.container.linux().as_ref().and_then(|linux| linux.personality().as_ref());
        let asked = self.plan.host_network.then_some(agent);
        let around = process::Surroundings { filter, personality, added: true, asked };
        let prepared = process::prepare(self.process, around)?;
        Err(finish(agent, prepared, || Ok(())))
    }
}
