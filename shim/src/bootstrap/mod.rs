//! How containerd finds, starts and removes a shim: the command line, the dialects of its standard input and output,
//! the socket, and the short-lived commands `start`, `delete` and `-info`.
//!
//! Everything here runs single-threaded, before or without the asynchronous runtime, and on the latency path of every
//! container. Only `start`'s standard output may carry anything: a byte on its standard error would become part of
//! the address under containerd 1.6 to 2.2, so errors are written there just before a non-zero exit.

mod args;
mod delete;
mod dialect;
mod grouping;
mod info;
mod process;
mod socket;
mod start;

pub use args::{Action, Invocation, USAGE};
pub use delete::delete;
pub use info::info;
pub use process::lower_oom_protection;
pub use start::{Serving, start};

/// Version of this build.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
