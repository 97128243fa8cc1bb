//! The host's network, for containers that are to share it: as far as a guest can, they find what they would find as
//! processes of the host.
//!
//! The guest has no interface but the loopback; to its kernel every address is one of its own. What a container sends to
//! a port that a container has goes there. Everything else ends at the agent's own two sockets ([`programs`]), and from
//! there goes to the host: connections one by one ([`connections`]), datagrams by client and server ([`datagrams`]). Where
//! a container is about to listen, its call waits until the shim does so on the host ([`listening`]).
//!
//! Containers are hostile, and so bounded: in connections, in pairs of datagram sockets, in listeners. What they are
//! given is no more than the shim gives. Runs on the agent's one thread.

mod connections;
mod datagrams;
mod listening;
mod packet;
mod programs;

use crate::containers::internal;
use crate::dials::Dials;
use crate::events::Events;
use crate::failure::{Failure, Kind};
use crate::log;
use crate::network::share_addresses;
use crate::sys::ring::Ring;
use connections::Bounds;
use listening::Listening;
pub use listening::Place;
use programs::Programs;
use std::fs::File;
use std::io;
use std::net::{Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use tokio::sync::OnceCell;
use vmshim_protocol::agent::ConnectTcpRequest;

/// What containers have of the host's network: nothing until it is shared.
pub struct HostNetwork {
    /// That of all containers.
    cgroup: PathBuf,
    events: Arc<Events>,
    dials: Arc<Dials>,
    listening: Arc<Listening>,
    shared: OnceCell<Programs>,
}

impl HostNetwork {
    /// Not shared yet.
    pub fn new(cgroup: PathBuf, events: Arc<Events>, dials: Arc<Dials>) -> Self {
        let listening = Arc::new(Listening::new(events.clone()));
        Self { cgroup, events, dials, listening, shared: OnceCell::new() }
    }

    /// Shares it, if it is not shared yet.
    pub async fn share(&self) -> Result<(), Failure> {
        self.shared.get_or_try_init(|| self.begin()).await.map(drop)
    }

    /// Whether it is shared.
    pub fn is_shared(&self) -> bool {
        self.shared.initialized()
    }

    /// Hands on to the host what connects to `listeners`, where servers of the host would listen in a pod that were no guest.
    pub fn stand_in(&self, listeners: Vec<std::net::TcpListener>) -> Result<(), Failure> {
        let bounds = Arc::<Bounds>::default();
        for listener in listeners {
            let listener = tokio::net::TcpListener::from_std(listener)
                .map_err(|error| internal("listen in a server's stead", &error))?;
            let (events, dials) = (self.events.clone(), self.dials.clone());
            say_end("a server of the pod", connections::serve(listener, bounds.clone(), events, dials));
        }
        Ok(())
    }

    /// Checks that a connection from the host reaches a container. One that does not would come back to us, and go to the
    /// host again.
    pub fn check_inward(&self, request: &ConnectTcpRequest) -> Result<(), Failure> {
        let port = request.to.port;
        if !self.is_shared() || u16::try_from(port).is_ok_and(|port| self.listening.has(port)) {
            return Ok(());
        }
        Err(Failure::new(Kind::FailedPrecondition, format!("no container listens on port {port}")))
    }

    /// Follows the calls of listen(2) that a seccomp filter asks about.
    pub fn follow(&self, listener: OwnedFd) {
        let listening = self.listening.clone();
        tokio::spawn(async move {
            if let Err(error) = listening.follow(listener).await {
                log::error(&format!("servers of a container are not seen any more: {error}"));
            }
        });
    }

    /// The host listens, or says by an error number why not.
    pub fn answered(&self, id: u64, errno: u32) -> Result<(), Failure> {
        let errno = i32::try_from(errno).ok().filter(|errno| *errno < 4096);
        let errno = errno.ok_or_else(|| Failure::new(Kind::InvalidArgument, "errno: is none of Linux's"))?;
        self.listening.answered(id, errno);
        Ok(())
    }

    async fn begin(&self) -> Result<Programs, Failure> {
        let doing = |error: io::Error| internal("share the host's network", &error);
        share_addresses().await?;
        let tcp = std::net::TcpListener::bind((Ipv6Addr::UNSPECIFIED, 0)).map_err(doing)?;
        let udp = datagrams::socket().map_err(doing)?;
        let cgroup = File::open(&self.cgroup).map_err(doing)?;
        let netns = File::open("/proc/self/ns/net").map_err(doing)?;
        let (programs, closed) = programs::enforce(cgroup, netns, tcp.as_fd(), udp.as_fd()).map_err(doing)?;
        let closed = Ring::new(closed, programs::RING_SIZE).map_err(doing)?;
        tcp.set_nonblocking(true).map_err(doing)?;
        let tcp = tokio::net::TcpListener::from_std(tcp).map_err(doing)?;
        let (events, dials) = (self.events.clone(), self.dials.clone());
        say_end("connections", connections::serve(tcp, Arc::default(), events.clone(), dials.clone()));
        say_end("datagrams", datagrams::serve(udp, events, dials));
        let listening = self.listening.clone();
        say_end("servers that end", async move { listening.follow_closed(closed).await });
        Ok(programs)
    }
}

/// The address with IPv4 where an IPv6 socket knows it as a mapped one.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// Runs what ends only by an error.
fn say_end(what: &'static str, task: impl Future<Output = io::Result<()>> + Send + 'static) {
    tokio::spawn(async move {
        if let Err(error) = task.await {
            log::error(&format!("the host's network is shared no more as to {what}: {error}"));
        }
    });
}
