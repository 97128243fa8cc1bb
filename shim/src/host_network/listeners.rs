//! Listeners of the host that stand for servers in the guest.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::sys::socket::{setsockopt, sockopt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::task::AbortHandle;
use tokio::time::Instant;
use vmshim_protocol::agent as api;

use super::{LIMIT, Refused, endpoint, expect};
use crate::vm::Vm;

/// For one guest at a time.
const MOST: usize = 1024;

/// As large as that of most servers.
const BACKLOG: u32 = 1024;

/// Where, and whether for IPv6 alone.
type Place = (SocketAddr, bool);

/// The listeners of one guest.
#[derive(Default)]
pub struct Listeners(Mutex<HashMap<Place, AbortHandle>>);

impl Listeners {
    /// Listens from now on.
    pub fn open(&self, vm: &Arc<Vm>, at: SocketAddr, ipv6_only: bool) -> io::Result<()> {
        let mut table = self.table();
        if table.contains_key(&(at, ipv6_only)) {
            return Ok(());
        }
        if table.len() >= MOST {
            return Err(io::Error::from_raw_os_error(libc::ENOBUFS));
        }
        let listener = listen(at, ipv6_only)?;
        let vm = vm.clone();
        let task = tokio::spawn(async move {
            if let Err(error) = serve(&vm, &listener, inside(at)).await {
                log::error!("connections to {at} are no longer taken in for the guest: {error}");
            }
        });
        table.insert((at, ipv6_only), task.abort_handle());
        Ok(())
    }

    /// Listens no more.
    pub fn close(&self, at: SocketAddr, ipv6_only: bool) {
        if let Some(task) = self.table().remove(&(at, ipv6_only)) {
            task.abort();
        }
    }

    fn table(&self) -> MutexGuard<'_, HashMap<Place, AbortHandle>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn listen(at: SocketAddr, ipv6_only: bool) -> io::Result<TcpListener> {
    let socket = match at {
        SocketAddr::V4(_) => TcpSocket::new_v4()?,
        SocketAddr::V6(_) => TcpSocket::new_v6()?,
    };
    socket.set_reuseaddr(true)?;
    if at.is_ipv6() {
        setsockopt(&socket, sockopt::Ipv6V6Only, &ipv6_only)?;
    }
    socket.bind(at)?;
    socket.listen(BACKLOG)
}

/// Where the server is found in the guest.
fn inside(at: SocketAddr) -> SocketAddr {
    let ip = match at.ip() {
        IpAddr::V4(Ipv4Addr::UNSPECIFIED) => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(Ipv6Addr::UNSPECIFIED) => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, at.port())
}

async fn serve(vm: &Arc<Vm>, listener: &TcpListener, server: SocketAddr) -> io::Result<()> {
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = vm.ended() => return Ok(()),
        };
        match accepted {
            Ok((connection, _)) => {
                let vm = vm.clone();
                tokio::spawn(async move {
                    if let Err(error) = hand_on(&vm, connection, server).await {
                        log::info!("a connection to {server} of the guest fails: {error}");
                    }
                });
            }
            // The client has gone already.
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
            Err(error) => return Err(error),
        }
    }
}

async fn hand_on(vm: &Vm, connection: TcpStream, server: SocketAddr) -> Result<(), Refused> {
    connection.set_nodelay(true)?;
    let port = expect(vm, &connection.into_std()?.into()).await?;
    let request =
        api::ConnectTcpRequest { stream: port.0, to: Some(endpoint(server)).into(), ..Default::default() };
    let deadline = Instant::now() + LIMIT;
    if let Err(error) = vm.agent().connect_tcp(&request, deadline).await {
        vm.forget(port, deadline).await;
        return Err(error.into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn both_families_can_have_a_listener_of_the_same_port() {
        let v4 = listen("0.0.0.0:0".parse().unwrap(), false).unwrap();
        let port = v4.local_addr().unwrap().port();
        let v6 = SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), port);
        assert_eq!(listen(v6, false).unwrap_err().raw_os_error(), Some(libc::EADDRINUSE));
        listen(v6, true).unwrap();
    }

    #[test]
    fn a_server_at_any_address_is_found_at_the_loopback() {
        let found = |at: &str| inside(at.parse().unwrap()).to_string();
        assert_eq!(found("0.0.0.0:80"), "127.0.0.1:80");
        assert_eq!(found("[::]:80"), "[::1]:80");
        assert_eq!(found("10.1.2.3:80"), "10.1.2.3:80");
    }
}
