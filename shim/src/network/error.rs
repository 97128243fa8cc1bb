//! Why a pod has no network.

use std::io;
use std::path::PathBuf;

use ttrpc::Code;

use crate::agent_client::AgentError;
use crate::state::StateError;
use crate::vm::ControlError;

/// Why a pod has no network.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// No file.
    #[error("the network namespace {} does not exist", .0.display())]
    Missing(PathBuf),
    /// Another file.
    #[error("{} is not a network namespace", .0.display())]
    NotNetns(PathBuf),
    /// Interfaces, but nothing to be reached by.
    #[error("no interface of the network namespace {} has an address; check what CNI made", .0.display())]
    NoAddress(PathBuf),
    /// Something that carries no Ethernet frames.
    #[error("interface {name} has addresses but {problem}, so a VM cannot have it")]
    Unsupported {
        /// The interface.
        name: String,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// More than the machine was made for.
    #[error("the pod has {found} interfaces and the machine {slots}; raise hypervisor.nic_slots")]
    TooMany {
        /// Interfaces that are up.
        found: usize,
        /// NIC slots.
        slots: u8,
    },
    /// Two VMs cannot be one station.
    #[error(
        "interface {0} is connected to another VM already; a network namespace can be that of one VM only"
    )]
    InUse(String),
    /// The host refused.
    #[error("cannot {what}: {source}")]
    Host {
        /// What was tried.
        what: String,
        /// Why.
        source: io::Error,
    },
    /// The journal.
    #[error(transparent)]
    State(#[from] StateError),
    /// The VMM.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The guest.
    #[error("the guest's network cannot be set up: {0}")]
    Agent(#[from] AgentError),
    /// A thread died.
    #[error("the shim failed to set up the network; its log says more")]
    Internal,
}

impl NetworkError {
    /// For a call that was to do `what`.
    pub(super) fn host(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::Host { what, source }
    }

    /// The code that containerd is told.
    pub fn code(&self) -> Code {
        match self {
            Self::NotNetns(_) | Self::Unsupported { .. } => Code::INVALID_ARGUMENT,
            Self::TooMany { .. } => Code::RESOURCE_EXHAUSTED,
            Self::Control(ControlError::TimedOut) | Self::Agent(AgentError::TimedOut) => {
                Code::DEADLINE_EXCEEDED
            }
            Self::Missing(_) | Self::NoAddress(_) | Self::InUse(_) => Code::FAILED_PRECONDITION,
            _ => Code::UNKNOWN,
        }
    }

    /// Whether the VM is no more, which has a reason of its own.
    pub fn guest_is_gone(&self) -> bool {
        matches!(
            self,
            Self::Agent(AgentError::Gone) | Self::Control(ControlError::Gone | ControlError::Ended(_))
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_and_sentences_are_for_the_user() {
        let missing = NetworkError::Missing("/run/netns/x".into());
        assert_eq!(missing.code(), Code::FAILED_PRECONDITION);
        assert_eq!(missing.to_string(), "the network namespace /run/netns/x does not exist");
        let late = NetworkError::Agent(AgentError::TimedOut);
        assert_eq!(late.code(), Code::DEADLINE_EXCEEDED);
        assert!(!late.guest_is_gone() && NetworkError::Agent(AgentError::Gone).guest_is_gone());
    }
}
