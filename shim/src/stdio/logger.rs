//! `binary://` and `binary-v2://` loggers: a program that reads the output of a container.
//!
//! It finds the container's standard output and error at descriptors 3 and 4, and closes 5 when it is ready, in the
//! second version after it has written a byte there. It ends by itself when both are at their end.

use std::io::{self, PipeReader, PipeWriter, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use nix::fcntl::{FcntlArg, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::{Ready, StdioError};

/// How long a logger may take to become ready, in milliseconds.
const READY_LIMIT: u16 = 10_000;

/// Numbers below this are those that the logger's descriptors are put at.
const FIRST_FREE: RawFd = 10;

/// What the container writes to.
#[derive(Debug)]
pub struct LoggerStreams {
    /// Its standard output.
    pub stdout: OwnedFd,
    /// Its standard error.
    pub stderr: OwnedFd,
}

/// Starts the logger and waits until it is ready.
pub fn start(
    path: &Path,
    args: &[String],
    ready: Ready,
    namespace: &str,
    id: &str,
) -> Result<LoggerStreams, StdioError> {
    let failed = |source| StdioError::Logger { path: path.to_owned(), source };
    let (stdout, stderr, mut word) = spawn(path, args, namespace, id).map_err(failed)?;
    let mut descriptors = [PollFd::new(word.as_fd(), PollFlags::POLLIN)];
    // The end of the pipe is the message, whether closed or by the logger's death.
    match poll(&mut descriptors, PollTimeout::from(READY_LIMIT)) {
        Ok(0) => Err(StdioError::LoggerSilent(path.to_owned())),
        Ok(_) if ready == Ready::Byte && word.read(&mut [0]).map_err(failed)? == 0 => {
            Err(StdioError::LoggerEnded(path.to_owned()))
        }
        Ok(_) => Ok(LoggerStreams { stdout: stdout.into(), stderr: stderr.into() }),
        Err(errno) => Err(failed(errno.into())),
    }
}

fn spawn(
    path: &Path,
    args: &[String],
    namespace: &str,
    id: &str,
) -> io::Result<(PipeWriter, PipeWriter, PipeReader)> {
    let (out_reader, out_writer) = io::pipe()?;
    let (err_reader, err_writer) = io::pipe()?;
    let (ready_reader, ready_writer) = io::pipe()?;
    let mut command = Command::new(path);
    command
        .args(args)
        .env_clear()
        .env("CONTAINER_ID", id)
        .env("CONTAINER_NAMESPACE", namespace)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    // Out of the way of the numbers that they will be given in the child.
    let high = [raise(&out_reader)?, raise(&err_reader)?, raise(&ready_writer)?];
    let raw = high.each_ref().map(AsRawFd::as_raw_fd);
    let in_child = move || {
        for (from, to) in raw.into_iter().zip(3..) {
            // SAFETY: both are integers, and 3 to 5 mean nothing else in the child after exec.
            if unsafe { libc::dup2(from, to) } < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    };
    // SAFETY: the closure makes dup2 calls only, which are safe between fork and exec.
    unsafe { command.pre_exec(in_child) };
    command.spawn()?;
    Ok((out_writer, err_writer, ready_reader))
}

fn raise(fd: &impl AsFd) -> io::Result<OwnedFd> {
    use std::os::fd::FromRawFd;
    let raw = fcntl(fd.as_fd(), FcntlArg::F_DUPFD_CLOEXEC(FIRST_FREE))?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn script(directory: &Path, body: &str) -> std::path::PathBuf {
        let path = directory.join("logger");
        std::fs::write(&path, format!("#!/bin/sh\n{body}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    #[test]
    fn a_logger_gets_both_streams_and_its_environment() {
        let directory = tempfile::tempdir().unwrap();
        let log = directory.path().join("log");
        let done = directory.path().join("done");
        let body = format!(
            "exec 5>&-\n{{ echo $1 $2 $CONTAINER_ID $CONTAINER_NAMESPACE; cat <&3; cat <&4; }} > {}\nmkfifo {}; : > {}.x",
            log.display(),
            done.display(),
            done.display()
        );
        let path = script(directory.path(), &body);
        let args = ["k".to_owned(), "v".to_owned()];
        let streams = start(&path, &args, Ready::Close, "ns", "id").unwrap();
        File::from(streams.stdout).write_all(b"out").unwrap();
        File::from(streams.stderr).write_all(b"err").unwrap();
        let finished = directory.path().join("done.x");
        let limit = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while !finished.exists() && std::time::Instant::now() < limit {
            std::thread::yield_now();
        }
        assert_eq!(std::fs::read_to_string(log).unwrap(), "k v id ns\nouterr");
    }

    #[test]
    fn the_second_version_wants_a_byte() {
        let directory = tempfile::tempdir().unwrap();
        let silent = script(directory.path(), "exit 0");
        assert!(start(&silent, &[], Ready::Close, "ns", "id").is_ok());
        let error = start(&silent, &[], Ready::Byte, "ns", "id").unwrap_err();
        assert!(matches!(error, StdioError::LoggerEnded(_)), "{error}");
        let other = tempfile::tempdir().unwrap();
        let ready = script(other.path(), "printf x >&5; exec 5>&-; cat <&3");
        assert!(start(&ready, &[], Ready::Byte, "ns", "id").is_ok());
    }

    #[test]
    fn a_logger_that_does_not_exist_is_named() {
        let error = start(Path::new("/nonexistent/logger"), &[], Ready::Close, "ns", "id").unwrap_err();
        assert!(error.to_string().contains("/nonexistent/logger"));
    }
}
