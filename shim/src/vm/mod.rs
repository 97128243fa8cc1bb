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

use std::os::fd::BorrowedFd;
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
pub use machine::Machine;
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
    pid: u32,
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

    /// Connects the guest's next connection to a fresh port with the descriptors.
    ///
    /// # Errors
    /// When the VMM refuses, does not answer in time, or is gone.
    pub async fn expect(
        &self,
        fds: &[(FdRole, BorrowedFd<'_>)],
        deadline: Instant,
    ) -> Result<(Port, Closed), ControlError> {
        let (port, closed) = self.streams.open()?;
        let command = Command::Expect { port: port.0 };
        if let Err(error) = self.request(command, fds, deadline).await {
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

    /// Puts a disk into an empty slot.
    ///
    /// # Errors
    /// When the VMM refuses, does not answer in time, or is gone.
    pub async fn attach_disk(
        &self,
        slot: u8,
        disk: BorrowedFd<'_>,
        read_only: bool,
        deadline: Instant,
    ) -> Result<(), ControlError> {
        self.request(Command::AttachDisk { slot, read_only }, &[(FdRole::Disk, disk)], deadline).await
    }

    /// Empties a slot.
    ///
    /// # Errors
    /// When the VMM refuses, does not answer in time, or is gone.
    pub async fn detach_disk(&self, slot: u8, deadline: Instant) -> Result<(), ControlError> {
        self.request(Command::DetachDisk { slot }, &[], deadline).await
    }

    /// Connects an idle NIC slot to a tap.
    ///
    /// # Errors
    /// When the VMM refuses, does not answer in time, or is gone.
    pub async fn attach_nic(
        &self,
        slot: u8,
        tap: BorrowedFd<'_>,
        deadline: Instant,
    ) -> Result<(), ControlError> {
        self.request(Command::AttachNic { slot }, &[(FdRole::Tap, tap)], deadline).await
    }

    /// Asks a VMM that has taken its configuration, so that a refusal of that is what the caller hears of.
    async fn request(
        &self,
        command: Command,
        fds: &[(FdRole, BorrowedFd<'_>)],
        deadline: Instant,
    ) -> Result<(), ControlError> {
        let mut booted = self.booted.clone();
        let asked = async {
            let _ = timeout_at(deadline, booted.wait_for(|booted| *booted)).await;
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
            // No process can have it, so nothing can be killed.
            pid: u32::MAX,
            booted: always(true),
            end,
            gone: always(false),
        };
        (Arc::new(vm), theirs)
    }
}
