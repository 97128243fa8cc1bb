//! What a pod has changed on the host, written down before it is changed, so that anybody can undo it.
//!
//! The journal is a file in the pod's directory under `state_dir`. Each entry names one side effect; entries are undone
//! in reverse order, each undoing is idempotent, and an entry whose side effect never came to be is harmless. The pod's
//! shim does it at its end, and `delete` does it when the shim could not. The directory is on a tmpfs, owned by
//! root, and nothing in it comes from the guest.

mod journal;
mod pod_dir;
mod process;
mod undo;

pub use journal::{Entry, Hooked, Journal, Redirection};
pub use pod_dir::PodDir;
pub use process::{ProcessId, signal, wait_gone};
pub use undo::{undo, undo_predecessor};

use std::path::PathBuf;

/// Why the state directory cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("the state directory {} cannot be used: {source}", path.display())]
pub struct StateError {
    /// The file or directory.
    pub path: PathBuf,
    /// Why.
    #[source]
    pub source: std::io::Error,
}
