//! The containers of this guest and their processes.
//!
//! [`Containers`] is the table; a [`Container`] makes and forgets its [`Process`]es; what is made is made by an engine
//! process ([`crate::engine`]), so nothing here blocks: files that can make a caller wait are touched on threads of the
//! blocking pool.
//!
//! Locks: the table's and a container's `execs` are held for a look-up or an insertion, never across an await, and
//! never both. Requests that change a container as a whole (delete, update, pause, resume) queue on its `lifecycle`;
//! signals, lists, statistics and exits do not.
//!
//! An exit is announced once for every process whose creation was answered with success, also if it was killed before
//! it was started or its program could not be executed.

mod container;
mod create;
mod files;
mod making;
mod pod;
mod process;
mod request;

mod teardown;

pub use container::Container;
pub use making::internal;
pub use process::{Process, Stage};
pub use request::size as request_size;

use crate::dials::Dials;
use crate::events::Events;
use crate::failure::{Failure, Kind};
use crate::host_network::HostNetwork;
use crate::link::Dialer;
use crate::reaper::Reaper;
use crate::sockets::Sockets;
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Where things are in the guest.
#[derive(Debug, Clone)]
pub struct Places {
    /// The program that is an engine when told so: this one.
    pub engine: PathBuf,
    /// Below it each container has its own directory.
    pub containers: PathBuf,
    /// Below it each container has its cgroup.
    pub cgroups: PathBuf,
    /// The shared virtio-fs directory.
    pub shared: PathBuf,
}

/// The table of containers.
pub struct Containers {
    places: Places,
    reaper: Arc<Reaper>,
    events: Arc<Events>,
    dialer: Box<dyn Dialer>,
    sockets: Arc<Sockets>,
    dials: Arc<Dials>,
    host_network: HostNetwork,
    table: Mutex<HashMap<String, Entry>>,
    /// Holds the pod's own namespaces, where it has such.
    pod: tokio::sync::OnceCell<pod::Pod>,
}

enum Entry {
    /// The id is taken; there is nothing to be asked yet, or any more.
    Changing,
    Ready(Arc<Container>),
}

impl Containers {
    /// An empty table.
    pub fn new(places: Places, reaper: Arc<Reaper>, events: Arc<Events>, dialer: Box<dyn Dialer>) -> Self {
        let dials = Arc::<Dials>::default();
        let sockets = Arc::new(Sockets::new(events.clone(), dials.clone()));
        let host_network = HostNetwork::new(places.cgroups.clone(), events.clone(), dials.clone());
        let pod = tokio::sync::OnceCell::new();
        Self { places, reaper, events, dialer, sockets, dials, host_network, table: Mutex::default(), pod }
    }

    /// The container of this id.
    pub fn get(&self, id: &str) -> Result<Arc<Container>, Failure> {
        match self.lock().get(id) {
            Some(Entry::Ready(container)) => Ok(container.clone()),
            Some(Entry::Changing) => Err(Failure::new(
                Kind::FailedPrecondition,
                format!("container \"{id}\" is being created or deleted"),
            )),
            None => Err(Failure::new(Kind::NotFound, format!("container \"{id}\" does not exist"))),
        }
    }

    /// What has happened in the guest.
    pub fn events(&self) -> &Events {
        &self.events
    }

    /// What containers have of the host's network.
    pub fn host_network(&self) -> &HostNetwork {
        &self.host_network
    }

    /// Joins a connection that waits for the host to the host's end of it.
    pub async fn connect_socket(&self, connection: u64, port: u32) -> Result<(), Failure> {
        let joined = self.dials.answer(connection, port, &*self.dialer).await;
        joined.map_err(|error| internal("reach the host's end of a connection", &error))
    }

    /// Forgets an exited or unstarted exec, or removes a container with all that is its own.
    pub async fn delete(&self, id: &str, exec_id: &str) -> Result<(), Failure> {
        let container = self.get(id)?;
        if !exec_id.is_empty() {
            return container.forget(exec_id).await;
        }
        let _turn = container.lifecycle.lock().await;
        // Somebody else may have had the turn before.
        self.get(id)?;
        container.finish().await?;
        self.lock().insert(id.to_owned(), Entry::Changing);
        container.stop_watching();
        let result = teardown::remove(self.directory(id), self.cgroup(id)).await;
        let mut table = self.lock();
        match result {
            Ok(()) => {
                table.remove(id);
                Ok(())
            }
            Err(failure) => {
                // Still there, so that it can be asked for again.
                table.insert(id.to_owned(), Entry::Ready(container.clone()));
                Err(failure)
            }
        }
    }

    /// Ends every process and lets go of every disk, for a power-off. What does not let itself be ended is left.
    pub async fn quiesce(&self) {
        for entry in self.lock().values() {
            if let Entry::Ready(container) = entry {
                // A cgroup that is gone has no processes.
                let _ = container.kill();
            }
        }
        teardown::release(self.places.containers.clone(), self.places.cgroups.clone()).await;
    }

    fn directory(&self, id: &str) -> PathBuf {
        self.places.containers.join(id)
    }

    fn cgroup(&self, id: &str) -> PathBuf {
        self.places.cgroups.join(id)
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Entry>> {
        // Nothing that holds the lock can panic half-way.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An id becomes the name of a directory and of a cgroup.
pub fn check_id(what: &str, id: &str) -> Result<(), Failure> {
    const LONGEST: usize = 200;
    let letter = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-' | b'+' | b'#');
    let fine = !id.is_empty() && id.len() <= LONGEST && id.bytes().all(letter) && !id.starts_with('.');
    if fine {
        return Ok(());
    }
    Err(Failure::new(
        Kind::InvalidArgument,
        format!(
            "{what} {id:?} must be 1 to {LONGEST} letters, digits, \"_\", \"-\", \"+\", \"#\" or \".\", not beginning with \".\""
        ),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_names() {
        for good in ["a", "7f3-x_y.z", "A+b", "a#01"] {
            assert!(check_id("container id", good).is_ok(), "{good}");
        }
        for bad in ["", ".", "..", ".x", "a/b", "a b", "ä", "a\n", &"x".repeat(300)] {
            assert!(check_id("container id", bad).is_err(), "{bad}");
        }
    }
}
