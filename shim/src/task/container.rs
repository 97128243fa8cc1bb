//! A container: its init, its execs, and what it has of the host.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

use super::TaskError;
use super::process::{Exit, Phase, Process};
use crate::hooks::Hooks;
use crate::ids::Name;
use crate::oci::Limits;
use crate::storage::{Slot, Staging};

/// One container.
#[derive(Debug)]
pub struct Container {
    /// Its id.
    pub id: Name,
    /// Its bundle on the host.
    pub bundle: PathBuf,
    /// Its first process.
    pub init: Arc<Process>,
    execs: Mutex<BTreeMap<String, Arc<Exec>>>,
    held_exit: Mutex<Option<Exit>>,
    storage: Mutex<Option<HostStorage>>,
    sockets: Mutex<Vec<PathBuf>>,
    hooks: Mutex<Option<Hooks>>,
    annotations: Mutex<BTreeMap<String, String>>,
    stands_for_pod: AtomicBool,
    limits: Mutex<Limits>,
    removed: watch::Sender<bool>,
    deleting: Mutex<bool>,
}

/// A process made by Exec.
#[derive(Debug)]
pub struct Exec {
    /// The process.
    pub process: Arc<Process>,
    /// The OCI process object, as JSON for the agent.
    pub spec: Vec<u8>,
}

/// What a container has of the host's storage.
#[derive(Debug)]
pub struct HostStorage {
    /// Mounts in the shared directory.
    pub staging: Staging,
    /// Its disks.
    pub slots: Vec<Slot>,
}

impl Container {
    /// A container that is being created.
    pub fn new(id: Name, bundle: PathBuf, init: Process) -> Self {
        Self {
            id,
            bundle,
            init: Arc::new(init),
            execs: Mutex::default(),
            held_exit: Mutex::default(),
            storage: Mutex::default(),
            sockets: Mutex::default(),
            hooks: Mutex::default(),
            annotations: Mutex::default(),
            stands_for_pod: AtomicBool::default(),
            limits: Mutex::default(),
            removed: watch::Sender::new(false),
            deleting: Mutex::default(),
        }
    }

    /// The init, or the exec of that id.
    ///
    /// # Errors
    /// When there is no such exec.
    pub fn process(&self, exec_id: &str) -> Result<Arc<Process>, TaskError> {
        if exec_id.is_empty() { Ok(self.init.clone()) } else { Ok(self.exec(exec_id)?.process.clone()) }
    }

    /// An exec.
    ///
    /// # Errors
    /// When there is no such exec.
    pub fn exec(&self, exec_id: &str) -> Result<Arc<Exec>, TaskError> {
        let found = lock(&self.execs).get(exec_id).cloned();
        found.ok_or_else(|| TaskError::NoProcess { id: self.id.to_string(), exec_id: exec_id.to_owned() })
    }

    /// Adds an exec.
    ///
    /// # Errors
    /// When the id is taken.
    pub fn add_exec(&self, exec: Exec) -> Result<(), TaskError> {
        use std::collections::btree_map::Entry;
        match lock(&self.execs).entry(exec.process.exec_id.clone()) {
            Entry::Occupied(taken) => Err(TaskError::ExecExists(taken.key().clone())),
            Entry::Vacant(free) => {
                free.insert(Arc::new(exec));
                Ok(())
            }
        }
    }

    /// Forgets an exec.
    pub fn remove_exec(&self, exec_id: &str) {
        lock(&self.execs).remove(exec_id);
    }

    /// All execs.
    pub fn execs(&self) -> Vec<Arc<Process>> {
        lock(&self.execs).values().map(|exec| exec.process.clone()).collect()
    }

    /// Whether an exec still runs.
    pub fn has_live_exec(&self) -> bool {
        lock(&self.execs).values().any(|exec| exec.process.phase().is_live())
    }

    /// Keeps the init's exit until the last exec has exited too: the init's is always the last that is told.
    pub fn hold_exit(&self, exit: Exit) {
        lock(&self.held_exit).get_or_insert(exit);
    }

    /// The init's exit that is being kept.
    pub fn take_held_exit(&self) -> Option<Exit> {
        lock(&self.held_exit).take()
    }

    /// Whether an exit is being kept.
    pub fn is_exit_held(&self) -> bool {
        lock(&self.held_exit).is_some()
    }

    /// Notes what the container has of the host.
    pub fn set_storage(&self, storage: HostStorage) {
        *lock(&self.storage) = Some(storage);
    }

    /// Takes it away, to give it back to the host.
    pub fn take_storage(&self) -> Option<HostStorage> {
        lock(&self.storage).take()
    }

    /// Notes which sockets of the host it can reach.
    pub fn set_sockets(&self, sockets: Vec<PathBuf>) {
        *lock(&self.sockets) = sockets;
    }

    /// The socket of that number.
    pub fn socket(&self, number: usize) -> Option<PathBuf> {
        lock(&self.sockets).get(number).cloned()
    }

    /// Notes what its spec asks to be run on the host, and told there.
    pub fn set_hooks(&self, hooks: Option<Hooks>, annotations: BTreeMap<String, String>) {
        *lock(&self.hooks) = hooks;
        *lock(&self.annotations) = annotations;
    }

    /// The host's hooks.
    pub fn hooks(&self) -> Option<Hooks> {
        lock(&self.hooks).clone()
    }

    /// Takes them away for the last time that they are run.
    pub fn take_hooks(&self) -> Option<Hooks> {
        lock(&self.hooks).take()
    }

    /// The spec's annotations.
    pub fn annotations(&self) -> BTreeMap<String, String> {
        lock(&self.annotations).clone()
    }

    /// Notes that it is the one that stands for its pod.
    pub fn set_stands_for_pod(&self) {
        self.stands_for_pod.store(true, Ordering::Relaxed);
    }

    /// Whether it is the one that stands for its pod.
    pub fn stands_for_pod(&self) -> bool {
        self.stands_for_pod.load(Ordering::Relaxed)
    }

    /// Notes what the machine must be large enough for.
    pub fn set_limits(&self, limits: Limits) {
        *lock(&self.limits) = limits;
    }

    /// What the machine must be large enough for.
    pub fn limits(&self) -> Limits {
        *lock(&self.limits)
    }

    /// Says that nothing of the container is left in the guest or on the host.
    pub fn set_removed(&self) {
        self.removed.send_replace(true);
    }

    /// Waits for that.
    pub async fn removed(&self) {
        let mut removed = self.removed.subscribe();
        // The sender lives in `self`, so the channel cannot close.
        let _ = removed.wait_for(|removed| *removed).await;
    }

    /// Begins the one Delete that goes through; false for any other.
    pub fn begin_delete(&self) -> bool {
        !std::mem::replace(&mut *lock(&self.deleting), true)
    }

    /// Lets Delete be tried again.
    pub fn abandon_delete(&self) {
        *lock(&self.deleting) = false;
    }

    /// Whether the init has exited.
    pub fn is_stopped(&self) -> bool {
        matches!(self.init.phase(), Phase::Stopped(_))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
