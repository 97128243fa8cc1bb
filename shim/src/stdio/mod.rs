//! Standard streams: opened here by the rules of containerd's own shims, then passed to the VMM. Data never flows
//! through the shim.

mod logger;
mod open;
mod uri;

pub use open::{Kept, Opened, Streams};
pub use uri::Target;

use std::io;
use std::path::PathBuf;

/// Why a process cannot have its standard streams.
#[derive(Debug, thiserror::Error)]
pub enum StdioError {
    /// A URI that is not understood.
    #[error("the stdio address {0:?} is not supported; use a fifo's path, fifo://, file:// or binary://")]
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
    /// A logger that did not say that it is ready.
    #[error("the logger {} did not become ready in time", .0.display())]
    LoggerSilent(PathBuf),
}
