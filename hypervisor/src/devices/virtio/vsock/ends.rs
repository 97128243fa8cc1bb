//! The host's ends of a stream: sockets, pipes, FIFOs, terminals, regular files.
//!
//! Not hostile, but not reliable either: peers vanish, readers stall. No operation here waits.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::libc;
use nix::sys::socket::{Shutdown, shutdown};
use nix::sys::stat::{SFlag, fstat};
use vm_memory::VolatileSlice;
use vmshim_protocol::control::FdRole;

use super::rings::MAX_SLICES;
use crate::event_loop::{Interest, Registrar};

/// Where the bytes of one connection come from and go to.
pub trait Ends {
    /// Whether there is anything to send to the guest.
    fn has_source(&self) -> bool;

    /// Whether what the guest sends is wanted.
    fn has_sink(&self) -> bool;

    /// Reads from the source; 0 is its end.
    ///
    /// # Errors
    /// `WouldBlock` when there is nothing yet.
    fn read(&mut self, into: &[VolatileSlice<'_>]) -> io::Result<usize>;

    /// Writes to the sink, possibly less than all.
    ///
    /// # Errors
    /// `WouldBlock` when it is full.
    fn write(&mut self, from: &[VolatileSlice<'_>]) -> io::Result<usize>;

    /// Reads no more: whoever writes to the source learns it.
    fn close_source(&mut self);

    /// Writes no more: whoever reads from the sink sees its end.
    fn close_sink(&mut self);
}

/// Why descriptors cannot be the ends of a stream.
#[derive(Debug, thiserror::Error)]
pub enum EndsError {
    /// Roles that do not go together.
    #[error("a stream needs a socket, or a source, a sink or both")]
    Roles,
    /// The kernel refused to look at the descriptor.
    #[error("a stream's descriptor cannot be used")]
    Descriptor(#[source] io::Error),
}

/// Descriptors that wait for the guest to dial.
#[derive(Debug)]
pub enum StreamEnds {
    /// Both directions.
    Socket(OwnedFd),
    /// One direction each; at least one.
    Halves {
        /// Read by the VMM, towards the guest.
        source: Option<OwnedFd>,
        /// Written by the VMM with what the guest sends.
        sink: Option<OwnedFd>,
    },
}

impl StreamEnds {
    /// Descriptors as they came with a request. They are made non-blocking, which concerns everybody who shares their
    /// open file description.
    ///
    /// # Errors
    /// See [`EndsError`].
    pub fn new(fds: impl IntoIterator<Item = (FdRole, OwnedFd)>) -> Result<Self, EndsError> {
        let (mut socket, mut source, mut sink) = (None, None, None);
        for (role, fd) in fds {
            let place = match role {
                FdRole::StreamSocket => &mut socket,
                FdRole::StreamSource => &mut source,
                FdRole::StreamSink => &mut sink,
                _ => return Err(EndsError::Roles),
            };
            set_nonblocking(&fd).map_err(|errno| EndsError::Descriptor(errno.into()))?;
            if place.replace(fd).is_some() {
                return Err(EndsError::Roles);
            }
        }
        match (socket, source, sink) {
            (Some(socket), None, None) => Ok(Self::Socket(socket)),
            (None, None, None) | (Some(_), ..) => Err(EndsError::Roles),
            (None, source, sink) => Ok(Self::Halves { source, sink }),
        }
    }
}

/// Regular files and block devices are left alone: they never say that they would block.
pub fn set_nonblocking(fd: &OwnedFd) -> Result<(), Errno> {
    let kind = SFlag::from_bits_truncate(fstat(fd)?.st_mode) & SFlag::S_IFMT;
    if kind == SFlag::S_IFREG || kind == SFlag::S_IFBLK {
        return Ok(());
    }
    let flags = OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL)?);
    if !flags.contains(OFlag::O_NONBLOCK) {
        fcntl(fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    }
    Ok(())
}

/// A descriptor in the event loop, reported once each time it becomes ready.
#[derive(Debug)]
struct Watched {
    file: File,
    registrar: Option<Registrar>,
}

impl Watched {
    /// `true` with the descriptor: it is a regular file or the like, which is always ready and never reported.
    fn new(fd: OwnedFd, registrar: &Registrar, interest: Interest, token: u32) -> io::Result<(Self, bool)> {
        let file = File::from(fd);
        match registrar.add(&file, interest.once_per_change(), token) {
            Ok(()) => Ok((Self { file, registrar: Some(registrar.clone()) }, false)),
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => {
                Ok((Self { file, registrar: None }, true))
            }
            Err(error) => Err(error),
        }
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        if let Some(registrar) = &self.registrar {
            // Fails only for what is not registered, and then there is nothing to undo.
            let _ = registrar.remove(&self.file);
        }
    }
}

/// Tokens under which the two descriptors of a stream report.
#[derive(Debug, Clone, Copy)]
pub struct EndTokens {
    /// For the source, or a socket.
    pub source: u32,
    /// For a sink of its own.
    pub sink: u32,
}

/// [`Ends`] made of descriptors.
#[derive(Debug)]
pub struct FdEnds {
    source: Option<Arc<Watched>>,
    sink: Option<Arc<Watched>>,
}

/// Ends, and what is known about them without having waited.
#[derive(Debug)]
pub struct Opened<E> {
    /// The ends.
    pub ends: E,
    /// The source can be read, and will never be reported as readable.
    pub readable: bool,
}

impl FdEnds {
    /// Puts the ends into the event loop.
    ///
    /// # Errors
    /// When the kernel refuses to watch a descriptor.
    pub fn open(ends: StreamEnds, registrar: &Registrar, tokens: EndTokens) -> io::Result<Opened<Self>> {
        let (source, sink, readable) = match ends {
            StreamEnds::Socket(fd) => {
                let (socket, always) = Watched::new(fd, registrar, Interest::READ_WRITE, tokens.source)?;
                let socket = Arc::new(socket);
                (Some(Arc::clone(&socket)), Some(socket), always)
            }
            StreamEnds::Halves { source, sink } => {
                let source = source.map(|fd| Watched::new(fd, registrar, Interest::READ, tokens.source));
                let sink = sink.map(|fd| Watched::new(fd, registrar, Interest::WRITE, tokens.sink));
                let (source, always) = source.transpose()?.unzip();
                let (sink, _) = sink.transpose()?.unzip();
                (source.map(Arc::new), sink.map(Arc::new), always.unwrap_or(false))
            }
        };
        Ok(Opened { ends: Self { source, sink }, readable })
    }
}

impl Ends for FdEnds {
    fn has_source(&self) -> bool {
        self.source.is_some()
    }

    fn has_sink(&self) -> bool {
        self.sink.is_some()
    }

    fn read(&mut self, into: &[VolatileSlice<'_>]) -> io::Result<usize> {
        let Some(source) = &self.source else { return Ok(0) };
        vectored(into, |iov, count| {
            // SAFETY: `vectored` passes `count` pieces that may be written for as long as the slices live.
            unsafe { libc::readv(source.file.as_raw_fd(), iov, count) }
        })
    }

    fn write(&mut self, from: &[VolatileSlice<'_>]) -> io::Result<usize> {
        let Some(sink) = &self.sink else { return Err(io::ErrorKind::BrokenPipe.into()) };
        vectored(from, |iov, count| {
            // SAFETY: `vectored` passes `count` pieces that may be read for as long as the slices live.
            unsafe { libc::writev(sink.file.as_raw_fd(), iov, count) }
        })
    }

    fn close_source(&mut self) {
        if let Some(source) = self.source.take() {
            // Refused by all that is not a connected socket, where closing is all there is to do.
            let _ = shutdown(source.file.as_raw_fd(), Shutdown::Read);
        }
    }

    fn close_sink(&mut self) {
        if let Some(sink) = self.sink.take() {
            // As above. A copy of the socket that somebody else holds must not keep the end from being seen.
            let _ = shutdown(sink.file.as_raw_fd(), Shutdown::Write);
        }
    }
}

/// Runs one vectored system call on the first [`MAX_SLICES`] slices, again when a signal came first.
fn vectored(
    slices: &[VolatileSlice<'_>],
    call: impl Fn(*const libc::iovec, libc::c_int) -> isize,
) -> io::Result<usize> {
    let mut iov = [libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; MAX_SLICES];
    let mut count = 0;
    for (place, slice) in iov.iter_mut().zip(slices) {
        // The guard only matters to memory that is mapped on demand, which guest RAM is not.
        *place = libc::iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: slice.len() };
        count += 1;
    }
    loop {
        let result = call(iov.as_ptr(), count);
        match usize::try_from(result) {
            Ok(bytes) => return Ok(bytes),
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => {}
                error => return Err(error),
            },
        }
    }
}
