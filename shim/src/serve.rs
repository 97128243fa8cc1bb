//! The serving process: its event loop, its signals and its end.

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use tokio::io::unix::AsyncFd;
use ttrpc::asynchronous::Server;

use crate::bootstrap::Serving;
use crate::cgroup::Cgroup;
use crate::config::Config;
use crate::connections::Connections;
use crate::events::Publisher;
use crate::logging;
use crate::reaper::Reaper;
use crate::sandbox;
use crate::streaming;
use crate::task::{Pod, configure, services};
use crate::transfer;

/// How long clients may take to close their connections. What a call waits for longer than that will not happen any more.
const ANSWERS_LIMIT: Duration = Duration::from_secs(1);

/// Serves until the pod is done.
///
/// # Errors
/// When not even an answer to Create can be given.
pub fn serve(serving: Serving) -> anyhow::Result<()> {
    let configured = configure(&serving);
    let (shim_cgroup, config) = match configured {
        Ok((options, config)) => (options.shim_cgroup, Ok(config)),
        Err(error) => (None, Err(error)),
    };
    let level = match &config {
        _ if serving.debug => log::LevelFilter::Debug,
        Ok(config) => config.runtime.log_level.into(),
        Err(_) => log::LevelFilter::from(Config::default().runtime.log_level),
    };
    logging::init(&serving.bundle.join("log"), level, serving.namespace.as_str(), serving.group.as_str());
    if let Some(path) = shim_cgroup {
        match Cgroup::locate(&path).map(|cgroup| cgroup.enter()) {
            Ok(Ok(())) => {}
            Ok(Err(error)) => log::error!("the shim cannot enter cgroup {path}: {error}"),
            Err(error) => log::error!("the shim cannot enter its cgroup: {error}"),
        }
    }
    let signals = Signals::block()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let result = runtime.block_on(run(serving, config, signals));
    // Threads that hang in a file system must not keep the process.
    runtime.shutdown_background();
    result
}

async fn run(
    serving: Serving,
    config: Result<Config, crate::task::BootError>,
    signals: Signals,
) -> anyhow::Result<()> {
    // SAFETY: the signals own their descriptor and keep it until they are dropped.
    let signals = unsafe { AsyncFd::register(signals) }.map_err(std::io::Error::from)?;
    let reaper = Reaper::default();
    let events = Publisher::new(serving.namespace.as_str(), serving.ttrpc_address.clone());
    let pod = Pod::boot(&serving, &reaper, events, config);
    let socket = serving.socket.clone();
    let connections = Connections::default();
    let mut server = Server::new()
        .add_listener(connections.listener(serving.listener)?)
        .register_service(services(&pod))
        .register_service(sandbox::services(&pod))
        .register_service(streaming::services(&pod.streams))
        .register_service(transfer::services(&pod));
    server.start().await?;
    tokio::spawn(handle_signals(pod.clone(), reaper, signals));
    pod.shutdown_requested().await;
    // While the journal still tells `delete` to wait, so that it is not the socket of a successor.
    let _ = std::fs::remove_file(socket);
    pod.wind_up().await;
    // Whoever asked for the end is to hear that it has come, and closes the connection when he has.
    let heard = async {
        server.stop_listen().await;
        connections.all_closed().await;
    };
    if tokio::time::timeout(ANSWERS_LIMIT, heard).await.is_err() {
        log::debug!("a connection is cut off that was not closed");
    }
    Ok(())
}

/// Reaps children, and ends the pod when the host asks.
async fn handle_signals(pod: Arc<Pod>, reaper: Reaper, signals: AsyncFd<Signals>) {
    loop {
        match next_signal(&signals).await {
            Some(Signal::SIGCHLD) => reaper.reap(),
            // containerd's own shims write their stacks to the log then; it must at least not end the pod.
            Some(Signal::SIGUSR1) => state(&pod).iter().for_each(|line| log::info!("{line}")),
            Some(signal) => {
                log::info!("the shim ends on {}", signal.as_str());
                pod.request_shutdown();
            }
            None => {}
        }
    }
}

/// What the pod is doing, a line each: its VM and its processes.
fn state(pod: &Pod) -> Vec<String> {
    let mut lines = vec![match pod.vm() {
        Ok(vm) => format!("the VM runs as process {}", vm.pid()),
        Err(error) => format!("no VM runs: {error}"),
    }];
    for container in pod.containers() {
        for process in std::iter::once(container.init.clone()).chain(container.execs()) {
            let output = if process.is_drained() { "none" } else { "open" };
            let (id, exec, phase) = (&container.id, &process.exec_id, process.phase().name());
            lines.push(format!("container {id}, process {exec:?}: {phase}, streams: {output}"));
        }
    }
    lines
}

async fn next_signal(signals: &AsyncFd<Signals>) -> Option<Signal> {
    let mut ready = signals.readable().await.ok()?;
    match signals.get_ref().0.read_signal() {
        Ok(Some(info)) => Signal::try_from(i32::try_from(info.ssi_signo).ok()?).ok(),
        _ => {
            ready.clear_ready();
            None
        }
    }
}

/// The signals that the shim handles, as a descriptor.
struct Signals(SignalFd);

impl Signals {
    fn block() -> nix::Result<Self> {
        let mut set = SigSet::empty();
        let handled = [Signal::SIGCHLD, Signal::SIGTERM, Signal::SIGINT, Signal::SIGUSR1];
        handled.into_iter().for_each(|signal| set.add(signal));
        set.thread_block()?;
        Ok(Self(SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?))
    }
}

impl AsRawFd for Signals {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        use std::os::fd::AsFd;
        self.0.as_fd().as_raw_fd()
    }
}
