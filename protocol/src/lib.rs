//! What the shim, the VMM and the agent say to each other.
//!
//! * [`agent`] (feature `agent`): the ttrpc service of the guest's first process, generated from `proto/agent.proto`.
//! * [`control`] (feature `control`): requests, replies and events between the shim and the VMM, with the file
//!   descriptors that travel along.
//! * [`power`]: how a guest ends its machine.
//! * [`shared`]: the virtio-fs device's tag and the layout of the directory it shares.
//! * [`vsock`]: the port numbers that host and guest agree on.

#[cfg(feature = "agent")]
pub mod agent;
#[cfg(feature = "control")]
pub mod control;
pub mod power;
pub mod shared;
pub mod vsock;
