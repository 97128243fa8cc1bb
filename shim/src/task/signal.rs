//! Kill.

use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};
use vmshim_protocol::agent as api;

use super::TaskError;
use super::container::Container;
use super::pause;
use super::pod::Pod;
use super::process::{Phase, Process};
use crate::agent_client::AgentError;

/// How long the caller waits for the guest to confirm. A signal has no answer, so a guest that is slow to confirm is
/// no reason to keep the caller.
const CONFIRMATION: Duration = Duration::from_millis(500);

/// How long a guest may take to obey SIGKILL before its VM is stopped.
const GRACE: Duration = Duration::from_secs(10);

/// How long a guest may take to confirm SIGKILL of an exec before its VM is stopped. Longer, since the container itself may
/// be well.
const EXEC_GRACE: Duration = Duration::from_secs(20);

/// The largest signal number.
const MAX_SIGNAL: u32 = 64;

const SIGKILL: u32 = 9;

/// Signals a process, or every process of its container.
///
/// # Errors
/// When there is nothing to signal, or the guest refuses.
pub async fn kill(pod: &Arc<Pod>, id: &str, exec_id: &str, signal: u32, all: bool) -> Result<(), TaskError> {
    let container = pod.container(id)?;
    let process = container.process(exec_id)?;
    if signal > MAX_SIGNAL {
        return Err(TaskError::Request(format!("signal {signal} does not exist")));
    }
    match process.phase() {
        Phase::Stopped(_) => return Err(TaskError::Finished),
        phase @ (Phase::Creating | Phase::Starting) => {
            return Err(TaskError::WrongPhase { verb: "signal", phase: phase.name() });
        }
        phase @ Phase::Created if !exec_id.is_empty() => {
            return Err(TaskError::WrongPhase { verb: "signal", phase: phase.name() });
        }
        // The init's exit is known and waits for those of the execs.
        _ if exec_id.is_empty() && container.is_exit_held() => return Err(TaskError::Finished),
        _ => {}
    }
    if signal == SIGKILL {
        // Nobody dies while nothing runs.
        pause::resume_pod(pod, Instant::now() + GRACE).await?;
    }
    let vm = pod.vm()?.clone();
    let request = api::SignalProcessRequest {
        container_id: id.to_owned(),
        exec_id: exec_id.to_owned(),
        signal,
        all,
        ..Default::default()
    };
    let deadline = Instant::now() + if exec_id.is_empty() { GRACE } else { EXEC_GRACE };
    let mut sent = tokio::spawn(async move { vm.agent().signal_process(&request, deadline).await });
    let confirmed = timeout(CONFIRMATION, &mut sent).await;
    if signal == SIGKILL && !matches!(confirmed, Ok(Ok(Ok(_)))) {
        let (pod, late) = (pod.clone(), confirmed.is_err().then_some(sent));
        tokio::spawn(async move {
            if process.exec_id.is_empty() || is_unconfirmed(late).await {
                enforce(&pod, &container, &process, deadline).await;
            }
        });
    }
    match confirmed {
        // Gone means that the VM's end, and with it the exit, is about to be told.
        Err(_) | Ok(Ok(Ok(_)) | Err(_) | Ok(Err(AgentError::Gone | AgentError::TimedOut))) => Ok(()),
        Ok(Ok(Err(refused))) => Err(refused.into()),
    }
}

/// Whether the guest has not confirmed in time. One that has may be waiting for an exec that takes its time to die, which
/// is no reason to end the container.
async fn is_unconfirmed(late: Option<JoinHandle<Result<api::Empty, AgentError>>>) -> bool {
    match late {
        Some(late) => !matches!(late.await, Ok(Ok(_))),
        None => false,
    }
}

/// Stops the VM of a guest that does not obey SIGKILL.
async fn enforce(pod: &Pod, container: &Arc<Container>, process: &Process, deadline: Instant) {
    if tokio::time::timeout_at(deadline, process.exited()).await.is_ok() {
        return;
    }
    if let Some(vm) = pod.living_vm().cloned() {
        log::error!("the guest ends nothing in container {} on SIGKILL, so its VM is stopped", container.id);
        vm.stop().await;
    }
}
