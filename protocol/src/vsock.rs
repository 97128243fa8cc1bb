//! vsock addresses that host and guest agree on.
//!
//! The guest dials the host: for each stream the shim names a port, registers the host's end of it with the VMM
//! ([`crate::control::Command::Expect`]) and tells the agent the port. A port that nobody registered is refused.

/// The guest's context id. The same in every VM: each VM has a vsock device, and so an address space, of its own.
pub const GUEST_CID: u32 = 3;

/// The host's context id, fixed by the virtio specification.
pub const HOST_CID: u32 = 2;

/// Dialled by the agent when it is ready. On that stream the agent serves ttrpc. The agent listens on its own port of
/// the same number too, for clients that come through the VMM's Unix socket.
pub const AGENT_PORT: u32 = 1024;

/// Dialled by the agent as soon as it runs: the guest's log, one line of UTF-8 text per entry,
/// `<syslog level digit> <text>\n`, both the kernel's and the agent's.
pub const LOG_PORT: u32 = 1025;

/// The first of the ports that the shim hands out for stdio, upwards, each used once in a VM's life.
pub const FIRST_STREAM_PORT: u32 = 0x1_0000;
