//! The Sandbox service in front of a guest that the tests play.

use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use containerd_shim_protos::sandbox_api::{
    CreateSandboxRequest, ShutdownSandboxRequest, StartSandboxRequest, StopSandboxRequest, WaitSandboxRequest,
};
use containerd_shim_protos::sandbox_api::{SandboxStatusRequest, SandboxStatusResponse};
use containerd_shim_protos::sandbox_async::SandboxClient;
use tokio::sync::watch;
use ttrpc::Code;
use ttrpc::asynchronous::{Client, Server, TtrpcContext};
use ttrpc::context::{Context, with_duration};
use vmshim_protocol::agent as api;
use vmshim_protocol::control::Outcome;

use super::services;
use crate::events::Publisher;
use crate::ids::Name;
use crate::state::PodDir;
use crate::task::Pod;
use crate::vm::{End, Vm};

type Ending = watch::Sender<Option<Arc<End>>>;

/// A guest that does as it is told.
struct Guest(Ending);

#[async_trait]
impl api::Agent for Guest {
    async fn set_up_pod(&self, _: &TtrpcContext, _: api::SetUpPodRequest) -> ttrpc::Result<api::Empty> {
        Ok(api::Empty::default())
    }

    async fn power_off(&self, _: &TtrpcContext, _: api::Empty) -> ttrpc::Result<api::Empty> {
        self.0.send_replace(Some(Arc::new(End::from_outcome(Outcome::PoweredOff, Vec::new()))));
        Ok(api::Empty::default())
    }
}

struct Stage {
    pod: Arc<Pod>,
    client: SandboxClient,
    end: Ending,
    _servers: [Server; 2],
    _directory: tempfile::TempDir,
}

/// A pod whose sandbox is called `pod`.
async fn stage() -> Stage {
    let directory = tempfile::tempdir().unwrap();
    let address = |name: &str| format!("unix://{}", directory.path().join(name).display());
    let (end, end_receiver) = watch::channel(None);
    let guest = api::create_agent(Arc::new(Guest(end.clone())));
    let mut agent = Server::new().bind(&address("agent")).unwrap().register_service(guest);
    agent.start().await.unwrap();
    let stream = UnixStream::connect(directory.path().join("agent")).unwrap();
    // The VMM's end of the control socket is dropped, so nobody waits for it.
    let (vm, _) = Vm::played(stream, end_receiver);
    let name = Name::new("pod").unwrap();
    let pod = Pod::around(vm, Publisher::new("ns", None), PodDir::new(directory.path(), &name, &name));
    let mut server = Server::new().bind(&address("shim")).unwrap().register_service(services(&pod));
    server.start().await.unwrap();
    let client = SandboxClient::new(Client::connect(&address("shim")).await.unwrap());
    Stage { pod, client, end, _servers: [agent, server], _directory: directory }
}

fn soon() -> Context {
    with_duration(Duration::from_secs(10))
}

fn code<T: std::fmt::Debug>(result: ttrpc::Result<T>) -> Code {
    match result.unwrap_err() {
        ttrpc::Error::RpcStatus(status) => status.code(),
        other => panic!("not a status: {other}"),
    }
}

impl Stage {
    async fn create(&self, id: &str) -> ttrpc::Result<()> {
        let request = CreateSandboxRequest {
            sandbox_id: id.into(),
            netns_path: "/nowhere".into(),
            ..CreateSandboxRequest::default()
        };
        self.client.create_sandbox(soon(), &request).await.map(drop)
    }

    async fn start(&self) -> ttrpc::Result<u32> {
        let request = StartSandboxRequest { sandbox_id: "pod".into(), ..StartSandboxRequest::default() };
        Ok(self.client.start_sandbox(soon(), &request).await?.pid)
    }

    async fn stop(&self) {
        let request = StopSandboxRequest { sandbox_id: "pod".into(), ..StopSandboxRequest::default() };
        self.client.stop_sandbox(soon(), &request).await.unwrap();
    }

    async fn status(&self) -> ttrpc::Result<SandboxStatusResponse> {
        let request = SandboxStatusRequest {
            sandbox_id: "pod".into(),
            verbose: true,
            ..SandboxStatusRequest::default()
        };
        self.client.sandbox_status(soon(), &request).await
    }

    async fn exit_status(&self) -> u32 {
        let request = WaitSandboxRequest { sandbox_id: "pod".into(), ..WaitSandboxRequest::default() };
        self.client.wait_sandbox(soon(), &request).await.unwrap().exit_status
    }
}

#[tokio::test]
async fn a_sandbox_lives_from_its_start_to_its_stop() {
    let stage = stage().await;
    assert_eq!(code(stage.start().await), Code::FAILED_PRECONDITION);
    assert_eq!(code(stage.status().await), Code::FAILED_PRECONDITION);
    assert_eq!(code(stage.create("other").await), Code::NOT_FOUND);
    stage.create("pod").await.unwrap();
    assert_eq!(code(stage.create("other").await), Code::ALREADY_EXISTS);
    assert_eq!(stage.start().await.unwrap(), stage.pod.task_pid());
    let status = stage.status().await.unwrap();
    assert_eq!(status.state, "SANDBOX_READY");
    assert_eq!(status.info["networkSandboxPath"], "/nowhere");
    assert!(status.created_at.is_some() && status.exited_at.is_none());
    stage.stop().await;
    stage.stop().await;
    assert_eq!(stage.status().await.unwrap().state, "SANDBOX_NOTREADY");
    assert_eq!(stage.exit_status().await, 0);
    let request = ShutdownSandboxRequest { sandbox_id: "pod".into(), ..ShutdownSandboxRequest::default() };
    stage.client.shutdown_sandbox(soon(), &request).await.unwrap();
    tokio::time::timeout(Duration::from_secs(5), stage.pod.shutdown_requested()).await.unwrap();
}

#[tokio::test]
async fn a_guest_that_dies_ends_its_sandbox() {
    let stage = stage().await;
    stage.create("pod").await.unwrap();
    stage.start().await.unwrap();
    stage.end.send_replace(Some(Arc::new(End::from_outcome(Outcome::Panicked, Vec::new()))));
    assert_eq!(stage.exit_status().await, 137);
    assert_eq!(stage.status().await.unwrap().state, "SANDBOX_NOTREADY");
}
