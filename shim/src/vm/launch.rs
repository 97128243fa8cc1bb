//! Starting a VM: as early and with as little waiting as possible.
//!
//! The VMM is started first, so that it runs on another CPU while this one prepares the rest. All requests up to
//! `Boot` are sent without waiting for their replies, and the agent's connection is used at once: what is written
//! to it waits in the socket until the guest dials. Readiness is the first answer.

use std::fs::File;
use std::io::{self, PipeReader, PipeWriter};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nix::sys::wait::WaitStatus;
use tokio::net::unix::pipe::Receiver;
use tokio::sync::watch;
use tokio::time::Instant;
use vmshim_protocol::control::{Command, Event, FdRole, MachineConfig};
use vmshim_protocol::cpus::PARAMETER;
use vmshim_protocol::vsock::{AGENT_PORT, LOG_PORT};

use super::control::{Control, ControlError};
use super::files::{self, FileError};
use super::process;
use super::streams::Streams;
use super::{End, Machine, Port, Reaped, Vm};
use crate::agent_client::AgentConnection;
use crate::cgroup::Cgroup;
use crate::config::Config;
use crate::logging::{LineBuffer, parse_guest_line};
use crate::reaper::Reaper;
use crate::state::{Entry, Journal, ProcessId, StateError};
use crate::timeline::{self, Mark};

/// Added to the guest's boot deadline for the VMM's own work.
const MARGIN: Duration = Duration::from_secs(10);

/// How long to wait for the exit status of a VMM whose socket is closed.
const REAP_LIMIT: Duration = Duration::from_millis(500);

/// Why a VM cannot be started.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// A file is missing or wrong.
    #[error(transparent)]
    File(#[from] FileError),
    /// The VMM's binary cannot be run.
    #[error("the VMM {} cannot be started ({source}); check hypervisor.path in the configuration", path.display())]
    Vmm {
        /// The binary.
        path: std::path::PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The cgroup cannot be made.
    #[error("the pod's cgroup cannot be made: {0}")]
    Cgroup(#[source] io::Error),
    /// The state directory cannot be used.
    #[error(transparent)]
    State(#[from] StateError),
    /// The host is out of something.
    #[error("the VM cannot be prepared: {0}")]
    Host(#[from] io::Error),
}

/// What a VM is made from.
pub struct Launcher<'a> {
    /// The settings.
    pub config: &'a Config,
    /// Its size.
    pub machine: Machine,
    /// Its name in log lines.
    pub id: &'a str,
    /// The root of its virtio-fs device.
    pub shared: &'a Path,
    /// Where the VMM is accounted.
    pub cgroup: Option<Cgroup>,
    /// The VMM's `oom_score_adj`, where the pod has one.
    pub oom_score: Option<i32>,
    /// Network interfaces that it can have.
    pub nic_slots: u8,
    /// Whether the guest's log is wanted.
    pub debug: bool,
}

impl Launcher<'_> {
    /// Starts the VMM and boots the guest. Comes back while it boots. `mount_shared` makes the shared directory's
    /// mount, while the VMM is starting.
    ///
    /// # Errors
    /// Whatever can be known before the boot. What goes wrong later is the VM's [`End`].
    pub fn launch<E>(
        &self,
        journal: &Journal,
        reaper: &Reaper,
        mount_shared: impl FnOnce() -> Result<(), E>,
    ) -> Result<Arc<Vm>, LaunchError>
    where
        LaunchError: From<E>,
    {
        let vm = &self.config.hypervisor;
        let kvm = files::kvm()?;
        let kernel = files::kernel(&vm.kernel)?;
        let root_image = files::root_image(&vm.root_image)?;
        let entrances = self.make_cgroup(journal)?;
        let started = process::start(&vm.path, entrances)
            .map_err(|source| LaunchError::Vmm { path: vm.path.clone(), source })?;
        timeline::pass(Mark::VmmStarted);
        let reaped = reaper.watch(started.pid);
        log::debug!("the VMM runs as process {}", started.pid);
        journal.intend(&Entry::Process(ProcessId::of(started.pid)?))?;
        if let Some(score) = self.oom_score {
            crate::bootstrap::lower_oom_protection(started.pid, score);
        }

        mount_shared()?;
        let shared = File::open(self.shared)?;
        let (agent, agent_peer) = UnixStream::pair()?;
        let log_pipe = if self.debug { Some(io::pipe()?) } else { None };
        let (log_reader, log_writer) = log_pipe.unzip();

        let control = Arc::new(Control::new(started.control)?);
        let (end_sender, end) = watch::channel(None);
        let (rooted_sender, rooted) = watch::channel(false);
        let (booted_sender, booted) = watch::channel(false);
        let (gone_sender, gone) = watch::channel(false);
        let streams = Arc::new(Streams::default());
        let supervisor = Supervisor {
            control: control.clone(),
            streams: streams.clone(),
            end: end_sender,
            rooted: rooted_sender,
            booted: booted_sender,
            last_words: Arc::default(),
        };
        supervisor.read_stderr(started.stderr)?;
        if let Some(reader) = log_reader {
            read_guest_log(reader)?;
        }
        let boot = Boot {
            configure: MachineConfig {
                id: self.id.to_owned(),
                vcpus: self.machine.all_vcpus(),
                memory_mib: self.machine.memory_mib,
                growth_mib: self.machine.growth_mib,
                kernel_params: self.kernel_params(),
                disk_slots: vm.disk_slots,
                nic_slots: self.nic_slots,
                receive_limit: vm.receive_limit(),
                send_limit: vm.send_limit(),
                uid: vm.uid,
                gid: vm.gid,
            },
            timeout: Duration::from_secs(vm.boot_timeout_seconds.into()),
            kvm,
            kernel,
            root_image,
            shared,
            agent: agent_peer.into(),
            log: log_writer,
        };
        supervisor.run(boot, reaped, gone_sender);
        let agent = AgentConnection::new(agent)?;
        let machine = self.machine;
        Ok(Arc::new(Vm { control, streams, agent, machine, pid: started.pid, rooted, booted, end, gone }))
    }

    /// The administrator's, which come last and therefore win.
    fn kernel_params(&self) -> String {
        let own = &self.config.hypervisor.kernel_params;
        match self.machine {
            Machine { spare_vcpus: 0, .. } => own.clone(),
            Machine { vcpus, .. } => format!("{PARAMETER}={vcpus} {own}"),
        }
    }

    fn make_cgroup(&self, journal: &Journal) -> Result<Vec<File>, LaunchError> {
        let Some(cgroup) = &self.cgroup else { return Ok(Vec::new()) };
        for parent in cgroup.missing_parents() {
            journal.intend(&Entry::CgroupParent(parent))?;
        }
        for directory in cgroup.directories() {
            journal.intend(&Entry::Cgroup(directory.clone()))?;
        }
        cgroup.create().and_then(|()| cgroup.entrances()).map_err(LaunchError::Cgroup)
    }
}

/// The requests that boot a VM, with their descriptors.
struct Boot {
    configure: MachineConfig,
    timeout: Duration,
    kvm: File,
    kernel: File,
    root_image: File,
    shared: File,
    agent: OwnedFd,
    log: Option<PipeWriter>,
}

impl Boot {
    async fn request(self, control: &Control, rooted: &watch::Sender<bool>) -> Result<(), ControlError> {
        let deadline = Instant::now() + self.timeout + MARGIN;
        let files = [
            (FdRole::Kvm, self.kvm.as_fd()),
            (FdRole::Kernel, self.kernel.as_fd()),
            (FdRole::RootImage, self.root_image.as_fd()),
            (FdRole::SharedDirectory, self.shared.as_fd()),
        ];
        let agent = [(FdRole::StreamSocket, self.agent.as_fd())];
        let log = self.log.as_ref().map(|writer| [(FdRole::StreamSink, writer.as_fd())]);
        let configure = async {
            control.request(Command::Configure(self.configure), &files, deadline).await?;
            rooted.send_replace(true);
            Ok(())
        };
        let expect_log = async {
            match &log {
                Some(fds) => control.request(Command::Expect { port: LOG_PORT }, fds, deadline).await,
                None => Ok(()),
            }
        };
        let deadline_ms = u32::try_from(self.timeout.as_millis()).unwrap_or(u32::MAX);
        // Polled in this order, so sent in this order, none waiting for the one before.
        let (configured, agent, log, booted) = tokio::join!(
            biased;
            configure,
            control.request(Command::Expect { port: AGENT_PORT }, &agent, deadline),
            expect_log,
            control.request(Command::Boot { deadline_ms }, &[], deadline),
        );
        configured.and(agent).and(log).and(booted)
    }
}

/// Watches a VMM from its start to its end.
struct Supervisor {
    control: Arc<Control>,
    streams: Arc<Streams>,
    end: watch::Sender<Option<Arc<End>>>,
    rooted: watch::Sender<bool>,
    booted: watch::Sender<bool>,
    last_words: Arc<Mutex<String>>,
}

impl Supervisor {
    fn run(self, boot: Boot, reaped: Reaped, gone: watch::Sender<bool>) {
        let control = self.control.clone();
        let this = Arc::new(self);
        let booter = this.clone();
        tokio::spawn(async move {
            // A VMM that is gone is reported by the other task, which knows why.
            match boot.request(&control, &booter.rooted).await {
                Ok(()) => {
                    log::debug!("the guest boots");
                    booter.booted.send_replace(true);
                }
                Err(ControlError::Gone) => {}
                Err(error) => booter.ended(End::refused(error.to_string())),
            }
        });
        tokio::spawn(async move {
            this.control.run(|event| this.on_event(event)).await;
            this.streams.close_all();
            let mut reaped = reaped;
            let status = tokio::time::timeout(REAP_LIMIT, &mut reaped).await;
            let status = status.ok().and_then(Result::ok);
            let last_words = this.last_words.lock().unwrap_or_else(PoisonError::into_inner).clone();
            this.ended(End::died(&describe(status), &last_words));
            if status.is_none() {
                let _ = reaped.await;
            }
            gone.send_replace(true);
        });
    }

    fn on_event(&self, event: Event) {
        match event {
            Event::StreamClosed { port } => self.streams.close(Port(port)),
            Event::Exited { outcome, console } => self.ended(End::from_outcome(outcome, console)),
        }
    }

    /// Only the first reason counts.
    fn ended(&self, end: End) {
        self.end.send_if_modified(|current| {
            let first = current.is_none();
            if first {
                *current = Some(Arc::new(end));
            }
            first
        });
    }

    fn read_stderr(&self, pipe: PipeReader) -> io::Result<()> {
        let last_words = self.last_words.clone();
        read_lines(pipe, move |line| {
            log::debug!("vmm: {line}");
            line.clone_into(&mut last_words.lock().unwrap_or_else(PoisonError::into_inner));
        })
    }
}

fn describe(status: Option<WaitStatus>) -> String {
    match status {
        Some(WaitStatus::Exited(_, code)) => format!("exited with status {code}"),
        Some(WaitStatus::Signaled(_, signal, _)) => format!("was killed by {}", signal.as_str()),
        _ => "closed its control socket".to_owned(),
    }
}

fn read_guest_log(pipe: PipeReader) -> io::Result<()> {
    read_lines(pipe, |line| {
        let (level, text) = parse_guest_line(line);
        log::debug!("guest: {}: {text}", level.as_str().to_ascii_lowercase());
    })
}

/// Reads lines until the pipe's end.
fn read_lines(pipe: PipeReader, mut on_line: impl FnMut(&str) + Send + 'static) -> io::Result<()> {
    let receiver = Receiver::from_owned_fd(pipe.into())?;
    tokio::spawn(async move {
        let mut buffer = [0; 4096];
        let mut lines = LineBuffer::default();
        loop {
            if receiver.readable().await.is_err() {
                return;
            }
            match receiver.try_read(&mut buffer) {
                Ok(0) => return,
                Ok(count) => lines.feed(&buffer[..count], &mut on_line),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => return,
            }
        }
    });
    Ok(())
}
