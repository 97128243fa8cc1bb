//! Cuts a hostile byte stream into lines of bounded length.

/// Bytes kept of one line; the rest of it is dropped.
const MAX_LINE: usize = 1024;

/// Bytes of a line that has not ended yet.
#[derive(Debug, Default)]
pub struct LineBuffer(Vec<u8>);

impl LineBuffer {
    /// Takes more of the stream and hands each line that it completes to `line`, made printable.
    pub fn feed(&mut self, bytes: &[u8], mut line: impl FnMut(&str)) {
        for part in bytes.split_inclusive(|byte| *byte == b'\n') {
            let ends = part.last() == Some(&b'\n');
            let text = part.strip_suffix(b"\n").unwrap_or(part);
            let room = MAX_LINE.saturating_sub(self.0.len());
            self.0.extend(text.iter().take(room));
            if ends {
                let whole = String::from_utf8_lossy(&self.0);
                line(&super::printable(whole.trim_end_matches('\r')));
                self.0.clear();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn lines_are_put_together_over_reads() {
        let mut buffer = LineBuffer::default();
        let mut lines = Vec::new();
        for part in [&b"a"[..], b"b\nc\n", b"\n", b"d"] {
            buffer.feed(part, |line| lines.push(line.to_owned()));
        }
        assert_eq!(lines, ["ab", "c", ""]);
    }

    proptest! {
        #[test]
        fn memory_is_bounded(parts in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..900), 0..8)) {
            let mut buffer = LineBuffer::default();
            for part in &parts {
                buffer.feed(part, |line| assert!(line.len() <= MAX_LINE * 3));
                prop_assert!(buffer.0.len() <= MAX_LINE);
            }
        }
    }
}
