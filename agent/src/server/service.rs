//! Each request, checked and handed on.

use crate::boot::{Readiness, cpus};
use crate::containers::{Containers, request_size};
use crate::failure::{Failure, Kind};
use crate::machine::Machine;
use crate::power;
use std::sync::Arc;
use ttrpc::Code;
use ttrpc::r#async::TtrpcContext;
use ttrpc::error::get_rpc_status;
use vmshim_protocol::agent::{
    Agent, ConfigureNetworkRequest, ConnectSocketRequest, ConnectTcpRequest, ContainerRequest,
    CreateContainerRequest, Empty, Event, ExecProcessRequest, GuestProcess, HostListeningRequest,
    ListProcessesResponse, ProcessCreated, ProcessRequest, ResizePtyRequest, SetUpPodRequest,
    SignalProcessRequest, StatsResponse, TakeUpRequest, TransferFilesRequest, UpdateContainerRequest,
};

/// The service.
pub struct Service {
    containers: Arc<Containers>,
    ready: Readiness,
    machine: Machine,
}

impl Service {
    /// Serves these containers once the guest is ready for them.
    pub fn new(containers: Arc<Containers>, ready: Readiness) -> Self {
        Self { containers, ready, machine: Machine::default() }
    }
}

impl From<Failure> for ttrpc::Error {
    fn from(failure: Failure) -> Self {
        let code = match failure.kind {
            Kind::NotFound => Code::NOT_FOUND,
            Kind::AlreadyExists => Code::ALREADY_EXISTS,
            Kind::FailedPrecondition => Code::FAILED_PRECONDITION,
            Kind::InvalidArgument => Code::INVALID_ARGUMENT,
            Kind::Unimplemented => Code::UNIMPLEMENTED,
            Kind::DeadlineExceeded => Code::DEADLINE_EXCEEDED,
            Kind::Internal => Code::INTERNAL,
        };
        get_rpc_status(code, failure.message)
    }
}

fn created(pid: u32) -> ProcessCreated {
    ProcessCreated { pid, ..Default::default() }
}

#[async_trait::async_trait]
impl Agent for Service {
    async fn set_up_pod(&self, _: &TtrpcContext, request: SetUpPodRequest) -> ttrpc::Result<Empty> {
        self.containers.set_up_pod(request).await?;
        Ok(Empty::new())
    }

    async fn create_container(
        &self,
        _: &TtrpcContext,
        request: CreateContainerRequest,
    ) -> ttrpc::Result<ProcessCreated> {
        self.ready.mounts().await;
        Ok(created(self.containers.create(request).await?))
    }

    async fn exec_process(
        &self,
        _: &TtrpcContext,
        request: ExecProcessRequest,
    ) -> ttrpc::Result<ProcessCreated> {
        Ok(created(self.containers.exec(request).await?))
    }

    async fn start_process(
        &self,
        _: &TtrpcContext,
        request: ProcessRequest,
    ) -> ttrpc::Result<ProcessCreated> {
        // A program counts the CPUs when it begins.
        self.ready.cpus().await;
        Ok(created(self.containers.start(&request.container_id, &request.exec_id).await?))
    }

    async fn signal_process(&self, _: &TtrpcContext, request: SignalProcessRequest) -> ttrpc::Result<Empty> {
        let container = self.containers.get(&request.container_id)?;
        let signal = i32::try_from(request.signal)
            .map_err(|_| Failure::new(Kind::InvalidArgument, format!("{} is no signal", request.signal)))?;
        if request.all {
            container.signal_all(signal)?;
        } else {
            container.signal(&request.exec_id, signal)?;
        }
        Ok(Empty::new())
    }

    async fn resize_pty(&self, _: &TtrpcContext, request: ResizePtyRequest) -> ttrpc::Result<Empty> {
        let process = self.containers.get(&request.container_id)?.process(&request.exec_id)?;
        let size = request_size(request.width, request.height)?;
        process.resize(size).map_err(|error| {
            Failure::new(
                Kind::Internal,
                format!("set the terminal's size: {}", crate::failure::describe(&error)),
            )
        })?;
        Ok(Empty::new())
    }

    async fn delete_process(&self, _: &TtrpcContext, request: ProcessRequest) -> ttrpc::Result<Empty> {
        self.containers.delete(&request.container_id, &request.exec_id).await?;
        Ok(Empty::new())
    }

    async fn list_processes(
        &self,
        _: &TtrpcContext,
        request: ContainerRequest,
    ) -> ttrpc::Result<ListProcessesResponse> {
        let processes = self.containers.get(&request.container_id)?.list()?;
        let processes = processes.into_iter().map(|process| GuestProcess {
            pid: process.pid,
            exec_id: process.exec_id,
            ..Default::default()
        });
        Ok(ListProcessesResponse { processes: processes.collect(), ..Default::default() })
    }

    async fn stats(&self, _: &TtrpcContext, request: ContainerRequest) -> ttrpc::Result<StatsResponse> {
        let metrics = match request.container_id.as_str() {
            "" => self.containers.stats().await?,
            id => self.containers.get(id)?.stats().await?,
        };
        Ok(StatsResponse { metrics, ..Default::default() })
    }

    async fn update_container(
        &self,
        _: &TtrpcContext,
        request: UpdateContainerRequest,
    ) -> ttrpc::Result<Empty> {
        self.containers.get(&request.container_id)?.update(&request.resources).await?;
        Ok(Empty::new())
    }

    async fn take_up(&self, _: &TtrpcContext, request: TakeUpRequest) -> ttrpc::Result<Empty> {
        self.ready.cpus().await;
        self.machine.take_up(request.cpus).await?;
        Ok(Empty::new())
    }

    async fn pause_container(&self, _: &TtrpcContext, request: ContainerRequest) -> ttrpc::Result<Empty> {
        self.containers.get(&request.container_id)?.freeze(true).await?;
        Ok(Empty::new())
    }

    async fn resume_container(&self, _: &TtrpcContext, request: ContainerRequest) -> ttrpc::Result<Empty> {
        self.containers.get(&request.container_id)?.freeze(false).await?;
        Ok(Empty::new())
    }

    async fn connect_socket(&self, _: &TtrpcContext, request: ConnectSocketRequest) -> ttrpc::Result<Empty> {
        self.containers.connect_socket(request.connection, request.port).await?;
        Ok(Empty::new())
    }

    async fn configure_network(
        &self,
        _: &TtrpcContext,
        request: ConfigureNetworkRequest,
    ) -> ttrpc::Result<Empty> {
        if cpus::are_several() {
            // An interface uses as many queues as there are CPUs.
            self.ready.cpus().await;
        }
        let servers = crate::network::configure(request, self.containers.home()?).await?;
        self.containers.host_network().stand_in(servers)?;
        Ok(Empty::new())
    }

    async fn connect_tcp(&self, _: &TtrpcContext, request: ConnectTcpRequest) -> ttrpc::Result<Empty> {
        self.containers.host_network().check_inward(&request)?;
        crate::network::connect(&request, self.containers.home()?).await?;
        Ok(Empty::new())
    }

    async fn share_host_network(&self, _: &TtrpcContext, _: Empty) -> ttrpc::Result<Empty> {
        self.ready.cpus().await;
        self.containers.host_network().share().await?;
        Ok(Empty::new())
    }

    async fn host_listening(&self, _: &TtrpcContext, request: HostListeningRequest) -> ttrpc::Result<Empty> {
        self.containers.host_network().answered(request.id, request.errno)?;
        Ok(Empty::new())
    }

    async fn transfer_files(&self, _: &TtrpcContext, request: TransferFilesRequest) -> ttrpc::Result<Empty> {
        self.containers.carry_files(request).await?;
        Ok(Empty::new())
    }

    async fn events(
        &self,
        _: &TtrpcContext,
        _: Empty,
        stream: ttrpc::r#async::ServerStreamSender<Event>,
    ) -> ttrpc::Result<()> {
        let stream = &stream;
        self.containers.events().listen(|event| async move { stream.send(&event).await.is_ok() }).await;
        Ok(())
    }

    async fn power_off(&self, _: &TtrpcContext, _: Empty) -> ttrpc::Result<Empty> {
        let containers = self.containers.clone();
        // After this answer, so that it has a chance to arrive.
        tokio::spawn(async move {
            containers.quiesce().await;
            power::off()
        });
        Ok(Empty::new())
    }
}
