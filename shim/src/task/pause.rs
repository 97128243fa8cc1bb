//! Pause and Resume: of a container by its freezer in the guest, of a whole pod by stopping its vCPUs.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::time::Instant;
use vmshim_protocol::agent as api;

use super::TaskError;
use super::container::Container;
use super::pod::Pod;
use super::process::Phase;

/// Whether a pod's vCPUs are stopped, and which of its containers are paused by that.
#[derive(Default)]
pub struct Stopped(Mutex<Option<Vec<Arc<Container>>>>);

impl Stopped {
    /// Whether nothing in the guest runs.
    pub fn is_on(&self) -> bool {
        self.lock().is_some()
    }

    fn lock(&self) -> MutexGuard<'_, Option<Vec<Arc<Container>>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Pauses a container, or with the one that stands for its pod the pod.
///
/// # Errors
/// When it does not run, or guest or VMM do not do it in time.
pub async fn pause(pod: &Pod, id: &str, deadline: Instant) -> Result<(), TaskError> {
    if !stands_for_pod(pod, id)? {
        return change_phase(pod, id, (Phase::Running, Phase::Paused, "pause"), deadline).await;
    }
    if pod.stopped.is_on() {
        return Err(TaskError::WrongPhase { verb: "pause", phase: Phase::Paused.name() });
    }
    if let Ok(container) = pod.container(id) {
        check(&container, Phase::Running, "pause")?;
    }
    let vm = pod.vm()?;
    let is_paused =
        |container: &Arc<Container>| container.init.advance(Phase::Running, Phase::Paused).is_ok();
    *pod.stopped.lock() = Some(pod.containers().into_iter().filter(is_paused).collect());
    let paused = vm.pause(deadline).await;
    if paused.is_err() {
        go_on(pod);
    }
    Ok(paused?)
}

/// Lets a container go on, or a pod.
///
/// # Errors
/// When it is not paused, or guest or VMM do not do it in time.
pub async fn resume(pod: &Pod, id: &str, deadline: Instant) -> Result<(), TaskError> {
    if !stands_for_pod(pod, id)? {
        return change_phase(pod, id, (Phase::Paused, Phase::Running, "resume"), deadline).await;
    }
    if !pod.stopped.is_on() {
        let phase = pod.container(id).map_or(Phase::Running, |container| container.init.phase());
        return Err(TaskError::WrongPhase { verb: "resume", phase: phase.name() });
    }
    resume_pod(pod, deadline).await
}

/// Lets a pod go on, if it is paused.
///
/// # Errors
/// When the VMM does not do it in time.
pub async fn resume_pod(pod: &Pod, deadline: Instant) -> Result<(), TaskError> {
    if pod.stopped.is_on() {
        pod.vm()?.resume(deadline).await?;
        go_on(pod);
    }
    Ok(())
}

fn go_on(pod: &Pod) {
    for container in pod.stopped.lock().take().into_iter().flatten() {
        // One that has ended meanwhile stays so.
        let _ = container.init.advance(Phase::Paused, Phase::Running);
    }
}

fn stands_for_pod(pod: &Pod, id: &str) -> Result<bool, TaskError> {
    if pod.sandbox.is_running() && id == pod.id.as_str() {
        return Ok(true);
    }
    Ok(pod.container(id)?.stands_for_pod())
}

fn check(container: &Container, phase: Phase, verb: &'static str) -> Result<(), TaskError> {
    match container.init.phase() {
        is if is == phase => Ok(()),
        other => Err(TaskError::WrongPhase { verb, phase: other.name() }),
    }
}

/// Freezes or thaws a container: a phase is left before the guest is asked, and only the right one.
async fn change_phase(
    pod: &Pod,
    id: &str,
    (from, to, verb): (Phase, Phase, &'static str),
    deadline: Instant,
) -> Result<(), TaskError> {
    let container = pod.container(id)?;
    check(&container, from, verb)?;
    let vm = pod.vm()?;
    let request = api::ContainerRequest { container_id: id.to_owned(), ..Default::default() };
    if to == Phase::Paused {
        pod.in_guest(vm, vm.agent().pause_container(&request, deadline)).await?;
    } else {
        pod.in_guest(vm, vm.agent().resume_container(&request, deadline)).await?;
    }
    container.init.advance(from, to).map_err(|phase| TaskError::WrongPhase { verb, phase: phase.name() })
}
