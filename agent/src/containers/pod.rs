//! The pod as a whole: namespaces that outlive its containers, and what all of them use.

use super::Containers;
use super::container::read_stats;
use super::making::{self, internal};
use super::process::{Process, Waiting};
use super::request;
use crate::engine::wire::{self, Document, Plan, Task};
use crate::failure::{Failure, Kind};
use crate::network::Home;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use vmshim_protocol::agent::SetUpPodRequest;

/// The longest name that the kernel takes.
const LONGEST_HOSTNAME: usize = 64;

/// The process that holds the pod's own namespaces.
pub struct Pod {
    /// The process.
    pub process: Arc<Process>,
    /// Whether they are owned by a user namespace of the pod's, which then has the pod's network, too.
    pub has_users: bool,
}

impl Containers {
    /// Makes the pod's own namespaces, if they are not there yet.
    pub async fn set_up_pod(&self, request: SetUpPodRequest) -> Result<(), Failure> {
        self.pod.get_or_try_init(|| self.make_pod(request)).await.map(drop)
    }

    /// Who holds them.
    pub fn pod(&self) -> Result<&Pod, Failure> {
        self.pod.get().ok_or_else(|| {
            Failure::new(Kind::FailedPrecondition, "the pod has no namespaces of its own to join")
        })
    }

    /// Where the pod's network is, if it is not in the guest's own namespace.
    pub fn home(&self) -> Result<Option<Home>, Failure> {
        let Some(pod) = self.pod.get().filter(|pod| pod.has_users) else { return Ok(None) };
        let pidfd = pod.process.pidfd().map(OwnedFd::try_clone).transpose();
        let pidfd = pidfd.map_err(|error| internal("find the pod's network", &error))?;
        Ok(pidfd.map(|pidfd| Home { pid: pod.process.pid(), pidfd }))
    }

    /// What all containers together use, as containerd's encoded message.
    pub async fn stats(&self) -> Result<Vec<u8>, Failure> {
        read_stats(self.places.cgroups.clone()).await
    }

    async fn make_pod(&self, request: SetUpPodRequest) -> Result<Pod, Failure> {
        if request.hostname.len() > LONGEST_HOSTNAME {
            return Err(Failure::new(
                Kind::InvalidArgument,
                format!("hostname is longer than {LONGEST_HOSTNAME} bytes"),
            ));
        }
        let users = request::users(&request.uids, &request.gids)?;
        let has_users = users.is_some();
        let sysctls = request.sysctls.into_iter().collect();
        let plan = Plan {
            container: String::new(),
            cgroup: self.places.cgroups.clone(),
            terminal: None,
            shared: self.places.shared.clone(),
            host_network: false,
            task: Task::Pod(wire::Pod { hostname: request.hostname, sysctls, users }),
        };
        let document = Document::write(&plan, b"null").map_err(|error| internal("write the plan", &error))?;
        let process = Arc::new(Process::new(String::new()));
        let dead = process.clone();
        let on_exit = move |status| {
            dead.exited(status);
        };
        let fds = [document.as_fd()];
        let made = making::make(&self.places.engine, &self.reaper, &fds, &process, on_exit).await?;
        process.created(Waiting { control: made.control, input: None });
        process.start(&*self.dialer).await?;
        Ok(Pod { process, has_users })
    }
}
