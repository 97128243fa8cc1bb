//! Why a request failed, as the shim is told: a kind that becomes a status code, and one sentence.

use serde::{Deserialize, Serialize};
use std::io;

/// What sort of failure it is; each kind is one ttrpc status code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    /// The container, process or program does not exist, or no longer does.
    NotFound,
    /// The id is taken.
    AlreadyExists,
    /// The container or process is in the wrong state for this.
    FailedPrecondition,
    /// The request, or a field of the spec, makes no sense.
    InvalidArgument,
    /// A field of the spec asks for what this guest cannot do.
    Unimplemented,
    /// Something took longer than it may.
    DeadlineExceeded,
    /// The kernel refused, or the agent is at fault.
    Internal,
}

/// A failure on its way to the shim. Also what crosses from the engine's process to the agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// What sort of failure it is.
    pub kind: Kind,
    /// One sentence for the user.
    pub message: String,
}

impl Failure {
    /// A failure of this kind, said in this sentence.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }
}

/// The words for an operating system error without Rust's "(os error N)", in lower case as other runtimes have it.
pub fn describe(error: &io::Error) -> String {
    let Some(code) = error.raw_os_error() else {
        return error.to_string();
    };
    let words = nix::errno::Errno::from_raw(code).desc();
    let mut letters = words.chars();
    match letters.next() {
        // "I/O error" and the like keep their capitals.
        Some(first) if letters.clone().next().is_some_and(char::is_lowercase) => {
            first.to_lowercase().chain(letters).collect()
        }
        _ => words.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_those_of_other_runtimes() {
        let say = |code| describe(&io::Error::from_raw_os_error(code));
        assert_eq!(say(libc::ENOENT), "no such file or directory");
        assert_eq!(say(libc::EACCES), "permission denied");
        assert_eq!(say(libc::ENOEXEC), "exec format error");
        assert_eq!(say(libc::EIO), "I/O error");
    }
}
