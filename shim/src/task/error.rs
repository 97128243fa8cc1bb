//! What the Task service answers when it cannot do what it is asked: a gRPC code and one sentence.

use std::sync::Arc;

use ttrpc::Code;

use crate::agent_client::{AgentError, GuestCode};
use crate::config::OptionsError;
use crate::hooks::HookError;
use crate::ids::InvalidName;
use crate::network::NetworkError;
use crate::oci::SpecError;
use crate::state::StateError;
use crate::stdio::StdioError;
use crate::storage::StorageError;
use crate::task::pod::BootError;
use crate::vm::ControlError;

/// Why a call fails.
#[derive(Debug, thiserror::Error)]
pub enum TaskError {
    /// No such container.
    #[error("container {0} not found")]
    NoContainer(String),
    /// No such exec.
    #[error("process {exec_id} of container {id} not found")]
    NoProcess {
        /// The container.
        id: String,
        /// The exec.
        exec_id: String,
    },
    /// The process has exited.
    #[error("process already finished")]
    Finished,
    /// A container of that id is there.
    #[error("container {0} already exists")]
    ContainerExists(String),
    /// An exec of that id is there.
    #[error("exec {0} already exists")]
    ExecExists(String),
    /// The call does not fit the process's phase.
    #[error("cannot {verb} a {phase} process")]
    WrongPhase {
        /// What was asked.
        verb: &'static str,
        /// What the process is.
        phase: &'static str,
    },
    /// Not in this version.
    #[error("{0} is not supported by this runtime")]
    Unsupported(&'static str),
    /// A field of the request.
    #[error("{0}")]
    Request(String),
    /// Too late.
    #[error("{0} took longer than the caller's deadline")]
    Deadline(&'static str),
    /// Nothing can run before the sandbox is there.
    #[error("the sandbox has not been created yet")]
    NoSandbox,
    /// There is one.
    #[error("the sandbox already exists")]
    SandboxExists,
    /// The call does not fit the sandbox's stage.
    #[error("cannot {verb} a {stage} sandbox")]
    WrongStage {
        /// What was asked.
        verb: &'static str,
        /// What the sandbox is.
        stage: &'static str,
    },
    /// Its vCPUs are stopped.
    #[error("the whole pod is paused; resume it first, by the container that stands for it")]
    PodPaused,
    /// More than the machine can ever have.
    #[error(
        "with this memory limit the pod's containers could have {wanted_mib} MiB, for which its machine cannot grow; it has \
         room for {most_mib} MiB: choose a smaller limit, or raise hypervisor.memory_growth_mib for new pods"
    )]
    NoRoom {
        /// The sum of the limits.
        wanted_mib: u64,
        /// What it can be.
        most_mib: u32,
    },
    /// The VM is no more.
    #[error("the pod's VM has ended: {0}")]
    VmEnded(String),
    /// The VM never was.
    #[error("the VM cannot be started: {0}")]
    Boot(Arc<BootError>),
    /// An id that is none.
    #[error(transparent)]
    Name(#[from] InvalidName),
    /// `config.json`.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// Runtime options.
    #[error(transparent)]
    Options(#[from] OptionsError),
    /// Root file system or volumes.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// The network.
    #[error("{0}")]
    Network(Arc<NetworkError>),
    /// Standard streams.
    #[error(transparent)]
    Stdio(#[from] StdioError),
    /// The VMM.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The guest.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// A hook of the spec.
    #[error(transparent)]
    Hook(HookError),
    /// The state directory.
    #[error(transparent)]
    State(StateError),
    /// A bug in the shim.
    #[error("the shim failed to {0}; its log says more")]
    Internal(&'static str),
}

impl TaskError {
    /// Whether what is meant is not there, or not any more.
    pub fn is_not_found(&self) -> bool {
        self.code() == Code::NOT_FOUND
    }

    fn code(&self) -> Code {
        match self {
            Self::NoContainer(_) | Self::NoProcess { .. } | Self::Finished => Code::NOT_FOUND,
            Self::ContainerExists(_) | Self::ExecExists(_) | Self::SandboxExists => Code::ALREADY_EXISTS,
            Self::WrongPhase { .. }
            | Self::WrongStage { .. }
            | Self::NoSandbox
            | Self::PodPaused
            | Self::VmEnded(_) => Code::FAILED_PRECONDITION,
            Self::Unsupported(_) => Code::UNIMPLEMENTED,
            Self::Request(_) | Self::Name(_) | Self::Spec(_) | Self::Options(_) => Code::INVALID_ARGUMENT,
            Self::Deadline(_) | Self::Control(ControlError::TimedOut) | Self::Agent(AgentError::TimedOut) => {
                Code::DEADLINE_EXCEEDED
            }
            Self::Boot(error) if error.is_invalid() => Code::INVALID_ARGUMENT,
            Self::Boot(_) => Code::FAILED_PRECONDITION,
            Self::Network(error) => error.code(),
            Self::Storage(StorageError::NoSlot) | Self::NoRoom { .. } => Code::RESOURCE_EXHAUSTED,
            Self::Storage(StorageError::Mount { .. }) => Code::UNKNOWN,
            Self::Storage(_) | Self::Stdio(_) => Code::INVALID_ARGUMENT,
            Self::Control(ControlError::Ended(_)) => Code::FAILED_PRECONDITION,
            Self::Control(error) if error.is_invalid() => Code::INVALID_ARGUMENT,
            Self::Hook(HookError::TimedOut { .. }) => Code::DEADLINE_EXCEEDED,
            Self::Control(_) | Self::Hook(_) | Self::State(_) | Self::Internal(_) => Code::UNKNOWN,
            Self::Agent(AgentError::Refused { code, .. }) => guest_code(*code),
            Self::Agent(AgentError::Gone) => Code::UNAVAILABLE,
        }
    }
}

fn guest_code(code: GuestCode) -> Code {
    match code {
        GuestCode::NotFound => Code::NOT_FOUND,
        GuestCode::AlreadyExists => Code::ALREADY_EXISTS,
        GuestCode::InvalidArgument => Code::INVALID_ARGUMENT,
        GuestCode::FailedPrecondition => Code::FAILED_PRECONDITION,
        GuestCode::DeadlineExceeded => Code::DEADLINE_EXCEEDED,
        GuestCode::Unimplemented => Code::UNIMPLEMENTED,
        GuestCode::ResourceExhausted => Code::RESOURCE_EXHAUSTED,
        GuestCode::Unknown => Code::UNKNOWN,
    }
}

impl From<TaskError> for ttrpc::Error {
    fn from(error: TaskError) -> Self {
        Self::RpcStatus(ttrpc::get_status(error.code(), error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn code(error: TaskError) -> Code {
        error.code()
    }

    #[test]
    fn codes_are_those_that_containerd_acts_on() {
        assert_eq!(code(TaskError::NoContainer("x".into())), Code::NOT_FOUND);
        assert_eq!(code(TaskError::Finished), Code::NOT_FOUND);
        assert_eq!(code(TaskError::ExecExists("x".into())), Code::ALREADY_EXISTS);
        assert_eq!(
            code(TaskError::WrongPhase { verb: "exec in", phase: "stopped" }),
            Code::FAILED_PRECONDITION
        );
        assert_eq!(code(TaskError::Unsupported("checkpoint")), Code::UNIMPLEMENTED);
        assert_eq!(code(AgentError::TimedOut.into()), Code::DEADLINE_EXCEEDED);
        assert_eq!(code(StorageError::UnknownType("zfs".into()).into()), Code::INVALID_ARGUMENT);
    }

    #[test]
    fn a_sentence_carries_no_debug_output() {
        let error = ttrpc::Error::from(TaskError::WrongPhase { verb: "pause", phase: "stopped" });
        let ttrpc::Error::RpcStatus(status) = error else { panic!("a status") };
        assert_eq!(status.message, "cannot pause a stopped process");
    }
}
