//! Servers of the host in the pod's network namespace.
//!
//! With runc, the pod's processes reach whoever listens in their network namespace. Here the guest has the namespace's
//! addresses, so to its kernel such a server is one of its own, and nobody listens there. The agent therefore does so in
//! its stead, and the shim makes each connection in the namespace. To the pod the port is taken, as it is with runc. A
//! namespace hardly ever has such servers, and then none of this is done; those that begin to listen after the pod has
//! been set up are not seen.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use tokio::net::TcpSocket;

use super::netns::Netns;

/// So many are followed; who has more of them has no use for a guest.
const MOST: usize = 64;

/// `TCP_LISTEN`, as the tables of /proc write it.
const LISTENING: &str = "0A";

/// The servers of a namespace. Clones are of the same.
#[derive(Clone, Default)]
pub struct Servers(Option<Arc<Inside>>);

struct Inside {
    netns: Netns,
    at: Vec<SocketAddr>,
}

impl Servers {
    /// Those at some addresses of the namespace, which is kept only where there are any.
    pub fn new(netns: Netns, at: Vec<SocketAddr>) -> Self {
        Self((!at.is_empty()).then(|| Arc::new(Inside { netns, at })))
    }

    /// Where they listen.
    pub fn at(&self) -> &[SocketAddr] {
        self.0.as_ref().map_or(&[], |inside| &inside.at)
    }

    /// Whether one takes connections to an address.
    pub fn have(&self, to: SocketAddr) -> bool {
        self.at().iter().any(|at| {
            let every = at.ip().is_unspecified() && at.is_ipv4() == to.is_ipv4();
            at.port() == to.port() && (every || at.ip() == to.ip())
        })
    }

    /// A socket of the namespace.
    ///
    /// # Errors
    /// When the namespace has no server, or the host no descriptors left.
    pub async fn socket(&self, make: fn() -> io::Result<TcpSocket>) -> io::Result<TcpSocket> {
        let inside = self.0.clone().ok_or(io::ErrorKind::NotFound)?;
        let made = tokio::task::spawn_blocking(move || inside.netns.run(make)).await;
        made.map_err(io::Error::other)?.map_err(io::Error::other)?
    }
}

/// Who listens in the network namespace of this thread.
///
/// # Errors
/// When /proc cannot be read.
pub fn scan() -> io::Result<Vec<SocketAddr>> {
    let mut found = BTreeSet::new();
    for table in ["tcp", "tcp6"] {
        match fs::read_to_string(format!("/proc/thread-self/net/{table}")) {
            Ok(text) => found.extend(text.lines().filter_map(listener)),
            // A kernel without IPv6.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    let both = found.iter().filter(|at| at.ip() == IpAddr::from(Ipv6Addr::UNSPECIFIED));
    let v4: Vec<_> = both.map(|at| SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), at.port())).collect();
    found.extend(v4);
    Ok(found.into_iter().take(MOST).collect())
}

/// The address of a line like `0: 0100007F:0050 00000000:0000 0A …`, if its socket listens. Each 32 bits are a number as
/// the machine would read them.
fn listener(line: &str) -> Option<SocketAddr> {
    let mut fields = line.split_ascii_whitespace().skip(1);
    let (ip, port) = fields.next()?.split_once(':')?;
    fields.nth(1).filter(|state| *state == LISTENING)?;
    let mut octets = Vec::new();
    for at in (0..ip.len()).step_by(8) {
        let word = u32::from_str_radix(ip.get(at..at + 8)?, 16).ok()?;
        octets.extend(word.to_ne_bytes());
    }
    let port = u16::from_str_radix(port, 16).ok()?;
    Some(SocketAddr::new(vmshim_protocol::address::ip(&octets)?.to_canonical(), port))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::net::TcpListener;
    use std::path::Path;

    fn servers(at: &[&str]) -> Servers {
        let netns = Netns::open(Path::new("/proc/self/ns/net")).unwrap();
        Servers::new(netns, at.iter().map(|at| at.parse().unwrap()).collect())
    }

    #[test]
    fn who_listens_is_found() {
        let v4 = TcpListener::bind("127.0.0.1:0").unwrap();
        let at = v4.local_addr().unwrap();
        assert!(scan().unwrap().len() == MOST || scan().unwrap().contains(&at));
    }

    #[test]
    fn a_line_of_the_kernels_tables_is_read() {
        let v4 = "  0: 0101F40A:23E7 00000000:0000 0A 00000000:00000000 00:00000000 00000000 0 0 9 1";
        assert_eq!(listener(v4), Some("10.244.1.1:9191".parse().unwrap()));
        let v6 = "1: 000080FE000000000000000001000000:0050 00000000000000000000000000000000:0000 0A 0:0";
        assert_eq!(listener(v6), Some("[fe80::1]:80".parse().unwrap()));
        for other in ["  sl  local_address rem_address   st", "", &v4.replace(" 0A ", " 01 ")] {
            assert_eq!(listener(other), None);
        }
    }

    #[test]
    fn a_server_takes_connections_to_its_address() {
        let servers = servers(&["10.0.0.1:80", "0.0.0.0:81", "[::1]:82"]);
        let have = |to: &str| servers.have(to.parse().unwrap());
        assert!(have("10.0.0.1:80") && have("1.2.3.4:81") && have("[::1]:82"));
        assert!(!have("10.0.0.2:80") && !have("[::1]:81") && !have("[::2]:82") && !have("10.0.0.1:82"));
    }

    #[tokio::test]
    async fn a_namespace_without_servers_is_not_kept() {
        let none = servers(&[]);
        assert!(none.0.is_none() && none.at().is_empty());
        assert!(none.socket(TcpSocket::new_v4).await.is_err());
    }

    proptest! {
        #[test]
        fn any_line_is_read(line in ".{0,200}") {
            let _ = listener(&line);
        }
    }
}
