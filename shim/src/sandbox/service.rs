//! The Sandbox service's methods.

use std::collections::HashMap;
use std::future::Future;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use containerd_shim_protos::protobuf::MessageField;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::sandbox_api::{
    CreateSandboxRequest, CreateSandboxResponse, PingRequest, PingResponse, PlatformRequest,
    PlatformResponse, SandboxMetricsRequest, SandboxMetricsResponse, SandboxStatusRequest,
    SandboxStatusResponse, ShutdownSandboxRequest, ShutdownSandboxResponse, StartSandboxRequest,
    StartSandboxResponse, StopSandboxRequest, StopSandboxResponse, WaitSandboxRequest, WaitSandboxResponse,
};
use containerd_shim_protos::sandbox_async::{Sandbox, create_sandbox};
use tokio::time::Instant;
use ttrpc::asynchronous::{Service as Dispatch, TtrpcContext};
use vmshim_protocol::agent as api;

use super::files;
use super::life::Stage;
use super::request::SandboxConfig;
use crate::cgroup::Cgroup;
use crate::network;
use crate::task::{METRICS_TYPE, Pod, Shape, TaskError};

/// How long the guest may take to end its containers and write back its disks before it is stopped as it is.
const POWER_OFF_LIMIT: Duration = Duration::from_secs(5);

/// 128 + SIGKILL, for a sandbox that ended without being asked to.
const KILLED: u32 = 137;

/// The methods, to be registered with a server.
pub fn services(pod: &Arc<Pod>) -> HashMap<String, Dispatch> {
    create_sandbox(Arc::new(Service { pod: pod.clone(), config: std::sync::Mutex::default() }))
}

struct Service {
    pod: Arc<Pod>,
    /// From CreateSandbox until StartSandbox.
    config: std::sync::Mutex<Requested>,
}

/// What is kept of CreateSandbox.
#[derive(Debug, Default)]
struct Requested {
    netns_path: String,
    pod: SandboxConfig,
}

impl Service {
    fn check_id(&self, id: &str) -> Result<(), TaskError> {
        if id == self.pod.id.as_str() {
            return Ok(());
        }
        Err(TaskError::NoContainer(id.chars().take(128).collect()))
    }

    fn requested(&self) -> std::sync::MutexGuard<'_, Requested> {
        self.config.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn create(&self, request: CreateSandboxRequest) -> Result<(), TaskError> {
        if self.pod.sandbox.is_there() {
            return Err(TaskError::SandboxExists);
        }
        self.check_id(&request.sandbox_id)?;
        let config = SandboxConfig::from_options(request.options.as_ref())
            .map_err(|error| TaskError::Request(error.to_string()))?;
        let cgroup = match config.cgroup_parent.as_str() {
            "" => None,
            parent => Some(cgroup_of(parent, self.pod.id.as_str())?),
        };
        self.pod.sandbox.create()?;
        let netns = network::meant_by(Path::new(&request.netns_path));
        self.pod.launch(Ok(Shape {
            limits: config.limits,
            cgroup,
            oom_score: None,
            netns,
            annotations: config.annotations.clone(),
            namespaces: config.users.is_some().then(|| config.namespaces()),
        }));
        match self.furnish(&config, request.options.is_some()) {
            Ok(()) => *self.requested() = Requested { netns_path: request.netns_path, pod: config },
            Err(error) => {
                self.pod.sandbox.stop(KILLED, SystemTime::now());
                return Err(error);
            }
        }
        let vm = self.pod.vm()?.clone();
        let pod = self.pod.clone();
        tokio::spawn(async move {
            vm.ended().await;
            pod.sandbox.stop(KILLED, SystemTime::now());
        });
        Ok(())
    }

    /// Makes what is needed of the host besides the VM, whose shared directory is there as soon as it is started.
    fn furnish(&self, config: &SandboxConfig, with_files: bool) -> Result<(), TaskError> {
        self.pod.vm()?;
        if !with_files {
            return Ok(());
        }
        let place = self.pod.dir.shared().join(self.pod.id.as_str());
        files::write(&place, config).map_err(|error| {
            log::error!("the pod's files in /etc cannot be written: {error}");
            TaskError::Internal("write the pod's files")
        })
    }
}

/// The cgroup of a pod below the one that its pods share, in the manner in which that one is named.
fn cgroup_of(parent: &str, id: &str) -> Result<Cgroup, TaskError> {
    let name = match parent.rsplit('/').next().filter(|last| last.ends_with(".slice")) {
        Some(slice) => format!("{slice}:vmshim:{id}"),
        None => format!("{}/{id}", parent.trim_end_matches('/')),
    };
    Cgroup::locate(&name).map_err(|error| TaskError::Request(error.to_string()))
}

/// Has the guest make what containers of the pod will share; that it answers says that it is up.
async fn start(pod: Arc<Pod>, config: SandboxConfig, deadline: Instant) -> Result<SystemTime, TaskError> {
    let vm = pod.vm()?.clone();
    let request = config.namespaces();
    pod.in_guest(&vm, vm.agent().set_up_pod(&request, deadline)).await?;
    let since = SystemTime::now();
    pod.sandbox.ready(since)?;
    Ok(since)
}

/// Ends the VM; its disks are written back first, if the guest does so in time.
async fn stop(pod: Arc<Pod>) -> Result<(), TaskError> {
    if let Some(vm) = pod.living_vm().cloned() {
        pod.sandbox.stop(0, SystemTime::now());
        let deadline = Instant::now() + POWER_OFF_LIMIT;
        // The answer may be lost with the guest; its end is what counts.
        let _ = vm.agent().power_off(&api::Empty::default(), deadline).await;
        let _ = tokio::time::timeout_at(deadline, vm.ended()).await;
    }
    pod.stop_vm().await;
    Ok(())
}

/// Carries a call through even if its caller goes away.
async fn detached<T: Send + 'static>(
    what: &'static str,
    call: impl Future<Output = Result<T, TaskError>> + Send + 'static,
) -> Result<T, TaskError> {
    tokio::spawn(call).await.unwrap_or(Err(TaskError::Internal(what)))
}

#[async_trait]
impl Sandbox for Service {
    async fn create_sandbox(
        &self,
        _: &TtrpcContext,
        request: CreateSandboxRequest,
    ) -> ttrpc::Result<CreateSandboxResponse> {
        self.create(request)?;
        Ok(CreateSandboxResponse::default())
    }

    async fn start_sandbox(
        &self,
        context: &TtrpcContext,
        request: StartSandboxRequest,
    ) -> ttrpc::Result<StartSandboxResponse> {
        self.check_id(&request.sandbox_id)?;
        self.pod.sandbox.begin_start()?;
        let config = std::mem::take(&mut self.requested().pod);
        let (pod, deadline) = (self.pod.clone(), self.pod.deadline(context.timeout_nano));
        let started = detached("start the sandbox", async move {
            let started = start(pod.clone(), config, deadline).await;
            if started.is_err() {
                pod.sandbox.stop(KILLED, SystemTime::now());
                pod.stop_vm().await;
            }
            started
        });
        let since = started.await?;
        Ok(StartSandboxResponse {
            pid: self.pod.task_pid(),
            created_at: MessageField::some(since.into()),
            ..StartSandboxResponse::default()
        })
    }

    async fn platform(&self, _: &TtrpcContext, request: PlatformRequest) -> ttrpc::Result<PlatformResponse> {
        self.check_id(&request.sandbox_id)?;
        let mut response = PlatformResponse::default();
        let platform = response.platform.mut_or_insert_default();
        "linux".clone_into(&mut platform.os);
        "amd64".clone_into(&mut platform.architecture);
        Ok(response)
    }

    async fn stop_sandbox(
        &self,
        _: &TtrpcContext,
        request: StopSandboxRequest,
    ) -> ttrpc::Result<StopSandboxResponse> {
        self.check_id(&request.sandbox_id)?;
        detached("stop the sandbox", stop(self.pod.clone())).await?;
        Ok(StopSandboxResponse::default())
    }

    async fn wait_sandbox(
        &self,
        _: &TtrpcContext,
        request: WaitSandboxRequest,
    ) -> ttrpc::Result<WaitSandboxResponse> {
        self.check_id(&request.sandbox_id)?;
        let (exit_status, at) = self.pod.sandbox.stopped().await?;
        Ok(WaitSandboxResponse {
            exit_status,
            exited_at: MessageField::some(at.into()),
            ..WaitSandboxResponse::default()
        })
    }

    async fn sandbox_status(
        &self,
        _: &TtrpcContext,
        request: SandboxStatusRequest,
    ) -> ttrpc::Result<SandboxStatusResponse> {
        self.check_id(&request.sandbox_id)?;
        let stage = self.pod.sandbox.stage();
        let (state, since, ended) = match stage {
            Stage::Absent => return Err(TaskError::NoSandbox.into()),
            Stage::Ready { since } => ("SANDBOX_READY", Some(since), None),
            Stage::Created | Stage::Starting => ("SANDBOX_NOTREADY", None, None),
            Stage::Stopped { since, at, .. } => ("SANDBOX_NOTREADY", since, Some(at)),
        };
        let pid = self.pod.task_pid();
        let mut info = HashMap::new();
        if request.verbose {
            info.insert("pid".to_owned(), pid.to_string());
            info.insert("state".to_owned(), stage.name().to_owned());
            info.insert("networkSandboxPath".to_owned(), self.requested().netns_path.clone());
        }
        Ok(SandboxStatusResponse {
            sandbox_id: request.sandbox_id,
            pid,
            state: state.to_owned(),
            info,
            created_at: since.map(Into::into).into(),
            exited_at: ended.map(Into::into).into(),
            ..SandboxStatusResponse::default()
        })
    }

    async fn ping_sandbox(&self, _: &TtrpcContext, request: PingRequest) -> ttrpc::Result<PingResponse> {
        self.check_id(&request.sandbox_id)?;
        self.pod.vm()?;
        Ok(PingResponse::default())
    }

    async fn shutdown_sandbox(
        &self,
        _: &TtrpcContext,
        request: ShutdownSandboxRequest,
    ) -> ttrpc::Result<ShutdownSandboxResponse> {
        self.check_id(&request.sandbox_id)?;
        detached("stop the sandbox", stop(self.pod.clone())).await?;
        self.pod.request_shutdown();
        Ok(ShutdownSandboxResponse::default())
    }

    async fn sandbox_metrics(
        &self,
        context: &TtrpcContext,
        request: SandboxMetricsRequest,
    ) -> ttrpc::Result<SandboxMetricsResponse> {
        self.check_id(&request.sandbox_id)?;
        let vm = self.pod.vm()?;
        let deadline = self.pod.deadline(context.timeout_nano);
        let all = api::ContainerRequest::default();
        let stats = self.pod.in_guest(vm, vm.agent().stats(&all, deadline)).await?;
        let mut response = SandboxMetricsResponse::default();
        let metrics = response.metrics.mut_or_insert_default();
        metrics.id = request.sandbox_id;
        metrics.timestamp = MessageField::some(SystemTime::now().into());
        let data = Any { type_url: METRICS_TYPE.to_owned(), value: stats.metrics, ..Any::default() };
        metrics.data = MessageField::some(data);
        Ok(response)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pods_cgroup_is_named_as_its_parent_is() {
        let path = |parent| cgroup_of(parent, "x").unwrap().directories().first().cloned();
        let ends = |parent, end: &str| path(parent).is_none_or(|path| path.ends_with(end));
        assert!(ends("/kubepods/pod1/", "kubepods/pod1/x"));
        assert!(ends("/kubepods.slice/kubepods-pod1.slice", "kubepods-pod1.slice/vmshim-x.scope"));
        assert!(cgroup_of("../..", "x").is_err());
    }
}
