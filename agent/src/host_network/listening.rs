//! Servers in containers: where one is about to listen, so does the host.
//!
//! The call of listen(2) waits for it, so whoever is told by a server that it listens finds it there, and a port that
//! the host has no more is an error of the call. The host stops when the last socket that listened there is closed,
//! which the kernel tells by the socket's number.

use super::canonical;
use crate::events::Events;
use crate::sys::register;
use crate::sys::ring::Ring;
use crate::sys::seccomp::{self, Asked, Question};
use nix::sys::socket::{AddressFamily, SockaddrLike, SockaddrStorage, getsockname, getsockopt, sockopt};
use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::io::Interest;
use tokio::sync::oneshot;
use tokio::time::timeout;

/// Places at a time.
const MOST: usize = 1024;

/// How long the host may take to listen.
const LIMIT: Duration = Duration::from_secs(30);

/// Where a server listens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Place {
    /// Address and port.
    pub at: SocketAddr,
    /// An IPv6 socket that takes in no IPv4 connections.
    pub ipv6_only: bool,
}

/// A socket that is about to listen. The kernel does not think it closed before this is dropped.
struct Server {
    _socket: OwnedFd,
    number: u64,
    place: Place,
}

/// The servers of all containers.
pub struct Listening {
    events: Arc<Events>,
    /// Held while the host is asked, so that no two ask for the same.
    turn: tokio::sync::Mutex<()>,
    table: Mutex<Table>,
}

#[derive(Default)]
struct Table {
    servers: HashMap<u64, Place>,
    last: u64,
    asked: HashMap<u64, oneshot::Sender<i32>>,
}

impl Table {
    fn has(&self, place: &Place) -> bool {
        self.servers.values().any(|other| other == place)
    }
}

impl Listening {
    /// None yet.
    pub fn new(events: Arc<Events>) -> Self {
        Self { events, turn: tokio::sync::Mutex::default(), table: Mutex::default() }
    }

    /// Whether a server listens on the port.
    pub fn has(&self, port: u16) -> bool {
        self.lock().servers.values().any(|place| place.at.port() == port)
    }

    /// Follows the processes of one filter until the last of them has ended.
    pub async fn follow(self: Arc<Self>, listener: OwnedFd) -> io::Result<()> {
        let listener = Arc::new(register(listener, Interest::READABLE)?);
        loop {
            let mut ready = listener.readable().await?;
            match seccomp::receive(listener.get_ref().as_fd())? {
                Asked::Waits(question) => {
                    let (this, listener) = (self.clone(), listener.clone());
                    tokio::spawn(async move {
                        let errno = this.decide(&question).await;
                        seccomp::answer(listener.get_ref().as_fd(), &question, errno);
                    });
                }
                Asked::Nothing => ready.clear_ready(),
                Asked::Over => return Ok(()),
            }
        }
    }

    /// Follows the sockets that are closed.
    pub async fn follow_closed(self: Arc<Self>, mut closed: Ring) -> io::Result<()> {
        loop {
            self.closed(closed.next().await?);
        }
    }

    /// The host's answer.
    pub fn answered(&self, id: u64, errno: i32) {
        if let Some(asked) = self.lock().asked.remove(&id) {
            // A process that has been killed meanwhile waits no more.
            let _ = asked.send(errno);
        }
    }

    /// 0 where the call may go on.
    async fn decide(&self, question: &Question) -> i32 {
        match server(question) {
            Some(server) => self.listen(&server).await,
            // The kernel has a better error for what is no socket, and the host nothing to do with what is not TCP.
            None => 0,
        }
    }

    async fn listen(&self, server: &Server) -> i32 {
        let _turn = self.turn.lock().await;
        let known = {
            let mut table = self.lock();
            let known = table.has(&server.place);
            if known {
                table.servers.insert(server.number, server.place);
            } else if table.servers.len() >= MOST {
                return libc::ENOBUFS;
            }
            known
        };
        if known {
            return 0;
        }
        let errno = self.ask(server.place).await;
        if errno == 0 {
            self.lock().servers.insert(server.number, server.place);
        }
        errno
    }

    async fn ask(&self, place: Place) -> i32 {
        let (sender, answer) = oneshot::channel();
        let id = {
            let mut table = self.lock();
            table.last += 1;
            let id = table.last;
            table.asked.insert(id, sender);
            id
        };
        self.events.host_listen(id, place);
        let answer = timeout(LIMIT, answer).await;
        self.lock().asked.remove(&id);
        answer.map_or(libc::ETIMEDOUT, |answer| answer.unwrap_or(libc::EIO))
    }

    fn closed(&self, number: u64) {
        let mut table = self.lock();
        let Some(place) = table.servers.remove(&number) else { return };
        if !table.has(&place) {
            self.events.host_unlisten(place);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        // Nothing that holds the lock can panic half-way.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The TCP socket that a call of listen(2) is about, where it has an address and does not listen yet.
fn server(question: &Question) -> Option<Server> {
    let socket = seccomp::descriptor_of(question.thread, question.argument).ok()?;
    let address: SockaddrStorage = getsockname(socket.as_raw_fd()).ok()?;
    let at = match address.family()? {
        AddressFamily::Inet => SocketAddr::from(std::net::SocketAddrV4::from(*address.as_sockaddr_in()?)),
        AddressFamily::Inet6 => SocketAddr::from(std::net::SocketAddrV6::from(*address.as_sockaddr_in6()?)),
        _ => return None,
    };
    let protocol: libc::c_int = option(&socket, libc::SO_PROTOCOL).ok()?;
    let listens = getsockopt(&socket, sockopt::AcceptConn).ok()?;
    if protocol != libc::IPPROTO_TCP || listens || at.port() == 0 {
        return None;
    }
    let ipv6_only = at.is_ipv6() && getsockopt(&socket, sockopt::Ipv6V6Only).ok()?;
    let number = option(&socket, libc::SO_COOKIE).ok()?;
    Some(Server { _socket: socket, number, place: Place { at: unscoped(at), ipv6_only } })
}

/// A number that the kernel knows of a socket.
fn option<T: Default>(socket: &OwnedFd, name: libc::c_int) -> io::Result<T> {
    let mut value = T::default();
    let mut length = libc::socklen_t::try_from(size_of::<T>()).map_err(io::Error::other)?;
    let place = (&raw mut value).cast();
    // SAFETY: the option fills the number, whose size it is told.
    let result =
        unsafe { libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, name, place, &raw mut length) };
    crate::sys::check(result.into()).map(|_| value)
}

/// Without scope and flow, which mean something in the guest alone.
fn unscoped(at: SocketAddr) -> SocketAddr {
    match at.ip() {
        IpAddr::V6(Ipv6Addr::UNSPECIFIED) => SocketAddr::new(at.ip(), at.port()),
        _ => canonical(at),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    fn question(socket: &impl AsRawFd) -> Question {
        // SAFETY: takes nothing, and cannot fail.
        let thread = unsafe { libc::gettid() }.cast_unsigned();
        Question::of(thread, u64::from(socket.as_raw_fd().cast_unsigned()))
    }

    fn place(text: &str) -> Place {
        Place { at: text.parse().unwrap(), ipv6_only: false }
    }

    fn played(number: u64, at: &str) -> Server {
        let socket = std::fs::File::open("/dev/null").unwrap().into();
        Server { _socket: socket, number, place: place(at) }
    }

    #[test]
    fn only_a_bound_tcp_socket_that_does_not_listen_is_a_server() {
        let listens = TcpListener::bind("127.0.0.1:0").unwrap();
        assert!(server(&question(&listens)).is_none());
        assert!(server(&question(&std::net::UdpSocket::bind("127.0.0.1:0").unwrap())).is_none());
        assert!(server(&question(&std::fs::File::open("/dev/null").unwrap())).is_none());
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let _inside = runtime.enter();
        let socket = tokio::net::TcpSocket::new_v6().unwrap();
        assert!(server(&question(&socket)).is_none());
        socket.bind("[::]:0".parse().unwrap()).unwrap();
        let found = server(&question(&socket)).unwrap();
        assert_eq!(found.place, Place { at: socket.local_addr().unwrap(), ipv6_only: false });
        assert_ne!(found.number, 0);
    }

    #[tokio::test]
    async fn the_host_is_asked_once_for_a_place_and_told_at_its_end() {
        let events = Arc::<Events>::default();
        let listening = Arc::new(Listening::new(events.clone()));
        let asking = listening.clone();
        let first = tokio::spawn(async move { asking.listen(&played(1, "0.0.0.0:80")).await });
        while listening.lock().asked.is_empty() {
            tokio::task::yield_now().await;
        }
        listening.answered(1, 0);
        assert_eq!(first.await.unwrap(), 0);
        assert_eq!(listening.listen(&played(2, "0.0.0.0:80")).await, 0);
        assert!(listening.has(80) && !listening.has(81));
        listening.closed(1);
        listening.closed(77);
        assert!(listening.has(80));
        assert_eq!(events.waiting(), 1);
        listening.closed(2);
        assert!(!listening.has(80));
        assert_eq!(events.waiting(), 2);
    }

    #[tokio::test]
    async fn what_the_host_refuses_is_the_calls_error() {
        let listening = Arc::new(Listening::new(Arc::default()));
        let asking = listening.clone();
        let refused = tokio::spawn(async move { asking.listen(&played(1, "[::]:80")).await });
        while listening.lock().asked.is_empty() {
            tokio::task::yield_now().await;
        }
        listening.answered(1, libc::EADDRINUSE);
        assert_eq!(refused.await.unwrap(), libc::EADDRINUSE);
        assert!(!listening.has(80));
    }

    #[tokio::test(start_paused = true)]
    async fn a_host_that_does_not_answer_is_not_waited_for_for_ever() {
        let listening = Listening::new(Arc::default());
        assert_eq!(listening.listen(&played(1, "0.0.0.0:80")).await, libc::ETIMEDOUT);
        assert!(listening.lock().asked.is_empty());
    }

    #[tokio::test]
    async fn there_is_a_bound() {
        let listening = Listening::new(Arc::default());
        let servers = (0..MOST).zip(1..).map(|(_, number)| (number, place("127.0.0.1:1")));
        listening.lock().servers.extend(servers);
        assert_eq!(listening.listen(&played(9999, "127.0.0.1:2")).await, libc::ENOBUFS);
    }
}
