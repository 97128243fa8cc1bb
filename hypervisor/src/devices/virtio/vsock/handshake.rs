//! What a host program says first on the hybrid Unix socket: `CONNECT <port>\n`.
//!
//! The line comes in pieces of any size; what follows it belongs to the stream and is never touched here. Whoever may
//! open the socket is trusted with the guest, but not to be correct.

/// Bytes of the longest line, its end included.
pub const MAX_LINE: usize = 32;

/// Why a line is refused. The client is told nothing: the protocol closes the socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HandshakeError {
    /// More than [`MAX_LINE`] bytes without an end.
    #[error("the line is too long")]
    TooLong,
    /// Not `CONNECT` and a port.
    #[error("the line is not CONNECT and a port")]
    Malformed,
}

/// What is known after some bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// All bytes belong to the line, and it goes on.
    Incomplete,
    /// The line is complete.
    Complete {
        /// The guest's port.
        port: u32,
        /// How many of the bytes given last belong to the line.
        taken: usize,
    },
}

/// A line under construction.
#[derive(Debug, Default)]
pub struct Handshake {
    line: [u8; MAX_LINE],
    len: usize,
}

impl Handshake {
    /// Bytes that may still come before the line is too long; never 0.
    pub fn room(&self) -> usize {
        MAX_LINE - self.len
    }

    /// Takes more bytes.
    ///
    /// # Errors
    /// The line will never be right.
    pub fn feed(&mut self, bytes: &[u8]) -> Result<Progress, HandshakeError> {
        let end = bytes.iter().position(|&byte| byte == b'\n');
        let taken = end.map_or(bytes.len(), |end| end + 1);
        let Some(free) = self.line.get_mut(self.len..self.len + taken) else {
            return Err(HandshakeError::TooLong);
        };
        free.copy_from_slice(&bytes[..taken]);
        self.len += taken;
        match end {
            Some(_) => parse(&self.line[..self.len - 1]).map(|port| Progress::Complete { port, taken }),
            None if self.len == MAX_LINE => Err(HandshakeError::TooLong),
            None => Ok(Progress::Incomplete),
        }
    }
}

fn parse(line: &[u8]) -> Result<u32, HandshakeError> {
    let line = std::str::from_utf8(line).map_err(|_| HandshakeError::Malformed)?;
    let mut words = line.split_ascii_whitespace();
    let (Some(verb), Some(port), None) = (words.next(), words.next(), words.next()) else {
        return Err(HandshakeError::Malformed);
    };
    let decimal = port.bytes().all(|byte| byte.is_ascii_digit());
    if !verb.eq_ignore_ascii_case("CONNECT") || !decimal {
        return Err(HandshakeError::Malformed);
    }
    port.parse().map_err(|_| HandshakeError::Malformed)
}

/// What the client is told once the guest has accepted.
pub fn acceptance(host_port: u32) -> String {
    format!("OK {host_port}\n")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn whole(line: &str) -> Result<Progress, HandshakeError> {
        Handshake::default().feed(line.as_bytes())
    }

    #[test]
    fn good_lines() {
        assert_eq!(whole("CONNECT 1024\n"), Ok(Progress::Complete { port: 1024, taken: 13 }));
        assert_eq!(whole("connect 4294967295\nrest"), Ok(Progress::Complete { port: u32::MAX, taken: 19 }));
        assert_eq!(whole("CoNnEcT  7 \r\n"), Ok(Progress::Complete { port: 7, taken: 13 }));
    }

    #[test]
    fn bad_lines() {
        for line in ["\n", "CONNECT\n", "CONNECT x\n", "CONNECT -1\n", "CONNECT +1\n", "CONNECT 4294967296\n"]
        {
            assert_eq!(whole(line), Err(HandshakeError::Malformed), "{line:?}");
        }
        for line in ["DISCONNECT 1\n", "CONNECT 1 2\n", "CONNECT\u{e9} 1\n", "CONNECT1\n"] {
            assert_eq!(whole(line), Err(HandshakeError::Malformed), "{line:?}");
        }
        assert_eq!(Handshake::default().feed(b"CONNECT \xff\n"), Err(HandshakeError::Malformed));
    }

    #[test]
    fn the_longest_line_has_32_bytes() {
        let longest = format!("CONNECT {:023}\n", 5);
        assert_eq!(longest.len(), MAX_LINE);
        assert_eq!(whole(&longest), Ok(Progress::Complete { port: 5, taken: 32 }));
        let longer = format!("CONNECT {:024}\n", 5);
        assert_eq!(whole(&longer), Err(HandshakeError::TooLong));
        assert_eq!(whole(&longer[..32]), Err(HandshakeError::TooLong));
    }

    proptest! {
        #[test]
        fn pieces_make_no_difference(port: u32, cuts in prop::collection::vec(1usize..5, 0..40), tail: Vec<u8>) {
            let mut bytes = format!("CONNECT {port}\n").into_bytes();
            let line = bytes.len();
            bytes.extend(tail);
            let mut handshake = Handshake::default();
            let mut at = 0;
            for cut in cuts.into_iter().chain(std::iter::repeat(4)) {
                let piece = &bytes[at..(at + cut).min(bytes.len())];
                match handshake.feed(piece).unwrap() {
                    Progress::Incomplete => at += piece.len(),
                    Progress::Complete { port: got, taken } => {
                        prop_assert_eq!(got, port);
                        prop_assert_eq!(at + taken, line);
                        break;
                    }
                }
            }
        }

        #[test]
        fn garbage_never_panics_and_always_ends(bytes: Vec<u8>) {
            let mut handshake = Handshake::default();
            for byte in bytes {
                prop_assert!(handshake.room() > 0);
                if handshake.feed(&[byte]) != Ok(Progress::Incomplete) {
                    break;
                }
            }
        }
    }
}
