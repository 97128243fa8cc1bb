//! Makes a container and its first process.

use super::error::{Context, Error, Result};
use super::process;
use super::process::terminal::Terminal;
use super::rootfs::{self, mounts};
use super::seccomp::Filter;
use super::spec::{self, Namespaces};
use super::wire::{self, Plan, Report, Root};
use super::{
    Descriptors, become_root, duplicate_stdio, finish, give_up, idmap, own_stdio, seal_descriptors,
    set_oom_score, set_sysctl, signal_pair, storage,
};
use crate::cgroup::{Cgroup, devices, limits};
use crate::sys::c_string;
use crate::sys::process::{CloneRequest, Cloned, clone3, join_session_keyring};
use oci_spec::runtime::{Linux, Process, Spec};
use std::convert::Infallible;
use std::fs;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

struct Container<'a> {
    plan: &'a Plan,
    spec: &'a Spec,
    linux: &'a Linux,
    process: &'a Process,
    namespaces: Namespaces,
    root: PathBuf,
    directory: &'a Path,
}

/// The engine's side: everything that is done from outside of the container.
pub fn make(
    agent: BorrowedFd<'_>,
    plan: &Plan,
    spec: &Spec,
    directory: &Path,
    root: &Root,
    join: &[i32],
    mut fds: Descriptors,
) -> Result<()> {
    let (linux, process, namespaces) = spec::check(spec)?;
    let stdio = fds.stdio(plan)?;
    own_stdio(stdio.as_ref(), process, linux)?;
    let filter = linux.seccomp().as_ref().map_or(Ok(None), Filter::compile)?;
    let root = storage::mount(root, directory, &plan.shared)?;
    let cgroup = Cgroup::create(&plan.cgroup).doing(|| "make the container's cgroup")?;
    if let Some(resources) = linux.resources() {
        limits::apply(&cgroup, resources)?;
    }
    let rules = linux.resources().as_ref().and_then(|resources| resources.devices().as_deref());
    devices::enforce(&cgroup, rules.unwrap_or_default())?;

    set_oom_score(process.oom_score_adj().unwrap_or(0))?;
    let joined = join.iter().map(|flag| Ok((*flag, fds.next()?))).collect::<Result<Vec<_>>>()?;
    super::join(joined)?;
    set_network_sysctls(linux)?;
    make_time_namespace(linux, namespaces)?;

    let container = Container { plan, spec, linux, process, namespaces, root, directory };
    let (ours, theirs) = signal_pair()?;
    // The cgroup namespace's root is the cgroup its maker is in, so the new process makes it once it is there; the time
    // namespace is made already.
    let later = libc::CLONE_NEWCGROUP | libc::CLONE_NEWTIME;
    let request = CloneRequest {
        namespaces: u64::from((namespaces.new & !later).cast_unsigned()),
        cgroup: Some(cgroup.directory()),
        sibling: true,
    };
    // SAFETY: an engine process has one thread.
    match unsafe { clone3(&request) }.doing(|| "make the container's first process")? {
        Cloned::Child => {
            drop(ours);
            let Err(error) = container.become_first(agent, &theirs, stdio, filter);
            give_up(agent, error)
        }
        Cloned::Parent(pid, pidfd) => {
            drop(theirs);
            wire::report(agent, &Report::Spawned(pid), Some(pidfd.as_fd())).doing(|| "answer the agent")?;
            if namespaces.new & libc::CLONE_NEWUSER != 0 {
                let (uids, gids) = (linux.uid_mappings(), linux.gid_mappings());
                idmap::write(pid, uids.as_deref().unwrap_or_default(), gids.as_deref().unwrap_or_default())?;
            }
            nix::unistd::write(&ours, b"!").doing(|| "let the first process begin").map(drop)
        }
    }
}

/// Only children of the process that makes a time namespace are in it, and only before that are its offsets set.
fn make_time_namespace(linux: &Linux, namespaces: Namespaces) -> Result<()> {
    if namespaces.new & libc::CLONE_NEWTIME == 0 {
        return Ok(());
    }
    // SAFETY: a plain integer.
    crate::sys::check(unsafe { libc::unshare(libc::CLONE_NEWTIME) }.into())
        .doing(|| "make a time namespace")?;
    for (clock, offset) in linux.time_offsets().iter().flatten() {
        let line = format!("{clock} {} {}\n", offset.secs().unwrap_or(0), offset.nanosecs().unwrap_or(0));
        fs::write("/proc/self/timens_offsets", line).doing(|| format!("set linux.timeOffsets[{clock}]"))?;
    }
    Ok(())
}

/// Those of the network, which may be the guest's: they are then not for a process in a new user namespace to change.
fn set_network_sysctls(linux: &Linux) -> Result<()> {
    let mut network = linux.sysctl().iter().flatten().filter(|(name, _)| spec::is_of_network(name));
    network.try_for_each(|(name, value)| set_sysctl(name, value))
}

impl Container<'_> {
    /// The new process's side.
    fn become_first(
        &self,
        agent: BorrowedFd<'_>,
        outside: &OwnedFd,
        stdio: Option<[OwnedFd; 3]>,
        filter: Option<Filter>,
    ) -> Result<Infallible> {
        if nix::unistd::read(outside, &mut [0]).doing(|| "wait for the engine")? != 1 {
            return Err(Error::Stopped);
        }
        if self.namespaces.has(libc::CLONE_NEWUSER) {
            become_root()?;
        }
        nix::sys::stat::umask(nix::sys::stat::Mode::empty());
        nix::unistd::setsid().doing(|| "begin a session")?;
        let name = c_string(format!("_ses.{}", self.plan.container)).doing(|| "name the session keyring")?;
        join_session_keyring(&name).doing(|| "join a session keyring")?;
        if self.namespaces.new & libc::CLONE_NEWCGROUP != 0 {
            // SAFETY: a plain integer.
            crate::sys::check(unsafe { libc::unshare(libc::CLONE_NEWCGROUP) }.into())
                .doing(|| "make a cgroup namespace")?;
        }
        self.set_sysctls()?;
        let around = mounts::Surroundings {
            shared: &self.plan.shared,
            directory: self.directory,
            cgroup: &self.plan.cgroup,
            cgroup_namespace: self.namespaces.has(libc::CLONE_NEWCGROUP),
            user_namespace: self.namespaces.has(libc::CLONE_NEWUSER),
            network_namespace: self.namespaces.has(libc::CLONE_NEWNET),
        };
        let later = rootfs::enter(self.spec, self.linux, &self.root, &around)?;
        self.set_names()?;
        match self.plan.terminal {
            Some(size) => {
                let terminal = Terminal::open(size, self.process)?;
                terminal.bind_console()?;
                terminal.give_to(self.process.user().uid())?;
                wire::report(agent, &Report::Terminal, Some(terminal.master.as_fd()))
                    .doing(|| "hand over the terminal")?;
                terminal.take()?;
            }
            None => duplicate_stdio(stdio)?,
        }
        rootfs::seal(self.spec, self.linux, later)?;
        seal_descriptors()?;
        let around = process::Surroundings {
            filter,
            personality: self.linux.personality().as_ref(),
            added: false,
            asked: self.plan.host_network.then_some(agent),
        };
        let prepared = process::prepare(self.process, around)?;
        Err(finish(agent, prepared, || self.run_start_hooks()))
    }

    /// Through the guest's own /proc, which is still there; they apply to the namespaces this process is in.
    fn set_sysctls(&self) -> Result<()> {
        let mut others = self.linux.sysctl().iter().flatten().filter(|(name, _)| !spec::is_of_network(name));
        others.try_for_each(|(name, value)| set_sysctl(name, value))
    }

    fn set_names(&self) -> Result<()> {
        if let Some(name) = self.spec.hostname().as_ref().filter(|name| !name.is_empty()) {
            nix::unistd::sethostname(name).doing(|| "set hostname")?;
        }
        if let Some(name) = self.spec.domainname().as_ref().filter(|name| !name.is_empty()) {
            // SAFETY: the pointer and length are those of the string.
            crate::sys::check(unsafe { libc::setdomainname(name.as_ptr().cast(), name.len()) }.into())
                .doing(|| "set domainname")?;
        }
        Ok(())
    }

    /// The only hooks that are run in the container; the others are the host's.
    fn run_start_hooks(&self) -> Result<()> {
        let hooks = self.spec.hooks().as_ref().and_then(|hooks| hooks.start_container().as_ref());
        for hook in hooks.into_iter().flatten() {
            super::hooks::run(hook, &self.plan.container)?;
        }
        Ok(())
    }
}
