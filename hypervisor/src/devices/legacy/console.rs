//! The last lines of the guest's console, kept for whoever asks why it died.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex};

use vmshim_protocol::control::{MAX_CONSOLE_LINE, MAX_CONSOLE_LINES};

use crate::sync::lock;

/// A ring of lines, bounded in both directions whatever the guest writes. Clones are the same ring.
#[derive(Debug, Clone, Default)]
pub struct Console(Arc<Mutex<Ring>>);

#[derive(Debug, Default)]
struct Ring {
    lines: VecDeque<String>,
    /// The line that is being written.
    current: Vec<u8>,
}

impl Console {
    /// Adds what the guest has written.
    pub fn push(&self, bytes: &[u8]) {
        let mut ring = lock(&self.0);
        for &byte in bytes {
            ring.push(byte);
        }
    }

    /// The last lines, oldest first, with the unfinished one.
    pub fn lines(&self) -> Vec<String> {
        let mut ring = lock(&self.0);
        ring.finish_line();
        ring.lines.iter().cloned().collect()
    }
}

impl Ring {
    fn push(&mut self, byte: u8) {
        match byte {
            b'\n' => self.finish_line(),
            // What is beyond the bound is cut off.
            _ if self.current.len() == MAX_CONSOLE_LINE => {}
            b'\t' | b' '..=b'~' | 0x80.. => self.current.push(byte),
            // Carriage returns and escapes would garble the log that the line ends up in.
            _ => {}
        }
    }

    fn finish_line(&mut self) {
        if self.current.is_empty() {
            return;
        }
        let mut line = String::from_utf8_lossy(&self.current).into_owned();
        self.current.clear();
        // A replacement character is longer than the byte it stands for.
        line.truncate(line.floor_char_boundary(MAX_CONSOLE_LINE));
        if self.lines.len() == MAX_CONSOLE_LINES {
            self.lines.pop_front();
        }
        self.lines.push_back(line);
    }
}

impl io::Write for Console {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.push(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn lines_are_kept_without_control_characters() {
        let console = Console::default();
        console.push(b"one\r\n\n\x1b[31mtwo\r\nthr");
        console.push(b"ee");
        assert_eq!(console.lines(), ["one", "[31mtwo", "three"]);
    }

    #[test]
    fn the_oldest_lines_go_first() {
        let console = Console::default();
        for line in 0..=MAX_CONSOLE_LINES {
            console.push(format!("{line}\n").as_bytes());
        }
        let lines = console.lines();
        assert_eq!(lines.len(), MAX_CONSOLE_LINES);
        assert_eq!(lines[0], "1");
    }

    proptest! {
        #[test]
        fn whatever_is_written_stays_bounded(bytes in proptest::collection::vec(any::<u8>(), 0..20_000)) {
            let console = Console::default();
            console.push(&bytes);
            let lines = console.lines();
            prop_assert!(lines.len() <= MAX_CONSOLE_LINES);
            prop_assert!(lines.iter().all(|line| line.len() <= MAX_CONSOLE_LINE));
        }
    }
}
