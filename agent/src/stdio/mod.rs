//! Standard streams of processes: one stream to the host for each, and a pipe or a terminal towards the process.
//!
//! A process gets pipes, not sockets, because programs open `/dev/stdout` anew. Between pipe and stream bytes move by
//! splice(2), so no byte is ever in the agent's hands: what cannot be written stays where it was, which is all there is
//! to backpressure, and an idle stream costs a task of a few hundred bytes. Exit statuses have nothing to do with any
//! of this: a stream ends when the last holder of the pipe is gone.
//!
//! Both sides are hostile or slow at will. Everything runs on the agent's one thread; a turn moves at most
//! [`CHUNK`] bytes.

mod pipe;
mod terminal;

use crate::failure::{Failure, Kind, describe};
use crate::link::{Dialer, Stream};
use nix::fcntl::OFlag;
use nix::unistd::{Gid, Uid};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use vmshim_protocol::agent::Stdio;

/// The most that one turn moves: a pipe's usual capacity.
const CHUNK: usize = 64 * 1024;

/// The streams that a process was asked to have: where it writes to is dialled, where it reads from is not yet.
pub struct Streams {
    stdin: Option<u32>,
    stdout: Option<Stream>,
    stderr: Option<Stream>,
    owner: (Uid, Gid),
}

/// The process's ends, and what is to be copied once it exists.
pub struct Pipes {
    process: [OwnedFd; 3],
    input: Option<Input>,
    outputs: Vec<(OwnedFd, Stream)>,
}

/// Standard input of a process that does not run yet. It is dialled when the process is let go: the host begins to read
/// its own end no sooner, since a client that is done writing before it knows of the process cannot say so any more.
pub struct Input {
    port: u32,
    pipe: OwnedFd,
}

impl Input {
    /// Dials, and copies in the background until there is no more.
    pub async fn serve(self, dialer: &dyn Dialer) -> Result<(), Failure> {
        let stream = dial(dialer, "stdin", self.port).await?;
        pipe::serve_input(stream, self.pipe)
            .map_err(|error| Failure::new(Kind::Internal, format!("set up stdin: {}", describe(&error))))
    }
}

async fn dial(dialer: &dyn Dialer, name: &str, port: u32) -> Result<Stream, Failure> {
    dialer.dial(port).await.map_err(|error| {
        let why = describe(&error);
        Failure::new(Kind::FailedPrecondition, format!("the host does not take {name} on port {port}: {why}"))
    })
}

impl Streams {
    /// Dials the ports that are named for output, all at once.
    pub async fn dial(dialer: &dyn Dialer, stdio: &Stdio) -> Result<Self, Failure> {
        if stdio.terminal && (stdio.stdin != 0 || stdio.stderr != 0) {
            return Err(Failure::new(
                Kind::InvalidArgument,
                "stdio: with a terminal, stdin and stderr have no port of their own",
            ));
        }
        let output = |name: &'static str, port: u32| async move {
            if port == 0 { Ok(None) } else { dial(dialer, name, port).await.map(Some) }
        };
        let (stdout, stderr) =
            tokio::try_join!(output("stdout", stdio.stdout), output("stderr", stdio.stderr))?;
        let stdin = Some(stdio.stdin).filter(|&port| port != 0);
        Ok(Self { stdin, stdout, stderr, owner: (Uid::from_raw(stdio.uid), Gid::from_raw(stdio.gid)) })
    }

    /// Makes a pipe for each stream; what has none is the null device.
    pub fn into_pipes(self) -> io::Result<Pipes> {
        let owner = self.owner;
        let mut outputs = Vec::new();
        let (stdin, input) = match self.stdin {
            None => (null()?, None),
            Some(port) => {
                let (read, pipe) = new_pipe(owner)?;
                set_nonblocking(pipe.as_fd())?;
                (read, Some(Input { port, pipe }))
            }
        };
        let mut output = |stream: Option<Stream>| match stream {
            None => null(),
            Some(stream) => {
                let (read, write) = new_pipe(owner)?;
                set_nonblocking(read.as_fd())?;
                outputs.push((read, stream));
                Ok(write)
            }
        };
        let process = [stdin, output(self.stdout)?, output(self.stderr)?];
        Ok(Pipes { process, input, outputs })
    }

    /// Copies between a terminal's master and its stream, in the background.
    pub fn serve_terminal(self, master: OwnedFd) -> io::Result<()> {
        set_nonblocking(master.as_fd())?;
        terminal::serve(master, self.stdout)
    }
}

impl Pipes {
    /// The process's stdin, stdout and stderr.
    pub fn for_process(&self) -> [BorrowedFd<'_>; 3] {
        let [stdin, stdout, stderr] = &self.process;
        [stdin.as_fd(), stdout.as_fd(), stderr.as_fd()]
    }

    /// Copies output in the background, until each stream has its end, and hands out what waits for the process to run.
    /// The process's ends are closed here.
    pub fn serve(self) -> io::Result<Option<Input>> {
        for (pipe, stream) in self.outputs {
            pipe::serve_output(pipe, stream)?;
        }
        Ok(self.input)
    }
}

fn null() -> io::Result<OwnedFd> {
    Ok(nix::fcntl::open("/dev/null", OFlag::O_RDWR | OFlag::O_CLOEXEC, nix::sys::stat::Mode::empty())?)
}

fn new_pipe((uid, gid): (Uid, Gid)) -> io::Result<(OwnedFd, OwnedFd)> {
    let (read, write) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
    if !uid.is_root() || gid.as_raw() != 0 {
        // Both ends are of one inode.
        nix::unistd::fchown(&read, Some(uid), Some(gid))?;
    }
    Ok((read, write))
}

fn set_nonblocking(fd: BorrowedFd<'_>) -> io::Result<()> {
    let flags = OFlag::from_bits_retain(nix::fcntl::fcntl(fd, nix::fcntl::FcntlArg::F_GETFL)?);
    nix::fcntl::fcntl(fd, nix::fcntl::FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}
