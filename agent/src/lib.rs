//! The first process of a vmshim guest: it runs OCI containers for the shim on the host.
//!
//! * [`boot`]: from `/init` to an agent that serves; mounts, CPUs, the dial to the host.
//! * [`server`]: the ttrpc service. [`containers`]: the containers and their processes.
//! * [`engine`]: makes a container or process, in a short-lived run of this same program.
//! * [`stdio`]: standard streams, one vsock stream each. [`events`]: what the shim is told. [`reaper`]: exits.
//! * [`cgroup`]: limits, device rules, statistics. [`link`]: streams to the host.
//! * [`network`]: the guest's interfaces. [`machine`]: what the machine gets. [`clock`]: its time of day. [`log`], [`power`], [`sys`].
//!
//! The agent is one thread with an event loop, and a few more while something may block. The shim is trusted; what runs
//! in containers, and their file systems, are not.

pub mod boot;
pub mod cgroup;
pub mod clock;
pub mod containers;
pub mod dials;
pub mod engine;
pub mod events;
pub mod failure;
pub mod host_network;
pub mod link;
pub mod log;
pub mod machine;
pub mod network;
pub mod power;
pub mod reaper;
pub mod server;
pub mod sockets;
pub mod stdio;
pub mod sys;
