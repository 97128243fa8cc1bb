//! The loop of a worker thread: waits for descriptors, calls who registered them.
//!
//! Each worker thread (`io`, `blk`, `fs`) runs one [`EventLoop`]. Who wants to be called makes a [`Handler`] and gets a
//! [`Registrar`] bound to it, which may be used from any thread. Readiness is level-triggered unless asked otherwise
//! ([`Interest::once_per_change`]): a descriptor that stays ready is reported again, so a handler may leave work undone.

use std::io;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex};

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use crate::bits;
use crate::sync::lock;

/// What to wait for. Errors and hang-ups are always reported.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Interest(EpollFlags);

impl Interest {
    /// Errors and hang-ups only.
    pub const NONE: Self = Self(EpollFlags::empty());
    /// Something to read, or the peer's end of file.
    pub const READ: Self = Self(EpollFlags::EPOLLIN.union(EpollFlags::EPOLLRDHUP));
    /// Room to write.
    pub const WRITE: Self = Self(EpollFlags::EPOLLOUT);
    /// Both.
    pub const READ_WRITE: Self = Self(Self::READ.0.union(Self::WRITE.0));

    /// The same, but reported once each time something changes instead of as long as it lasts (`EPOLLET`): for who
    /// remembers that a descriptor is ready and uses it until it is not.
    pub const fn once_per_change(self) -> Self {
        Self(self.0.union(EpollFlags::EPOLLET))
    }
}

/// What a descriptor is ready for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Readiness(EpollFlags);

impl Readiness {
    /// A read does not block; it may return end of file or an error.
    pub fn readable(self) -> bool {
        self.0.intersects(
            EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP | EpollFlags::EPOLLHUP | EpollFlags::EPOLLERR,
        )
    }

    /// A write does not block; it may return an error.
    pub fn writable(self) -> bool {
        self.0.intersects(EpollFlags::EPOLLOUT | EpollFlags::EPOLLHUP | EpollFlags::EPOLLERR)
    }

    /// The peer is gone in both directions, or the descriptor has failed: reported until it is removed.
    pub fn hung_up(self) -> bool {
        self.0.intersects(EpollFlags::EPOLLHUP | EpollFlags::EPOLLERR)
    }
}

/// Who is called when a descriptor is ready.
pub trait Handler: Send + Sync {
    /// `token` is what was given at registration. An event that was already fetched when its descriptor was removed
    /// still arrives, once, in the same round: a handler knows which of its tokens live.
    fn on_ready(&self, token: u32, readiness: Readiness);
}

/// Registers descriptors on behalf of one [`Handler`]. Clones are the same registrar; any thread may use them.
#[derive(Debug, Clone)]
pub struct Registrar {
    epoll: Arc<Epoll>,
    handler: u32,
}

impl Registrar {
    /// Waits for `fd`.
    ///
    /// # Errors
    /// `EEXIST` when it is registered already, `EPERM` when it is a regular file or directory, which are always ready.
    pub fn add(&self, fd: impl AsFd, interest: Interest, token: u32) -> io::Result<()> {
        Ok(self.epoll.add(fd, self.event(interest, token))?)
    }

    /// Waits for something else, or under another token.
    ///
    /// # Errors
    /// `ENOENT` when it is not registered.
    pub fn modify(&self, fd: impl AsFd, interest: Interest, token: u32) -> io::Result<()> {
        Ok(self.epoll.modify(fd, &mut self.event(interest, token))?)
    }

    /// Stops waiting. Needed before the last copy of a descriptor that has been duplicated is closed; harmless
    /// otherwise.
    ///
    /// # Errors
    /// `ENOENT` when it is not registered.
    pub fn remove(&self, fd: impl AsFd) -> io::Result<()> {
        Ok(self.epoll.delete(fd)?)
    }

    fn event(&self, interest: Interest, token: u32) -> EpollEvent {
        EpollEvent::new(interest.0, u64::from(self.handler) << 32 | u64::from(token))
    }
}

/// The descriptors of one thread and who is called for them.
pub struct EventLoop {
    epoll: Arc<Epoll>,
    handlers: Mutex<Vec<Arc<dyn Handler>>>,
}

/// Events fetched by one system call. Between two calls everything fetched is handled, so a busy descriptor cannot
/// starve the others.
const BATCH: usize = 32;

impl EventLoop {
    /// An empty loop.
    ///
    /// # Errors
    /// When the process has no descriptors left.
    pub fn new() -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        Ok(Self { epoll: Arc::new(epoll), handlers: Mutex::new(Vec::new()) })
    }

    /// Lets `handler` register descriptors. The loop keeps it for good.
    pub fn registrar(&self, handler: Arc<dyn Handler>) -> Registrar {
        let mut handlers = lock(&self.handlers);
        handlers.push(handler);
        // A VM has a few dozen devices; saturating keeps the conversion total.
        let index = u32::try_from(handlers.len() - 1).unwrap_or(u32::MAX);
        Registrar { epoll: Arc::clone(&self.epoll), handler: index }
    }

    /// Handles events until the process ends.
    ///
    /// # Errors
    /// When the kernel refuses to wait, which is a fault of this program.
    pub fn run(&self) -> io::Result<std::convert::Infallible> {
        loop {
            self.turn(EpollTimeout::NONE)?;
        }
    }

    /// Waits once, for at most `timeout`, and handles what is ready; returns how many events that were.
    ///
    /// # Errors
    /// As [`EventLoop::run`].
    pub fn turn(&self, timeout: EpollTimeout) -> io::Result<usize> {
        let mut events = [EpollEvent::empty(); BATCH];
        let count = match self.epoll.wait(&mut events, timeout) {
            Ok(count) => count,
            Err(Errno::EINTR) => 0,
            Err(errno) => return Err(errno.into()),
        };
        for event in &events[..count] {
            self.dispatch(event);
        }
        Ok(count)
    }

    fn dispatch(&self, event: &EpollEvent) {
        let (token, index) = (bits::low(event.data()), bits::high(event.data()));
        let handler = {
            let handlers = lock(&self.handlers);
            usize::try_from(index).ok().and_then(|index| handlers.get(index).cloned())
        };
        // The lock is released: a handler may make registrars.
        if let Some(handler) = handler {
            handler.on_ready(token, Readiness(event.events()));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::*;

    #[derive(Default)]
    struct Recorder(Mutex<Vec<(u32, Readiness)>>);

    impl Handler for Recorder {
        fn on_ready(&self, token: u32, readiness: Readiness) {
            self.0.lock().unwrap().push((token, readiness));
        }
    }

    impl Recorder {
        fn tokens(&self) -> Vec<u32> {
            self.0.lock().unwrap().drain(..).map(|(token, _)| token).collect()
        }
    }

    #[test]
    fn each_handler_gets_its_own_tokens() {
        let event_loop = EventLoop::new().unwrap();
        let (first, second) = (Arc::new(Recorder::default()), Arc::new(Recorder::default()));
        let (mut a, b) = UnixStream::pair().unwrap();
        let (mut c, d) = UnixStream::pair().unwrap();
        event_loop.registrar(first.clone()).add(&b, Interest::READ, u32::MAX).unwrap();
        event_loop.registrar(second.clone()).add(&d, Interest::READ, 7).unwrap();
        a.write_all(b"x").unwrap();
        c.write_all(b"x").unwrap();
        assert_eq!(event_loop.turn(EpollTimeout::ZERO).unwrap(), 2);
        assert_eq!(first.tokens(), [u32::MAX]);
        assert_eq!(second.tokens(), [7]);
    }

    #[test]
    fn readiness_is_reported_until_it_is_used_up() {
        let event_loop = EventLoop::new().unwrap();
        let recorder = Arc::new(Recorder::default());
        let registrar = event_loop.registrar(recorder.clone());
        let (mut a, mut b) = UnixStream::pair().unwrap();
        registrar.add(&b, Interest::READ, 1).unwrap();
        a.write_all(b"x").unwrap();
        event_loop.turn(EpollTimeout::ZERO).unwrap();
        event_loop.turn(EpollTimeout::ZERO).unwrap();
        assert_eq!(recorder.tokens(), [1, 1]);
        b.read_exact(&mut [0]).unwrap();
        assert_eq!(event_loop.turn(EpollTimeout::ZERO).unwrap(), 0);
        registrar.modify(&b, Interest::WRITE, 2).unwrap();
        event_loop.turn(EpollTimeout::ZERO).unwrap();
        assert_eq!(recorder.tokens(), [2]);
        registrar.remove(&b).unwrap();
        assert_eq!(event_loop.turn(EpollTimeout::ZERO).unwrap(), 0);
    }

    #[test]
    fn a_change_is_reported_once() {
        let event_loop = EventLoop::new().unwrap();
        let recorder = Arc::new(Recorder::default());
        let (mut a, b) = UnixStream::pair().unwrap();
        a.write_all(b"x").unwrap();
        event_loop.registrar(recorder.clone()).add(&b, Interest::READ.once_per_change(), 1).unwrap();
        event_loop.turn(EpollTimeout::ZERO).unwrap();
        event_loop.turn(EpollTimeout::ZERO).unwrap();
        assert_eq!(recorder.tokens(), [1]);
        a.write_all(b"y").unwrap();
        event_loop.turn(EpollTimeout::ZERO).unwrap();
        assert_eq!(recorder.tokens(), [1]);
    }

    #[test]
    fn a_closed_peer_is_a_hang_up() {
        let event_loop = EventLoop::new().unwrap();
        let recorder = Arc::new(Recorder::default());
        let registrar = event_loop.registrar(recorder.clone());
        let (a, b) = UnixStream::pair().unwrap();
        registrar.add(&b, Interest::NONE, 1).unwrap();
        drop(a);
        event_loop.turn(EpollTimeout::ZERO).unwrap();
        let (_, readiness) = recorder.0.lock().unwrap()[0];
        assert!(readiness.hung_up() && readiness.readable());
    }

    #[test]
    fn a_regular_file_is_refused() {
        let event_loop = EventLoop::new().unwrap();
        let registrar = event_loop.registrar(Arc::new(Recorder::default()));
        let error = registrar.add(tempfile::tempfile().unwrap(), Interest::READ, 0).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(nix::libc::EPERM));
    }
}
