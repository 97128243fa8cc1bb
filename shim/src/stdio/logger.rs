//! `binary://` and `binary-v2://` loggers: a program that reads the output of a container.
//!
//! It finds the container's standard output and error at descriptors 3 and 4, and closes 5 when it is ready, in the
//! second version after it has written a byte there. It ends by itself when both are at their end; one that does not is
//! ended, so that none is left when its process is deleted.

use std::io::{self, PipeReader, PipeWriter, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::fcntl::{FcntlArg, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::{Ready, StdioError};
use crate::state::{ProcessId, signal, wait_gone};

/// How long a logger may take to become ready, in milliseconds.
const READY_LIMIT: u16 = 10_000;

/// How long a logger may take to read what is left and end, before it is asked to.
const READ_LIMIT: Duration = Duration::from_secs(10);

/// How long it may take to end when it is asked to.
const TERM_LIMIT: Duration = Duration::from_secs(2);

/// Numbers below this are those that the logger's descriptors are put at.
const FIRST_FREE: RawFd = 10;

/// What the container writes to.
#[derive(Debug)]
pub struct LoggerStreams {
    /// Its standard output.
    pub stdout: OwnedFd,
    /// Its standard error.
    pub stderr: OwnedFd,
    /// Who reads them.
    pub logger: Logger,
}

/// A logger's process. It is ended when this is dropped, in its own time.
#[derive(Debug)]
pub struct Logger(Option<Running>);

#[derive(Debug)]
struct Running {
    id: ProcessId,
    process: OwnedFd,
}

impl Logger {
    fn of(pid: u32) -> io::Result<Self> {
        // One that has been reaped already is not there to be named.
        let Ok(id) = ProcessId::of(pid) else { return Ok(Self(None)) };
        Ok(Self(id.open()?.map(|process| Running { id, process })))
    }

    /// What the journal calls it; none where it has ended.
    pub fn id(&self) -> Option<ProcessId> {
        self.0.as_ref().map(|running| running.id)
    }

    /// Waits until it has read everything, for which its pipes must be closed, and ends it where it does not end by
    /// itself. To be called on a thread that may wait.
    pub fn end(mut self) {
        if let Some(running) = self.0.take() {
            running.end(READ_LIMIT, TERM_LIMIT);
        }
    }
}

impl Running {
    /// SIGTERM after the first limit, SIGKILL after the second.
    fn end(&self, read: Duration, term: Duration) {
        for (limit, next) in [(read, libc::SIGTERM), (term, libc::SIGKILL)] {
            if !matches!(wait_gone(&self.process, limit), Ok(false)) {
                return;
            }
            log::warn!("the logger of process id {} does not end and gets signal {next}", self.id.pid);
            if let Err(error) = signal(&self.process, next) {
                log::error!("the logger of process id {} cannot be ended: {error}", self.id.pid);
            }
        }
    }
}

impl Drop for Logger {
    fn drop(&mut self) {
        if let Some(running) = self.0.take() {
            std::thread::spawn(move || running.end(READ_LIMIT, TERM_LIMIT));
        }
    }
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
    let (logger, stdout, stderr, mut word) = spawn(path, args, namespace, id).map_err(failed)?;
    let mut descriptors = [PollFd::new(word.as_fd(), PollFlags::POLLIN)];
    // The end of the pipe is the message, whether closed or by the logger's death.
    match poll(&mut descriptors, PollTimeout::from(READY_LIMIT)) {
        Ok(0) => {
            if let Some(running) = &logger.0 {
                running.end(Duration::ZERO, Duration::ZERO);
            }
            Err(StdioError::LoggerSilent(path.to_owned()))
        }
        Ok(_) if ready == Ready::Byte && word.read(&mut [0]).map_err(failed)? == 0 => {
            Err(StdioError::LoggerEnded(path.to_owned()))
        }
        Ok(_) => Ok(LoggerStreams { stdout: stdout.into(), stderr: stderr.into(), logger }),
        Err(errno) => Err(failed(errno.into())),
    }
}

fn spawn(
    path: &Path,
    args: &[String],
    namespace: &str,
    id: &str,
) -> io::Result<(Logger, PipeWriter, PipeWriter, PipeReader)> {
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
    let child = command.spawn()?;
    Ok((Logger::of(child.id())?, out_writer, err_writer, ready_reader))
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
        let line = "echo $1 $2 $CONTAINER_ID $CONTAINER_NAMESPACE; cat <&3; cat <&4; sleep 0.3; echo end";
        let body = format!("exec 5>&-\n{{ {line}; }} > {}", log.display());
        let path = script(directory.path(), &body);
        let args = ["k".to_owned(), "v".to_owned()];
        let streams = start(&path, &args, Ready::Close, "ns", "id").unwrap();
        File::from(streams.stdout).write_all(b"out").unwrap();
        File::from(streams.stderr).write_all(b"err").unwrap();
        streams.logger.end();
        assert_eq!(std::fs::read_to_string(log).unwrap(), "k v id ns\nouterrend\n");
    }

    #[test]
    fn a_logger_that_does_not_end_is_ended() {
        let directory = tempfile::tempdir().unwrap();
        let path = script(directory.path(), "trap '' TERM\nexec 5>&-\nwhile :; do sleep 60; done");
        let LoggerStreams { mut logger, .. } = start(&path, &[], Ready::Close, "ns", "id").unwrap();
        let running = logger.0.take().unwrap();
        running.end(Duration::from_millis(10), Duration::from_millis(10));
        assert!(wait_gone(&running.process, READ_LIMIT).unwrap());
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
