//! Makes containers, and processes in them.

use super::container::Container;
use super::making::{self, internal};
use super::process::{Process, Stage, Waiting};
use super::request::Donor;
use super::{Containers, Entry, check_id, request, teardown};
use crate::engine::wire::{Document, Plan, Task};
use crate::failure::{Failure, Kind};
use crate::stdio::Streams;
use std::collections::hash_map;
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use vmshim_protocol::agent::{CreateContainerRequest, ExecProcessRequest, Stdio};

impl Containers {
    /// Lets a process run.
    pub async fn start(&self, id: &str, exec_id: &str) -> Result<u32, Failure> {
        self.get(id)?.start(exec_id, &*self.dialer).await
    }

    /// Makes a container whose first process waits to be started. On failure nothing is left of it.
    pub async fn create(self: &Arc<Self>, request: CreateContainerRequest) -> Result<u32, Failure> {
        // A caller who gives up must not leave half a container: the work goes on without him.
        let containers = self.clone();
        finish(tokio::spawn(async move { containers.create_to_the_end(request).await })).await
    }

    async fn create_to_the_end(self: Arc<Self>, request: CreateContainerRequest) -> Result<u32, Failure> {
        let id = request.container_id.clone();
        check_id("container id", &id)?;
        match self.lock().entry(id.clone()) {
            hash_map::Entry::Occupied(_) => {
                return Err(Failure::new(Kind::AlreadyExists, format!("container \"{id}\" exists already")));
            }
            hash_map::Entry::Vacant(place) => drop(place.insert(Entry::Changing)),
        }
        match self.make_container(&request).await {
            Ok(container) => {
                let first = container.first.clone();
                self.lock().insert(id, Entry::Ready(container));
                Ok(first.pid())
            }
            Err(failure) => {
                // The first failure is the one to tell.
                let _ = teardown::remove(self.directory(&id), self.cgroup(&id)).await;
                self.lock().remove(&id);
                Err(failure)
            }
        }
    }

    async fn make_container(&self, request: &CreateContainerRequest) -> Result<Arc<Container>, Failure> {
        let id = &request.container_id;
        let stdio = request.stdio.as_ref().cloned().unwrap_or_default();
        let (namespaces, joined) = request::namespaces(&request.spec)?;
        let root = request::root(&request.rootfs)?;
        let donors =
            joined.iter().map(|(flags, donor)| self.donor(*flags, donor)).collect::<Result<Vec<_>, _>>()?;
        let plan = Plan {
            container: id.clone(),
            cgroup: self.cgroup(id),
            terminal: request::terminal(&stdio)?,
            shared: self.places.shared.clone(),
            host_network: self.host_network.is_shared(),
            task: Task::Create {
                directory: self.directory(id),
                root,
                join: joined.iter().map(|(flag, _)| *flag).collect(),
                devices: request.devices.iter().map(request::block_device).collect::<Result<_, _>>()?,
            },
        };
        let directory = self.directory(id);
        fs::create_dir(&directory).map_err(|error| internal("make the container's directory", &error))?;
        let listeners = self.sockets.listen(id, &directory, &request.sockets)?;
        let document =
            Document::write(&plan, &request.spec).map_err(|error| internal("write the plan", &error))?;
        let container = Arc::new(Container::new(
            id.clone(),
            plan.cgroup.clone(),
            namespaces,
            document,
            self.events.clone(),
            listeners,
        ));
        let donors: Vec<BorrowedFd<'_>> =
            donors.iter().filter_map(|donor| donor.pidfd()).map(AsFd::as_fd).collect();
        let process = container.first.clone();
        let document = container.document();
        self.make_process(&container, &process, document, &donors, &stdio).await?;
        container.begin_watching().map_err(|error| internal("watch the container's memory", &error))?;
        Ok(container)
    }

    /// The process whose namespace a container joins.
    fn donor(&self, flags: i32, donor: &Donor) -> Result<Arc<Process>, Failure> {
        let (process, has_users, name) = match donor {
            Donor::Pod => {
                let pod = self.pod()?;
                (pod.process.clone(), pod.has_users, "the pod".to_owned())
            }
            Donor::Container(id) => {
                let container = self.get(id)?;
                let has_users = container.namespaces.has(libc::CLONE_NEWUSER);
                (container.first.clone(), has_users, format!("container \"{id}\""))
            }
        };
        if flags & libc::CLONE_NEWUSER != 0 && !has_users {
            return Err(Failure::new(
                Kind::FailedPrecondition,
                format!("{name} has no user namespace of its own to join"),
            ));
        }
        match process.stage() {
            Stage::Exited(_) => Err(Failure::new(
                Kind::FailedPrecondition,
                format!("{name} has stopped and has no namespaces to join"),
            )),
            _ => Ok(process),
        }
    }

    /// Makes one more process in a container.
    pub async fn exec(self: &Arc<Self>, request: ExecProcessRequest) -> Result<u32, Failure> {
        let containers = self.clone();
        finish(tokio::spawn(async move { containers.exec_to_the_end(request).await })).await
    }

    async fn exec_to_the_end(&self, request: ExecProcessRequest) -> Result<u32, Failure> {
        check_id("exec id", &request.exec_id)?;
        let container = self.get(&request.container_id)?;
        container.check_can_exec().await?;
        let process = container.reserve(&request.exec_id)?;
        match self.make_exec(&container, &process, &request).await {
            Ok(()) => Ok(process.pid()),
            Err(failure) => {
                container.drop_exec(&request.exec_id);
                Err(failure)
            }
        }
    }

    async fn make_exec(
        &self,
        container: &Arc<Container>,
        process: &Arc<Process>,
        request: &ExecProcessRequest,
    ) -> Result<(), Failure> {
        let stdio = request.stdio.as_ref().cloned().unwrap_or_default();
        let plan = Plan {
            container: container.id.clone(),
            cgroup: self.cgroup(&container.id),
            terminal: request::terminal(&stdio)?,
            shared: self.places.shared.clone(),
            host_network: self.host_network.is_shared(),
            task: Task::Exec { namespaces: container.namespaces.all() },
        };
        let document =
            Document::write(&plan, &request.process).map_err(|error| internal("write the plan", &error))?;
        let first = container
            .first
            .pidfd()
            .ok_or_else(|| Failure::new(Kind::FailedPrecondition, "container not created"))?;
        let more = [first.as_fd(), container.document()];
        self.make_process(container, process, document.as_fd(), &more, &stdio).await
    }

    /// Dials the streams, has the engine make the process, and begins to copy.
    async fn make_process(
        &self,
        container: &Arc<Container>,
        process: &Arc<Process>,
        document: BorrowedFd<'_>,
        more: &[BorrowedFd<'_>],
        stdio: &Stdio,
    ) -> Result<(), Failure> {
        let streams = Streams::dial(&*self.dialer, stdio).await?;
        let copying = |error: io::Error| internal("set up stdio", &error);
        let on_exit = {
            let (container, process) = (container.clone(), process.clone());
            move |status| container.process_exited(&process, status)
        };
        let mut fds = vec![document];
        let (made, input) = if stdio.terminal {
            fds.extend_from_slice(more);
            let made = making::make(&self.places.engine, &self.reaper, &fds, process, on_exit).await?;
            let master = made.terminal.as_ref().map(OwnedFd::try_clone).transpose().map_err(copying)?;
            let master = master
                .ok_or_else(|| Failure::new(Kind::Internal, "the container engine sent no terminal"))?;
            streams.serve_terminal(master).map_err(copying)?;
            (made, None)
        } else {
            let pipes = streams.into_pipes().map_err(copying)?;
            fds.extend(pipes.for_process());
            fds.extend_from_slice(more);
            let made = making::make(&self.places.engine, &self.reaper, &fds, process, on_exit).await?;
            (made, pipes.serve().map_err(copying)?)
        };
        if let Some(master) = made.terminal {
            process.set_terminal(master);
        }
        if let Some(servers) = made.servers {
            self.host_network.follow(servers);
        }
        if !process.created(Waiting { control: made.control, input })
            && let Stage::Exited(status) = process.stage()
        {
            // It died between its report and here; its exit has not been announced.
            container.announce(process, status);
        }
        Ok(())
    }
}

async fn finish<T>(task: tokio::task::JoinHandle<Result<T, Failure>>) -> Result<T, Failure> {
    task.await.unwrap_or_else(|_| Err(Failure::new(Kind::Internal, "the agent is shutting down")))
}
