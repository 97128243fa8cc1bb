//! Turning a copy of `start` into the serving process.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::AsRawFd;

use nix::errno::Errno;
use nix::unistd::{ForkResult, Pid, dup2_stderr, dup2_stdin, dup2_stdout, fork, getppid, setsid};

/// The kernel's largest `oom_score_adj`.
const MAX_OOM_SCORE: i32 = 1000;

/// Which side of the fork this is.
pub enum Side {
    /// `start`, which prints the address.
    Parent,
    /// The process that serves.
    Server,
}

/// Splits off the serving process: its own session, no standard streams, adoptive parent of whatever its children
/// leave behind, and one step more eligible for the OOM killer than containerd.
///
/// A fork without exec hands the bound socket and all that was parsed over for nothing.
///
/// # Errors
/// When the kernel refuses the fork.
pub fn split() -> io::Result<Side> {
    let score = oom_score(getppid());
    // SAFETY: the process has one thread, so the child may do whatever the parent could.
    match unsafe { fork() }? {
        ForkResult::Parent { .. } => Ok(Side::Parent),
        ForkResult::Child => {
            setsid()?;
            core_scheduling();
            silence()?;
            adopt_orphans()?;
            if let Some(score) = score {
                // Raising the score is always allowed.
                let _ = set_oom_score("self", score.saturating_add(1).min(MAX_OOM_SCORE));
            }
            Ok(Side::Server)
        }
    }
}

/// Makes a process at least as eligible for the OOM killer as `score` says; lowering may not be allowed, then the
/// score stays.
pub fn lower_oom_protection(pid: u32, score: i32) {
    let _ = set_oom_score(&pid.to_string(), score.clamp(-MAX_OOM_SCORE, MAX_OOM_SCORE));
}

fn oom_score(pid: Pid) -> Option<i32> {
    std::fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).ok()?.trim().parse().ok()
}

fn set_oom_score(pid: &str, score: i32) -> io::Result<()> {
    std::fs::write(format!("/proc/{pid}/oom_score_adj"), score.to_string())
}

fn silence() -> io::Result<()> {
    let null = OpenOptions::new().read(true).write(true).open("/dev/null")?;
    dup2_stdin(&null)?;
    dup2_stdout(&null)?;
    dup2_stderr(&null)?;
    debug_assert!(null.as_raw_fd() > 2);
    Ok(())
}

fn adopt_orphans() -> io::Result<()> {
    // SAFETY: this prctl takes integers only.
    let result = unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) };
    Errno::result(result).map(drop).map_err(Into::into)
}

/// Puts the pod's processes under a core-scheduling cookie of their own when containerd asks for it. A kernel
/// without core scheduling leaves them as they are.
fn core_scheduling() {
    const PR_SCHED_CORE: i32 = 62;
    const CREATE: libc::c_ulong = 1;
    const PROCESS_GROUP: libc::c_ulong = 2;
    if std::env::var_os("SCHED_CORE").is_some_and(|value| !value.is_empty()) {
        // SAFETY: this prctl takes integers only.
        unsafe { libc::prctl(PR_SCHED_CORE, CREATE, 0 as libc::c_ulong, PROCESS_GROUP, 0 as libc::c_ulong) };
    }
}
