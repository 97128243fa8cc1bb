//! The Task service's methods, under both of its names.

use std::collections::{HashMap, HashSet};
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use containerd_shim_protos::api::{
    CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest,
    CreateTaskResponse, DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest, PauseRequest,
    PidsRequest, PidsResponse, ProcessInfo, ResizePtyRequest, ResumeRequest, ShutdownRequest, StartRequest,
    StartResponse, StateRequest, StateResponse, StatsRequest, StatsResponse, Status, UpdateTaskRequest,
    WaitRequest, WaitResponse,
};
use containerd_shim_protos::events::task::{TaskPaused, TaskResumed};
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{Message, MessageField};
use containerd_shim_protos::shim::oci::ProcessDetails;
use containerd_shim_protos::shim_async::{Task, create_task};
use tokio::time::{Instant, timeout_at};
use ttrpc::asynchronous::{Service as Dispatch, TtrpcContext};
use vmshim_protocol::agent as api;

use super::container::Container;
use super::pod::Pod;
use super::process::{Phase, Process, Size};
use super::{TaskError, create, delete, exec, pause, resize, signal};

const SERVICE_V3: &str = "containerd.task.v3.Task";
const SERVICE_V2: &str = "containerd.task.v2.Task";

/// What metrics are encoded as. Consumers go by this, not by the host's cgroup version.
pub const METRICS_TYPE: &str = "io.containerd.cgroups.v2.Metrics";

/// How long the guest may take to list processes.
const LIST_LIMIT: Duration = Duration::from_secs(2);

/// More processes than any container has; what the guest lists beyond that is left out.
const MOST_LISTED: usize = 32_768;

/// A field of our own in containerd's `ProcessDetails`: the process id in the guest, which clients show by this number.
const GUEST_PID_FIELD: u32 = 100;

const PROCESS_DETAILS_TYPE: &str = "containerd.runc.v1.ProcessDetails";

/// The methods, to be registered with a server: the two versions differ in name only.
pub fn services(pod: &Arc<Pod>) -> HashMap<String, Dispatch> {
    let mut both = HashMap::new();
    for name in [SERVICE_V3, SERVICE_V2] {
        let service = Service { pod: pod.clone() };
        let methods = create_task(Arc::new(service)).remove(SERVICE_V3);
        both.extend(methods.map(|methods| (name.to_owned(), methods)));
    }
    both
}

struct Service {
    pod: Arc<Pod>,
}

impl Service {
    fn process(&self, id: &str, exec_id: &str) -> Result<(Arc<Container>, Arc<Process>), TaskError> {
        let container = self.pod.container(id)?;
        let process = container.process(exec_id)?;
        Ok((container, process))
    }

    /// What is to be said of each process in the container, as the guest lists them; none where it lists none in time.
    async fn guest_processes(&self, container: &Container, deadline: Instant) -> Option<Vec<Option<Any>>> {
        if !container.init.phase().is_live() {
            return None;
        }
        let vm = self.pod.living_vm()?;
        let request = api::ContainerRequest { container_id: container.id.to_string(), ..Default::default() };
        let listed = self.pod.in_guest(vm, vm.agent().list_processes(&request, deadline)).await.ok()?;
        let of_execs: HashSet<_> = container.execs().iter().map(|exec| exec.exec_id.clone()).collect();
        let details = listed.processes.into_iter().take(MOST_LISTED).map(|process| {
            // A name that the guest makes up is nobody's.
            let exec_id = Some(process.exec_id).filter(|id| of_execs.contains(id)).unwrap_or_default();
            process_details(&exec_id, Some(process.pid))
        });
        Some(details.collect::<Vec<_>>()).filter(|details| !details.is_empty())
    }
}

/// Carries a call through even if its caller goes away.
async fn detached<T: Send + 'static>(
    what: &'static str,
    call: impl Future<Output = Result<T, TaskError>> + Send + 'static,
) -> Result<T, TaskError> {
    tokio::spawn(call).await.unwrap_or(Err(TaskError::Internal(what)))
}

#[async_trait]
impl Task for Service {
    async fn state(&self, _: &TtrpcContext, request: StateRequest) -> ttrpc::Result<StateResponse> {
        let (container, process) = self.process(&request.id, &request.exec_id)?;
        let phase = process.phase();
        let is_exec = !process.exec_id.is_empty();
        let status = match phase {
            Phase::Creating | Phase::Created => Status::CREATED,
            // An exec is frozen with its container.
            Phase::Starting | Phase::Running if container.init.phase() == Phase::Paused => Status::PAUSED,
            Phase::Starting | Phase::Running => Status::RUNNING,
            Phase::Paused => Status::PAUSED,
            Phase::Stopped(_) => Status::STOPPED,
        };
        let has_pid = !(is_exec && status == Status::CREATED);
        let mut response = StateResponse {
            id: if is_exec { process.exec_id.clone() } else { container.id.to_string() },
            bundle: container.bundle.to_string_lossy().into_owned(),
            pid: if has_pid { self.pod.task_pid() } else { 0 },
            status: status.into(),
            stdin: process.streams.stdin.clone(),
            stdout: process.streams.stdout.clone(),
            stderr: process.streams.stderr.clone(),
            terminal: process.streams.terminal,
            exec_id: process.exec_id.clone(),
            ..StateResponse::default()
        };
        if let Phase::Stopped(exit) = phase {
            response.exit_status = exit.status;
            response.exited_at = MessageField::some(exit.at.into());
        }
        Ok(response)
    }

    async fn create(
        &self,
        context: &TtrpcContext,
        request: CreateTaskRequest,
    ) -> ttrpc::Result<CreateTaskResponse> {
        let pod = self.pod.clone();
        let deadline = pod.deadline(context.timeout_nano);
        let pid = detached("create", async move { create::create(&pod, request, deadline).await }).await?;
        Ok(CreateTaskResponse { pid, ..CreateTaskResponse::default() })
    }

    async fn start(&self, context: &TtrpcContext, request: StartRequest) -> ttrpc::Result<StartResponse> {
        let pod = self.pod.clone();
        let deadline = pod.deadline(context.timeout_nano);
        let call = async move { exec::start(&pod, &request.id, &request.exec_id, deadline).await };
        Ok(StartResponse { pid: detached("start", call).await?, ..StartResponse::default() })
    }

    async fn delete(&self, context: &TtrpcContext, request: DeleteRequest) -> ttrpc::Result<DeleteResponse> {
        let pod = self.pod.clone();
        let deadline = pod.deadline(context.timeout_nano);
        let call = async move { delete::delete(&pod, &request.id, &request.exec_id, deadline).await };
        let exit = detached("delete", call).await?;
        Ok(DeleteResponse {
            pid: self.pod.task_pid(),
            exit_status: exit.status,
            exited_at: MessageField::some(exit.at.into()),
            ..DeleteResponse::default()
        })
    }

    async fn pids(&self, context: &TtrpcContext, request: PidsRequest) -> ttrpc::Result<PidsResponse> {
        let container = self.pod.container(&request.id)?;
        let deadline = self.pod.deadline(context.timeout_nano).min(Instant::now() + LIST_LIMIT);
        let details = match self.guest_processes(&container, deadline).await {
            Some(processes) => processes,
            // As it was made. The init is there as long as the container: containerd takes an empty list for a leaked
            // shim.
            None => {
                let live = container.execs().into_iter().filter(|exec| exec.phase().is_live());
                let known = [container.init.clone()].into_iter().chain(live);
                known.map(|process| process_details(&process.exec_id, None)).collect()
            }
        };
        let pid = self.pod.task_pid();
        let processes =
            details.into_iter().map(|info| ProcessInfo { pid, info: info.into(), ..ProcessInfo::default() });
        Ok(PidsResponse { processes: processes.collect(), ..PidsResponse::default() })
    }

    async fn pause(&self, context: &TtrpcContext, request: PauseRequest) -> ttrpc::Result<Empty> {
        let (pod, deadline) = (self.pod.clone(), self.pod.deadline(context.timeout_nano));
        let id = request.id.clone();
        detached("pause", async move { pause::pause(&pod, &id, deadline).await }).await?;
        self.pod.events.publish(&TaskPaused { container_id: request.id, ..TaskPaused::default() });
        Ok(Empty::default())
    }

    async fn resume(&self, context: &TtrpcContext, request: ResumeRequest) -> ttrpc::Result<Empty> {
        let (pod, deadline) = (self.pod.clone(), self.pod.deadline(context.timeout_nano));
        let id = request.id.clone();
        detached("resume", async move { pause::resume(&pod, &id, deadline).await }).await?;
        self.pod.events.publish(&TaskResumed { container_id: request.id, ..TaskResumed::default() });
        Ok(Empty::default())
    }

    async fn checkpoint(&self, _: &TtrpcContext, _: CheckpointTaskRequest) -> ttrpc::Result<Empty> {
        Err(TaskError::Unsupported("checkpoint").into())
    }

    async fn kill(&self, _: &TtrpcContext, request: KillRequest) -> ttrpc::Result<Empty> {
        // As with runc, an exec is signalled alone.
        let all = request.all && request.exec_id.is_empty();
        signal::kill(&self.pod, &request.id, &request.exec_id, request.signal, all).await?;
        Ok(Empty::default())
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> ttrpc::Result<Empty> {
        exec::add(&self.pod, request)?;
        Ok(Empty::default())
    }

    async fn resize_pty(&self, context: &TtrpcContext, request: ResizePtyRequest) -> ttrpc::Result<Empty> {
        let (_, process) = self.process(&request.id, &request.exec_id)?;
        if !process.streams.terminal {
            return Ok(Empty::default());
        }
        process.set_size(Size { width: request.width, height: request.height });
        let deadline = self.pod.deadline(context.timeout_nano);
        match timeout_at(deadline, process.settled()).await {
            Ok(Phase::Stopped(_)) => return Ok(Empty::default()),
            // The guest hears of the process, and of its terminal's size, when it starts.
            Ok(Phase::Created) if !request.exec_id.is_empty() => return Ok(Empty::default()),
            Ok(_) => {}
            Err(_) => return Err(TaskError::Deadline("resizing the terminal").into()),
        }
        let vm = self.pod.vm()?;
        let size = api::ResizePtyRequest {
            container_id: request.id,
            exec_id: request.exec_id,
            width: request.width,
            height: request.height,
            ..Default::default()
        };
        self.pod.in_guest(vm, vm.agent().resize_pty(&size, deadline)).await?;
        Ok(Empty::default())
    }

    async fn close_io(&self, _: &TtrpcContext, request: CloseIORequest) -> ttrpc::Result<Empty> {
        let (_, process) = self.process(&request.id, &request.exec_id)?;
        if request.stdin {
            process.close_stdin();
        }
        Ok(Empty::default())
    }

    async fn update(&self, context: &TtrpcContext, request: UpdateTaskRequest) -> ttrpc::Result<Empty> {
        let pod = self.pod.clone();
        let deadline = pod.deadline(context.timeout_nano);
        let resources = request.resources.into_option().unwrap_or_default().value;
        detached("update", async move { resize::update(&pod, &request.id, resources, deadline).await })
            .await?;
        Ok(Empty::default())
    }

    async fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> ttrpc::Result<WaitResponse> {
        let (_, process) = self.process(&request.id, &request.exec_id)?;
        let exit = process.exited().await;
        Ok(WaitResponse {
            exit_status: exit.status,
            exited_at: MessageField::some(exit.at.into()),
            ..WaitResponse::default()
        })
    }

    async fn stats(&self, context: &TtrpcContext, request: StatsRequest) -> ttrpc::Result<StatsResponse> {
        let container = self.pod.container(&request.id)?;
        if container.is_stopped() {
            // Its cgroup is gone; containerd skips such a container silently.
            return Err(TaskError::Finished.into());
        }
        let vm = self.pod.vm()?;
        let ask = api::ContainerRequest { container_id: request.id, ..Default::default() };
        let deadline = self.pod.deadline(context.timeout_nano);
        let stats = self.pod.in_guest(vm, vm.agent().stats(&ask, deadline)).await?;
        let metrics = Any { type_url: METRICS_TYPE.to_owned(), value: stats.metrics, ..Any::default() };
        Ok(StatsResponse { stats: MessageField::some(metrics), ..StatsResponse::default() })
    }

    async fn connect(&self, _: &TtrpcContext, request: ConnectRequest) -> ttrpc::Result<ConnectResponse> {
        let task_pid = if self.pod.container(&request.id).is_ok() { self.pod.task_pid() } else { 0 };
        Ok(ConnectResponse { shim_pid: std::process::id(), task_pid, ..ConnectResponse::default() })
    }

    async fn shutdown(&self, _: &TtrpcContext, request: ShutdownRequest) -> ttrpc::Result<Empty> {
        let sandbox_lives = self.pod.sandbox.is_running() && request.id != self.pod.id.as_str();
        if self.pod.containers().is_empty() && !sandbox_lives {
            self.pod.request_shutdown();
        }
        Ok(Empty::default())
    }
}

/// What a list of processes says of one, where there is something to say.
fn process_details(exec_id: &str, guest_pid: Option<u32>) -> Option<Any> {
    if exec_id.is_empty() && guest_pid.is_none() {
        return None;
    }
    let mut details = ProcessDetails { exec_id: exec_id.to_owned(), ..ProcessDetails::default() };
    if let Some(pid) = guest_pid {
        details.mut_unknown_fields().add_varint(GUEST_PID_FIELD, pid.into());
    }
    let value = details.write_to_bytes().ok()?;
    Some(Any { type_url: PROCESS_DETAILS_TYPE.to_owned(), value, ..Any::default() })
}

#[cfg(test)]
mod tests {
    use containerd_shim_protos::protobuf::UnknownValueRef;

    use super::*;

    #[test]
    fn a_listed_process_tells_its_exec_and_its_pid_in_the_guest() {
        assert!(process_details("", None).is_none());
        let info = process_details("e", Some(17)).unwrap();
        let details = ProcessDetails::parse_from_bytes(&info.value).unwrap();
        assert_eq!(details.exec_id, "e");
        assert_eq!(details.unknown_fields().get(GUEST_PID_FIELD), Some(UnknownValueRef::Varint(17)));
    }
}
