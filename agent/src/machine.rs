//! What the machine gets, and loses, while the guest runs.

use crate::boot::cpus;
use crate::containers::internal;
use crate::failure::{Failure, Kind};
use crate::sys::slots;
use tokio::sync::Mutex;

/// Changes of the machine, made one after the other.
#[derive(Debug, Default)]
pub struct Machine {
    /// Handed on in the order in which it is asked for.
    turn: Mutex<()>,
}

impl Machine {
    /// Starts the drivers of devices that have come, and has `cpus` CPUs up when it comes back.
    pub async fn take_up(&self, cpus: u32) -> Result<(), Failure> {
        let _turn = self.turn.lock().await;
        let taken = tokio::task::spawn_blocking(move || {
            slots::look_again().map_err(|error| internal("start the machine's new devices", &error))?;
            cpus::keep_up(cpus).map_err(|error| internal("change the number of CPUs", &error))
        });
        taken.await.unwrap_or_else(|_| Err(Failure::new(Kind::Internal, "the agent is shutting down")))
    }
}
