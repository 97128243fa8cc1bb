//! The Task service in front of a guest, a VMM and a daemon that the tests play.

use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use containerd_shim_protos::api::{Empty, ExecProcessRequest, ForwardRequest};
use containerd_shim_protos::events::task::TaskExit;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{Message, MessageField};
use containerd_shim_protos::shim_async::{Events, create_events};
use tokio::sync::{Notify, mpsc, watch};
use tokio::time::{Instant, timeout};
use ttrpc::asynchronous::{Server, ServerStreamSender, TtrpcContext};
use vmshim_protocol::agent as api;
use vmshim_protocol::control::{ControlSocket, Outcome};

use super::container::Container;
use super::pod::Pod;
use super::process::{Exit, Phase, Process};
use super::{TaskError, delete, exec, signal};
use crate::events::Publisher;
use crate::ids::Name;
use crate::state::PodDir;
use crate::stdio::Streams;
use crate::vm::{End, Vm};

const SOON: Duration = Duration::from_secs(10);

/// What the guest is told to do.
#[derive(Default)]
struct Script {
    reports: Mutex<Option<mpsc::UnboundedReceiver<api::Event>>>,
    hang_on_signals: bool,
    /// Reported before StartProcess is answered.
    exit_before_start_is_answered: Option<mpsc::UnboundedSender<api::Event>>,
    start: Start,
}

/// What StartProcess comes to.
#[derive(Default, PartialEq)]
enum Start {
    #[default]
    Succeeds,
    Fails,
    Hangs,
}

#[async_trait]
impl api::Agent for Script {
    async fn start_process(
        &self,
        _: &TtrpcContext,
        request: api::ProcessRequest,
    ) -> ttrpc::Result<api::ProcessCreated> {
        if let Some(reports) = &self.exit_before_start_is_answered {
            let _ = reports.send(exited(&request.container_id, &request.exec_id, 0));
            // The report travels on another stream of the same connection; let it go first.
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        match self.start {
            Start::Succeeds => Ok(api::ProcessCreated::default()),
            Start::Fails => Err(ttrpc::Error::RpcStatus(ttrpc::get_status(ttrpc::Code::UNKNOWN, "no"))),
            Start::Hangs => std::future::pending().await,
        }
    }

    async fn exec_process(
        &self,
        _: &TtrpcContext,
        _: api::ExecProcessRequest,
    ) -> ttrpc::Result<api::ProcessCreated> {
        Ok(api::ProcessCreated::default())
    }

    async fn signal_process(
        &self,
        _: &TtrpcContext,
        _: api::SignalProcessRequest,
    ) -> ttrpc::Result<api::Empty> {
        if self.hang_on_signals {
            Notify::new().notified().await;
        }
        Ok(api::Empty::default())
    }

    async fn delete_process(&self, _: &TtrpcContext, _: api::ProcessRequest) -> ttrpc::Result<api::Empty> {
        Ok(api::Empty::default())
    }

    async fn events(
        &self,
        _: &TtrpcContext,
        _: api::Empty,
        sender: ServerStreamSender<api::Event>,
    ) -> ttrpc::Result<()> {
        let reports = self.reports.lock().unwrap().take();
        let Some(mut reports) = reports else { return Ok(()) };
        while let Some(event) = reports.recv().await {
            sender.send(&event).await?;
        }
        Ok(())
    }
}

fn exited(id: &str, exec_id: &str, status: u32) -> api::Event {
    let exit = api::ProcessExited {
        container_id: id.to_owned(),
        exec_id: exec_id.to_owned(),
        status,
        ..Default::default()
    };
    api::Event { event: Some(api::event::Event::Exited(exit)), ..Default::default() }
}

/// Writes down topics, for exits with the process's id.
#[derive(Clone, Default)]
struct Daemon(Arc<Mutex<Vec<String>>>);

#[async_trait]
impl Events for Daemon {
    async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
        let mut line = request.envelope.topic.clone();
        if line == "/tasks/exit" {
            let exit = TaskExit::parse_from_bytes(&request.envelope.event.value).unwrap();
            line = format!("{line} {} {}", exit.id, exit.exit_status);
        }
        self.0.lock().unwrap().push(line);
        Ok(Empty::default())
    }
}

struct Stage {
    pod: Arc<Pod>,
    daemon: Daemon,
    guest: mpsc::UnboundedSender<api::Event>,
    end: watch::Sender<Option<Arc<End>>>,
    _vmm: ControlSocket,
    _servers: [Server; 2],
    _directory: tempfile::TempDir,
}

/// A pod with one created container, `c`.
async fn stage(prepare: impl FnOnce(&mut Script, &mpsc::UnboundedSender<api::Event>)) -> Stage {
    let directory = tempfile::tempdir().unwrap();
    let address = |name: &str| format!("unix://{}", directory.path().join(name).display());
    let (guest, reports) = mpsc::unbounded_channel();
    let mut script = Script { reports: Mutex::new(Some(reports)), ..Script::default() };
    prepare(&mut script, &guest);
    let mut agent =
        Server::new().bind(&address("agent")).unwrap().register_service(api::create_agent(Arc::new(script)));
    agent.start().await.unwrap();
    let daemon = Daemon::default();
    let events = create_events(Arc::new(daemon.clone()));
    let mut server = Server::new().bind(&address("daemon")).unwrap().register_service(events);
    server.start().await.unwrap();

    let (end, end_receiver) = watch::channel(None);
    let stream = UnixStream::connect(directory.path().join("agent")).unwrap();
    let (vm, vmm) = Vm::played(stream, end_receiver);
    let name = Name::new("c").unwrap();
    let dir = PodDir::new(directory.path(), &name, &name);
    let pod = Pod::around(vm, Publisher::new("ns", Some(address("daemon"))), dir);
    let init = Process::new(String::new(), Streams::default(), Phase::Created);
    pod.add(&Arc::new(Container::new(name, PathBuf::from("/bundle"), init))).unwrap();
    Stage { pod, daemon, guest, end, _vmm: vmm, _servers: [agent, server], _directory: directory }
}

impl Stage {
    async fn start(&self, exec_id: &str) -> Result<u32, TaskError> {
        exec::start(&self.pod, "c", exec_id, Instant::now() + SOON).await
    }

    fn add_exec(&self, exec_id: &str) -> Result<(), TaskError> {
        let spec = Any { value: br#"{"args":["a"]}"#.to_vec(), ..Any::default() };
        exec::add(
            &self.pod,
            ExecProcessRequest {
                id: "c".into(),
                exec_id: exec_id.into(),
                spec: MessageField::some(spec),
                ..ExecProcessRequest::default()
            },
        )
    }

    fn process(&self, exec_id: &str) -> Arc<Process> {
        self.pod.container("c").unwrap().process(exec_id).unwrap()
    }

    async fn exit_of(&self, exec_id: &str) -> Exit {
        let process = self.process(exec_id);
        timeout(SOON, process.exited()).await.unwrap()
    }

    async fn delete(&self, exec_id: &str) -> Result<Exit, TaskError> {
        delete::delete(&self.pod, "c", exec_id, Instant::now() + SOON).await
    }

    async fn published(&self) -> Vec<String> {
        self.pod.events.flush(SOON).await;
        self.daemon.0.lock().unwrap().clone()
    }
}

#[tokio::test]
async fn the_inits_exit_is_the_last_to_be_told() {
    let stage = stage(|_, _| {}).await;
    stage.start("").await.unwrap();
    stage.add_exec("e").unwrap();
    stage.start("e").await.unwrap();
    stage.guest.send(exited("c", "", 3)).unwrap();
    stage.guest.send(exited("c", "", 3)).unwrap();
    stage.guest.send(exited("nobody", "", 3)).unwrap();
    stage.guest.send(exited("c", "e", 137)).unwrap();
    assert_eq!(stage.exit_of("").await.status, 3);
    assert_eq!(stage.delete("e").await.unwrap().status, 137);
    assert_eq!(stage.delete("").await.unwrap().status, 3);
    assert!(matches!(stage.delete("").await, Err(TaskError::NoContainer(_))));
    assert_eq!(
        stage.published().await,
        [
            "/tasks/start",
            "/tasks/exec-added",
            "/tasks/exec-started",
            "/tasks/exit e 137",
            "/tasks/exit c 3",
            "/tasks/delete"
        ]
    );
}

#[tokio::test]
async fn an_exit_that_overtakes_its_start_is_told_after_it() {
    let stage = stage(|script, guest| script.exit_before_start_is_answered = Some(guest.clone())).await;
    stage.start("").await.unwrap();
    assert_eq!(stage.exit_of("").await.status, 0);
    assert_eq!(stage.published().await, ["/tasks/start", "/tasks/exit c 0"]);
}

#[tokio::test]
async fn a_guest_that_hangs_keeps_nobody_who_signals() {
    let stage = stage(|script, _| script.hang_on_signals = true).await;
    stage.start("").await.unwrap();
    let before = SystemTime::now();
    signal::kill(&stage.pod, "c", "", 15, false).await.unwrap();
    assert!(before.elapsed().unwrap() < Duration::from_secs(2));
    assert_eq!(stage.process("").phase(), Phase::Running);
}

#[tokio::test]
async fn with_the_vm_everything_ends_and_the_next_call_says_why() {
    let stage = stage(|_, _| {}).await;
    stage.start("").await.unwrap();
    stage.add_exec("e").unwrap();
    stage.start("e").await.unwrap();
    let console = vec!["Kernel panic".to_owned()];
    stage.end.send_replace(Some(Arc::new(End::from_outcome(Outcome::Panicked, console))));
    assert_eq!(stage.exit_of("").await.status, 137);
    assert_eq!(stage.published().await[3..], ["/tasks/exit e 137", "/tasks/exit c 137"]);
    let error = stage.start("").await.unwrap_err().to_string();
    assert!(error.contains("Kernel panic"), "{error}");
    stage.delete("e").await.unwrap();
    stage.delete("").await.unwrap();
}

#[tokio::test]
async fn calls_in_the_wrong_phase_are_refused_by_name() {
    let stage = stage(|_, _| {}).await;
    stage.start("").await.unwrap();
    assert_eq!(stage.start("").await.unwrap_err().to_string(), "cannot start a running process");
    assert_eq!(stage.delete("").await.unwrap_err().to_string(), "cannot delete a running process");
    stage.add_exec("e").unwrap();
    assert!(matches!(stage.add_exec("e"), Err(TaskError::ExecExists(_))));
    assert!(matches!(signal::kill(&stage.pod, "c", "e", 9, false).await, Err(TaskError::WrongPhase { .. })));
    assert!(matches!(
        signal::kill(&stage.pod, "c", "none", 9, false).await,
        Err(TaskError::NoProcess { .. })
    ));
    stage.guest.send(exited("c", "", 0)).unwrap();
    stage.exit_of("").await;
    assert!(matches!(signal::kill(&stage.pod, "c", "", 9, false).await, Err(TaskError::Finished)));
    assert_eq!(stage.start("e").await.unwrap_err().to_string(), "cannot exec in a stopped process");
}

#[tokio::test]
async fn a_container_that_waits_for_its_start_takes_execs() {
    let stage = stage(|_, _| {}).await;
    stage.add_exec("e").unwrap();
    stage.start("e").await.unwrap();
    assert_eq!(stage.process("").phase(), Phase::Created);
    assert_eq!(stage.published().await, ["/tasks/exec-added", "/tasks/exec-started"]);
}

#[tokio::test]
async fn the_vms_end_during_start_is_the_inits_end() {
    let stage = stage(|script, _| script.start = Start::Hangs).await;
    let (started, ()) = tokio::join!(stage.start(""), async {
        while stage.process("").phase() != Phase::Starting {
            tokio::task::yield_now().await;
        }
        stage.end.send_replace(Some(Arc::new(End::from_outcome(Outcome::Panicked, Vec::new()))));
    });
    assert!(matches!(started, Err(TaskError::VmEnded(_))));
    assert_eq!(stage.exit_of("").await.status, 137);
    assert_eq!(stage.delete("").await.unwrap().status, 137);
    assert_eq!(stage.published().await, ["/tasks/exit c 137", "/tasks/delete"]);
}

#[tokio::test]
async fn an_init_that_dies_of_its_start_has_exited() {
    for before_the_answer in [true, false] {
        let stage = stage(|script, guest| {
            script.start = Start::Fails;
            script.exit_before_start_is_answered = before_the_answer.then(|| guest.clone());
        })
        .await;
        stage.start("").await.unwrap_err();
        if !before_the_answer {
            stage.guest.send(exited("c", "", 0)).unwrap();
        }
        assert_eq!(stage.exit_of("").await.status, 0);
        stage.delete("").await.unwrap();
    }
}

#[tokio::test]
async fn nobody_waits_for_an_exec_that_cannot_start() {
    let stage = stage(|script, _| script.start = Start::Fails).await;
    stage.add_exec("e").unwrap();
    let (exit, started) = tokio::join!(stage.exit_of("e"), stage.start("e"));
    assert!(started.is_err());
    assert_eq!(exit.status, 255);
    stage.delete("e").await.unwrap();
    assert_eq!(stage.published().await, ["/tasks/exec-added"]);
}
