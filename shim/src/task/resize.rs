//! How large the machine is while its pod runs: as large as the limits of its containers need.
//!
//! It grows before a container may use more, and shrinks after one may not any more. Nobody waits for it to shrink, since
//! a guest gives back only what it can empty, and as it can. It does not become smaller than it was made.
//!
//! What is asked of the guest is always the sum of what all containers have been promised at that moment, so that calls
//! which come at the same time do not have to wait for each other.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use tokio::time::Instant;
use vmshim_protocol::agent as api;

use super::TaskError;
use super::container::Container;
use super::pod::Pod;
use crate::oci::{Limits, resources_for_guest};
use crate::vm::{ControlError, Vm};

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
    let raised = after.memory_bytes() > before.memory_bytes();
    if raised {
        container.set_limits(after);
    }
    let updated = async {
        if raised {
            check_room(pod, vm)?;
            grow(pod, vm, deadline).await?;
        }
        let request = api::UpdateContainerRequest {
            container_id: container.id.to_string(),
            resources,
            ..Default::default()
        };
        pod.in_guest(vm, vm.agent().update_container(&request, deadline)).await
    }
    .await;
    match updated {
        Ok(_) => container.set_limits(after),
        Err(_) => take_back(&container, after, before),
    }
    shrink(pod);
    updated.map(drop)
}

/// Another call may have set other limits meanwhile.
fn take_back(container: &Container, promised: Limits, before: Limits) {
    if container.limits() == promised {
        container.set_limits(before);
    }
}

fn check_room(pod: &Pod, vm: &Vm) -> Result<(), TaskError> {
    let (machine, limits) = (vm.machine(), promised_bytes(pod));
    if machine.growth_for(limits) <= machine.growth_mib {
        return Ok(());
    }
    Err(TaskError::NoRoom { wanted_mib: limits.div_ceil(1 << 20), most_mib: machine.most_limits_mib() })
}

/// Waits until the machine is as large as the containers need, or as it can become. Asks nothing of a machine that is
/// large enough as it was made.
///
/// # Errors
/// When the guest does not take the memory up in time, or is gone.
pub async fn grow(pod: &Pod, vm: &Vm, deadline: Instant) -> Result<(), TaskError> {
    let machine = vm.machine();
    let wanted = || machine.growth_for(promised_bytes(pod)).min(machine.growth_mib);
    if wanted() == 0 {
        return Ok(());
    }
    vm.is_booting(deadline).await;
    let growth = wanted();
    if pod.growth_mib.swap(growth, Ordering::Relaxed) != growth {
        vm.resize_memory(growth, deadline).await?;
    }
    // Also where another call has asked: it may not have come so far.
    pod.in_guest(vm, vm.agent().take_up(&api::Empty::new(), deadline)).await?;
    vm.await_memory(growth, deadline).await.map_err(|error| match error {
        ControlError::TimedOut => TaskError::Deadline("giving the guest the memory that the limits need"),
        error => error.into(),
    })?;
    log::debug!("the guest has {growth} MiB more than it was made with");
    Ok(())
}

/// Lets the guest give back what no container needs, in its own time.
pub fn shrink(pod: &Arc<Pod>) {
    let asked = pod.growth_mib.load(Ordering::Relaxed);
    let Some(vm) = pod.living_vm().cloned() else { return };
    let machine = vm.machine();
    let growth = machine.growth_for(promised_bytes(pod)).min(machine.growth_mib);
    if growth >= asked {
        return;
    }
    pod.growth_mib.store(growth, Ordering::Relaxed);
    let deadline = pod.deadline(0);
    tokio::spawn(async move {
        match vm.resize_memory(growth, deadline).await {
            Ok(()) => log::debug!("the guest shall have {growth} MiB more than it was made with"),
            Err(error) => log::warn!("the guest cannot be asked to give memory back: {error}"),
        }
    });
}

/// The sum of the memory limits of all containers that can use memory.
fn promised_bytes(pod: &Pod) -> u64 {
    let containers = pod.containers();
    let live = containers.iter().filter(|container| !container.is_stopped());
    live.filter_map(|container| container.limits().memory_bytes()).fold(0, u64::saturating_add)
}
