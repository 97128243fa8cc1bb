//! Copies between a terminal's master and its stream, both ways on the one stream.
//!
//! A terminal is no pipe, so bytes go through a buffer here. The host's half-close only ends the input: there is no
//! end of file on a terminal but the character that the user types. When the last process has closed the terminal the
//! kernel answers EIO, after everything written has been read; that is the output's end.

use super::CHUNK;
use crate::link::Stream;
use crate::sys::register;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// A line discipline takes 4 KiB at a time, and gives no more.
const LINE: usize = 4096;
const _: () = assert!(LINE <= CHUNK);

/// Copies in the background until the terminal is closed.
pub fn serve(master: OwnedFd, stream: Option<Stream>) -> io::Result<()> {
    let master = register(master, Interest::READABLE | Interest::WRITABLE)?;
    tokio::spawn(async move {
        let Some(stream) = stream else {
            let _ = discard(&master).await;
            return;
        };
        let ended = tokio::select! {
            ended = copy_output(&master, &stream) => ended,
            () = input_only(&stream, &master) => Ok(()),
        };
        match ended {
            Ok(()) => drop(stream.finish_writing()),
            Err(_) => {
                drop(stream);
                let _ = discard(&master).await;
            }
        }
    });
    Ok(())
}

/// The end of the input is not the end of the terminal, so this has none.
async fn input_only(stream: &Stream, master: &AsyncFd<OwnedFd>) {
    let _ = copy_input(stream, master).await;
    std::future::pending().await
}

async fn copy_output(master: &AsyncFd<OwnedFd>, stream: &Stream) -> io::Result<()> {
    let mut buffer = vec![0; LINE];
    loop {
        let length = read_terminal(master, &mut buffer).await?;
        if length == 0 {
            return Ok(());
        }
        let mut rest = buffer.get(..length).unwrap_or_default();
        while !rest.is_empty() {
            let written = stream
                .when(Interest::WRITABLE, |socket| {
                    use nix::sys::socket::{MsgFlags, send};
                    use std::os::fd::AsRawFd;
                    Ok(send(socket.as_raw_fd(), rest, MsgFlags::MSG_NOSIGNAL)?)
                })
                .await?;
            rest = rest.get(written..).unwrap_or_default();
        }
    }
}

async fn copy_input(stream: &Stream, master: &AsyncFd<OwnedFd>) -> io::Result<()> {
    let mut buffer = vec![0; LINE];
    loop {
        let length =
            stream.when(Interest::READABLE, |socket| Ok(nix::unistd::read(socket, &mut buffer)?)).await?;
        if length == 0 {
            return Ok(());
        }
        let mut rest = buffer.get(..length).unwrap_or_default();
        while !rest.is_empty() {
            let written =
                master.async_io(Interest::WRITABLE, |master| Ok(nix::unistd::write(master, rest)?)).await?;
            rest = rest.get(written..).unwrap_or_default();
        }
    }
}

/// 0 when the terminal is closed.
async fn read_terminal(master: &AsyncFd<OwnedFd>, buffer: &mut [u8]) -> io::Result<usize> {
    master
        .async_io(Interest::READABLE, |master| match nix::unistd::read(master.as_fd(), buffer) {
            Err(nix::Error::EIO) => Ok(0),
            other => Ok(other?),
        })
        .await
}

async fn discard(master: &AsyncFd<OwnedFd>) -> io::Result<()> {
    let mut buffer = vec![0; LINE];
    while read_terminal(master, &mut buffer).await? > 0 {}
    Ok(())
}
