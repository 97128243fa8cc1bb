//! What the shim, the VMM and the agent say to each other.
//!
//! * [`address`] (feature `agent`): how messages carry Internet addresses.
//! * [`agent`] (feature `agent`): the ttrpc service of the guest's first process, generated from `proto/agent.proto`.
//! * [`bpf`] (feature `bpf`): eBPF programs that host and guest attach to their own sockets and cgroups.
//! * [`containerd`] (feature `containerd`): services of containerd's, generated from `proto/containerd/`.
//! * [`control`] (feature `control`): requests, replies and events between the shim and the VMM, with the file
//!   descriptors that travel along.
//! * [`cpus`]: how many CPUs a guest brings up.
//! * [`datagrams`] (feature `datagrams`): how datagrams go through a stream between shim and agent.
//! * [`netlink`] (feature `netlink`): requests to the kernel that host and guest make of their own network.
//! * [`nic`]: how the guest knows which virtio-net device is which slot.
//! * [`power`]: how a guest ends its machine.
//! * [`shared`]: the virtio-fs device's tag and the layout of the directory it shares.
//! * [`vsock`]: the port numbers that host and guest agree on.

#[cfg(feature = "agent")]
pub mod address;
#[cfg(feature = "agent")]
pub mod agent;
#[cfg(feature = "bpf")]
pub mod bpf;
#[cfg(feature = "containerd")]
pub mod containerd;
#[cfg(feature = "control")]
pub mod control;
pub mod cpus;
#[cfg(feature = "datagrams")]
pub mod datagrams;
#[cfg(feature = "netlink")]
pub mod netlink;
pub mod nic;
pub mod power;
pub mod shared;
pub mod vsock;
