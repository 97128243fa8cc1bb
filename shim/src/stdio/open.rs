//! Opening the streams of one process.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

use nix::fcntl::OFlag;
use nix::unistd::pipe2;

use super::logger::{self, Logger, LoggerStreams};
use super::{StdioError, Target};
use crate::streaming::{self, ByteStream, Held, Waiting};
use crate::vm::Closed;

/// Where the streams of a process lead, as containerd asked.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Streams {
    /// Address of standard input.
    pub stdin: String,
    /// Address of standard output.
    pub stdout: String,
    /// Address of standard error.
    pub stderr: String,
    /// One terminal in place of three streams.
    pub terminal: bool,
    /// Whose the pipes are.
    pub owner: Owner,
}

/// User and group.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Owner {
    /// The user's id.
    pub uid: u32,
    /// The group's id.
    pub gid: u32,
}

/// Opened streams: what the VMM gets, and what the shim keeps.
#[derive(Debug, Default)]
pub struct Opened {
    /// Read towards the guest.
    pub stdin: Option<OwnedFd>,
    /// Written from the guest.
    pub stdout: Option<OwnedFd>,
    /// Written from the guest.
    pub stderr: Option<OwnedFd>,
    /// To be kept as long as the process.
    pub kept: Kept,
}

/// Handles that the shim holds so that clients may come and go.
#[derive(Debug, Default)]
pub struct Kept {
    /// Keeps standard input from ending when a client detaches; dropped by CloseIO.
    pub stdin_writer: Option<Writer>,
    /// The program that reads the output, where it is one.
    pub logger: Option<Logger>,
    /// Complete when the clients' streams have got everything.
    pub sent: Vec<Closed>,
    /// Keep writing from failing while no client reads.
    readers: Vec<Reader>,
}

/// What keeps standard input open.
#[derive(Debug)]
pub enum Writer {
    /// An end of a fifo.
    Fifo(#[expect(dead_code, reason = "held for its descriptor")] File),
    /// Room for the next client of a stream.
    Stream(#[expect(dead_code, reason = "held for its drop")] Held),
}

/// What keeps output open.
#[derive(Debug)]
enum Reader {
    Fifo(#[expect(dead_code, reason = "held for its descriptor")] File),
    Stream(#[expect(dead_code, reason = "held for its drop")] Held),
}

impl Streams {
    /// Whether there is a standard input to be opened by [`Streams::open_input`].
    pub fn has_late_input(&self) -> bool {
        !self.terminal && !self.stdin.is_empty()
    }

    /// Opens standard input; what comes with it keeps it from ending. Whoever writes to it may do so from now on.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub fn open_input(&self, clients: &Arc<Waiting>) -> Result<(OwnedFd, Option<Writer>), StdioError> {
        match Target::parse(&self.stdin)? {
            Target::Stream(name) => {
                let stream = opened(clients, &name)?;
                let (read, write) = pipe2(PIPE_FLAGS).map_err(stream_failed)?;
                let held =
                    streaming::receive(clients.clone(), name, stream, write).map_err(StdioError::Stream)?;
                Ok((read, Some(Writer::Stream(held))))
            }
            Target::Fifo(path) | Target::File(path) => open_source(&path),
            Target::None | Target::Binary { .. } => Err(StdioError::Unsupported(self.stdin.clone())),
        }
    }

    /// Ends what clients have opened for a process that will not ask for it any more.
    pub fn renounce(&self, clients: &Waiting) {
        for address in [&self.stdin, &self.stdout, &self.stderr] {
            if let Ok(Target::Stream(name)) = Target::parse(address) {
                drop(clients.take(&name));
            }
        }
    }

    /// Opens everything that a process is made with: all but a standard input that is no terminal. Never waits for a
    /// peer, except for a logger that is starting, so it belongs on a thread of its own. A logger is told the id: the
    /// container's, or that of an exec.
    ///
    /// # Errors
    /// The stream that cannot be opened is named.
    pub fn open(&self, namespace: &str, id: &str, clients: &Arc<Waiting>) -> Result<Opened, StdioError> {
        let mut opened = Opened::default();
        if let Target::Binary { .. } = Target::parse(&self.stdin)? {
            return Err(StdioError::Unsupported(self.stdin.clone()));
        }
        if self.terminal && !self.stdin.is_empty() {
            let (source, writer) = self.open_input(clients)?;
            opened.stdin = Some(source);
            opened.kept.stdin_writer = writer;
        }
        let stdout = Target::parse(&self.stdout)?;
        let stderr = if self.terminal { Target::None } else { Target::parse(&self.stderr)? };
        if let Target::Binary { path, args, ready } = &stdout {
            let LoggerStreams { stdout, stderr: errors, logger } =
                logger::start(path, args, *ready, namespace, id)?;
            opened.kept.logger = Some(logger);
            opened.stdout = Some(stdout);
            opened.stderr = (!self.terminal).then_some(errors);
            return Ok(opened);
        }
        let same_file = matches!(&stdout, Target::File(_)) && stdout == stderr;
        opened.stdout = open_sink(stdout, &mut opened.kept, clients)?;
        opened.stderr = match &opened.stdout {
            Some(file) if same_file => {
                let path = Path::new(&self.stderr).to_owned();
                Some(file.try_clone().map_err(|source| StdioError::Open { path, source })?)
            }
            _ => open_sink(stderr, &mut opened.kept, clients)?,
        };
        Ok(opened)
    }
}

/// Both ends of a pipe are on event loops.
const PIPE_FLAGS: OFlag = OFlag::O_CLOEXEC.union(OFlag::O_NONBLOCK);

fn opened(clients: &Waiting, name: &str) -> Result<ByteStream, StdioError> {
    clients.take(name).ok_or_else(|| StdioError::NoStream(name.chars().take(128).collect()))
}

fn stream_failed(error: nix::Error) -> StdioError {
    StdioError::Stream(error.into())
}

fn open_source(path: &Path) -> Result<(OwnedFd, Option<Writer>), StdioError> {
    let failed = |source| StdioError::Open { path: path.to_owned(), source };
    let source = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(failed)?;
    let is_fifo = is_fifo(&source).map_err(failed)?;
    // There is a reader now, so this does not wait.
    let writer = is_fifo.then(|| OpenOptions::new().write(true).open(path)).transpose().map_err(failed)?;
    Ok((source.into(), writer.map(Writer::Fifo)))
}

fn open_sink(target: Target, kept: &mut Kept, clients: &Arc<Waiting>) -> Result<Option<OwnedFd>, StdioError> {
    match target {
        Target::None => Ok(None),
        Target::Stream(name) => {
            let stream = opened(clients, &name)?;
            let (read, write) = pipe2(PIPE_FLAGS).map_err(stream_failed)?;
            let (held, sent) =
                streaming::send(clients.clone(), name, stream, read).map_err(StdioError::Stream)?;
            kept.readers.push(Reader::Stream(held));
            kept.sent.push(sent);
            Ok(Some(write))
        }
        Target::Fifo(path) => {
            let failed = |source| StdioError::Open { path: path.clone(), source };
            // A reader first, without which the writer would wait for one.
            let reader =
                OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&path).map_err(failed)?;
            let fifo = is_fifo(&reader).map_err(failed)?;
            let writer = OpenOptions::new().write(true).append(!fifo).open(&path).map_err(failed)?;
            if fifo {
                kept.readers.push(Reader::Fifo(reader));
            }
            Ok(Some(writer.into()))
        }
        Target::File(path) => {
            let failed = |source| StdioError::Open { path: path.clone(), source };
            if let Some(directory) = path.parent() {
                DirBuilder::new().recursive(true).mode(0o755).create(directory).map_err(failed)?;
            }
            let file =
                OpenOptions::new().append(true).create(true).mode(0o644).open(&path).map_err(failed)?;
            Ok(Some(file.into()))
        }
        Target::Binary { path, .. } => Err(StdioError::Unsupported(path.to_string_lossy().into_owned())),
    }
}

fn is_fifo(file: &File) -> io::Result<bool> {
    Ok(file.metadata()?.file_type().is_fifo())
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use nix::sys::stat::Mode;
    use nix::unistd::mkfifo;

    use super::*;

    fn fifo(directory: &Path, name: &str) -> String {
        let path = directory.join(name);
        mkfifo(&path, Mode::from_bits_truncate(0o600)).unwrap();
        path.to_str().unwrap().to_owned()
    }

    #[test]
    fn fifos_open_without_a_peer_and_outlive_it() {
        let directory = tempfile::tempdir().unwrap();
        let streams = Streams {
            stdin: fifo(directory.path(), "in"),
            stdout: fifo(directory.path(), "out"),
            ..Streams::default()
        };
        let clients = Arc::default();
        let mut opened = streams.open("ns", "id", &clients).unwrap();
        assert!(opened.stderr.is_none());
        // Nobody reads, and writing still works.
        let mut out = File::from(opened.stdout.take().unwrap());
        out.write_all(b"kept").unwrap();
        let mut reader =
            OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&streams.stdout).unwrap();
        let mut buffer = [0; 4];
        reader.read_exact(&mut buffer).unwrap();
        assert_eq!(&buffer, b"kept");
        // A client that writes and goes does not end the input; dropping the kept writer does.
        let (input, mut writer) = streams.open_input(&clients).unwrap();
        let mut input = File::from(input);
        drop(OpenOptions::new().write(true).open(&streams.stdin).unwrap());
        assert_eq!(input.read(&mut buffer).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        assert!(writer.take().is_some());
        assert_eq!(input.read(&mut buffer).unwrap(), 0);
    }

    #[test]
    fn a_stream_that_no_client_has_opened_is_named() {
        let address = "ttrpc+unix:///run/s.sock?streaming_id=mine".to_owned();
        let streams = Streams { stdin: address.clone(), stdout: address, ..Streams::default() };
        let sentence = "no client has opened the stream \"mine\" that stdio is to go to";
        assert_eq!(streams.open("ns", "id", &Arc::default()).unwrap_err().to_string(), sentence);
        assert_eq!(streams.open_input(&Arc::default()).unwrap_err().to_string(), sentence);
    }

    #[test]
    fn files_are_made_and_appended_to() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("new/log");
        let address = format!("file://{}", path.display());
        let streams = Streams { stdout: address.clone(), stderr: address, ..Streams::default() };
        for _ in 0..2 {
            let opened = streams.open("ns", "id", &Arc::default()).unwrap();
            File::from(opened.stdout.unwrap()).write_all(b"o").unwrap();
            File::from(opened.stderr.unwrap()).write_all(b"e").unwrap();
        }
        assert_eq!(std::fs::read_to_string(path).unwrap(), "oeoe");
    }

    #[test]
    fn a_terminal_has_no_standard_error() {
        let directory = tempfile::tempdir().unwrap();
        let streams = Streams {
            stdout: fifo(directory.path(), "out"),
            stderr: "/nonexistent".to_owned(),
            terminal: true,
            ..Streams::default()
        };
        assert!(streams.open("ns", "id", &Arc::default()).unwrap().stderr.is_none());
    }
}
