//! Copies between a stream and a pipe.

use super::CHUNK;
use crate::link::Stream;
use crate::sys::pipe::splice;
use crate::sys::register;
use nix::fcntl::OFlag;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Stream to pipe. The host's half-close is the pipe's end.
pub fn serve_input(stream: Stream, pipe: OwnedFd) -> io::Result<()> {
    // A pipe whose readers are gone tells so even while nothing is to be written.
    let pipe = register(pipe, Interest::WRITABLE)?;
    tokio::spawn(async move {
        tokio::select! {
            // Whatever ended it, dropping both ends tells both sides.
            _ = copy_input(&stream, &pipe) => {}
            _ = no_readers(&pipe) => {}
        }
    });
    Ok(())
}

/// Pipe to stream. The pipe's end is a half-close of the stream.
pub fn serve_output(pipe: OwnedFd, stream: Stream) -> io::Result<()> {
    let pipe = register(pipe, Interest::READABLE)?;
    tokio::spawn(async move {
        let ended = tokio::select! {
            ended = copy_output(&pipe, &stream) => ended,
            // Also while the process is silent: nobody will ever read what it writes.
            _ = stream.broken() => Err(io::ErrorKind::BrokenPipe.into()),
        };
        match ended {
            Ok(()) => drop(stream.finish_writing()),
            // The host has let go of the stream. The process must not die of it: its words go nowhere.
            Err(_) => {
                drop(stream);
                let _ = discard(&pipe).await;
            }
        }
    });
    Ok(())
}

async fn copy_input(stream: &Stream, pipe: &AsyncFd<OwnedFd>) -> io::Result<()> {
    loop {
        // splice(2) does not say which side made it stop, so each side is asked before.
        stream.when(Interest::READABLE, peek).await?;
        let moved = pipe
            .async_io(Interest::WRITABLE, |pipe| match splice(stream.as_fd(), pipe.as_fd(), CHUNK) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock && !writable(pipe) => Err(error),
                // Somebody else's signal for the same bytes; look again.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
                other => other.map(Some),
            })
            .await?;
        if moved == Some(0) {
            return Ok(());
        }
    }
}

/// Whether bytes, or the end, are there to be read.
fn peek(socket: std::os::fd::BorrowedFd<'_>) -> io::Result<()> {
    use nix::sys::socket::{MsgFlags, recv};
    use std::os::fd::AsRawFd;
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
    Ok(recv(socket.as_raw_fd(), &mut [0], flags).map(drop)?)
}

async fn copy_output(pipe: &AsyncFd<OwnedFd>, stream: &Stream) -> io::Result<()> {
    loop {
        pipe.async_io(Interest::READABLE, |pipe| if readable(pipe) { Ok(()) } else { would_block() }).await?;
        let moved =
            stream.when(Interest::WRITABLE, |stream| splice(pipe.get_ref().as_fd(), stream, CHUNK)).await?;
        if moved == 0 {
            return Ok(());
        }
    }
}

fn would_block<T>() -> io::Result<T> {
    Err(io::ErrorKind::WouldBlock.into())
}

fn ready_for(fd: &OwnedFd, events: nix::poll::PollFlags) -> bool {
    use nix::poll::{PollFd, PollTimeout, poll};
    poll(&mut [PollFd::new(fd.as_fd(), events)], PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
}

fn readable(pipe: &OwnedFd) -> bool {
    ready_for(pipe, nix::poll::PollFlags::POLLIN)
}

fn writable(pipe: &OwnedFd) -> bool {
    ready_for(pipe, nix::poll::PollFlags::POLLOUT)
}

async fn no_readers(pipe: &AsyncFd<OwnedFd>) -> io::Result<()> {
    crate::link::hung_up(pipe.get_ref().as_fd()).await
}

async fn discard(pipe: &AsyncFd<OwnedFd>) -> io::Result<()> {
    let flags = OFlag::O_WRONLY | OFlag::O_CLOEXEC;
    let null = nix::fcntl::open("/dev/null", flags, nix::sys::stat::Mode::empty())?;
    while pipe.async_io(Interest::READABLE, |pipe| splice(pipe.as_fd(), null.as_fd(), CHUNK)).await? > 0 {}
    Ok(())
}
