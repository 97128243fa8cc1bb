//! From the kernel's log to the host's.

use crate::link::Stream;
use crate::sys::register;
use nix::fcntl::OFlag;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use tokio::io::Interest;

/// The kernel's longest record.
const RECORD: usize = 8192;
/// What is written to the host at once.
const BATCH: usize = 16 * 1024;

/// Sends every record, from the first of this boot on, until the host no longer wants them.
pub async fn forward(stream: Stream) -> io::Result<()> {
    let flags = OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    let log = nix::fcntl::open("/dev/kmsg", flags, nix::sys::stat::Mode::empty())?;
    let log = register(log, Interest::READABLE)?;
    let mut record = vec![0; RECORD];
    let mut batch = String::new();
    loop {
        log.async_io(Interest::READABLE, |log| match read(log, &mut record)? {
            Some(length) => {
                append(&mut batch, record.get(..length).unwrap_or_default());
                Ok(())
            }
            None => Ok(()),
        })
        .await?;
        while batch.len() < BATCH
            && let Ok(Some(length)) = read(log.get_ref(), &mut record)
        {
            append(&mut batch, record.get(..length).unwrap_or_default());
        }
        send_all(&stream, batch.as_bytes()).await?;
        batch.clear();
    }
}

/// One record; None where some were lost, because the log went round before they were read.
fn read(log: &OwnedFd, record: &mut [u8]) -> io::Result<Option<usize>> {
    match nix::unistd::read(log.as_fd(), record) {
        Err(nix::Error::EPIPE) => Ok(None),
        other => Ok(Some(other?)),
    }
}

/// "prefix,sequence,time,flags;text\n KEY=value\n…" becomes "level text\n".
fn append(batch: &mut String, record: &[u8]) {
    let record = String::from_utf8_lossy(record);
    let Some((prefix, rest)) = record.split_once(';') else { return };
    let priority: u32 = prefix.split(',').next().and_then(|field| field.parse().ok()).unwrap_or(6);
    let text = rest.lines().next().unwrap_or_default();
    batch.push(char::from_digit(priority & 7, 10).unwrap_or('6'));
    batch.push(' ');
    batch.push_str(text);
    batch.push('\n');
}

async fn send_all(stream: &Stream, mut bytes: &[u8]) -> io::Result<()> {
    use nix::sys::socket::{MsgFlags, send};
    use std::os::fd::AsRawFd;
    while !bytes.is_empty() {
        let sent = stream
            .when(Interest::WRITABLE, |socket| Ok(send(socket.as_raw_fd(), bytes, MsgFlags::MSG_NOSIGNAL)?))
            .await?;
        bytes = bytes.get(sent..).unwrap_or_default();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn line(record: &str) -> String {
        let mut batch = String::new();
        append(&mut batch, record.as_bytes());
        batch
    }

    #[test]
    fn a_record_becomes_a_line() {
        assert_eq!(line("4,339,5140900,-;a;b\n SUBSYSTEM=x\n"), "4 a;b\n");
        assert_eq!(line("30,1,2,-;facility is cut off\n"), "6 facility is cut off\n");
        assert_eq!(line("nothing"), "");
    }

    proptest! {
        #[test]
        fn a_record_is_at_most_one_line(record in prop::collection::vec(any::<u8>(), 0..100)) {
            let mut batch = String::new();
            append(&mut batch, &record);
            prop_assert!(batch.matches('\n').count() <= 1);
        }
    }
}
