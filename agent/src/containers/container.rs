//! One container.

use super::making::internal;
use super::process::{Process, Stage};
use crate::cgroup::events::{self, Watch};
use crate::cgroup::{Cgroup, limits, stats};
use crate::engine::spec::Namespaces;
use crate::events::Events;
use crate::failure::{Failure, Kind, describe};
use crate::link::Dialer;
use crate::sockets::Listeners;
use oci_spec::runtime::LinuxResources;
use protobuf::Message;
use std::collections::{HashMap, hash_map};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;
use tokio::task::AbortHandle;

/// A frozen process is one that the kernel could stop; one in an endless I/O never is.
const FREEZE_DEADLINE: Duration = Duration::from_secs(10);
/// More execs at a time than any pod has.
const MOST_EXECS: usize = 4096;

/// A container.
pub struct Container {
    /// Its id.
    pub id: String,
    /// Its namespaces apart from the guest's own.
    pub namespaces: Namespaces,
    /// Its first process.
    pub first: Arc<Process>,
    /// Held by whoever changes the container as a whole.
    pub lifecycle: tokio::sync::Mutex<()>,
    /// Plan and spec, which an exec's engine reads again.
    document: OwnedFd,
    cgroup: PathBuf,
    execs: Mutex<HashMap<String, Arc<Process>>>,
    events: Arc<Events>,
    /// Kills by the out-of-memory killer that have been told.
    oom_kills: AtomicU64,
    watcher: OnceLock<AbortHandle>,
    /// Closed with the container.
    _listeners: Listeners,
}

/// What a list of processes has for each.
pub struct Listed {
    /// In the guest's first pid namespace.
    pub pid: u32,
    /// Of the exec that made it.
    pub exec_id: String,
}

impl Container {
    /// A container that is being made.
    pub fn new(
        id: String,
        cgroup: PathBuf,
        namespaces: Namespaces,
        document: OwnedFd,
        events: Arc<Events>,
        listeners: Listeners,
    ) -> Self {
        Self {
            id,
            namespaces,
            first: Arc::new(Process::new(String::new())),
            lifecycle: tokio::sync::Mutex::default(),
            document,
            cgroup,
            execs: Mutex::default(),
            events,
            oom_kills: AtomicU64::new(0),
            watcher: OnceLock::new(),
            _listeners: listeners,
        }
    }

    /// Plan and spec.
    pub fn document(&self) -> BorrowedFd<'_> {
        self.document.as_fd()
    }

    /// A process of the container.
    pub fn process(&self, exec_id: &str) -> Result<Arc<Process>, Failure> {
        if exec_id.is_empty() {
            return Ok(self.first.clone());
        }
        self.execs().get(exec_id).cloned().ok_or_else(|| {
            Failure::new(
                Kind::NotFound,
                format!("exec \"{exec_id}\" in container \"{}\" does not exist", self.id),
            )
        })
    }

    /// Lets a process run.
    pub async fn start(&self, exec_id: &str, dialer: &dyn Dialer) -> Result<u32, Failure> {
        let process = self.process(exec_id)?;
        if self.is_frozen()? {
            return Err(Failure::new(
                Kind::FailedPrecondition,
                "cannot start a process in a paused container",
            ));
        }
        process.start(dialer).await?;
        Ok(process.pid())
    }

    /// Sends a signal to one process.
    pub fn signal(&self, exec_id: &str, signal: i32) -> Result<(), Failure> {
        self.process(exec_id)?.signal(signal)
    }

    /// Sends a signal to every process, execs and children too.
    pub fn signal_all(&self, signal: i32) -> Result<(), Failure> {
        let finished = || Failure::new(Kind::NotFound, "process already finished");
        let doing = |error: io::Error| match error.kind() {
            io::ErrorKind::NotFound => finished(),
            _ => internal("signal the container's processes", &error),
        };
        let cgroup = self.open_cgroup().map_err(doing)?;
        if !cgroup.is_populated().map_err(doing)? {
            return Err(finished());
        }
        if signal == libc::SIGKILL {
            return cgroup.kill().map_err(doing);
        }
        for pid in cgroup.processes().map_err(doing)? {
            // SAFETY: plain integers. A process that is gone since is what was wanted.
            let sent = crate::sys::check(unsafe { libc::kill(pid.cast_signed(), signal) }.into());
            match sent {
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                    return Err(Failure::new(Kind::InvalidArgument, format!("{signal} is no signal")));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Kills every process.
    pub fn kill(&self) -> io::Result<()> {
        self.open_cgroup()?.kill()
    }

    /// All processes in the container's cgroup.
    pub fn list(&self) -> Result<Vec<Listed>, Failure> {
        let pids = self.open_cgroup().and_then(|cgroup| cgroup.processes());
        let pids = pids.map_err(|error| internal("list the container's processes", &error))?;
        let by_pid: HashMap<u32, String> =
            self.execs().values().map(|process| (process.pid(), process.exec_id.clone())).collect();
        let list = pids
            .into_iter()
            .map(|pid| Listed { pid, exec_id: by_pid.get(&pid).cloned().unwrap_or_default() });
        Ok(list.collect())
    }

    /// The container's use of resources, as containerd's encoded message.
    pub async fn stats(&self) -> Result<Vec<u8>, Failure> {
        read_stats(self.cgroup.clone()).await
    }

    /// Changes the container's limits.
    pub async fn update(&self, resources: &[u8]) -> Result<(), Failure> {
        let resources: LinuxResources = serde_json::from_slice(resources)
            .map_err(|error| Failure::new(Kind::InvalidArgument, format!("resources: {error}")))?;
        let _turn = self.lifecycle.lock().await;
        if let Stage::Exited(_) = self.first.stage() {
            return Err(Failure::new(Kind::FailedPrecondition, "cannot update a stopped container"));
        }
        let path = self.cgroup.clone();
        on_thread(move || {
            let cgroup =
                Cgroup::open(&path).map_err(|error| internal("open the container's cgroup", &error))?;
            Ok(limits::update(&cgroup, &resources)?)
        })
        .await
    }

    /// Freezes (or thaws) the container, and waits until it is.
    pub async fn freeze(&self, freeze: bool) -> Result<(), Failure> {
        let _turn = self.lifecycle.lock().await;
        let (verb, value) = if freeze { ("pause", 1) } else { ("resume", 0) };
        let refuse = |state: &str| {
            Err(Failure::new(Kind::FailedPrecondition, format!("cannot {verb} a container that is {state}")))
        };
        match (self.first.stage(), self.is_frozen()?) {
            (Stage::Exited(_), _) => return refuse("stopped"),
            (_, true) if freeze => return refuse("paused"),
            (_, false) if !freeze => return refuse("not paused"),
            _ => {}
        }
        let doing = |error: io::Error| internal(&format!("{verb} the container"), &error);
        let cgroup = self.open_cgroup().map_err(doing)?;
        let watch = Watch::new(&cgroup, "cgroup.events").map_err(doing)?;
        cgroup.write("cgroup.freeze", &value.to_string()).map_err(doing)?;
        match tokio::time::timeout(FREEZE_DEADLINE, watch.until("frozen", value)).await {
            Ok(result) => result.map_err(doing),
            Err(_) => {
                // Half frozen is no state to be left in.
                cgroup.write("cgroup.freeze", "0").map_err(doing)?;
                Err(Failure::new(Kind::DeadlineExceeded, "a process of the container cannot be frozen"))
            }
        }
    }

    /// Whether a process can be added now.
    pub async fn check_can_exec(&self) -> Result<(), Failure> {
        let refuse = |state: &str| {
            Err(Failure::new(Kind::FailedPrecondition, format!("cannot exec in a {state} container")))
        };
        match self.first.stage() {
            Stage::Exited(_) | Stage::Making => refuse("stopped"),
            _ if self.is_frozen()? => refuse("paused"),
            Stage::Created | Stage::Running => Ok(()),
        }
    }

    /// Takes an exec id.
    pub fn reserve(&self, exec_id: &str) -> Result<Arc<Process>, Failure> {
        let mut execs = self.execs();
        if execs.len() >= MOST_EXECS {
            return Err(Failure::new(
                Kind::FailedPrecondition,
                format!("the container has {MOST_EXECS} execs already"),
            ));
        }
        match execs.entry(exec_id.to_owned()) {
            hash_map::Entry::Occupied(_) => {
                Err(Failure::new(Kind::AlreadyExists, format!("exec \"{exec_id}\" exists already")))
            }
            hash_map::Entry::Vacant(place) => {
                Ok(place.insert(Arc::new(Process::new(exec_id.to_owned()))).clone())
            }
        }
    }

    /// Gives an exec id back.
    pub fn drop_exec(&self, exec_id: &str) {
        self.execs().remove(exec_id);
    }

    /// Forgets an exec that has exited or was never started.
    pub async fn forget(&self, exec_id: &str) -> Result<(), Failure> {
        let process = self.process(exec_id)?;
        match process.stage() {
            Stage::Exited(_) => {}
            Stage::Created => kill_and_wait(&process).await,
            Stage::Making | Stage::Running => {
                return Err(Failure::new(Kind::FailedPrecondition, "cannot delete a running process"));
            }
        }
        self.drop_exec(exec_id);
        Ok(())
    }

    /// Makes sure that the first process is dead, where that is no surprise to anyone.
    pub async fn finish(&self) -> Result<(), Failure> {
        match self.first.stage() {
            Stage::Exited(_) => Ok(()),
            Stage::Created => {
                kill_and_wait(&self.first).await;
                Ok(())
            }
            Stage::Making | Stage::Running => {
                Err(Failure::new(Kind::FailedPrecondition, "cannot delete a running container"))
            }
        }
    }

    /// A process of the container is dead. Called once for each, by the reaper.
    pub fn process_exited(&self, process: &Process, status: u32) {
        let before = process.exited(status);
        if process.exec_id.is_empty() && self.namespaces.new & libc::CLONE_NEWPID == 0 {
            // Without a pid namespace of its own the kernel does not end the others with the first.
            let _ = self.kill();
        }
        if matches!(before, Stage::Created | Stage::Running) {
            self.announce(process, status);
        }
    }

    /// Tells of an exit, and before that of the kill that caused it.
    pub fn announce(&self, process: &Process, status: u32) {
        if let Ok(text) = self.open_cgroup().and_then(|cgroup| cgroup.read("memory.events")) {
            self.tell_oom(&text);
        }
        self.events.exited(&self.id, &process.exec_id, status);
    }

    /// Tells of kills by the out-of-memory killer as they happen.
    pub fn begin_watching(self: &Arc<Self>) -> io::Result<()> {
        let cgroup = self.open_cgroup()?;
        if !cgroup.has("memory.events") {
            return Ok(());
        }
        let watch = Watch::new(&cgroup, "memory.events")?;
        let container = Arc::downgrade(self);
        let task = tokio::spawn(async move {
            while let Ok(text) = watch.read() {
                let Some(container) = container.upgrade() else { return };
                container.tell_oom(&text);
                drop(container);
                if watch.changed().await.is_err() {
                    return;
                }
            }
        });
        // Begun once, by the one who makes the container.
        let _ = self.watcher.set(task.abort_handle());
        Ok(())
    }

    /// The cgroup is about to be removed.
    pub fn stop_watching(&self) {
        if let Some(watcher) = self.watcher.get() {
            watcher.abort();
        }
    }

    fn tell_oom(&self, memory_events: &str) {
        let kills = events::value(memory_events, "oom_kill").unwrap_or(0);
        if self.oom_kills.fetch_max(kills, Ordering::Relaxed) < kills {
            self.events.out_of_memory(&self.id);
        }
    }

    fn is_frozen(&self) -> Result<bool, Failure> {
        match self.open_cgroup().and_then(|cgroup| cgroup.read("cgroup.freeze")) {
            Ok(text) => Ok(text.trim() == "1"),
            Err(error) => {
                Err(Failure::new(Kind::Internal, format!("read the container's state: {}", describe(&error))))
            }
        }
    }

    fn open_cgroup(&self) -> io::Result<Cgroup> {
        Cgroup::open(&self.cgroup)
    }

    fn execs(&self) -> MutexGuard<'_, HashMap<String, Arc<Process>>> {
        // Nothing that holds the lock can panic half-way.
        self.execs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A cgroup's use of resources, as containerd's encoded message.
pub async fn read_stats(path: PathBuf) -> Result<Vec<u8>, Failure> {
    on_thread(move || {
        let metrics =
            Cgroup::open(&path).and_then(|cgroup| stats::read(&cgroup)).map_err(|error| {
                match error.kind() {
                    io::ErrorKind::NotFound => {
                        Failure::new(Kind::NotFound, "the container has no cgroup any more")
                    }
                    _ => internal("read the container's cgroup", &error),
                }
            })?;
        metrics.write_to_bytes().map_err(|error| Failure::new(Kind::Internal, error.to_string()))
    })
    .await
}

async fn kill_and_wait(process: &Process) {
    // An error says that it is dead, which is then waited for no longer than the reaper takes.
    let _ = process.signal(libc::SIGKILL);
    process.wait().await;
}

async fn on_thread<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Failure> + Send + 'static,
) -> Result<T, Failure> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|_| Err(Failure::new(Kind::Internal, "the agent is shutting down")))
}
