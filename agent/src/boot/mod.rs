//! From the kernel's jump to `/init` to an agent that serves.
//!
//! How long the host waits is decided here, so the order is: begin to dial the host (which needs nothing but a socket),
//! mount what every request needs while the host answers, serve; what only a container needs (the shared directory) or
//! its program (the other CPUs) is done on a thread while the first request is on its way, and the request waits for it.

pub mod cpus;
mod mounts;

use crate::clock::HostClock;
use crate::containers::{Containers, Places};
use crate::events::Events;
use crate::link::{self, Host, Stream};
use crate::reaper::{self, Reaper};
use crate::server::{self, Connections, Service};
use crate::{log, network, power};
use anyhow::Context;
use std::convert::Infallible;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use tokio::sync::watch;
use vmshim_protocol::vsock::{AGENT_PORT, LOG_PORT};

/// Where the guest keeps what is the agent's.
const OWN: &str = "/run/vmshim";

/// How far the late part of the boot is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Late {
    Begun,
    Mounted,
    Complete,
}

/// What a request can wait for.
#[derive(Debug, Clone)]
pub struct Readiness(watch::Receiver<Late>);

impl Readiness {
    /// Everything is ready; for servers that are not the guest's first process.
    pub fn complete() -> Self {
        Self(watch::Sender::new(Late::Complete).subscribe())
    }

    /// Waits until containers can be made.
    pub async fn mounts(&self) {
        self.until(Late::Mounted).await;
    }

    /// Waits until all CPUs are there.
    pub async fn cpus(&self) {
        self.until(Late::Complete).await;
    }

    async fn until(&self, stage: Late) {
        // Where the late part has died, what it has left undone fails by itself.
        let _ = self.0.clone().wait_for(|now| *now >= stage).await;
    }
}

/// Runs as the guest's first process. Comes back only with the reason why it cannot.
pub fn run() -> anyhow::Result<Infallible> {
    let agent = Host::begin(AGENT_PORT).context("dial the host")?;
    let log_stream = Host::begin(LOG_PORT);
    reaper::block_signal().context("block SIGCHLD")?;
    mounts::essential().context("mount the guest's file systems")?;
    log::open();
    log::say_panics();
    mounts::settle();
    let clock = HostClock::find().inspect(HostClock::apply);
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("start the event loop")?;
    runtime.block_on(serve(agent, log_stream.ok(), clock))
}

async fn serve(
    agent: OwnedFd,
    log_stream: Option<OwnedFd>,
    clock: Option<HostClock>,
) -> anyhow::Result<Infallible> {
    let reaper = Arc::new(Reaper::default());
    let events = Arc::new(Events::default());
    let containers = Arc::new(Containers::new(places(), reaper.clone(), events, Box::new(Host)));
    let service = Service::new(containers.clone(), begin_late_part());
    let (_server, connections) = server::serve(service).await.context("start the server")?;

    tokio::spawn(async move {
        if let Err(error) = reaper.run().await {
            log::error(&format!("children can no longer be reaped: {error}"));
        }
    });
    tokio::spawn(accept(connections.clone()));
    if let Some(clock) = clock {
        tokio::spawn(clock.follow());
    }
    let stream = Host::finish(agent).await.context("dial the host")?;
    let end = connections.add(stream);
    if let Some(socket) = log_stream {
        tokio::spawn(forward_log(socket));
    }
    // Without the host there is nobody to run containers for.
    let _ = end.await;
    log::info("the host has gone");
    containers.quiesce().await;
    power::off()
}

fn places() -> Places {
    Places {
        engine: PathBuf::from("/proc/self/exe"),
        containers: PathBuf::from(OWN).join("containers"),
        cgroups: crate::cgroup::parent(),
        shared: PathBuf::from(OWN).join("shared"),
    }
}

/// For clients on the host that come through the VMM's own socket.
async fn accept(connections: Connections) {
    let take = |stream: Stream| drop(connections.add(stream));
    if let Err(error) = link::accept_from_host(AGENT_PORT, take).await {
        log::error(&format!("cannot listen for the host: {error}"));
    }
}

/// A host that does not listen there wants no log.
async fn forward_log(socket: OwnedFd) {
    if let Ok(stream) = Host::finish(socket).await {
        let _ = log::forward(stream).await;
    }
}

fn begin_late_part() -> Readiness {
    let (sender, receiver) = watch::channel(Late::Begun);
    tokio::task::spawn_blocking(move || {
        if let Err(error) = mounts::shared(&places().shared) {
            log::error(&format!("the shared directory is not there: {error}"));
        }
        sender.send_replace(Late::Mounted);
        cpus::bring_up();
        if let Err(error) = network::loopback::set_up() {
            log::error(&format!("the loopback interface stays down: {error}"));
        }
        sender.send_replace(Late::Complete);
    });
    Readiness(receiver)
}
