//! What the guest and the VMM report: exits, want of memory, the end of everything.
//!
//! Each process's exit is published once, when it is known, whatever becomes of its output. The init's is the last of
//! its container's: the kernel ends all of a pid namespace with its init, so the others' are on their way.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use containerd_shim_protos::events::task::{TaskExit, TaskOOM};
use containerd_shim_protos::protobuf::MessageField;
use tokio::time::{Instant, sleep};
use vmshim_protocol::agent as api;

use super::container::Container;
use super::pod::Pod;
use super::process::{Ending, Exit, Process};
use super::sockets;
use crate::agent_client::AgentError;
use crate::timeline::{self, Mark};
use crate::vm::Vm;

/// How long the exits of execs may lag behind that of their init before they are taken for granted.
const EXEC_LAG: Duration = Duration::from_secs(2);

/// How long the guest may take to remove a container.
const REMOVE_LIMIT: Duration = Duration::from_secs(10);

/// How long the VMM may take to tell why the agent is gone.
const END_LIMIT: Duration = Duration::from_secs(1);

/// Follows the guest's reports and the VM's end.
pub fn watch(pod: &Arc<Pod>, vm: &Arc<Vm>) {
    let (reports_pod, reports_vm) = (pod.clone(), vm.clone());
    tokio::spawn(async move { follow_reports(&reports_pod, &reports_vm).await });
    let (end_pod, end_vm) = (pod.clone(), vm.clone());
    tokio::spawn(async move {
        let end = end_vm.ended().await;
        if end.orderly {
            log::info!("the VM has ended: {}", end.sentence());
        } else {
            log::error!("the VM has ended: {}", end.sentence());
            end.console().iter().for_each(|line| log::error!("console: {line}"));
        }
        all_ended(&end_pod);
    });
}

async fn follow_reports(pod: &Arc<Pod>, vm: &Arc<Vm>) {
    if let Err(error) = receive_reports(pod, vm).await {
        // Without reports nothing in the guest can be known any more.
        if tokio::time::timeout(END_LIMIT, vm.ended()).await.is_err() {
            log::error!("the guest's agent stopped reporting ({error}), so the VM is stopped");
            vm.stop().await;
        }
    }
}

async fn receive_reports(pod: &Arc<Pod>, vm: &Arc<Vm>) -> Result<(), AgentError> {
    let mut reports = vm.agent().events().await?;
    loop {
        let Some(report) = reports.recv().await? else { return Err(AgentError::Gone) };
        match report.event {
            Some(api::event::Event::Exited(exited)) => {
                let exit = Exit { status: exited.status, at: SystemTime::now() };
                process_ended(pod, &exited.container_id, &exited.exec_id, exit);
            }
            Some(api::event::Event::OutOfMemory(event)) => {
                if let Ok(container) = pod.container(&event.container_id) {
                    pod.events
                        .publish(&TaskOOM { container_id: container.id.to_string(), ..TaskOOM::default() });
                }
            }
            Some(api::event::Event::SocketDialled(dialled)) => sockets::follow(pod, vm, dialled),
            Some(api::event::Event::HostDialled(dialled)) => pod.dialled(vm, &dialled),
            Some(api::event::Event::HostListen(listen)) => pod.host_network.listen(vm, &listen),
            Some(api::event::Event::HostUnlisten(unlisten)) => pod.host_network.unlisten(&unlisten),
            _ => {}
        }
    }
}

/// A process has exited. What the guest says of processes that do not exist is nothing.
pub fn process_ended(pod: &Arc<Pod>, id: &str, exec_id: &str, exit: Exit) {
    let Ok(container) = pod.container(id) else { return };
    let Ok(process) = container.process(exec_id) else { return };
    if !exec_id.is_empty() {
        end(pod, &container, &process, exit);
        if !container.has_live_exec()
            && let Some(held) = container.take_held_exit()
        {
            init_ended(pod, &container, held);
        }
        return;
    }
    if !container.has_live_exec() {
        return init_ended(pod, &container, exit);
    }
    container.hold_exit(exit);
    let pod = pod.clone();
    tokio::spawn(async move {
        sleep(EXEC_LAG).await;
        if let Some(held) = container.take_held_exit() {
            end_execs(&pod, &container);
            init_ended(&pod, &container, held);
        }
    });
}

/// The VM is no more, and nothing in it.
pub fn all_ended(pod: &Pod) {
    for container in pod.containers() {
        end_execs(pod, &container);
        let exit = container.take_held_exit().unwrap_or_else(Exit::killed);
        end(pod, &container, &container.init, exit);
        // The guest's part of it went with the guest.
        remove_from_host(&container);
    }
}

/// Takes an exit that came while its process was still being created or started.
pub fn apply_early_exit(pod: &Arc<Pod>, container: &Container, process: &Process) {
    if let Some(exit) = process.take_early_exit() {
        process_ended(pod, container.id.as_str(), &process.exec_id, exit);
    }
}

fn end_execs(pod: &Pod, container: &Container) {
    for exec in container.execs() {
        if exec.phase().is_live() {
            end(pod, container, &exec, Exit::killed());
        }
    }
}

fn init_ended(pod: &Arc<Pod>, container: &Arc<Container>, exit: Exit) {
    if end(pod, container, &container.init, exit) {
        timeline::pass(Mark::Exited);
        let (pod, container) = (pod.clone(), container.clone());
        tokio::spawn(async move { wind_down(&pod, &container).await });
    }
}

/// Marks the exit and publishes it, if it is news.
fn end(pod: &Pod, container: &Container, process: &Process, exit: Exit) -> bool {
    let news = process.end(exit) == Ending::Now;
    if news {
        let exec_id = &process.exec_id;
        log::debug!("process {exec_id:?} of container {} has exited with {}", container.id, exit.status);
        let process_id = if exec_id.is_empty() { container.id.to_string() } else { exec_id.clone() };
        pod.events.publish(&TaskExit {
            container_id: container.id.to_string(),
            id: process_id,
            pid: pod.task_pid(),
            exit_status: exit.status,
            exited_at: MessageField::some(exit.at.into()),
            ..TaskExit::default()
        });
    }
    news
}

/// Gives back what a container had, off everybody's path: its output first, then the guest's part, then the host's;
/// with the last container, the VM.
async fn wind_down(pod: &Arc<Pod>, container: &Arc<Container>) {
    for process in container.execs().iter().chain([&container.init]) {
        process.drained().await;
    }
    log::debug!("the output of container {} has been read", container.id);
    if let Some(vm) = pod.living_vm().cloned() {
        let request = api::ProcessRequest { container_id: container.id.to_string(), ..Default::default() };
        let deadline = Instant::now() + REMOVE_LIMIT;
        if let Err(error) = pod.in_guest(&vm, vm.agent().delete_process(&request, deadline)).await {
            log::warn!("the guest did not remove container {}: {error}", container.id);
        }
        remove_storage(pod, container).await;
    }
    log::debug!("container {} is removed from the guest", container.id);
    container.set_removed();
    // A sandbox lives until it is stopped.
    if !pod.sandbox.is_there()
        && pod.containers().iter().all(|container| container.is_stopped())
        && let Some(vm) = pod.living_vm().cloned()
    {
        if log::log_enabled!(log::Level::Debug)
            && let Some(statistics) = vm.statistics(Instant::now() + REMOVE_LIMIT).await
        {
            timeline::take_over(&statistics);
        }
        vm.stop().await;
    }
}

/// Takes a container's disks out of the VM and its mounts off the host.
pub async fn remove_storage(pod: &Pod, container: &Container) {
    let Some(storage) = container.take_storage() else { return };
    if let Some(vm) = pod.living_vm() {
        for slot in &storage.slots {
            let _ = vm.detach_disk(slot.number(), Instant::now() + REMOVE_LIMIT).await;
        }
    }
    let mut staging = storage.staging;
    let removed = tokio::task::spawn_blocking(move || staging.remove()).await;
    if let Ok(Err(error)) = removed {
        log::warn!("mounts of container {} stay until its pod ends: {error}", container.id);
    }
}

fn remove_from_host(container: &Arc<Container>) {
    let storage = container.take_storage();
    let container = container.clone();
    tokio::task::spawn_blocking(move || {
        if let Some(mut storage) = storage {
            let _ = storage.staging.remove();
        }
        container.set_removed();
    });
}
