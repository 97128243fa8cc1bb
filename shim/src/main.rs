//! containerd runtime shim that runs each pod in a KVM microVM.
//!
//! One process per pod serves containerd's Task service; [`bootstrap`] starts and removes it. The shim trusts
//! containerd and the host's files; it does not trust the guest, nor the VMM once a workload runs. It has one thread
//! for its event loop, and short-lived ones for system calls that may wait.

mod agent_client;
mod bootstrap;
mod cgroup;
mod config;
mod connections;
mod events;
mod hooks;
mod host_network;
mod ids;
mod logging;
mod network;
mod oci;
mod reaper;
mod sandbox;
mod serve;
mod state;
mod stdio;
mod storage;
mod streaming;
mod task;
mod timeline;
mod transfer;
mod vm;

use std::io::Write;
use std::process::ExitCode;

use bootstrap::{Action, Invocation};

/// In the bundle: names the state directory where it is not the default one.
const STATE_DIR_FILE: &str = "vmshim-state-dir";

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> anyhow::Result<()> {
    timeline::pass(timeline::Mark::ShimStarted);
    let invocation = Invocation::parse(std::env::args().skip(1))?;
    match invocation.action {
        Action::Start => {
            if let Some(serving) = bootstrap::start(&invocation)? {
                serve::serve(serving)?;
            }
        }
        Action::Delete => print(&bootstrap::delete(&invocation)?)?,
        Action::Info => print(&bootstrap::info()?)?,
        Action::Version => print(format!("containerd-shim-vmshim-v2 {}\n", bootstrap::VERSION).as_bytes())?,
        Action::Help => print(bootstrap::USAGE.as_bytes())?,
    }
    Ok(())
}

fn print(bytes: &[u8]) -> std::io::Result<()> {
    std::io::stdout().write_all(bytes)
}
