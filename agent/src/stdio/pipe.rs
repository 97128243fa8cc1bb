//! Copies between a stream and a pipe.

use super::CHUNK;
use crate::link::Stream;
use crate::log;
use crate::sys::pipe::splice;
use crate::sys::register;
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::task::coop::consume_budget;

/// The most that one turn moves to a stream. The kernel copies it into one packet, for which it wants contiguous memory:
/// so much comes from eight pages in a row, which it frees if need be; for more it would rather fail with ENOMEM, and
/// output would be lost.
const PACKET: usize = 28 * 1024;

/// Stream to pipe. The host's half-close is the pipe's end.
pub fn serve_input(stream: Stream, pipe: OwnedFd) -> io::Result<()> {
    let pipe = register(pipe, Interest::WRITABLE)?;
    tokio::spawn(async move {
        tokio::select! {
            // Whatever ended it, dropping both ends tells both sides.
            _ = copy_input(&stream, &pipe) => {}
            // The process no longer reads; the host must not have to write to find out.
            _ = pipe.ready(Interest::ERROR) => {}
        }
    });
    Ok(())
}

/// Pipe to stream. The pipe's end is a half-close of the stream.
pub fn serve_output(pipe: OwnedFd, stream: Stream) -> io::Result<()> {
    let pipe = register(pipe, Interest::READABLE)?;
    tokio::spawn(async move {
        match copy_output(&pipe, &stream).await {
            Ok(()) => drop(stream.finish_writing()),
            // The host has let go of the stream. The process must not die of it: its words go nowhere.
            Err(error) => {
                if !is_end(&error) {
                    log::error(&format!("the rest of a process's output is lost: {error}"));
                }
                drop(stream);
                let _ = discard(&pipe).await;
            }
        }
    });
    Ok(())
}

async fn copy_input(stream: &Stream, pipe: &AsyncFd<OwnedFd>) -> io::Result<()> {
    loop {
        match splice(stream.as_fd(), pipe.get_ref().as_fd(), CHUNK) {
            Ok(0) => return Ok(()),
            Ok(_) => consume_budget().await,
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => return Err(error),
            // splice(2) does not say which of the two it would have had to wait for.
            Err(_) if is(pipe.get_ref().as_fd(), PollFlags::POLLOUT) => {
                stream.when(Interest::READABLE, |stream| wait_unless(stream, PollFlags::POLLIN)).await?;
            }
            Err(_) => {
                pipe.async_io(Interest::WRITABLE, |pipe| wait_unless(pipe.as_fd(), PollFlags::POLLOUT))
                    .await?;
            }
        }
    }
}

async fn copy_output(pipe: &AsyncFd<OwnedFd>, stream: &Stream) -> io::Result<()> {
    loop {
        match splice(pipe.get_ref().as_fd(), stream.as_fd(), PACKET) {
            Ok(0) => return Ok(()),
            Ok(_) => consume_budget().await,
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => return Err(error),
            Err(_) if is(pipe.get_ref().as_fd(), PollFlags::POLLIN) => {
                stream.when(Interest::WRITABLE, |stream| wait_unless(stream, PollFlags::POLLOUT)).await?;
            }
            Err(_) => {
                pipe.async_io(Interest::READABLE, |pipe| wait_unless(pipe.as_fd(), PollFlags::POLLIN))
                    .await?;
            }
        }
    }
}

/// Whether a stream is no more because its other side wants no more.
fn is_end(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, NotConnected};
    matches!(error.kind(), BrokenPipe | ConnectionReset | NotConnected)
}

async fn discard(pipe: &AsyncFd<OwnedFd>) -> io::Result<()> {
    let flags = OFlag::O_WRONLY | OFlag::O_CLOEXEC;
    let null = nix::fcntl::open("/dev/null", flags, nix::sys::stat::Mode::empty())?;
    while pipe.async_io(Interest::READABLE, |pipe| splice(pipe.as_fd(), null.as_fd(), CHUNK)).await? > 0 {}
    Ok(())
}

/// Whether a descriptor is in a state now, or has failed or ended.
fn is(fd: BorrowedFd<'_>, state: PollFlags) -> bool {
    poll(&mut [PollFd::new(fd, state)], PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
}

/// What the event loop is told when it asks whether a state has come.
fn wait_unless(fd: BorrowedFd<'_>, state: PollFlags) -> io::Result<()> {
    if is(fd, state) { Ok(()) } else { Err(io::ErrorKind::WouldBlock.into()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
    use std::fs::File;
    use std::io::{Read, Write};

    /// The agent's end, and the host's as a plain blocking file.
    fn stream() -> (Stream, File) {
        let flags = SockFlag::SOCK_CLOEXEC;
        let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::Stream, None, flags).unwrap();
        super::super::set_nonblocking(ours.as_fd()).unwrap();
        (Stream::new(ours).unwrap(), theirs.into())
    }

    fn pipe() -> (File, File) {
        let (read, write) =
            super::super::new_pipe((nix::unistd::Uid::from_raw(3), nix::unistd::Gid::from_raw(4))).unwrap();
        (read.into(), write.into())
    }

    async fn on_thread<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
        tokio::task::spawn_blocking(work).await.unwrap()
    }

    #[tokio::test]
    async fn output_is_whole_and_ends_with_the_last_writer() {
        let ((read, mut write), (ours, mut theirs)) = (pipe(), stream());
        super::super::set_nonblocking(read.as_fd()).unwrap();
        serve_output(read.into(), ours).unwrap();
        let writer = tokio::task::spawn_blocking(move || {
            let second = write.try_clone().unwrap();
            for number in 0..100_000u32 {
                write.write_all(&number.to_le_bytes()).unwrap();
            }
            drop(write);
            second
        });
        let mut first = vec![0; 400_000];
        let (theirs, first) = on_thread(move || {
            theirs.read_exact(&mut first).unwrap();
            (theirs, first)
        })
        .await;
        assert!(first.chunks_exact(4).zip(0u32..).all(|(bytes, number)| bytes == number.to_le_bytes()));
        drop(writer.await.unwrap());
        let mut theirs = theirs;
        assert_eq!(on_thread(move || theirs.read(&mut [0]).unwrap()).await, 0);
    }

    #[tokio::test]
    async fn a_host_that_goes_does_not_end_the_process() {
        let ((read, mut write), (ours, theirs)) = (pipe(), stream());
        super::super::set_nonblocking(read.as_fd()).unwrap();
        serve_output(read.into(), ours).unwrap();
        drop(theirs);
        // Far more than the pipe holds.
        on_thread(move || write.write_all(&vec![0; 1 << 20])).await.unwrap();
    }

    #[tokio::test]
    async fn input_ends_with_the_hosts_half_close() {
        let ((mut read, write), (ours, mut theirs)) = (pipe(), stream());
        super::super::set_nonblocking(write.as_fd()).unwrap();
        serve_input(ours, write.into()).unwrap();
        let writer = tokio::task::spawn_blocking(move || {
            theirs.write_all(&vec![7; 1 << 20]).unwrap();
            nix::sys::socket::shutdown(
                std::os::fd::AsRawFd::as_raw_fd(&theirs),
                nix::sys::socket::Shutdown::Write,
            )
            .unwrap();
            theirs
        });
        let length = on_thread(move || {
            let mut all = Vec::new();
            read.read_to_end(&mut all).unwrap()
        })
        .await;
        assert_eq!(length, 1 << 20);
        drop(writer.await.unwrap());
    }

    #[tokio::test]
    async fn a_process_that_no_longer_reads_ends_the_stream() {
        let ((read, write), (ours, mut theirs)) = (pipe(), stream());
        super::super::set_nonblocking(write.as_fd()).unwrap();
        serve_input(ours, write.into()).unwrap();
        drop(read);
        assert_eq!(on_thread(move || theirs.read(&mut [0]).unwrap()).await, 0);
    }
}
