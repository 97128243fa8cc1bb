//! One process that the agent has made.

use crate::engine::process::terminal;
use crate::engine::wire::Size;
use crate::failure::{Failure, Kind, describe};
use crate::link::Dialer;
use crate::stdio::Input;
use crate::sys::process::pidfd_send_signal;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::OnceLock;
use tokio::sync::{Mutex, watch};

use super::making::Control;

/// How far a process has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Not announced yet.
    Making,
    /// Prepared, waiting to be let go.
    Created,
    /// Its program runs.
    Running,
    /// Dead, with its status as a shell would say it.
    Exited(u32),
}

/// A process and what the agent holds of it.
pub struct Process {
    /// Empty for a container's first process.
    pub exec_id: String,
    identity: OnceLock<(u32, OwnedFd)>,
    terminal: OnceLock<OwnedFd>,
    stage: watch::Sender<Stage>,
    /// Until it is let go.
    waiting: Mutex<Option<Waiting>>,
}

/// What there is to do with a prepared process when it is let go.
pub struct Waiting {
    /// The conversation with it.
    pub control: Control,
    /// Its standard input, where it has one.
    pub input: Option<Input>,
}

impl Process {
    /// One that is being made.
    pub fn new(exec_id: String) -> Self {
        Self {
            exec_id,
            identity: OnceLock::new(),
            terminal: OnceLock::new(),
            stage: watch::Sender::new(Stage::Making),
            waiting: Mutex::default(),
        }
    }

    /// Its id in the guest's first pid namespace; 0 while it has none.
    pub fn pid(&self) -> u32 {
        self.identity.get().map_or(0, |(pid, _)| *pid)
    }

    /// Its pidfd, once it has one.
    pub fn pidfd(&self) -> Option<&OwnedFd> {
        self.identity.get().map(|(_, pidfd)| pidfd)
    }

    /// How far it has come.
    pub fn stage(&self) -> Stage {
        *self.stage.borrow()
    }

    /// It exists now.
    pub fn identify(&self, pid: u32, pidfd: OwnedFd) {
        // Set once, by the one who makes it.
        let _ = self.identity.set((pid, pidfd));
    }

    /// Its terminal, kept to set the size.
    pub fn set_terminal(&self, master: OwnedFd) {
        let _ = self.terminal.set(master);
    }

    /// Whether it has one.
    pub fn has_terminal(&self) -> bool {
        self.terminal.get().is_some()
    }

    /// It is prepared. False if it has died since.
    pub fn created(&self, waiting: Waiting) -> bool {
        if let Ok(mut place) = self.waiting.try_lock() {
            *place = Some(waiting);
        }
        self.stage.send_if_modified(|stage| {
            let alive = *stage == Stage::Making;
            if alive {
                *stage = Stage::Created;
            }
            alive
        })
    }

    /// It is dead. Says how far it had come.
    pub fn exited(&self, status: u32) -> Stage {
        self.stage.send_replace(Stage::Exited(status))
    }

    /// Waits for its death.
    pub async fn wait(&self) {
        // The sender lives as long as the process object.
        let _ = self.stage.subscribe().wait_for(|stage| matches!(stage, Stage::Exited(_))).await;
    }

    /// Lets it run.
    pub async fn start(&self, dialer: &dyn Dialer) -> Result<(), Failure> {
        let mut place = self.waiting.lock().await;
        let refuse = |why: &str| {
            Err(Failure::new(Kind::FailedPrecondition, format!("cannot start a process that {why}")))
        };
        match self.stage() {
            Stage::Created => {}
            Stage::Making => return refuse("is being created"),
            Stage::Running => return refuse("runs already"),
            Stage::Exited(_) => return refuse("has stopped"),
        }
        let Some(waiting) = place.take() else { return refuse("runs already") };
        if let Some(input) = waiting.input {
            input.serve(dialer).await?;
        }
        waiting.control.let_go().await?;
        self.stage.send_if_modified(|stage| {
            let alive = *stage == Stage::Created;
            if alive {
                *stage = Stage::Running;
            }
            alive
        });
        Ok(())
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: i32) -> Result<(), Failure> {
        let finished = || Failure::new(Kind::NotFound, "process already finished");
        let pidfd = match self.stage() {
            Stage::Exited(_) => return Err(finished()),
            _ => self.pidfd().ok_or_else(|| Failure::new(Kind::FailedPrecondition, "process not created"))?,
        };
        pidfd_send_signal(pidfd.as_fd(), signal).map_err(|error| match error.raw_os_error() {
            Some(libc::ESRCH) => finished(),
            Some(libc::EINVAL) => Failure::new(Kind::InvalidArgument, format!("{signal} is no signal")),
            _ => Failure::new(Kind::Internal, format!("send signal {signal}: {}", describe(&error))),
        })
    }

    /// Sets the size of its terminal, if it has one.
    pub fn resize(&self, size: Size) -> io::Result<()> {
        self.terminal.get().map_or(Ok(()), |terminal| terminal::resize(terminal.as_fd(), size))
    }
}
