//! The benchmark: what a user waits for and pays, beside runc in the same run.
//!
//! Times are the host's own clock. In the test host's `--icount` mode that clock advances one nanosecond per executed
//! instruction, so that a figure is a count of work that does not depend on the machine; see `scripts/bench --help`.

mod memory;
mod network;
mod pod;
mod pods;
mod report;
mod run;
mod size;
mod stdio;

pub use pod::prepare_network;
pub use report::{Figure, Report, Row};

use std::path::Path;
use std::time::Duration;

use anyhow::{Result, bail};

use crate::containerd::Containerd;

/// The image every row runs.
pub const IMAGE: &str = "docker.io/library/busybox:latest";

/// What can be measured, in the order of the table.
pub const ROWS: [&str; 7] = ["run", "exec", "memory", "stdio", "size", "pods", "network"];

/// How a benchmark is made.
#[derive(Debug)]
pub struct Plan<'a> {
    /// The daemon, with [`IMAGE`] imported, also for pods, on the network of [`prepare_network`].
    pub daemon: &'a Containerd,
    /// Counted runs of each measurement; one more goes before them uncounted.
    pub runs: usize,
    /// After how long without a sign of life a run is given up as hung.
    pub hang: Duration,
    /// Bytes through `cat`.
    pub stream_bytes: u64,
    /// MiB from one pod to another.
    pub network_mib: u32,
    /// The program `bench-load`.
    pub load: &'a Path,
    /// Where the programs are installed.
    pub prefix: &'a Path,
}

/// Measures the named rows.
///
/// # Errors
/// On an unknown row, or when a container that has to run does not.
pub fn measure(plan: &Plan<'_>, rows: &[String], report: &mut Report) -> Result<()> {
    for row in rows {
        eprintln!("bench: measuring {row}");
        match row.as_str() {
            "run" => run::cold_run(plan, report)?,
            "exec" => run::exec(plan, report)?,
            "memory" => memory::idle(plan, report)?,
            "stdio" => stdio::cat(plan, report)?,
            "size" => size::programs(plan, report)?,
            "pods" => pods::lives(plan, report)?,
            "network" => network::between_pods(plan, report)?,
            other => bail!("no row is named {other:?}; there are {}", ROWS.join(", ")),
        }
    }
    Ok(())
}
