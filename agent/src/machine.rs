//! What the machine gets while the guest runs.

use crate::containers::internal;
use crate::failure::{Failure, Kind};
use crate::sys::slots;

/// Starts the drivers of devices that have come, and comes back when they run.
pub async fn take_up() -> Result<(), Failure> {
    let looked = tokio::task::spawn_blocking(slots::look_again).await;
    let looked = looked.map_err(|_| Failure::new(Kind::Internal, "the agent is shutting down"))?;
    looked.map_err(|error| internal("start the machine's new devices", &error))
}
