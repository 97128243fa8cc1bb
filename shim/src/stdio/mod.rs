//! Standard streams: opened here by the rules of containerd's own shims, then passed to the VMM. Data never flows
//! through the shim.

mod logger;
mod open;
mod uri;

pub use open::{Kept, Opened, Owner, Streams};
pub use uri::{Ready, Target};

use std::io;
use std::path::PathBuf;

/// Why a process cannot have its standard streams.
#[derive(Debug, thiserror::Error)]
pub enum StdioError {
    /// A URI that is not understood.
    #[error(
        "the stdio address {0:?} is not supported; use a fifo's path, fifo://, file://, binary:// or binary-v2://"
    )]
    Unsupported(String),
    /// A file or fifo that cannot be opened.
    #[error("{} cannot be opened for stdio: {source}", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A logger that cannot be run.
    #[error("the logger {} cannot be started: {source}", path.display())]
    Logger {
        /// The binary.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A logger that ended, or let go, without a word.
    #[error("the logger {} ended before it said that it is ready", .0.display())]
    LoggerEnded(PathBuf),
    /// A logger that did not say that it is ready.
    #[error("the logger {} did not become ready in time", .0.display())]
    LoggerSilent(PathBuf),
}
