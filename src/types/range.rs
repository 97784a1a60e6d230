//! Half-open ranges of bytes (or of any other unit counted from 0).

use std::fmt;

use serde::{Deserialize, Serialize};

/// The bytes from `start` up to, not including, `end`; `start <= end` always.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "[u64; 2]", try_from = "[u64; 2]")]
pub struct ByteRange {
    start: u64,
    end: u64,
}

impl ByteRange {
    /// The range `start..end`, or nothing when `end < start`.
    #[must_use]
    pub const fn new(start: u64, end: u64) -> Option<Self> {
        if start <= end { Some(Self { start, end }) } else { None }
    }

    /// `len` bytes from `start`, or nothing when the end does not fit 64 bits.
    #[must_use]
    pub const fn with_len(start: u64, len: u64) -> Option<Self> {
        match start.checked_add(len) {
            Some(end) => Some(Self { start, end }),
            None => None,
        }
    }

    /// The first byte.
    #[must_use]
    pub const fn start(self) -> u64 {
        self.start
    }

    /// One past the last byte.
    #[must_use]
    pub const fn end(self) -> u64 {
        self.end
    }

    /// The number of bytes.
    #[must_use]
    pub const fn len(self) -> u64 {
        self.end - self.start
    }

    /// Whether there is no byte in it.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.start == self.end
    }

    /// The bytes in both, or nothing when they do not meet.
    #[must_use]
    pub fn intersect(self, other: Self) -> Option<Self> {
        Self::new(self.start.max(other.start), self.end.min(other.end)).filter(|both| !both.is_empty())
    }
}

impl From<ByteRange> for [u64; 2] {
    fn from(range: ByteRange) -> Self {
        [range.start, range.end]
    }
}

impl TryFrom<[u64; 2]> for ByteRange {
    type Error = String;

    fn try_from([start, end]: [u64; 2]) -> Result<Self, String> {
        Self::new(start, end).ok_or_else(|| format!("range ends at {end}, before its start {start}"))
    }
}

impl fmt::Display for ByteRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}..{}", self.start, self.end)
    }
}
