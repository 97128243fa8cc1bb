//! What goes wrong while a container or process is made.

use crate::failure::{Failure, Kind, describe};
use std::io;

/// A failure of the engine; [`Failure`] is its form for other processes.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The spec asks for what the guest cannot do.
    #[error("{field} is not supported in the guest: {reason}")]
    Unsupported {
        /// The field, as it is called in config.json.
        field: String,
        /// Why, or what to do instead.
        reason: String,
    },
    /// The spec contradicts itself or cannot be understood.
    #[error("{field}: {reason}")]
    Invalid {
        /// The field, as it is called in config.json.
        field: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The container's program cannot be run; worded as runc does, because users and scripts know these sentences.
    #[error("{0}")]
    Program(String),
    /// The container to join is gone.
    #[error("cannot exec in a stopped container")]
    Stopped,
    /// A disk has not shown up.
    #[error("{0}")]
    TimedOut(String),
    /// The kernel refused.
    #[error("{action}: {}", describe(source))]
    System {
        /// What was tried.
        action: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
}

/// The engine's result.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// A field that the guest cannot honour.
    pub fn unsupported(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Unsupported { field: field.into(), reason: reason.into() }
    }

    /// A field that makes no sense.
    pub fn invalid(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Invalid { field: field.into(), reason: reason.into() }
    }

    fn kind(&self) -> Kind {
        match self {
            Self::Unsupported { .. } => Kind::Unimplemented,
            Self::Invalid { .. } => Kind::InvalidArgument,
            Self::Program(_) => Kind::NotFound,
            Self::Stopped => Kind::FailedPrecondition,
            Self::TimedOut(_) => Kind::DeadlineExceeded,
            Self::System { .. } => Kind::Internal,
        }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Failure::new(error.kind(), error.to_string())
    }
}

/// Says what was tried when the kernel refuses.
pub trait Context<T> {
    /// Adds the action to the error; the closure runs only then.
    fn doing<S: Into<String>>(self, action: impl FnOnce() -> S) -> Result<T>;
}

impl<T, E: Into<io::Error>> Context<T> for std::result::Result<T, E> {
    fn doing<S: Into<String>>(self, action: impl FnOnce() -> S) -> Result<T> {
        self.map_err(|error| Error::System { action: action().into(), source: error.into() })
    }
}
