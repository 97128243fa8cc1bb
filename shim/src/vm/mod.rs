//! The virtual machine: starting the VMM, talking to it, and learning of its end.
//!
//! The VMM opens nothing itself; every file it needs is opened here and passed to it. Once a workload runs, the VMM
//! is taken to be in the guest's hands: what it sends is parsed, bounded and never trusted. Everything runs on the
//! shim's one thread; no lock is held over an await.

mod control;
mod end;
mod files;
mod launch;
mod machine;
mod process;
mod streams;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::sync::{oneshot, watch};
use tokio::time::{Instant, timeout_at};
use vmshim_protocol::control::{Command, FdRole, Response, Statistics};

pub use control::ControlError;
pub use end::End;
pub use launch::{LaunchError, Launcher};
pub use machine::{Machine, Size, host_memory_mib, sum_of_memory};
pub use streams::{Closed, Port};

use crate::agent_client::AgentConnection;
use control::Control;
use streams::Streams;

/// How long the VMM may take to obey `Stop` before it is killed.
const STOP_LIMIT: Duration = Duration::from_secs(2);

/// A running VMM and the guest in it.
pub struct Vm {
    control: Arc<Control>,
    streams: Arc<Streams>,
    agent: AgentConnection,
    machine: Machine,
    pid: u32,
    rooted: watch::Receiver<bool>,
    booted: watch::Receiver<bool>,
    end: watch::Receiver<Option<Arc<End>>>,
    gone: watch::Receiver<bool>,
}

impl Vm {
    /// The VMM's process id.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// The guest's agent. Calls made before the guest is up wait for it.
    pub fn agent(&self) -> &AgentConnection {
        &self.agent
    }

    /// Its size.
    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    /// How the VM ended, when it has.
    pub fn end(&self) -> Option<Arc<End>> {
        self.end.borrow().clone()
    }

    /// Waits for the VM's end.
    pub async fn ended(&self) -> Arc<End> {
        let mut end = self.end.clone();
        match end.wait_for(Option::is_some).await {
            Ok(end) => end.as_ref().map_or_else(|| Arc::new(End::lost()), Arc::clone),
            Err(_) => Arc::new(End::lost()),
        }
    }

    /// Waits until the shared directory is the VMM's root. The kernel carries later mounts there, and earlier ones are
    /// there already; but a mount made while the VMM changes its root, holding a copy that is attached nowhere, is lost.
    ///
    /// # Errors
    /// When the VM ends before, or the deadline comes.
    pub async fn is_rooted(&self, deadline: Instant) -> Result<(), ControlError> {
        let mut rooted = self.rooted.clone();
        tokio::select! {
            biased;
            rooted = timeout_at(deadline, rooted.wait_for(|rooted| *rooted)) => match rooted {
                Ok(Ok(_)) => Ok(()),
                Ok(Err(_)) => Err(ControlError::Gone),
                Err(_) => Err(ControlError::TimedOut),
            },
            end = self.ended() => Err(ControlError::Ended(end.sentence())),
        }
    }

    /// A fresh port, for [`Vm::supply`].
    ///
    /// # Errors
    /// When none is left.
    pub fn reserve(&self) -> Result<(Port, Closed), ControlError> {
        self.streams.open()
    }

    /// Connects the guest's next connection to a reserved port with the descriptors.
    ///
    /// # Errors
    /// When the VMM refuses, does not answer in time, or is gone.
    pub async fn supply(
        &self,
        port: Port,
        fds: &[(FdRole, BorrowedFd<'_>)],
        deadline: Instant,
    ) -> Result<(), ControlError> {
        self.request(Command::Expect { port: port.0 }, fds, deadline).await
    }

    /// Connects the guest's next connection to a fresh port with the descriptors.
    ///
    /// # Errors
    /// When the VMM refuses, does not answer in time, or is gone.
    pub async fn expect(
        &self,
        fds: &[(FdRole, BorrowedFd<'_>)],
        deadline: Instant,
    ) -> Result<(Port, Closed), ControlError> {
        let (port, closed) = self.reserve()?;
        if let Err(error) = self.supply(port, fds, deadline).await {
            self.streams.close(port);
            return Err(error);
        }
        Ok((port, closed))
    }

    /// Takes a port back and resets its connection; the stream's [`Closed`] comes true. A VMM that does not answer
    /// changes nothing.
    pub async fn forget(&self, port: Port, deadline: Instant) {
        let _ = self.request(Command::Forget { port: port.0 }, &[], deadline).await;
        self.streams.close(port);
    }

    /// Puts a disk, made of one or more files, into an empty slot.
    ///
    /// # Errors
    /// When the VMM refuses, does not answer in time, or is gone.
    pub async fn attach_disk(
        &self,
        slot: u8,
        files: &[BorrowedFd<'_>],
        read_only: bool,
        deadline: Instant,
    ) -> Result<(), ControlError> {
        let fds: Vec<_> = files.iter().map(|file| (FdRole::Disk, *file)).collect();
        self.request(Command::AttachDisk { slot, read_only }, &fds, deadline).await
    }

    /// Empties a slot.
    ///
    /// # Errors
    /// When the VMM refuses, does not answer in time, or is gone.
    pub async fn detach_disk(&self, slot: u8, deadline: Instant) -> Result<(), ControlError> {
        self.request(Command::DetachDisk { slot }, &[], deadline).await
    }

    /// Connects an idle NIC slot to the queues of a tap.
    ///
    /// # Errors
    /// When the VMM refuses, does not answer in time, or is gone.
    pub async fn attach_nic(
        &self,
        slot: u8,
        queues: &[OwnedFd],
        deadline: Instant,
    ) -> Result<(), ControlError> {
        let fds: Vec<_> = queues.iter().map(|queue| (FdRole::Tap, queue.as_fd())).collect();
        self.request(Command::AttachNic { slot }, &fds, deadline).await
    }

    /// Stops the vCPUs.
    ///
    /// # Errors
    /// When the VMM does not answer in time, or is gone.
    pub async fn pause(&self, deadline: Instant) -> Result<(), ControlError> {
        self.request(Command::Pause, &[], deadline).await
    }

    /// Lets the vCPUs run on.
    ///
    /// # Errors
    /// When the VMM does not answer in time, or is gone.
    pub async fn resume(&self, deadline: Instant) -> Result<(), ControlError> {
        self.request(Command::Resume, &[], deadline).await
    }

    /// Asks the guest to have so much memory beyond what it has booted with. What is asked last counts; calls made after
    /// the boot ask in their order.
    ///
    /// # Errors
    /// When the VMM refuses, does not answer in time, or is gone.
    pub async fn resize_memory(&self, growth_mib: u32, deadline: Instant) -> Result<(), ControlError> {
        self.request(Command::ResizeMemory { growth_mib }, &[], deadline).await
    }

    /// Waits until the guest has so much memory beyond what it has booted with.
    ///
    /// # Errors
    /// When it does not in time, or is asked to have less, or the VMM is gone.
    pub async fn await_memory(&self, growth_mib: u32, deadline: Instant) -> Result<(), ControlError> {
        self.request(Command::AwaitMemory { growth_mib }, &[], deadline).await
    }

    /// Waits until the VMM has been told to boot, which is when all that is asked of it is asked in order.
    pub async fn is_booting(&self, deadline: Instant) {
        let mut booted = self.booted.clone();
        let _ = timeout_at(deadline, booted.wait_for(|booted| *booted)).await;
    }

    /// Asks a VMM that has taken its configuration, so that a refusal of that is what the caller hears of.
    async fn request(
        &self,
        command: Command,
        fds: &[(FdRole, BorrowedFd<'_>)],
        deadline: Instant,
    ) -> Result<(), ControlError> {
        let asked = async {
            self.is_booting(deadline).await;
            self.control.request(command, fds, deadline).await
        };
        tokio::select! {
            biased;
            end = self.ended() => Err(ControlError::Ended(end.sentence())),
            result = asked => match (result, self.end()) {
                (Err(ControlError::Gone), Some(end)) => Err(ControlError::Ended(end.sentence())),
                (result, _) => result,
            },
        }
    }

    /// What the VMM counts; nothing where it does not answer.
    pub async fn statistics(&self, deadline: Instant) -> Option<Statistics> {
        match self.control.ask(Command::Statistics, &[], deadline).await {
            Ok(Response::Statistics(statistics)) => Some(statistics),
            _ => None,
        }
    }

    /// Ends the VM, by force if need be, and waits until the VMM's process is gone.
    pub async fn stop(&self) {
        let deadline = Instant::now() + STOP_LIMIT;
        let _ = self.control.request(Command::Stop, &[], deadline).await;
        let mut gone = self.gone.clone();
        if tokio::time::timeout_at(deadline, gone.wait_for(|gone| *gone)).await.is_err() {
            log::warn!("the VMM does not stop and is killed");
            self.kill();
            let _ = tokio::time::timeout(STOP_LIMIT, gone.wait_for(|gone| *gone)).await;
        }
    }

    fn kill(&self) {
        // The pid cannot have been recycled: it is ours until `gone` says that it was reaped.
        if !*self.gone.borrow()
            && let Ok(pid) = i32::try_from(self.pid)
        {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
}

/// Completes when a child has been reaped.
pub type Reaped = oneshot::Receiver<nix::sys::wait::WaitStatus>;

#[cfg(test)]
impl Vm {
    /// A VM whose agent is played by the other end of `agent`, whose end by `end`, and whose VMM never answers.
    pub fn played(
        agent: std::os::unix::net::UnixStream,
        end: watch::Receiver<Option<Arc<End>>>,
    ) -> (Arc<Self>, vmshim_protocol::control::ControlSocket) {
        use nix::fcntl::{FcntlArg, OFlag, fcntl};
        let (ours, theirs) = vmshim_protocol::control::ControlSocket::pair().unwrap();
        fcntl(&ours, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
        let always = |value| watch::channel(value).1;
        let vm = Self {
            control: Arc::new(Control::new(ours).unwrap()),
            streams: Arc::default(),
            agent: AgentConnection::new(agent).unwrap(),
            machine: Machine::new(&crate::config::Config::default(), &Default::default(), u32::MAX),
            // No process can have it, so nothing can be killed.
            pid: u32::MAX,
            rooted: always(true),
            booted: always(true),
            end,
            gone: always(false),
        };
        (Arc::new(vm), theirs)
    }
}
