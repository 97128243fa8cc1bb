//! Sockets of the host inside containers: a container connects to a Unix socket that the agent listens on, the shim is
//! told, connects to the host's socket, and names a port on which the agent reaches it.
//!
//! Containers are hostile: how many connections there are at once is bounded, and one too many is closed at once.

use crate::containers::internal;
use crate::dials::Dials;
use crate::events::Events;
use crate::failure::Failure;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use tokio::io::copy_bidirectional;
use tokio::net::UnixListener;
use tokio::sync::Semaphore;
use tokio::task::AbortHandle;
use vmshim_protocol::agent::Socket;

/// The directory below a container's own where its sockets are.
pub const DIRECTORY: &str = "sockets";

/// Connections of all containers, waiting or open.
const MOST_CONNECTIONS: usize = 512;

/// Permission bits.
const MODE: u32 = 0o777;

/// Makes them, and follows their connections.
pub struct Sockets {
    events: Arc<Events>,
    dials: Arc<Dials>,
    free: Arc<Semaphore>,
}

/// A container's listeners, closed when dropped.
#[derive(Debug, Default)]
pub struct Listeners(Vec<AbortHandle>);

impl Drop for Listeners {
    fn drop(&mut self) {
        self.0.iter().for_each(AbortHandle::abort);
    }
}

impl Sockets {
    /// None yet.
    pub fn new(events: Arc<Events>, dials: Arc<Dials>) -> Self {
        Self { events, dials, free: Arc::new(Semaphore::new(MOST_CONNECTIONS)) }
    }

    /// Listens on a container's sockets, which are made in its directory.
    pub fn listen(
        self: &Arc<Self>,
        container: &str,
        directory: &Path,
        sockets: &[Socket],
    ) -> Result<Listeners, Failure> {
        let mut listeners = Listeners::default();
        if sockets.is_empty() {
            return Ok(listeners);
        }
        let doing = |error: io::Error| internal("make the container's sockets", &error);
        let directory = directory.join(DIRECTORY);
        fs::create_dir(&directory).map_err(doing)?;
        for socket in sockets {
            let path = directory.join(socket.number.to_string());
            let listener = UnixListener::bind(&path).map_err(doing)?;
            std::os::unix::fs::chown(&path, Some(socket.uid), Some(socket.gid)).map_err(doing)?;
            fs::set_permissions(&path, fs::Permissions::from_mode(socket.mode & MODE)).map_err(doing)?;
            let (this, container, number) = (self.clone(), container.to_owned(), socket.number);
            let task = tokio::spawn(async move { this.accept(&listener, &container, number).await });
            listeners.0.push(task.abort_handle());
        }
        Ok(listeners)
    }

    async fn accept(&self, listener: &UnixListener, container: &str, number: u32) {
        while let Ok((mut guest, _)) = listener.accept().await {
            let Ok(permit) = self.free.clone().try_acquire_owned() else { continue };
            let (events, dials, container) = (self.events.clone(), self.dials.clone(), container.to_owned());
            tokio::spawn(async move {
                let tell = |connection| events.socket_dialled(&container, number, connection);
                if let Some(mut host) = dials.request(tell).await {
                    // Either side may break off; the other is closed with it.
                    let _ = copy_bidirectional(&mut guest, &mut host).await;
                }
                drop(permit);
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::link::{Dialer, Stream};
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
    use std::os::fd::OwnedFd;
    use std::sync::Mutex;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::UnixStream;

    /// The host: the first dial reaches the stream.
    struct Host(Mutex<Option<OwnedFd>>);

    #[async_trait::async_trait]
    impl Dialer for Host {
        async fn dial(&self, port: u32) -> io::Result<Stream> {
            assert_eq!(port, 9);
            Stream::new(self.0.lock().unwrap().take().unwrap())
        }
    }

    fn sockets() -> (Arc<Dials>, Arc<Sockets>) {
        let dials = Arc::<Dials>::default();
        (dials.clone(), Arc::new(Sockets::new(Arc::default(), dials)))
    }

    async fn until_one_waits(dials: &Dials) {
        while dials.waiting() == 0 {
            tokio::task::yield_now().await;
        }
    }

    fn socket(number: u32) -> Socket {
        Socket { number, mode: 0o10600, ..Default::default() }
    }

    #[tokio::test]
    async fn a_connection_reaches_the_host_and_half_closes() {
        let directory = tempfile::tempdir().unwrap();
        let (dials, sockets) = sockets();
        let listeners = sockets.listen("c", directory.path(), &[socket(0)]).unwrap();
        let path = directory.path().join("sockets/0");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o600);
        let mut guest = UnixStream::connect(&path).await.unwrap();
        until_one_waits(&dials).await;
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let (agents, hosts) = socketpair(AddressFamily::Unix, SockType::Stream, None, flags).unwrap();
        let mut host = Stream::new(hosts).unwrap();
        dials.answer(1, 9, &Host(Mutex::new(Some(agents)))).await.unwrap();
        guest.shutdown().await.unwrap();
        let mut text = String::new();
        host.read_to_string(&mut text).await.unwrap();
        host.write_all(b"hello").await.unwrap();
        drop(host);
        guest.read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "hello");
        drop(listeners);
        while UnixStream::connect(&path).await.is_ok() {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn one_connection_too_many_and_one_that_is_refused_are_closed() {
        let directory = tempfile::tempdir().unwrap();
        let (dials, sockets) = sockets();
        let _listeners = sockets.listen("c", directory.path(), &[socket(0)]).unwrap();
        let path = directory.path().join("sockets/0");
        let all = sockets.free.clone().acquire_many_owned(511).await.unwrap();
        let mut first = UnixStream::connect(&path).await.unwrap();
        let mut second = UnixStream::connect(&path).await.unwrap();
        assert_eq!(second.read(&mut [0]).await.unwrap(), 0);
        until_one_waits(&dials).await;
        dials.answer(1, 0, &Host(Mutex::default())).await.unwrap();
        assert_eq!(first.read(&mut [0]).await.unwrap(), 0);
        drop(all);
        assert_eq!(sockets.free.available_permits(), MOST_CONNECTIONS);
    }
}
