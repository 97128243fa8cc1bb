//! Byte streams to the host.
//!
//! The guest dials ([`Dialer`]); in tests the host is a Unix socket. [`Stream`] is one stream, read and written by its
//! descriptor alone, so that vsock and Unix sockets are the same to everything above.

mod host;
mod stream;

pub use host::{Host, accept_from_host};
pub use stream::Stream;

use std::io;

/// A host that is never reached.
#[cfg(test)]
pub struct Nowhere;

#[cfg(test)]
#[async_trait::async_trait]
impl Dialer for Nowhere {
    async fn dial(&self, _: u32) -> io::Result<Stream> {
        Err(io::ErrorKind::ConnectionRefused.into())
    }
}

/// Opens streams to the host.
#[async_trait::async_trait]
pub trait Dialer: Send + Sync {
    /// Connects to a port of the host.
    async fn dial(&self, port: u32) -> io::Result<Stream>;
}
