//! The lines of a file, one at a time, with their place.
//!
//! Owns: finding line ends, the limit of a line, the byte-order mark. Refuses to know: what a line says.
//!
//! `LN-1`: however long a line or a file is, at most one line within the limit and one chunk are in memory.

use std::path::Path;

use super::DataError;
use crate::store::{LocalStore, ReadAt, Store};
use crate::types::{as_u64, as_usize};

/// The longest line that is read.
pub(super) const MAX_LINE_BYTES: u64 = 64 << 20;
/// Bytes asked of the store at a time.
const CHUNK_BYTES: u64 = 1 << 20;
/// The byte-order mark of UTF-8, which some editors put first.
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// Opens a data file, which must not be empty.
pub(super) fn open(path: &Path) -> Result<Box<dyn ReadAt>, DataError> {
    let name = path.file_name().and_then(|name| name.to_str());
    let Some(name) = name else { return Err(DataError::NotAFile { path: path.display().to_string() }) };
    let file = LocalStore::new(path.parent().unwrap_or_else(|| Path::new(""))).open(name)?;
    if file.len_bytes() == 0 {
        return Err(DataError::Empty { path: path.display().to_string() });
    }
    Ok(file)
}

/// One line without its end.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Line {
    /// Counted from 1.
    pub(super) number: u64,
    /// Where it starts in the file.
    pub(super) offset_bytes: u64,
    /// Its bytes; absent when there are more than the limit.
    pub(super) bytes: Option<Vec<u8>>,
}

/// Reads a file line by line.
#[derive(Debug)]
pub(super) struct Lines {
    file: Box<dyn ReadAt>,
    limit_bytes: u64,
    /// Bytes read; those before `taken` are handed out, and the last is the one before `read_to` of the file.
    pending: Vec<u8>,
    taken: usize,
    read_to: u64,
    number: u64,
}

impl Lines {
    pub(super) fn new(file: Box<dyn ReadAt>, limit_bytes: u64) -> Self {
        Self { file, limit_bytes, pending: Vec::new(), taken: 0, read_to: 0, number: 0 }
    }

    /// The next line; none at the end of the file.
    pub(super) fn next(&mut self) -> Result<Option<Line>, DataError> {
        let offset_bytes = self.read_to - as_u64(self.rest().len());
        if offset_bytes == self.file.len_bytes() {
            return Ok(None);
        }
        self.number += 1;
        let mut too_long = false;
        let mut searched = 0;
        let len = loop {
            if let Some(found) = self.rest().iter().skip(searched).position(|&byte| byte == b'\n') {
                break searched + found + 1;
            }
            if as_u64(self.rest().len()) > self.limit_bytes {
                too_long = true;
                self.taken = self.pending.len();
            }
            searched = self.rest().len();
            if !self.read_chunk()? {
                break searched;
            }
        };
        let mut bytes = self.pending.get(self.taken..self.taken + len).unwrap_or_default();
        self.taken += len;
        bytes = bytes.strip_suffix(b"\n").unwrap_or(bytes);
        bytes = bytes.strip_suffix(b"\r").unwrap_or(bytes);
        if offset_bytes == 0 {
            bytes = bytes.strip_prefix(BYTE_ORDER_MARK).unwrap_or(bytes);
        }
        too_long |= as_u64(bytes.len()) > self.limit_bytes;
        let bytes = (!too_long).then(|| bytes.to_vec());
        Ok(Some(Line { number: self.number, offset_bytes, bytes }))
    }

    /// What is read and not handed out yet.
    fn rest(&self) -> &[u8] {
        self.pending.get(self.taken..).unwrap_or_default()
    }

    /// Reads on; false at the end of the file.
    fn read_chunk(&mut self) -> Result<bool, DataError> {
        self.pending.drain(..self.taken);
        self.taken = 0;
        let chunk = CHUNK_BYTES.min(self.file.len_bytes() - self.read_to);
        let old = self.pending.len();
        self.pending.resize(old + as_usize(chunk), 0);
        let room = self.pending.get_mut(old..).unwrap_or_default();
        self.file.read_exact_at(self.read_to, room)?;
        self.read_to += chunk;
        Ok(chunk > 0)
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::disallowed_methods, reason = "the tests write the files that they read")]

    use super::*;

    fn lines(content: &[u8], limit_bytes: u64) -> Vec<(u64, u64, Option<String>)> {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("a.jsonl");
        std::fs::write(&path, content).expect("written");
        let mut lines = Lines::new(open(&path).expect("a file"), limit_bytes);
        let mut found = Vec::new();
        while let Some(line) = lines.next().expect("a line") {
            let text = line.bytes.map(|bytes| String::from_utf8(bytes).expect("UTF-8"));
            found.push((line.number, line.offset_bytes, text));
        }
        found
    }

    fn some(text: &str) -> Option<String> {
        Some(text.to_owned())
    }

    #[test]
    fn ends_marks_and_places() {
        let found = lines(b"\xef\xbb\xbfab\r\n\nc\n", 10);
        assert_eq!(found, [(1, 0, some("ab")), (2, 7, some("")), (3, 8, some("c"))]);
        assert_eq!(lines(b"a\nb", 10), [(1, 0, some("a")), (2, 2, some("b"))]);
    }

    /// A line over the limit, also one over many chunks, is passed over and the next is read at its place.
    #[test]
    fn a_long_line_is_passed_over() {
        assert_eq!(lines(b"abc\nabcd\nx", 3), [(1, 0, some("abc")), (2, 4, None), (3, 9, some("x"))]);
        let mut content = vec![b'x'; 5 << 19];
        content.extend(b"\ny\n");
        assert_eq!(lines(&content, 3), [(1, 0, None), (2, (5 << 19) + 1, some("y"))]);
        assert_eq!(lines(&vec![b'x'; 3 << 20], 3), [(1, 0, None)]);
    }

    /// Lines that lie across the chunks of reading are whole.
    #[test]
    fn lines_across_chunks() {
        let text: String = (0..300_000).map(|i| format!("{i}\n")).collect();
        let found = lines(text.as_bytes(), 100);
        assert_eq!(found.len(), 300_000);
        assert!((0..).zip(&found).all(|(i, line)| line.2 == Some(format!("{i}"))));
    }

    #[test]
    fn an_empty_file_is_refused() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("a.jsonl");
        std::fs::write(&path, b"").expect("written");
        let message = open(&path).expect_err("empty").to_string();
        assert!(message.ends_with("a.jsonl: expected text, found an empty file"), "{message}");
        assert!(matches!(open(directory.path()), Err(DataError::Store(_))), "a directory");
    }
}
