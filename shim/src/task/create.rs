//! Create: from a bundle to a container in the guest that waits for Start.

use std::collections::HashMap;
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
use super::hooks;
use super::pod::{Pod, namespaces_of};
use super::process::{Phase, Process};
use super::resize;
use super::rootfs::Plan;
use super::streams::{connect, forget};
use crate::config::RuntimeOptions;
use crate::ids::Name;
use crate::oci::{HostParts, Limits, Place, Spec, for_guest, leave_read_only_to_host};
use crate::sandbox;
use crate::stdio::{Owner, Streams};
use crate::storage::{MountRequest, OpenedDevice, SocketOwner, Staging};
use crate::timeline::{self, Mark};
use crate::vm::Vm;

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
    let options = request.options.as_ref().map(RuntimeOptions::from_any).transpose()?.unwrap_or_default();
    let bundle = PathBuf::from(&request.bundle);
    let vm = match pod.vm() {
        // No sandbox either: the bundle is what is wrong.
        Err(TaskError::NoSandbox) => {
            return Err(Spec::read(&bundle).err().map_or(TaskError::NoSandbox, TaskError::from));
        }
        vm => vm?.clone(),
    };
    let streams = Streams {
        stdin: request.stdin.clone(),
        stdout: request.stdout.clone(),
        stderr: request.stderr.clone(),
        terminal: request.terminal,
        owner: Owner { uid: options.io_uid, gid: options.io_gid },
    };
    let init = Process::new(String::new(), streams, Phase::Creating);
    let container = Arc::new(Container::new(id, bundle, init));
    pod.add(&container)?;
    log::debug!("container {} is asked for", container.id);
    let built = timeout_at(deadline, build(pod, &vm, &container, &request, deadline)).await;
    let built = match built.unwrap_or(Err(TaskError::Deadline("creating the container"))) {
        Ok(()) => hooks::created(pod, &container, deadline).await,
        Err(error) => Err(error),
    };
    if let Err(error) = built {
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
    if spec.is_sandbox() {
        container.set_stands_for_pod();
    }
    let place = match spec.sandbox_id() {
        _ if pod.sandbox.is_there() => Place::Sandboxed,
        Some(_) if container.id != pod.id => Place::Member { sandbox: &pod.id, pid: pod.task_pid() },
        _ => Place::Alone,
    };
    if matches!(place, Place::Sandboxed) {
        for (source, destination) in sandbox::mounts(&pod.dir.shared().join(pod.id.as_str())) {
            spec.bind_by_default(&source, &destination);
        }
    }
    let users = spec.users().filter(|_| matches!(place, Place::Alone));
    let namespaces = users.map(|users| namespaces_of(users, String::new(), HashMap::new()));
    // Users of its own have a network of their own, too.
    let wants_host_network = spec.wants_host_network() && !pod.has_netns() && spec.users().is_none();
    let HostParts { binds, sockets, devices, hooks } =
        for_guest(&mut spec, &container.bundle, &container.id, place)?;
    container.set_sockets(sockets.clone());
    container.set_limits(Limits::of_container(&spec));
    container.set_hooks(hooks::any(hooks), spec.annotations().clone());
    let root = spec.root_path(&container.bundle);
    let mount = MountRequest::parse(&request.rootfs)?;

    vm.is_rooted(deadline).await?;
    let mut staging = Staging::new(&pod.dir.shared(), &container.id);
    let streams = container.init.streams.clone();
    let (namespace, id) = (pod.namespace.to_string(), container.id.to_string());
    let clients = pod.streams.clone();
    let (staging, rootfs, opened) = blocking("prepare storage", move || {
        let owners = sockets.iter().map(|path| SocketOwner::of(path)).collect::<Result<Vec<_>, _>>();
        let rootfs = owners.and_then(|owners| {
            Ok((staging.stage(mount, &root, &binds)?, OpenedDevice::open_all(devices)?, owners))
        });
        let opened = rootfs.is_ok().then(|| streams.open(&namespace, &id, &clients));
        (staging, rootfs, opened)
    })
    .await?;
    log::debug!("storage and stdio of container {} are ready", container.id);
    leave_read_only_to_host(&mut spec, &container.id, staging.partly_read_only());
    let planned = rootfs.and_then(|(rootfs, devices, owners)| {
        let (plan, slots) = Plan::new(rootfs, devices, &container.id, &pod.slots)?;
        Ok((plan, slots, owners))
    });
    let (plan, slots, owners) = match planned {
        Ok(planned) => planned,
        Err(error) => {
            container.set_storage(HostStorage { staging, slots: Vec::new() });
            return Err(error.into());
        }
    };
    container.set_storage(HostStorage { staging, slots });
    let (rootfs, devices) = plan.attach(vm, deadline).await?;

    let spec = serde_json::to_vec(&spec).map_err(|_| TaskError::Internal("encode a spec"))?;
    let opened = opened.transpose()?.unwrap_or_default();
    pod.note_logger(&opened)?;
    let stdio = connect(vm, &container.init, opened, deadline).await?;
    let request = api::CreateContainerRequest {
        container_id: container.id.to_string(),
        spec,
        rootfs: MessageField::some(rootfs),
        stdio: MessageField::some(stdio),
        sockets: (0..).zip(owners).map(|(number, owner)| socket(number, owner)).collect(),
        devices,
        ..Default::default()
    };
    pod.network_ready(vm).await?;
    resize::grow(pod, vm, deadline).await?;
    if wants_host_network {
        pod.in_guest(vm, pod.host_network.share(vm, deadline)).await?;
    }
    if let Some(namespaces) = namespaces {
        // They are there already where the pod has a network.
        pod.in_guest(vm, vm.agent().set_up_pod(&namespaces, deadline)).await?;
    }
    pod.in_guest(vm, vm.agent().create_container(&request, deadline)).await.map(drop)
}

fn socket(number: u32, owner: SocketOwner) -> api::Socket {
    let SocketOwner { mode, uid, gid } = owner;
    api::Socket { number, mode, uid, gid, ..Default::default() }
}

async fn roll_back(pod: &Arc<Pod>, container: &Container) {
    if let Some(vm) = pod.living_vm() {
        forget(vm, &container.init, pod.deadline(0)).await;
    }
    exits::remove_storage(pod, container).await;
    pod.remove(&container.id);
    resize::shrink(pod);
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
