//! Delete.

use std::sync::Arc;
use std::time::Duration;

use containerd_shim_protos::events::task::TaskDelete;
use containerd_shim_protos::protobuf::MessageField;
use tokio::time::{Instant, timeout_at};
use vmshim_protocol::agent as api;

use super::TaskError;
use super::container::Container;
use super::create::blocking;
use super::hooks;
use super::pod::Pod;
use super::process::{Exit, Phase, Process};
use super::resize;
use super::streams::forget;
use crate::timeline::{self, Mark};

/// How long output may take to reach its reader.
const DRAIN_LIMIT: Duration = Duration::from_secs(10);

/// SIGKILL.
const SIGKILL: u32 = 9;

/// Removes an exited process; with an init, its container.
///
/// # Errors
/// When it still runs, or is gone already.
pub async fn delete(pod: &Arc<Pod>, id: &str, exec_id: &str, deadline: Instant) -> Result<Exit, TaskError> {
    let container = pod.container(id)?;
    let process = container.process(exec_id)?;
    match process.phase() {
        Phase::Stopped(_) | Phase::Created => {}
        Phase::Running | Phase::Paused => {
            return Err(TaskError::WrongPhase { verb: "delete", phase: process.phase().name() });
        }
        phase => return Err(TaskError::WrongPhase { verb: "delete", phase: phase.name() }),
    }
    if exec_id.is_empty() {
        delete_init(pod, &container, deadline).await
    } else {
        delete_exec(pod, &container, &process, deadline).await
    }
}

async fn delete_exec(
    pod: &Pod,
    container: &Arc<Container>,
    process: &Arc<Process>,
    deadline: Instant,
) -> Result<Exit, TaskError> {
    let exit = match process.phase() {
        Phase::Stopped(exit) => exit,
        // It never ran, so the guest has never heard of it.
        _ => Exit::killed(),
    };
    settle(pod, process, deadline).await;
    container.remove_exec(&process.exec_id);
    if let Some(vm) = pod.living_vm().cloned() {
        let request = api::ProcessRequest {
            container_id: container.id.to_string(),
            exec_id: process.exec_id.clone(),
            ..Default::default()
        };
        // Nobody waits for the guest to forget it.
        tokio::spawn(async move {
            let _ = vm.agent().delete_process(&request, deadline).await;
        });
    }
    Ok(exit)
}

async fn delete_init(
    pod: &Arc<Pod>,
    container: &Arc<Container>,
    deadline: Instant,
) -> Result<Exit, TaskError> {
    if !container.begin_delete() {
        return Err(TaskError::NoContainer(container.id.to_string()));
    }
    let exit = match finish(pod, container, deadline).await {
        Ok(exit) => exit,
        Err(error) => {
            container.abandon_delete();
            return Err(error);
        }
    };
    pod.remove(&container.id);
    resize::shrink(pod);
    timeline::pass(Mark::Deleted);
    timeline::log();
    pod.events.publish(&TaskDelete {
        container_id: container.id.to_string(),
        pid: pod.task_pid(),
        exit_status: exit.status,
        exited_at: MessageField::some(exit.at.into()),
        ..TaskDelete::default()
    });
    Ok(exit)
}

async fn finish(pod: &Arc<Pod>, container: &Arc<Container>, deadline: Instant) -> Result<Exit, TaskError> {
    let too_late = |_| TaskError::Deadline("deleting the container");
    if container.init.phase() == Phase::Created {
        let vm = pod.vm()?;
        let request = api::SignalProcessRequest {
            container_id: container.id.to_string(),
            signal: SIGKILL,
            all: true,
            ..Default::default()
        };
        match pod.in_guest(vm, vm.agent().signal_process(&request, deadline)).await {
            // It has just died of itself, and its exit is about to be told.
            Err(error) if error.is_not_found() => {}
            other => drop(other?),
        }
    }
    let exit = timeout_at(deadline, container.init.exited()).await.map_err(too_late)?;
    for process in container.execs().iter().chain([&container.init]) {
        settle(pod, process, deadline).await;
    }
    timeout_at(deadline, container.removed()).await.map_err(too_late)?;
    hooks::deleted(pod, container, deadline).await;
    Ok(exit)
}

/// Waits until output has reached its reader, and gives up on a reader that does not read. A logger has ended then.
async fn settle(pod: &Pod, process: &Process, deadline: Instant) {
    let logger = process.take_logger();
    let patience = deadline.min(Instant::now() + DRAIN_LIMIT);
    if timeout_at(patience, process.drained()).await.is_err() {
        log::warn!("nobody reads the output of process {:?}; the rest of it is dropped", process.exec_id);
    }
    match pod.living_vm() {
        Some(vm) if !process.is_drained() => forget(vm, process, deadline).await,
        _ => drop(process.disconnect()),
    }
    process.streams.renounce(&pod.streams);
    // Past the deadline it is ended all the same.
    if let Some(logger) = logger {
        let _ = timeout_at(deadline, blocking("end a logger", move || logger.end())).await;
    }
}
