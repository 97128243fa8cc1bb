//! When a container's hooks run: at Create, Start and Delete, each on a thread that may wait.

use std::process::Child;
use std::time::Instant;

use tokio::time::Instant as Deadline;
use vmshim_protocol::agent as api;

use super::TaskError;
use super::container::Container;
use super::create::blocking;
use super::pod::Pod;
use crate::hooks::{self, HookError, Hooks, STATE_VERSION, State};
use crate::state::{Entry, Hooked};

/// SIGKILL.
const SIGKILL: u32 = 9;

/// Runs the hooks of a container that the guest has just made.
///
/// # Errors
/// The hook that failed is named; the container is gone from the guest then.
pub async fn created(pod: &Pod, container: &Container, deadline: Deadline) -> Result<(), TaskError> {
    let Some(hooks) = container.hooks() else { return Ok(()) };
    if let Some(journal) = &pod.journal {
        journal.intend(&Entry::Hooks(hooked(container))).map_err(TaskError::State)?;
    }
    let state = state(pod, container, "creating");
    let result = run(pod, deadline, move |end, wait| {
        hooks::run("prestart", &hooks.prestart, &state, end, wait)?;
        hooks::run("createRuntime", &hooks.create_runtime, &state, end, wait)
    })
    .await;
    if result.is_err() {
        discard(pod, container).await;
        deleted(pod, container, pod.deadline(0)).await;
    }
    result
}

/// Runs the hooks of a container whose program has just been started.
///
/// # Errors
/// The hook that failed is named; the program has been killed then.
pub async fn started(pod: &Pod, container: &Container, deadline: Deadline) -> Result<(), TaskError> {
    let Some(hooks) = container.hooks().filter(|hooks| !hooks.poststart.is_empty()) else { return Ok(()) };
    let state = state(pod, container, "running");
    let result =
        run(pod, deadline, move |end, wait| hooks::run("poststart", &hooks.poststart, &state, end, wait))
            .await;
    if result.is_err() {
        kill(pod, container).await;
    }
    result
}

/// Runs the hooks of a container that is no more.
pub async fn deleted(pod: &Pod, container: &Container, deadline: Deadline) {
    let Some(hooks) = container.take_hooks() else { return };
    if let Some(journal) = &pod.journal
        && let Err(error) = journal.intend(&Entry::HooksDone(hooked(container)))
    {
        log::warn!("{error}");
    }
    let state = State { pid: None, ..state(pod, container, "stopped") };
    let ran = run(pod, deadline, move |end, wait| {
        hooks::run_poststop(&hooks.poststop, &state, end, wait);
        Ok(())
    });
    // The hooks' own failures are told where they arise.
    let _ = ran.await;
}

/// Whether a container has any of the host's hooks.
pub fn any(hooks: Hooks) -> Option<Hooks> {
    Some(hooks).filter(|hooks| *hooks != Hooks::default())
}

async fn run(
    pod: &Pod,
    deadline: Deadline,
    action: impl FnOnce(
        Instant,
        &dyn Fn(&mut Child) -> std::io::Result<std::process::ExitStatus>,
    ) -> Result<(), HookError>
    + Send
    + 'static,
) -> Result<(), TaskError> {
    let reaper = pod.reaper.clone();
    let expectation = reaper.expect();
    let wait = move |child: &mut Child| reaper.wait(child.id());
    let work = move || {
        let result = action(deadline.into_std(), &wait);
        drop(expectation);
        result
    };
    blocking("run hooks", work).await?.map_err(TaskError::Hook)
}

fn state(pod: &Pod, container: &Container, status: &'static str) -> State {
    State {
        oci_version: STATE_VERSION,
        id: container.id.to_string(),
        status,
        pid: Some(pod.task_pid()),
        bundle: container.bundle.clone(),
        annotations: container.annotations(),
    }
}

fn hooked(container: &Container) -> Hooked {
    Hooked { id: container.id.to_string(), bundle: container.bundle.clone() }
}

async fn kill(pod: &Pod, container: &Container) {
    let Some(vm) = pod.living_vm() else { return };
    let request = api::SignalProcessRequest {
        container_id: container.id.to_string(),
        signal: SIGKILL,
        all: true,
        ..Default::default()
    };
    if let Err(error) = pod.in_guest(vm, vm.agent().signal_process(&request, pod.deadline(0))).await {
        log::warn!("container {} cannot be killed after its hook has failed: {error}", container.id);
    }
}

/// Removes a created container from the guest.
async fn discard(pod: &Pod, container: &Container) {
    kill(pod, container).await;
    let Some(vm) = pod.living_vm() else { return };
    let request = api::ProcessRequest { container_id: container.id.to_string(), ..Default::default() };
    if let Err(error) = pod.in_guest(vm, vm.agent().delete_process(&request, pod.deadline(0))).await {
        log::warn!("container {} stays in the guest after its hook has failed: {error}", container.id);
    }
}
