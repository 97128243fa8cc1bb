//! Starting the VMM's process.

use std::fs::File;
use std::io::{self, PipeReader, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use vmshim_protocol::control::ControlSocket;

/// The descriptor number at which the VMM finds its control socket.
const CONTROL_FD: RawFd = 3;

/// A VMM that has just been started.
pub struct Started {
    /// Its process id; it is a child of this process.
    pub pid: u32,
    /// The shim's end of the control socket, non-blocking.
    pub control: ControlSocket,
    /// What it writes to standard error.
    pub stderr: PipeReader,
}

/// Starts the VMM in the cgroups whose entrances are given.
///
/// # Errors
/// When the binary cannot be run.
pub fn start(binary: &Path, mut entrances: Vec<File>) -> io::Result<Started> {
    let (ours, theirs) = ControlSocket::pair().map_err(io::Error::other)?;
    let (stderr, stderr_writer) = io::pipe()?;
    let theirs = OwnedFd::from(theirs);
    let child_end = theirs.as_raw_fd();
    let mut command = Command::new(binary);
    command.arg("--control-fd").arg(CONTROL_FD.to_string());
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(stderr_writer).env_clear().current_dir("/");
    let in_child = move || {
        // Entering before exec accounts everything that the VMM ever allocates to the pod.
        for entrance in &mut entrances {
            entrance.write_all(b"0")?;
        }
        place(child_end, CONTROL_FD)
    };
    // SAFETY: the closure makes system calls on descriptors opened before the fork, and allocates nothing.
    unsafe { command.pre_exec(in_child) };
    let child = command.spawn()?;
    set_nonblocking(&ours)?;
    Ok(Started { pid: child.id(), control: ours, stderr })
}

/// Gives the descriptor the number `to`, without close-on-exec.
fn place(from: RawFd, to: RawFd) -> io::Result<()> {
    // SAFETY: both calls take integers; `to` is a number that nothing else in the child uses after exec.
    let result = unsafe { if from == to { libc::fcntl(to, libc::F_SETFD, 0) } else { libc::dup2(from, to) } };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn set_nonblocking(socket: &ControlSocket) -> io::Result<()> {
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    fcntl(socket, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    Ok(())
}
