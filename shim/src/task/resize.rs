//! How large the machine is while its pod runs: as large as the limits of its containers need.
//!
//! It grows before a container may use more, and shrinks after one may not any more. Nobody waits for it to shrink, since
//! a guest gives back only what it can empty, and as it can. It does not become smaller than it was made.
//!
//! What is asked of the guest is always the sum of what all containers have been promised at that moment, so that calls
//! which come at the same time do not have to wait for each other.

use std::sync::{Arc, MutexGuard, PoisonError};

use tokio::time::Instant;
use vmshim_protocol::agent as api;

use super::TaskError;
use super::pod::Pod;
use crate::oci::{Limits, resources_for_guest};
use crate::vm::{ControlError, Size, Vm, sum_of_memory};

/// Changes a container's limits, and the machine with them.
///
/// # Errors
/// When there is no such container, the machine cannot become so large, or the guest refuses; then nothing has changed.
pub async fn update(
    pod: &Arc<Pod>,
    id: &str,
    resources: Vec<u8>,
    deadline: Instant,
) -> Result<(), TaskError> {
    let container = pod.container(id)?;
    if container.is_stopped() {
        return Err(TaskError::WrongPhase { verb: "update", phase: "stopped" });
    }
    let resources = resources_for_guest(&resources)?;
    let vm = pod.vm()?;
    let before = container.limits();
    let after = before.updated(&resources);
    let promised = before.or_larger(after);
    container.set_limits(promised);
    let updated = async {
        if after.memory_bytes() > before.memory_bytes() {
            check_room(pod, vm)?;
        }
        grow(pod, vm, deadline).await?;
        let request = api::UpdateContainerRequest {
            container_id: container.id.to_string(),
            resources,
            ..Default::default()
        };
        pod.in_guest(vm, vm.agent().update_container(&request, deadline)).await
    }
    .await;
    // Unless another call has set others meanwhile.
    if container.limits() == promised {
        container.set_limits(if updated.is_ok() { after } else { before });
    }
    shrink(pod);
    updated.map(drop)
}

fn check_room(pod: &Pod, vm: &Vm) -> Result<(), TaskError> {
    let (machine, limits) = (vm.machine(), promised(pod));
    if machine.has_room_for(&limits) {
        return Ok(());
    }
    let wanted_mib = sum_of_memory(&limits).div_ceil(1 << 20);
    Err(TaskError::NoRoom { wanted_mib, most_mib: machine.most_limits_mib() })
}

/// Waits until the machine is as large as the containers need, or as it can become. Asks nothing of a machine that is
/// large enough as it was made.
///
/// # Errors
/// When the guest does not take the memory or the CPUs up in time, or is gone.
pub async fn grow(pod: &Pod, vm: &Vm, deadline: Instant) -> Result<(), TaskError> {
    let machine = vm.machine();
    let wanted = || machine.size_for(&promised(pod));
    if wanted() == machine.made() {
        return Ok(());
    }
    vm.is_booting(deadline).await;
    let size = wanted();
    let Size { vcpus, growth_mib } = size;
    let before = ask(pod, size).unwrap_or(machine.made());
    if before.growth_mib != growth_mib {
        vm.resize_memory(growth_mib, deadline).await?;
    }
    // Also where another call has asked: it may not have come so far.
    pod.in_guest(vm, vm.agent().take_up(&take_up(vcpus), deadline)).await?;
    vm.await_memory(growth_mib, deadline).await.map_err(|error| match error {
        ControlError::TimedOut => TaskError::Deadline("giving the guest the memory that the limits need"),
        error => error.into(),
    })?;
    log::debug!("the guest has {vcpus} CPUs and {growth_mib} MiB more than it was made with");
    Ok(())
}

/// Lets the guest give back what no container needs, in its own time.
pub fn shrink(pod: &Arc<Pod>) {
    let Some(vm) = pod.living_vm().cloned() else { return };
    let Some(before) = *size(pod) else { return };
    let wanted = vm.machine().size_for(&promised(pod));
    let size =
        Size { vcpus: wanted.vcpus.min(before.vcpus), growth_mib: wanted.growth_mib.min(before.growth_mib) };
    if size == before {
        return;
    }
    ask(pod, size);
    let (pod, deadline) = (pod.clone(), pod.deadline(0));
    tokio::spawn(async move {
        if let Err(error) = give_back(&pod, &vm, before, size, deadline).await {
            log::warn!("the guest cannot be asked to give back what it has: {error}");
        }
    });
}

async fn give_back(pod: &Pod, vm: &Vm, before: Size, size: Size, deadline: Instant) -> Result<(), TaskError> {
    if size.growth_mib < before.growth_mib {
        vm.resize_memory(size.growth_mib, deadline).await?;
    }
    if size.vcpus < before.vcpus {
        pod.in_guest(vm, vm.agent().take_up(&take_up(size.vcpus), deadline)).await?;
    }
    Ok(())
}

fn take_up(vcpus: u8) -> api::TakeUpRequest {
    api::TakeUpRequest { cpus: vcpus.into(), ..Default::default() }
}

/// Notes what is asked of the machine from now on; says what was before.
fn ask(pod: &Pod, wanted: Size) -> Option<Size> {
    size(pod).replace(wanted)
}

fn size(pod: &Pod) -> MutexGuard<'_, Option<Size>> {
    pod.size.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The limits of all containers that can use anything.
fn promised(pod: &Pod) -> Vec<Limits> {
    let containers = pod.containers();
    containers
        .iter()
        .filter(|container| !container.is_stopped())
        .map(|container| container.limits())
        .collect()
}
