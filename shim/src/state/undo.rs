//! Undoing a pod's journal.

use std::io::{self, ErrorKind, Read};
use std::os::fd::AsFd;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::process::{signal, wait_gone};
use super::{Entry, Journal, PodDir, ProcessId, StateError};
use crate::hooks::run_left_poststop;

/// How long a shim may take to end by itself once it is asked to.
const SHIM_GRACE: Duration = Duration::from_secs(2);

/// How long the kernel may take to end a killed process.
const KILL_LIMIT: Duration = Duration::from_secs(2);

/// How long a logger may take to read what is left, and again to end when it is asked to.
const LOGGER_GRACE: Duration = Duration::from_secs(2);

/// How long a cgroup whose processes have been killed may keep one.
const UNPOPULATED_LIMIT: Duration = Duration::from_secs(2);

/// Undoes everything in the journal and removes the pod's directory. May be done again, and after any interruption.
///
/// # Errors
/// The first thing that could not be undone, after all else has been tried. The journal stays.
pub fn undo(pod: &PodDir) -> Result<(), StateError> {
    undo_all_but(pod, None)
}

/// Undoes what a dead shim of the same pod has left, except its socket, whose place has been taken since.
///
/// # Errors
/// As [`undo`].
pub fn undo_predecessor(pod: &PodDir, socket: &Path) -> Result<(), StateError> {
    undo_all_but(pod, Some(socket))
}

fn undo_all_but(pod: &PodDir, kept: Option<&Path>) -> Result<(), StateError> {
    let mut failure = None;
    let mut done = Vec::new();
    let mut loggers = Vec::new();
    for entry in Journal::read(&pod.journal())? {
        let (path, result) = match &entry {
            Entry::Shim(shim) => (pod.path(), end_shim(shim)),
            Entry::Process(process) => (pod.path(), kill(process)),
            Entry::Logger(logger) => {
                loggers.push(*logger);
                continue;
            }
            Entry::Mount(path) => (path.as_path(), unmount(path)),
            Entry::Cgroup(path) => (path.as_path(), remove_cgroup(path)),
            Entry::CgroupParent(path) => {
                // In use by others, or gone with them.
                let _ = std::fs::remove_dir(path);
                continue;
            }
            Entry::HooksDone(hooked) => {
                done.push(hooked.clone());
                continue;
            }
            Entry::Hooks(hooked) if done.contains(hooked) => continue,
            Entry::Hooks(hooked) => (hooked.bundle.as_path(), run_left_poststop(&hooked.id, &hooked.bundle)),
            Entry::Redirection(redirection) => {
                (redirection.netns.as_path(), crate::network::undo(redirection))
            }
            Entry::File(path) if Some(path.as_path()) == kept => continue,
            Entry::File(path) => (path.as_path(), remove_file(path)),
        };
        if let Err(source) = result {
            failure.get_or_insert(StateError { path: path.to_owned(), source });
        }
    }
    // The VMM has let go of their pipes by now.
    for logger in &loggers {
        if let Err(source) = end_logger(logger) {
            failure.get_or_insert(StateError { path: pod.path().to_owned(), source });
        }
    }
    match failure {
        Some(failure) => Err(failure),
        None => remove_directory(pod),
    }
}

fn end_shim(shim: &ProcessId) -> io::Result<()> {
    if shim.pid == std::process::id() {
        return Ok(());
    }
    let Some(process) = shim.open()? else { return Ok(()) };
    signal(&process, libc::SIGTERM)?;
    if wait_gone(&process, SHIM_GRACE)? {
        return Ok(());
    }
    kill(shim)
}

fn end_logger(logger: &ProcessId) -> io::Result<()> {
    let Some(process) = logger.open()? else { return Ok(()) };
    if wait_gone(&process, LOGGER_GRACE)? {
        return Ok(());
    }
    signal(&process, libc::SIGTERM)?;
    if wait_gone(&process, LOGGER_GRACE)? {
        return Ok(());
    }
    kill(logger)
}

fn kill(id: &ProcessId) -> io::Result<()> {
    let Some(process) = id.open()? else { return Ok(()) };
    signal(&process, libc::SIGKILL)?;
    if wait_gone(&process, KILL_LIMIT)? {
        return Ok(());
    }
    Err(io::Error::new(ErrorKind::TimedOut, format!("process {} does not end", id.pid)))
}

fn unmount(path: &Path) -> io::Result<()> {
    match umount2(path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
        Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

fn remove_cgroup(path: &Path) -> io::Result<()> {
    // Absent on cgroup v1, where the processes have been killed one by one.
    match std::fs::write(path.join("cgroup.kill"), "1") {
        Err(error) if !is_gone(&error) && error.kind() != ErrorKind::PermissionDenied => return Err(error),
        _ => {}
    }
    match std::fs::remove_dir(path) {
        Err(error) if error.kind() == ErrorKind::ResourceBusy => {
            wait_unpopulated(path)?;
            ignore_missing(std::fs::remove_dir(path))
        }
        result => ignore_missing(result),
    }
}

/// Whether a file of a cgroup is missing, or was removed with its cgroup after it had been opened: the shim that ends
/// and the `delete` that follows it undo the same journal, at times together.
fn is_gone(error: &io::Error) -> bool {
    error.kind() == ErrorKind::NotFound || error.raw_os_error() == Some(libc::ENODEV)
}

/// Waits until the last process of a cgroup is gone: one that has been killed is in it until it has exited.
fn wait_unpopulated(cgroup: &Path) -> io::Result<()> {
    let until = Instant::now() + UNPOPULATED_LIMIT;
    loop {
        let mut events = String::new();
        let opened = std::fs::File::open(cgroup.join("cgroup.events"))
            .and_then(|mut file| file.read_to_string(&mut events).map(|_| file));
        let file = match opened {
            // Version 1 has none, and killed processes have been waited for.
            Err(error) if is_gone(&error) => return Ok(()),
            file => file?,
        };
        let left = until.saturating_duration_since(Instant::now());
        if events.lines().any(|line| line == "populated 0") || left.is_zero() {
            return Ok(());
        }
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        poll(&mut [PollFd::new(file.as_fd(), PollFlags::POLLPRI)], timeout)?;
    }
}

fn remove_file(path: &Path) -> io::Result<()> {
    ignore_missing(std::fs::remove_file(path))
}

/// Removes the directory by name of what is in it, never recursively: were a mount still there, its contents are not
/// ours to delete.
fn remove_directory(pod: &PodDir) -> Result<(), StateError> {
    let failed = |path: &Path, source| StateError { path: path.to_owned(), source };
    ignore_missing(std::fs::remove_dir(pod.shared())).map_err(|error| failed(&pod.shared(), error))?;
    remove_file(&pod.journal()).map_err(|error| failed(&pod.journal(), error))?;
    ignore_missing(std::fs::remove_dir(pod.path())).map_err(|error| failed(pod.path(), error))?;
    if let Some(namespace) = pod.path().parent() {
        // Other pods of the namespace keep it.
        let _ = std::fs::remove_dir(namespace);
    }
    Ok(())
}

fn ignore_missing(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::Name;

    fn pod(root: &Path) -> PodDir {
        PodDir::new(root, &Name::new("ns").unwrap(), &Name::new("pod").unwrap())
    }

    #[test]
    fn everything_is_undone_and_undoing_again_is_fine() {
        let root = tempfile::tempdir().unwrap();
        let pod = pod(root.path());
        pod.create().unwrap();
        let journal = Journal::create(pod.journal()).unwrap();
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let file = root.path().join("socket");
        std::fs::write(&file, "").unwrap();
        std::fs::create_dir(pod.shared()).unwrap();
        for entry in [
            Entry::Shim(ProcessId::of_self().unwrap()),
            Entry::File(file.clone()),
            Entry::File(root.path().join("never made")),
            Entry::Mount(pod.shared()),
            Entry::Cgroup(root.path().join("no cgroup")),
            Entry::Process(ProcessId::of(child.id()).unwrap()),
        ] {
            journal.intend(&entry).unwrap();
        }
        // A zombie is gone for a pidfd, so the child need not be reaped first.
        undo(&pod).unwrap();
        assert!(!child.wait().unwrap().success());
        assert!(!file.exists());
        assert!(!pod.path().parent().unwrap().exists());
        undo(&pod).unwrap();
    }

    #[test]
    fn a_logger_is_given_time_and_ended() {
        let root = tempfile::tempdir().unwrap();
        let pod = pod(root.path());
        pod.create().unwrap();
        let journal = Journal::create(pod.journal()).unwrap();
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        journal.intend(&Entry::Logger(ProcessId::of(child.id()).unwrap())).unwrap();
        undo(&pod).unwrap();
        use std::os::unix::process::ExitStatusExt;
        assert_eq!(child.wait().unwrap().signal(), Some(libc::SIGTERM));
    }

    #[test]
    fn a_successors_socket_stays() {
        let root = tempfile::tempdir().unwrap();
        let pod = pod(root.path());
        pod.create().unwrap();
        let journal = Journal::create(pod.journal()).unwrap();
        let (socket, other) = (root.path().join("socket"), root.path().join("other"));
        for path in [&socket, &other] {
            std::fs::write(path, "").unwrap();
            journal.intend(&Entry::File(path.clone())).unwrap();
        }
        undo_predecessor(&pod, &socket).unwrap();
        assert!(socket.exists() && !other.exists() && !pod.path().exists());
    }

    #[test]
    fn a_parent_goes_only_when_it_is_empty() {
        let root = tempfile::tempdir().unwrap();
        let pod = pod(root.path());
        pod.create().unwrap();
        let journal = Journal::create(pod.journal()).unwrap();
        let (empty, used) = (root.path().join("empty"), root.path().join("used"));
        for parent in [&empty, &used] {
            std::fs::create_dir(parent).unwrap();
            journal.intend(&Entry::CgroupParent(parent.clone())).unwrap();
        }
        std::fs::create_dir(used.join("another")).unwrap();
        undo(&pod).unwrap();
        assert!(!empty.exists() && used.join("another").exists());
    }

    #[test]
    fn last_hooks_are_run_once() {
        use crate::state::Hooked;
        let root = tempfile::tempdir().unwrap();
        let pod = pod(root.path());
        pod.create().unwrap();
        let journal = Journal::create(pod.journal()).unwrap();
        let hooked = |id: &str| {
            let bundle = root.path().join(id);
            std::fs::create_dir(&bundle).unwrap();
            let line = format!("echo >> {}", bundle.join("mark").display());
            let hook = serde_json::json!({ "path": "/bin/sh", "args": ["sh", "-c", line] });
            let spec = serde_json::json!({ "hooks": { "poststop": [hook] } });
            std::fs::write(bundle.join("config.json"), spec.to_string()).unwrap();
            Hooked { id: id.to_owned(), bundle }
        };
        let (left, ended) = (hooked("left"), hooked("ended"));
        for entry in
            [Entry::Hooks(left.clone()), Entry::Hooks(ended.clone()), Entry::HooksDone(ended.clone())]
        {
            journal.intend(&entry).unwrap();
        }
        undo(&pod).unwrap();
        assert!(left.bundle.join("mark").exists() && !ended.bundle.join("mark").exists());
    }

    #[test]
    fn a_cgroup_that_goes_while_its_file_is_open_is_gone() {
        assert!(is_gone(&io::Error::from_raw_os_error(libc::ENODEV)));
        assert!(is_gone(&io::Error::from_raw_os_error(libc::ENOENT)));
        assert!(!is_gone(&io::Error::from_raw_os_error(libc::EBUSY)));
    }

    #[test]
    fn what_is_not_ours_is_not_deleted() {
        let root = tempfile::tempdir().unwrap();
        let pod = pod(root.path());
        pod.create().unwrap();
        std::fs::create_dir(pod.shared()).unwrap();
        std::fs::write(pod.shared().join("precious"), "").unwrap();
        assert!(undo(&pod).is_err());
        assert!(pod.shared().join("precious").exists());
    }
}
