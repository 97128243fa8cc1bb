//! Exec and Start.

use std::sync::Arc;

use containerd_shim_protos::api::ExecProcessRequest;
use containerd_shim_protos::events::task::{TaskExecAdded, TaskExecStarted, TaskStart};
use containerd_shim_protos::protobuf::MessageField;
use serde_json::{Map, Value};
use tokio::time::Instant;
use vmshim_protocol::agent as api;

use super::TaskError;
use super::container::{Container, Exec};
use super::create::blocking;
use super::exits;
use super::hooks;
use super::pod::Pod;
use super::process::{Phase, Process};
use super::streams::{connect, connect_input, forget};
use crate::oci::process_for_guest;
use crate::stdio::Streams;
use crate::timeline::{self, Mark};
use crate::vm::Vm;

/// Bytes of the longest exec id.
const MAX_EXEC_ID: usize = 256;

/// Adds a process to a container, which may yet have to start. It is made in the guest by Start.
///
/// # Errors
/// When the container does not run any more or is paused, the id is taken or the process is not described right.
pub fn add(pod: &Pod, request: ExecProcessRequest) -> Result<(), TaskError> {
    let container = pod.container(&request.id)?;
    check_host(&container)?;
    if request.exec_id.is_empty() || request.exec_id.len() > MAX_EXEC_ID {
        return Err(TaskError::Request("exec_id must have from 1 to 256 bytes".to_owned()));
    }
    let spec = guest_process(&request.spec.value)?;
    let streams = Streams {
        stdin: request.stdin,
        stdout: request.stdout,
        stderr: request.stderr,
        terminal: request.terminal,
        owner: container.init.streams.owner,
    };
    let process = Arc::new(Process::new(request.exec_id.clone(), streams, Phase::Created));
    container.add_exec(Exec { process, spec })?;
    pod.events.publish(&TaskExecAdded {
        container_id: request.id,
        exec_id: request.exec_id,
        ..TaskExecAdded::default()
    });
    Ok(())
}

/// Whether a container can have execs now.
fn check_host(container: &Container) -> Result<(), TaskError> {
    match container.init.phase() {
        Phase::Created | Phase::Starting | Phase::Running => Ok(()),
        phase => Err(TaskError::WrongPhase { verb: "exec in", phase: phase.name() }),
    }
}

/// The process object without what names the host's security modules.
fn guest_process(json: &[u8]) -> Result<Vec<u8>, TaskError> {
    let mut process: Map<String, Value> = serde_json::from_slice(json)
        .map_err(|error| TaskError::Request(format!("the exec's spec is not an OCI process: {error}")))?;
    let has_args = process.get("args").and_then(Value::as_array).is_some_and(|args| !args.is_empty());
    if !has_args {
        return Err(TaskError::Request("the exec's spec has no args".to_owned()));
    }
    // As runc reads it.
    process.entry("user").or_insert_with(|| serde_json::json!({ "uid": 0, "gid": 0 }));
    process_for_guest(&mut process)?;
    serde_json::to_vec(&process).map_err(|_| TaskError::Internal("encode a process"))
}

/// Runs a created process and publishes that it runs, before anything that it does can be told.
///
/// # Errors
/// When it is not created, its container does not run, or the guest cannot run it.
pub async fn start(pod: &Arc<Pod>, id: &str, exec_id: &str, deadline: Instant) -> Result<u32, TaskError> {
    let container = pod.container(id)?;
    let process = container.process(exec_id)?;
    let vm = pod.vm()?.clone();
    if !exec_id.is_empty() {
        check_host(&container)?;
    }
    process
        .advance(Phase::Created, Phase::Starting)
        .map_err(|phase| TaskError::WrongPhase { verb: "start", phase: phase.name() })?;
    if let Err(error) = run(pod, &vm, &container, &process, deadline).await {
        let _ = process.advance(Phase::Starting, Phase::Created);
        if exec_id.is_empty() {
            // The guest's init may have died of it, or the whole VM.
            exits::apply_early_exit(pod, &container, &process);
        } else {
            // Whether or not it ran for a moment, it is as it was before.
            process.take_early_exit();
            process.give_up();
        }
        return Err(error);
    }
    process.advance(Phase::Starting, Phase::Running).map_err(|_| TaskError::Internal("start a process"))?;
    log::debug!("process {exec_id:?} of container {id} runs");
    let pid = pod.task_pid();
    if exec_id.is_empty() {
        timeline::pass(Mark::TaskStarted);
        pod.events.publish(&TaskStart { container_id: id.to_owned(), pid, ..TaskStart::default() });
    } else {
        pod.events.publish(&TaskExecStarted {
            container_id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            pid,
            ..TaskExecStarted::default()
        });
    }
    exits::apply_early_exit(pod, &container, &process);
    if exec_id.is_empty() {
        hooks::started(pod, &container, deadline).await?;
    }
    Ok(pid)
}

async fn run(
    pod: &Pod,
    vm: &Arc<Vm>,
    container: &Container,
    process: &Process,
    deadline: Instant,
) -> Result<(), TaskError> {
    if !process.exec_id.is_empty()
        && let Err(error) = prepare(pod, vm, container, process, deadline).await
    {
        forget(vm, process, deadline).await;
        return Err(error);
    }
    connect_input(pod, vm, process, deadline).await?;
    let request = api::ProcessRequest {
        container_id: container.id.to_string(),
        exec_id: process.exec_id.clone(),
        ..Default::default()
    };
    pod.in_guest(vm, vm.agent().start_process(&request, deadline)).await.map(drop)
}

async fn prepare(
    pod: &Pod,
    vm: &Arc<Vm>,
    container: &Container,
    process: &Process,
    deadline: Instant,
) -> Result<(), TaskError> {
    let streams = process.streams.clone();
    let (namespace, id) = (pod.namespace.to_string(), process.exec_id.clone());
    let clients = pod.streams.clone();
    let opened = blocking("open stdio", move || streams.open(&namespace, &id, &clients)).await??;
    pod.note_logger(&opened)?;
    let mut stdio = connect(vm, process, opened, deadline).await?;
    if let Some(size) = process.size() {
        (stdio.width, stdio.height) = (size.width, size.height);
    }
    let request = api::ExecProcessRequest {
        container_id: container.id.to_string(),
        exec_id: process.exec_id.clone(),
        process: container.exec(&process.exec_id)?.spec.clone(),
        stdio: MessageField::some(stdio),
        ..Default::default()
    };
    pod.in_guest(vm, vm.agent().exec_process(&request, deadline)).await.map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_without_a_program_is_refused() {
        assert!(guest_process(b"{}").is_err());
        assert!(guest_process(br#"{"args":[]}"#).is_err());
        assert!(guest_process(b"[").is_err());
    }

    #[test]
    fn the_hosts_security_modules_are_not_asked_for() {
        let chosen = guest_process(br#"{"args":["a"],"apparmorProfile":"p"}"#).unwrap_err().to_string();
        assert!(chosen.contains("process.apparmorProfile"), "{chosen}");
        let out = guest_process(br#"{"args":["a"],"apparmorProfile":"docker-default","cwd":"/"}"#).unwrap();
        let value: Value = serde_json::from_slice(&out).unwrap();
        assert_eq!(value, serde_json::json!({ "args": ["a"], "cwd": "/", "user": { "uid": 0, "gid": 0 } }));
    }
}
