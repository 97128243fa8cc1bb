//! What can go wrong between shim and agent.

use ttrpc::Code;

use crate::logging::printable;

/// Characters kept of a message from the guest.
const MAX_MESSAGE: usize = 512;

/// What ttrpc says in the name of a handler that it has given up.
const GIVEN_UP: &str = "timeout";

/// Why the agent did not do what it was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AgentError {
    /// The agent refused. The message is the guest's, bounded and printable.
    #[error("{message}")]
    Refused {
        /// Its kind.
        code: GuestCode,
        /// One sentence.
        message: String,
    },
    /// No answer in time.
    #[error("the guest's agent does not answer")]
    TimedOut,
    /// The connection is gone, and with it the guest.
    #[error("the guest's agent is gone")]
    Gone,
}

/// The gRPC codes that the agent may use, which are those that make sense to pass on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GuestCode {
    /// No such container or process.
    NotFound,
    /// There is one already.
    AlreadyExists,
    /// The request is wrong.
    InvalidArgument,
    /// The request is wrong in this state.
    FailedPrecondition,
    /// Not supported by the guest.
    Unimplemented,
    /// Something in the guest took too long.
    DeadlineExceeded,
    /// Out of memory, processes, space.
    ResourceExhausted,
    /// Anything else.
    Unknown,
}

impl From<ttrpc::Error> for AgentError {
    fn from(error: ttrpc::Error) -> Self {
        match error {
            ttrpc::Error::RpcStatus(status) => {
                let code = match status.code() {
                    Code::DEADLINE_EXCEEDED if status.message() == GIVEN_UP => return Self::TimedOut,
                    Code::DEADLINE_EXCEEDED => GuestCode::DeadlineExceeded,
                    Code::NOT_FOUND => GuestCode::NotFound,
                    Code::ALREADY_EXISTS => GuestCode::AlreadyExists,
                    Code::INVALID_ARGUMENT => GuestCode::InvalidArgument,
                    Code::FAILED_PRECONDITION => GuestCode::FailedPrecondition,
                    Code::UNIMPLEMENTED => GuestCode::Unimplemented,
                    Code::RESOURCE_EXHAUSTED => GuestCode::ResourceExhausted,
                    _ => GuestCode::Unknown,
                };
                let bounded: String = status.message().chars().take(MAX_MESSAGE).collect();
                Self::Refused { code, message: printable(&bounded) }
            }
            _ => Self::Gone,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(code: Code, message: impl ToString) -> ttrpc::Error {
        ttrpc::Error::RpcStatus(ttrpc::get_status(code, message))
    }

    #[test]
    fn the_guests_words_are_bounded_and_printable() {
        let text = format!("bad\x1b[31m{}", "x".repeat(10_000));
        let error = AgentError::from(status(Code::NOT_FOUND, text));
        let AgentError::Refused { code, message } = error else { panic!("a refusal") };
        assert_eq!((code, message.chars().count()), (GuestCode::NotFound, MAX_MESSAGE));
        assert!(!message.chars().any(char::is_control));
    }

    #[test]
    fn broken_connections_mean_that_the_agent_is_gone() {
        for error in [ttrpc::Error::RemoteClosed, ttrpc::Error::Socket("x".into())] {
            assert_eq!(AgentError::from(error), AgentError::Gone);
        }
        let late = status(Code::DEADLINE_EXCEEDED, "timeout");
        assert_eq!(AgentError::from(late), AgentError::TimedOut);
    }

    #[test]
    fn what_took_too_long_in_the_guest_is_told() {
        let sentence = "no disk has appeared in slot 3";
        let error = AgentError::from(status(Code::DEADLINE_EXCEEDED, sentence));
        assert_eq!(error.to_string(), sentence);
        assert!(matches!(error, AgentError::Refused { code: GuestCode::DeadlineExceeded, .. }));
    }
}
