//! TCP between two pods: a server that swallows or echoes, and its clients.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::{MIB, megabytes_a_second};

/// What a client asks for by its first byte: to be told how much came, or to get each byte back.
const SWALLOW: u8 = b's';
const ECHO: u8 = b'e';

/// What is written and read in one piece.
const PIECE: usize = MIB / 8;

/// Round trips before those that count: the first ones find out who the neighbour is.
const WARM_UP: usize = 20;

/// How long a server may take to listen once its container has started.
const LISTENS_WITHIN: Duration = Duration::from_secs(10);

/// Serves clients on all addresses until it is killed.
///
/// # Errors
/// When the port can't be had.
pub fn serve(port: u16) -> Result<()> {
    let listener = TcpListener::bind(("0.0.0.0", port))?;
    for client in listener.incoming() {
        let client = client?;
        thread::spawn(move || answer(client).inspect_err(|error| eprintln!("bench-load: {error:#}")));
    }
    Ok(())
}

fn answer(mut client: TcpStream) -> Result<()> {
    let mut wish = [0];
    client.read_exact(&mut wish)?;
    match wish[0] {
        SWALLOW => swallow(client),
        ECHO => echo(client),
        other => bail!("no wish is {other}"),
    }
}

fn swallow(mut client: TcpStream) -> Result<()> {
    let (mut buffer, mut received) = (vec![0; PIECE], 0);
    loop {
        match client.read(&mut buffer)? {
            0 => break,
            length => received += length as u64,
        }
    }
    Ok(client.write_all(&received.to_be_bytes())?)
}

fn echo(mut client: TcpStream) -> Result<()> {
    client.set_nodelay(true)?;
    let mut byte = [0];
    while client.read(&mut byte)? > 0 {
        client.write_all(&byte)?;
    }
    Ok(())
}

/// MB/s of one stream, from the first byte until the server has said that it has the last.
///
/// # Errors
/// When the server can't be reached, or has got another number of bytes.
pub fn throughput(server: SocketAddr, bytes: u64) -> Result<f64> {
    let mut stream = connect(server)?;
    stream.write_all(&[SWALLOW])?;
    let piece = vec![b'x'; PIECE];
    let started = Instant::now();
    let mut left = bytes;
    while left > 0 {
        let length = usize::try_from(left).unwrap_or(usize::MAX).min(PIECE);
        stream.write_all(&piece[..length])?;
        left -= length as u64;
    }
    stream.shutdown(std::net::Shutdown::Write)?;
    let mut received = [0; 8];
    stream.read_exact(&mut received)?;
    let elapsed = started.elapsed();
    let received = u64::from_be_bytes(received);
    ensure!(received == bytes, "{received} of {bytes} bytes arrived");
    Ok(megabytes_a_second(bytes, elapsed))
}

/// The median of `count` round trips of one byte, in microseconds.
///
/// # Errors
/// When the server can't be reached.
pub fn round_trip(server: SocketAddr, count: usize) -> Result<f64> {
    let mut stream = connect(server)?;
    stream.set_nodelay(true)?;
    stream.write_all(&[ECHO])?;
    let mut times = Vec::with_capacity(WARM_UP + count);
    let mut byte = [b'x'];
    for _ in 0..WARM_UP + count {
        let started = Instant::now();
        stream.write_all(&byte)?;
        stream.read_exact(&mut byte)?;
        times.push(started.elapsed());
    }
    let counted = &mut times[WARM_UP..];
    counted.sort_unstable();
    let median = counted.get(count / 2).context("no round trip is to be counted")?;
    Ok(median.as_secs_f64() * 1e6)
}

/// Nobody tells a client when the server in the other pod listens.
fn connect(server: SocketAddr) -> Result<TcpStream> {
    let started = Instant::now();
    loop {
        match TcpStream::connect(server) {
            Err(error)
                if error.kind() == ErrorKind::ConnectionRefused && started.elapsed() < LISTENS_WITHIN =>
            {
                thread::sleep(Duration::from_millis(10));
            }
            done => return done.with_context(|| format!("cannot connect to {server}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn server() -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        thread::spawn(move || {
            for client in listener.incoming() {
                let _ = answer(client.unwrap());
            }
        });
        address
    }

    #[test]
    fn a_stream_arrives_and_bytes_come_back() {
        let server = server();
        assert!(throughput(server, (3 << 20) + 1).unwrap() > 0.0);
        assert!(round_trip(server, 5).unwrap() > 0.0);
    }

    #[test]
    fn what_nobody_offers_is_no_answer() {
        let mut client = TcpStream::connect(server()).unwrap();
        client.write_all(b"?").unwrap();
        assert_eq!(client.read(&mut [0]).unwrap(), 0);
        assert!(round_trip(server(), 0).is_err());
    }
}
