//! The agent's service and messages, generated from `proto/agent.proto`, which documents them.

#[allow(
    missing_docs,
    clippy::all,
    clippy::pedantic,
    clippy::restriction,
    nonstandard_style,
    unused,
    rustdoc::all
)]
mod generated {
    pub mod agent {
        include!(concat!(env!("OUT_DIR"), "/agent.rs"));
    }
    pub mod agent_ttrpc {
        include!(concat!(env!("OUT_DIR"), "/agent_ttrpc.rs"));
    }
}

pub use generated::agent::*;
pub use generated::agent_ttrpc::{Agent, AgentClient, create_agent};

/// The source of a bind mount in a spec for the agent, followed by the number of a socket of the same request.
pub const SOCKET_SOURCE: &str = "vmshim-socket:";

/// The path of a namespace in a spec for the agent, followed by the id of the container in the same guest whose
/// namespace is joined.
pub const CONTAINER_NAMESPACE: &str = "vmshim-container:";

/// The path of a namespace in a spec for the agent where the pod's own is joined.
pub const POD_NAMESPACE: &str = "vmshim-pod";

/// The directory of the guest that is the pod's shared memory: a file system of its own, for bind mounts by path.
pub const POD_SHARED_MEMORY: &str = "/dev/shm";
