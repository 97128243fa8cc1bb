//! TCP connections of containers to what may be on the host, or in the pod's network namespace.
//!
//! The guest's kernel completes them with the agent before the host has been asked, so what the host refuses is reset
//! rather than refused.

use super::canonical;
use crate::dials::Dials;
use crate::events::Events;
use nix::sys::socket::{setsockopt, sockopt};
use std::io;
use std::sync::Arc;
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

/// At a time; further ones wait.
const MOST: usize = 512;

/// Of these, as many wait for the host at a time; it refuses to follow more than twice as many.
const MOST_ASKED: usize = 128;

/// How many more connections there may be.
pub struct Bounds {
    free: Arc<Semaphore>,
    asked: Semaphore,
}

impl Default for Bounds {
    fn default() -> Self {
        Self { free: Arc::new(Semaphore::new(MOST)), asked: Semaphore::new(MOST_ASKED) }
    }
}

/// Takes in connections for as long as the guest lives.
pub async fn serve(
    listener: TcpListener,
    bounds: Arc<Bounds>,
    events: Arc<Events>,
    dials: Arc<Dials>,
) -> io::Result<()> {
    while let Ok(permit) = bounds.free.clone().acquire_owned().await {
        let connection = match listener.accept().await {
            Ok((connection, _)) => connection,
            // The client has gone already.
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => continue,
            Err(error) => return Err(error),
        };
        let (events, dials, bounds) = (events.clone(), dials.clone(), bounds.clone());
        tokio::spawn(async move {
            // Whatever ends it, both sides see their connection closed.
            let _ = carry(connection, &events, &dials, &bounds.asked).await;
            drop(permit);
        });
    }
    Ok(())
}

async fn carry(
    mut connection: TcpStream,
    events: &Events,
    dials: &Dials,
    asked: &Semaphore,
) -> io::Result<()> {
    let to = canonical(connection.local_addr()?);
    let turn = asked.acquire().await.map_err(io::Error::other)?;
    let host = dials.request(|number| events.host_dialled(number, to, false)).await;
    drop(turn);
    match host {
        Some(mut host) => copy_bidirectional(&mut connection, &mut host).await.map(drop),
        None => reset(&connection),
    }
}

/// Has the connection reset when it is closed.
fn reset(connection: &TcpStream) -> io::Result<()> {
    let at_once = libc::linger { l_onoff: 1, l_linger: 0 };
    Ok(setsockopt(connection, sockopt::Linger, &at_once)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::link::Nowhere;
    use tokio::io::AsyncReadExt;

    #[tokio::test]
    async fn what_the_host_refuses_is_reset() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let dials = Arc::<Dials>::default();
        tokio::spawn(serve(listener, Arc::default(), Arc::default(), dials.clone()));
        let mut client = TcpStream::connect(address).await.unwrap();
        while dials.waiting() == 0 {
            tokio::task::yield_now().await;
        }
        dials.answer(1, 0, &Nowhere).await.unwrap();
        let error = client.read(&mut [0]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    }
}
