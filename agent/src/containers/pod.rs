//! The pod as a whole: namespaces that outlive its containers, and what all of them use.

use super::Containers;
use super::container::read_stats;
use super::making::{self, internal};
use super::process::{Process, Waiting};
use crate::engine::wire::{Document, Plan, Task};
use crate::failure::{Failure, Kind};
use std::os::fd::AsFd;
use std::sync::Arc;
use vmshim_protocol::agent::SetUpPodRequest;

/// The longest name that the kernel takes.
const LONGEST_HOSTNAME: usize = 64;

impl Containers {
    /// Makes the pod's own namespaces, if they are not there yet.
    pub async fn set_up_pod(&self, request: SetUpPodRequest) -> Result<(), Failure> {
        self.pod.get_or_try_init(|| self.make_pod(request)).await.map(drop)
    }

    /// The process that holds them.
    pub fn pod(&self) -> Result<Arc<Process>, Failure> {
        self.pod.get().cloned().ok_or_else(|| {
            Failure::new(Kind::FailedPrecondition, "the pod has no namespaces of its own to join")
        })
    }

    /// What all containers together use, as containerd's encoded message.
    pub async fn stats(&self) -> Result<Vec<u8>, Failure> {
        read_stats(self.places.cgroups.clone()).await
    }

    async fn make_pod(&self, request: SetUpPodRequest) -> Result<Arc<Process>, Failure> {
        if request.hostname.len() > LONGEST_HOSTNAME {
            return Err(Failure::new(
                Kind::InvalidArgument,
                format!("hostname is longer than {LONGEST_HOSTNAME} bytes"),
            ));
        }
        let plan = Plan {
            container: String::new(),
            cgroup: self.places.cgroups.clone(),
            terminal: None,
            shared: self.places.shared.clone(),
            host_network: false,
            task: Task::Pod { hostname: request.hostname, sysctls: request.sysctls.into_iter().collect() },
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
        Ok(process)
    }
}
