//! The agent's side of an engine's work: starts the engine, follows its reports, and later lets the process go.

use super::process::{Process, Stage};
use crate::engine::{self, wire};
use crate::failure::{Failure, Kind, describe};
use crate::reaper::Reaper;
use crate::sys::register;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use wire::Report;

/// The conversation with a process that waits to be let go.
pub struct Control {
    socket: AsyncFd<OwnedFd>,
}

/// A process that is prepared, and its terminal where it has one.
pub struct Made {
    /// By which it will be let go.
    pub control: Control,
    /// The terminal's master.
    pub terminal: Option<OwnedFd>,
    /// By which it asks where it may listen, where it shares the host's network.
    pub servers: Option<OwnedFd>,
}

/// Has an engine make `process` by the document in the first of `fds`. `on_exit` is called once when the process that
/// came of it is dead, also where the making fails after all.
pub async fn make(
    program: &Path,
    reaper: &Arc<Reaper>,
    fds: &[BorrowedFd<'_>],
    process: &Process,
    on_exit: impl FnOnce(u32) + Send + 'static,
) -> Result<Made, Failure> {
    let expectation = reaper.expect();
    let control = begin(program, fds).map_err(|error| internal("start the container engine", &error))?;
    let (mut terminal, mut servers) = (None, None);
    let mut on_exit = Some(on_exit);
    loop {
        let (report, mut fds) = control.next().await?.ok_or_else(|| died(process))?;
        match report {
            Report::Spawned(pid) => {
                let (Some(pidfd), Some(on_exit)) = (fds.pop(), on_exit.take()) else {
                    return Err(nonsense());
                };
                process.identify(pid, pidfd);
                expectation.claim(pid, on_exit);
            }
            Report::Terminal => terminal = Some(fds.pop().ok_or_else(nonsense)?),
            Report::Servers => servers = Some(fds.pop().ok_or_else(nonsense)?),
            Report::Ready => return Ok(Made { control, terminal, servers }),
            Report::Failed(failure) => return Err(failure),
            Report::Done => return Err(nonsense()),
        }
    }
}

/// Has an engine do what makes no process.
pub async fn order(program: &Path, fds: &[BorrowedFd<'_>]) -> Result<(), Failure> {
    let control = begin(program, fds).map_err(|error| internal("start the container engine", &error))?;
    match control.next().await? {
        Some((Report::Done, _)) => Ok(()),
        Some((Report::Failed(failure), _)) => Err(failure),
        Some(_) => Err(nonsense()),
        None => Err(Failure::new(Kind::Internal, "the container engine ended without an answer")),
    }
}

fn begin(program: &Path, fds: &[BorrowedFd<'_>]) -> io::Result<Control> {
    let (ours, theirs) = socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
    )?;
    // The engine waits the plain way.
    nix::fcntl::fcntl(&theirs, nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::empty()))?;
    wire::send(ours.as_fd(), b"!", fds)?;
    // The child is reaped with all others, so the handle is of no use.
    drop(
        Command::new(program)
            .arg0("vmshim-agent")
            .arg(engine::COMMAND)
            .env_clear()
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?,
    );
    Ok(Control { socket: register(ours, Interest::READABLE)? })
}

impl Control {
    /// The next report; None when nobody is left to report.
    async fn next(&self) -> Result<Option<(Report, Vec<OwnedFd>)>, Failure> {
        let (bytes, fds) =
            self.socket.async_io(Interest::READABLE, |socket| wire::receive(socket.as_fd())).await.or_else(
                |error| match error.raw_os_error() {
                    // The other end was closed with our word unread.
                    Some(libc::ECONNRESET) => Ok(Default::default()),
                    _ => Err(internal("hear from the container engine", &error)),
                },
            )?;
        if bytes.is_empty() {
            return Ok(None);
        }
        let report = serde_json::from_slice(&bytes).map_err(|_| nonsense())?;
        Ok(Some((report, fds)))
    }

    /// Lets the process run, and waits until it does: it closes its end by executing its program.
    pub async fn let_go(self) -> Result<(), Failure> {
        // A process that is dead by now is not ours to complain about; its exit says all.
        let _ = wire::send(self.socket.get_ref().as_fd(), b"!", &[]);
        match self.next().await? {
            Some((Report::Failed(failure), _)) => Err(failure),
            Some(_) => Err(nonsense()),
            None => Ok(()),
        }
    }
}

fn died(process: &Process) -> Failure {
    match process.stage() {
        Stage::Exited(137) => Failure::new(
            Kind::Internal,
            "the process was killed while it was made; its memory limit may be too low",
        ),
        _ => Failure::new(Kind::Internal, "the container engine ended without an answer"),
    }
}

fn nonsense() -> Failure {
    Failure::new(Kind::Internal, "the container engine answered nonsense")
}

/// A failure of the agent itself.
pub fn internal(action: &str, error: &io::Error) -> Failure {
    Failure::new(Kind::Internal, format!("{action}: {}", describe(error)))
}
