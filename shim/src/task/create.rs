//! Create: from a bundle to a container in the guest that waits for Start.

use std::path::PathBuf;
use std::sync::Arc;

use containerd_shim_protos::api::CreateTaskRequest;
use containerd_shim_protos::events::task::{TaskCreate, TaskIO};
use containerd_shim_protos::protobuf::MessageField;
use tokio::time::{Instant, timeout_at};
use vmshim_protocol::agent as api;

use super::TaskError;
use super::container::{Container, HostStorage};
use super::exits;
use super::pod::Pod;
use super::process::{Phase, Process};
use crate::config::RuntimeOptions;
use crate::ids::Name;
use crate::oci::{Spec, for_guest};
use crate::stdio::{Opened, Streams};
use crate::storage::{Disk, MountRequest, Rootfs, Staging};
use crate::timeline::{self, Mark};
use crate::vm::{Closed, Port, Vm};
use vmshim_protocol::control::FdRole;

/// Creates a container. When it fails, nothing of it is left in guest or host.
///
/// # Errors
/// What is wrong with the request, or what went wrong.
pub async fn create(pod: &Arc<Pod>, request: CreateTaskRequest, deadline: Instant) -> Result<u32, TaskError> {
    timeline::pass(Mark::CreateCalled);
    let id = Name::new(&request.id)?;
    if !request.checkpoint.is_empty() {
        return Err(TaskError::Unsupported("restoring a checkpoint"));
    }
    if let Some(options) = request.options.as_ref() {
        RuntimeOptions::from_any(options)?;
    }
    let vm = pod.vm()?.clone();
    let streams = Streams {
        stdin: request.stdin.clone(),
        stdout: request.stdout.clone(),
        stderr: request.stderr.clone(),
        terminal: request.terminal,
    };
    let init = Process::new(String::new(), streams, Phase::Creating);
    let container = Arc::new(Container::new(id, PathBuf::from(&request.bundle), init));
    pod.add(&container)?;
    log::debug!("container {} is asked for", container.id);
    let built = timeout_at(deadline, build(pod, &vm, &container, &request, deadline)).await;
    if let Err(error) = built.unwrap_or(Err(TaskError::Deadline("creating the container"))) {
        roll_back(pod, &container).await;
        return Err(error);
    }
    container
        .init
        .advance(Phase::Creating, Phase::Created)
        .map_err(|_| TaskError::Internal("create a process"))?;
    log::debug!("container {} is created", container.id);
    pod.events.publish(&task_create(pod, &request));
    timeline::pass(Mark::Created);
    exits::apply_early_exit(pod, &container, &container.init);
    Ok(pod.task_pid())
}

async fn build(
    pod: &Pod,
    vm: &Arc<Vm>,
    container: &Arc<Container>,
    request: &CreateTaskRequest,
    deadline: Instant,
) -> Result<(), TaskError> {
    let mut spec = Spec::read(&container.bundle)?;
    let binds = for_guest(&mut spec, &container.bundle, &container.id)?;
    let root = spec.root_path(&container.bundle);
    let mount = MountRequest::parse(&request.rootfs)?;
    let spec = serde_json::to_vec(&spec).map_err(|_| TaskError::Internal("encode a spec"))?;

    let mut staging = Staging::new(&pod.dir.shared(), &container.id);
    let streams = container.init.streams.clone();
    let (namespace, id) = (pod.namespace.to_string(), container.id.to_string());
    let (staging, rootfs, opened) = blocking("prepare storage", move || {
        let rootfs = staging.stage(mount, &root, &binds);
        let opened = rootfs.is_ok().then(|| streams.open(&namespace, &id));
        (staging, rootfs, opened)
    })
    .await?;
    let disk = match rootfs {
        Ok(Rootfs::Shared) => Ok(None),
        Ok(Rootfs::Disk(disk)) => pod.slots.take().map(|slot| Some((slot, disk))),
        Err(error) => Err(error),
    };
    log::debug!("storage and stdio of container {} are ready", container.id);
    let (slot, disk) = match disk {
        Ok(disk) => disk.unzip(),
        Err(error) => {
            container.set_storage(HostStorage { staging, slot: None });
            return Err(error.into());
        }
    };
    let slot_number = slot.as_ref().map(crate::storage::Slot::number);
    container.set_storage(HostStorage { staging, slot });
    let rootfs = attach_rootfs(vm, &container.id, slot_number.zip(disk), deadline).await?;

    let opened = opened.transpose()?.unwrap_or_default();
    let stdio = connect(vm, &container.init, opened, deadline).await?;
    let request = api::CreateContainerRequest {
        container_id: container.id.to_string(),
        spec,
        rootfs: MessageField::some(rootfs),
        stdio: MessageField::some(stdio),
        ..Default::default()
    };
    pod.network_ready(vm).await?;
    pod.in_guest(vm, vm.agent().create_container(&request, deadline)).await.map(drop)
}

async fn attach_rootfs(
    vm: &Vm,
    id: &Name,
    disk: Option<(u8, Disk)>,
    deadline: Instant,
) -> Result<api::RootFilesystem, TaskError> {
    use std::os::fd::AsFd;
    use vmshim_protocol::agent::root_filesystem::Source;
    let Some((slot, disk)) = disk else {
        return Ok(api::RootFilesystem {
            source: Some(Source::Shared(format!("{id}/rootfs"))),
            ..Default::default()
        });
    };
    vm.attach_disk(slot, disk.file.as_fd(), disk.read_only, deadline).await?;
    let disk = api::Disk {
        slot: slot.into(),
        filesystem: disk.filesystem.to_owned(),
        options: disk.options,
        ..Default::default()
    };
    Ok(api::RootFilesystem { source: Some(Source::Disk(disk)), ..Default::default() })
}

/// Gives the opened streams to the VMM, each on a port of its own, and what is kept to the process.
///
/// # Errors
/// When the VMM does not take one; then none stays.
pub async fn connect(
    vm: &Vm,
    process: &Process,
    opened: Opened,
    deadline: Instant,
) -> Result<api::Stdio, TaskError> {
    let terminal = process.streams.terminal;
    let source = opened.stdin.as_ref().map(|fd| (FdRole::StreamSource, fd));
    let sink = opened.stdout.as_ref().map(|fd| (FdRole::StreamSink, fd));
    let errors = opened.stderr.as_ref().map(|fd| (FdRole::StreamSink, fd));
    // A terminal is one stream that carries both directions.
    let groups = if terminal {
        [Vec::new(), source.into_iter().chain(sink).collect(), Vec::new()]
    } else {
        [source.into_iter().collect::<Vec<_>>(), sink.into_iter().collect(), errors.into_iter().collect()]
    };
    let [stdin, stdout, stderr] = groups;
    let (stdin, stdout, stderr) = tokio::join!(
        expect(vm, &stdin, deadline),
        expect(vm, &stdout, deadline),
        expect(vm, &stderr, deadline)
    );
    let mut open: Vec<(Port, Closed)> = Vec::new();
    let mut failure = None;
    let mut numbers = [0; 3];
    for (number, result) in numbers.iter_mut().zip([stdin, stdout, stderr]) {
        match result {
            Ok(Some((port, closed))) => {
                *number = port.0;
                open.push((port, closed));
            }
            Ok(None) => {}
            Err(error) => failure = Some(error),
        }
    }
    process.connect(opened.kept, open);
    match failure {
        Some(error) => {
            forget(vm, process, deadline).await;
            Err(error)
        }
        None => Ok(api::Stdio {
            stdin: numbers[0],
            stdout: numbers[1],
            stderr: numbers[2],
            terminal,
            ..Default::default()
        }),
    }
}

async fn expect(
    vm: &Vm,
    fds: &[(FdRole, &std::os::fd::OwnedFd)],
    deadline: Instant,
) -> Result<Option<(Port, Closed)>, TaskError> {
    use std::os::fd::AsFd;
    if fds.is_empty() {
        return Ok(None);
    }
    let fds: Vec<_> = fds.iter().map(|(role, fd)| (*role, fd.as_fd())).collect();
    Ok(Some(vm.expect(&fds, deadline).await?))
}

/// Takes back every port of a process.
pub async fn forget(vm: &Vm, process: &Process, deadline: Instant) {
    for port in process.disconnect() {
        vm.forget(port, deadline).await;
    }
}

async fn roll_back(pod: &Pod, container: &Container) {
    if let Some(vm) = pod.living_vm() {
        forget(vm, &container.init, pod.deadline(0)).await;
    }
    exits::remove_storage(pod, container).await;
    pod.remove(&container.id);
}

/// Runs what may wait for a file system or a peer on a thread of its own.
///
/// # Errors
/// When that thread fails.
pub async fn blocking<T: Send + 'static>(
    what: &'static str,
    action: impl FnOnce() -> T + Send + 'static,
) -> Result<T, TaskError> {
    tokio::task::spawn_blocking(action).await.map_err(|_| TaskError::Internal(what))
}

fn task_create(pod: &Pod, request: &CreateTaskRequest) -> TaskCreate {
    TaskCreate {
        container_id: request.id.clone(),
        bundle: request.bundle.clone(),
        rootfs: request.rootfs.clone(),
        io: MessageField::some(TaskIO {
            stdin: request.stdin.clone(),
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
            terminal: request.terminal,
            ..TaskIO::default()
        }),
        checkpoint: request.checkpoint.clone(),
        pid: pod.task_pid(),
        ..TaskCreate::default()
    }
}
