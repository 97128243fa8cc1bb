//! Standard streams: opened here by the rules of containerd's own shims, then passed to the VMM. Data never flows
//! through the shim, except where a client wants it on the shim's own connection ([`crate::streaming`]).

mod logger;
mod open;
mod uri;

pub use logger::Logger;
pub use open::{Kept, Opened, Owner, Streams, Writer};
pub use uri::{Ready, Target};

use std::io;
use std::path::PathBuf;

/// Why a process cannot have its standard streams.
#[derive(Debug, thiserror::Error)]
pub enum StdioError {
    /// A URI that is not understood.
    #[error(
        "the stdio address {0:?} is not supported; use a fifo's path, fifo://, file://, binary://, binary-v2:// or ttrpc+unix://"
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
    /// A stream that is not there.
    #[error("no client has opened the stream {0:?} that stdio is to go to")]
    NoStream(String),
    /// A stream that cannot be carried on.
    #[error("the stream for stdio cannot be set up: {0}")]
    Stream(io::Error),
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
