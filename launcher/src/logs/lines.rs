//! Cuts a stream of bytes into lines, in bounded memory.
//!
//! Owns: [`LineSplitter`] and [`Tail`]. Pure: no files, no terminal.
//! Invariant LG-1: at most [`LINE_LIMIT`] bytes are held back; a longer line is handed on in pieces.

use std::collections::VecDeque;

/// The longest line that is kept together, in bytes.
pub(crate) const LINE_LIMIT: usize = 8 * 1024;
/// Lines that a [`Tail`] keeps.
pub(crate) const TAIL_LINES: usize = 20;

/// Cuts at `\n`, `\r\n` and `\r` (progress bars).
#[derive(Debug, Default)]
pub(crate) struct LineSplitter {
    partial: Vec<u8>,
    after_return: bool,
}

impl LineSplitter {
    /// Takes the next bytes and hands on each complete line, without its end.
    pub(crate) fn push(&mut self, mut bytes: &[u8], mut emit: impl FnMut(&[u8])) {
        if std::mem::take(&mut self.after_return) {
            bytes = bytes.strip_prefix(b"\n").unwrap_or(bytes);
        }
        while let Some(position) = bytes.iter().position(|byte| matches!(byte, b'\n' | b'\r')) {
            let (line, rest) = bytes.split_at(position);
            let is_return = rest.first() == Some(&b'\r');
            let is_blank = line.is_empty() && self.partial.is_empty();
            // A bar that starts with a return does not mean an empty line; an empty line may still end in \r\n.
            if !(is_return && is_blank) {
                self.hold(line, &mut emit);
                emit(&self.partial);
                self.partial.clear();
            }
            bytes = rest.get(1..).unwrap_or_default();
            if is_return && !is_blank {
                self.after_return = bytes.is_empty();
                bytes = bytes.strip_prefix(b"\n").unwrap_or(bytes);
            }
        }
        self.hold(bytes, &mut emit);
    }

    /// Hands on what is left when the stream has ended.
    pub(crate) fn finish(&mut self, mut emit: impl FnMut(&[u8])) {
        if !self.partial.is_empty() {
            emit(&self.partial);
            self.partial.clear();
        }
    }

    fn hold(&mut self, mut bytes: &[u8], emit: &mut impl FnMut(&[u8])) {
        while self.partial.len() + bytes.len() > LINE_LIMIT {
            let (head, rest) = bytes.split_at(LINE_LIMIT - self.partial.len());
            self.partial.extend_from_slice(head);
            emit(&self.partial);
            self.partial.clear();
            bytes = rest;
        }
        self.partial.extend_from_slice(bytes);
    }
}

/// The last lines of a stream.
#[derive(Debug, Default)]
pub(crate) struct Tail(VecDeque<Vec<u8>>);

impl Tail {
    /// Appends a line and forgets the oldest beyond the limit.
    pub(crate) fn push(&mut self, line: &[u8]) {
        // A bounded deque that reuses its oldest buffer allocates nothing in the long run.
        let mut buffer = if self.0.len() >= TAIL_LINES { self.0.pop_front().unwrap_or_default() } else { Vec::new() };
        buffer.clear();
        buffer.extend_from_slice(line);
        self.0.push_back(buffer);
    }

    /// The lines, oldest first, as text.
    pub(crate) fn lines(&self) -> Vec<String> {
        self.0.iter().map(|line| String::from_utf8_lossy(line).into_owned()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(chunks: &[&str], expected: &[&str]) {
        let (mut splitter, mut lines) = (LineSplitter::default(), Vec::new());
        let mut keep = |line: &[u8]| lines.push(String::from_utf8_lossy(line).into_owned());
        for chunk in chunks {
            splitter.push(chunk.as_bytes(), &mut keep);
        }
        splitter.finish(&mut keep);
        assert_eq!(lines, expected, "{chunks:?}");
    }

    #[test]
    fn lines_end_at_newlines_and_returns() {
        check(&["a\nb", "c\n", "d"], &["a", "bc", "d"]);
        check(&["a\r\nb\r", "\nc\n"], &["a", "b", "c"]);
        check(&["\r10%\r20%\r30%\n"], &["10%", "20%", "30%"]);
        check(&["a\n\nb\n"], &["a", "", "b"]);
        check(&["a\r\n\r\nb"], &["a", "", "b"]);
    }

    #[test]
    fn a_long_line_comes_in_pieces() {
        let long = "x".repeat(LINE_LIMIT * 2 + 5);
        let piece = "x".repeat(LINE_LIMIT);
        check(&[&long, "y\n"], &[&piece, &piece, "xxxxxy"]);
    }

    #[test]
    fn a_tail_keeps_the_last_twenty() {
        let mut tail = Tail::default();
        (0..25).for_each(|n| tail.push(format!("{n}").as_bytes()));
        assert_eq!(tail.lines(), (5..25).map(|n| n.to_string()).collect::<Vec<_>>());
    }
}
