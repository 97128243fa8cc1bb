//! Host programs on the hybrid Unix socket that have not said yet where they want to go.
//!
//! A client says `CONNECT <port>\n` within [`HANDSHAKE_TIMEOUT`] or is hung up on. Nothing past that line is read
//! here: it belongs to the stream.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, SockFlag, accept4, recv};

use super::deadlines::Deadlines;
use super::ends::set_nonblocking;
use super::handshake::{Handshake, MAX_LINE, Progress};
use super::slots::{SlotId, Slots, Token};
use crate::event_loop::{Interest, Registrar};

/// How long a client may take to say where it wants to go.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(2);

/// Clients that may be at it at the same time; more wait in the listener's backlog.
const MAX_CLIENTS: usize = 128;

/// A listening socket and those it has let in.
#[derive(Debug)]
pub struct Clients {
    listener: OwnedFd,
    /// Somebody may wait in the backlog.
    waiting: bool,
    clients: Slots<Client>,
    deadlines: Deadlines<SlotId>,
}

#[derive(Debug)]
struct Client {
    socket: File,
    handshake: Handshake,
    deadline: Instant,
}

impl Clients {
    /// Takes over a listening Unix stream socket.
    ///
    /// # Errors
    /// When it cannot be made non-blocking.
    pub fn new(listener: OwnedFd) -> io::Result<Self> {
        set_nonblocking(&listener)?;
        Ok(Self {
            listener,
            waiting: true,
            clients: Slots::new(MAX_CLIENTS),
            deadlines: Deadlines::default(),
        })
    }

    /// Puts the listener into the event loop.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn watch(&self, registrar: &Registrar, token: Token) -> io::Result<()> {
        registrar.add(&self.listener, Interest::READ.once_per_change(), token.encode())
    }

    /// Takes the listener out again, and hangs up on everybody.
    pub fn unwatch(&mut self, registrar: &Registrar) {
        // Fails only for what is not registered.
        let _ = registrar.remove(&self.listener);
        self.clients = Slots::new(MAX_CLIENTS);
        self.deadlines.clear();
        self.waiting = true;
    }

    /// The listener has something to say.
    pub fn on_listener(&mut self) {
        self.waiting = true;
    }

    /// Whether there may be somebody to let in.
    pub fn has_waiting(&self) -> bool {
        self.waiting
    }

    /// Lets in who waits, at most `room` of them.
    pub fn accept(&mut self, room: usize, registrar: &Registrar, now: Instant) {
        let room = room.saturating_sub(self.clients.len()).min(self.clients.room());
        for _ in 0..room {
            if !self.waiting {
                return;
            }
            match accept4(self.listener.as_raw_fd(), SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC) {
                Ok(fd) => {
                    // SAFETY: the kernel has just made this descriptor for us and nobody else knows it.
                    let socket = unsafe { File::from_raw_fd(fd) };
                    self.admit(socket, registrar, now);
                }
                // A client that has left again is nobody's fault.
                Err(Errno::EINTR | Errno::ECONNABORTED) => {}
                // Done, or no descriptors left: then the next event, or the next that leaves, is the occasion.
                Err(errno) => {
                    self.waiting = errno != Errno::EAGAIN;
                    return;
                }
            }
        }
    }

    fn admit(&mut self, socket: File, registrar: &Registrar, now: Instant) {
        let Some(id) = self.clients.vacancy() else { return };
        // A client that cannot be watched is hung up on.
        if registrar.add(&socket, Interest::READ.once_per_change(), Token::Client(id).encode()).is_ok() {
            let deadline = now + HANDSHAKE_TIMEOUT;
            self.deadlines.insert(deadline, id);
            self.clients.insert(Client { socket, handshake: Handshake::default(), deadline });
        }
    }

    /// A client has said something. Once it is complete, this is the guest's port and the client's socket.
    pub fn on_client(&mut self, id: SlotId, registrar: &Registrar) -> Option<(u32, OwnedFd)> {
        let client = self.clients.get_mut(id)?;
        let port = match client.listen() {
            Ok(None) => return None,
            Ok(Some(port)) => Some(port),
            Err(_) => None,
        };
        let client = self.clients.remove(id)?;
        self.deadlines.remove(client.deadline, id);
        // Fails only for what is not registered.
        let _ = registrar.remove(&client.socket);
        port.map(|port| (port, OwnedFd::from(client.socket)))
    }

    /// When [`Clients::expire`] has to be called next.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.deadlines.next()
    }

    /// Hangs up on those who took too long.
    pub fn expire(&mut self, now: Instant) {
        while let Some(id) = self.deadlines.pop(now) {
            // Closing takes it out of the event loop: nobody else has this descriptor.
            self.clients.remove(id);
        }
    }
}

impl Client {
    /// Reads on to the end of the line; the port when it is there.
    fn listen(&mut self) -> io::Result<Option<u32>> {
        loop {
            let mut bytes = [0; MAX_LINE];
            let room = self.handshake.room();
            let fd = self.socket.as_raw_fd();
            let seen = match recv(fd, &mut bytes[..room], MsgFlags::MSG_PEEK) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(seen) => seen,
                Err(Errno::EAGAIN) => return Ok(None),
                Err(Errno::EINTR) => continue,
                Err(errno) => return Err(errno.into()),
            };
            let progress = self.handshake.feed(&bytes[..seen]).map_err(io::Error::other)?;
            let (taken, port) = match progress {
                Progress::Incomplete => (seen, None),
                Progress::Complete { port, taken } => (taken, Some(port)),
            };
            // What was seen is there: this neither waits nor returns less.
            recv(fd, &mut bytes[..taken], MsgFlags::empty())?;
            if port.is_some() {
                return Ok(port);
            }
        }
    }
}
