//! Datagrams on a stream: each behind its length in two bytes, big-endian.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// The longest datagram that a stream can carry, which is longer than any of UDP.
pub const LONGEST: usize = 65_535;

/// Reads the next datagram into `buffer`. Not to be dropped half-way and called again.
///
/// # Errors
/// `UnexpectedEof` at the stream's end, also where it comes within a datagram.
pub async fn read(stream: &mut (impl AsyncRead + Unpin), buffer: &mut Vec<u8>) -> io::Result<()> {
    let length = stream.read_u16().await?;
    buffer.resize(length.into(), 0);
    stream.read_exact(buffer).await.map(drop)
}

/// Writes a datagram. Not to be dropped half-way and called again.
///
/// # Errors
/// The stream's, or where the datagram is too long.
pub async fn write(stream: &mut (impl AsyncWrite + Unpin), datagram: &[u8]) -> io::Result<()> {
    let length = u16::try_from(datagram.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let framed = [&length.to_be_bytes()[..], datagram].concat();
    stream.write_all(&framed).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn datagrams_keep_their_bounds() {
        let (mut a, mut b) = tokio::io::duplex(1 << 18);
        let sent: [&[u8]; 4] = [b"one", b"", &[7; LONGEST], b"x"];
        for datagram in sent {
            write(&mut a, datagram).await.unwrap();
        }
        assert!(write(&mut a, &[0; LONGEST + 1]).await.is_err());
        drop(a);
        let mut buffer = Vec::new();
        for datagram in sent {
            read(&mut b, &mut buffer).await.unwrap();
            assert_eq!(buffer, datagram);
        }
        assert_eq!(read(&mut b, &mut buffer).await.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }
}
