//! Documents into sequences, as views of one flat array of tokens.
//!
//! Owns: [`Sequences`]: where documents and sequences begin, which token is the target of which.
//! Refuses to know: files, text, the order of training.
//!
//! Invariants:
//! - `PK-1`: packed, the sequences one after another are the documents one after another: no token is lost or doubled.
//! - `PK-2`: a target is the token that follows in the same document, also when that one begins the next sequence; the
//!   last token of a document, and one before a token of the prompt, have none.
//!
//! Four bytes a token are kept; targets and starts are derived when a batch is made.

use sha2::{Digest as _, Sha256};

use super::{Batch, IGNORED, SplitCounts};
use crate::types::{as_u64, as_usize};

/// Where a document lies in the array.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Document {
    start: usize,
    /// The first token that is a target; past the document's end when none is.
    learned_from: usize,
}

/// Token sequences of at most `length` tokens.
#[derive(Debug)]
pub(super) struct Sequences {
    length: usize,
    packed: bool,
    ids: Vec<u32>,
    documents: Vec<Document>,
    pub(super) counts: SplitCounts,
}

impl Sequences {
    pub(super) fn new(length: u32, packed: bool) -> Self {
        let length = as_usize(u64::from(length));
        Self { length, packed, ids: Vec::new(), documents: Vec::new(), counts: SplitCounts::default() }
    }

    /// Adds a document whose first `masked` tokens are no targets. Not packed, what does not fit is cut off and counted;
    /// a document of which nothing would be learned is left out and counted.
    pub(super) fn push(&mut self, tokens: &[u32], masked: usize) {
        let mut kept = tokens;
        if !self.packed && tokens.len() > self.length {
            self.counts.truncated_records += 1;
            self.counts.truncated_tokens += as_u64(tokens.len() - self.length);
            // One token more is kept: it is the target of the last.
            kept = tokens.get(..=self.length).unwrap_or(tokens);
        }
        let first_target = masked.max(1);
        let targets = kept.len().saturating_sub(first_target);
        if targets == 0 && !self.packed {
            self.counts.unlearnable_records += 1;
            return;
        }
        let start = self.ids.len();
        self.documents.push(Document { start, learned_from: start + first_target });
        self.ids.extend_from_slice(kept);
        self.counts.targets += as_u64(targets);
        self.counts.tokens += as_u64(if self.packed { kept.len() } else { kept.len().min(self.length) });
    }

    /// Adds a text in which everything is learned. Not packed, it is cut into as many sequences as it fills.
    pub(super) fn push_text(&mut self, tokens: &[u32]) {
        if self.packed {
            return self.push(tokens, 0);
        }
        for start in (0..tokens.len()).step_by(self.length) {
            let end = tokens.len().min(start + self.length);
            let piece = tokens.get(start..tokens.len().min(end + 1)).unwrap_or_default();
            let (truncated, cut) = (self.counts.truncated_records, self.counts.truncated_tokens);
            self.push(piece, 0);
            // The token over the end is there as a target only: nothing was cut off.
            (self.counts.truncated_records, self.counts.truncated_tokens) = (truncated, cut);
        }
    }

    /// The number of sequences.
    pub(super) fn len(&self) -> u64 {
        as_u64(if self.packed { self.ids.len().div_ceil(self.length) } else { self.documents.len() })
    }

    /// Feeds what determines every sequence to a hash.
    pub(super) fn digest(&self, hash: &mut Sha256) {
        let words = [as_u64(self.length), u64::from(self.packed), as_u64(self.ids.len()), as_u64(self.documents.len())];
        words.iter().for_each(|word| hash.update(word.to_le_bytes()));
        for ids in self.ids.chunks(4096) {
            let bytes: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
            hash.update(&bytes);
        }
        for document in &self.documents {
            hash.update(as_u64(document.start).to_le_bytes());
            hash.update(as_u64(document.learned_from).to_le_bytes());
        }
    }

    /// The largest id.
    pub(super) fn largest_id(&self) -> Option<u32> {
        self.ids.iter().copied().max()
    }

    /// Where a sequence lies in the array.
    ///
    /// # Panics
    /// When there is no such sequence.
    fn window(&self, index: u64) -> (usize, usize) {
        assert!(index < self.len(), "sequence {index} of {}", self.len());
        let index = as_usize(index);
        if self.packed {
            let start = index * self.length;
            return (start, self.ids.len().min(start + self.length));
        }
        let start = self.documents[index].start;
        (start, self.end(index).min(start + self.length))
    }

    /// The end of a document.
    fn end(&self, document: usize) -> usize {
        self.documents.get(document + 1).map_or(self.ids.len(), |next| next.start)
    }

    /// The sequences at `indices` as rows, each padded to the longest with `pad`. With `apart`, a token attends only to
    /// its own document.
    pub(super) fn batch(&self, indices: &[u64], pad: u32, apart: bool) -> Batch {
        let windows: Vec<(usize, usize)> = indices.iter().map(|&index| self.window(index)).collect();
        let sequence = windows.iter().map(|(start, end)| end - start).max().unwrap_or(0);
        let room = windows.len() * sequence;
        let mut batch = Batch {
            ids: Vec::with_capacity(room),
            targets: Vec::with_capacity(room),
            starts: Vec::with_capacity(room),
            batch: windows.len(),
            sequence,
        };
        for window in windows {
            self.push_row(&mut batch, window, apart);
            let len = window.1 - window.0;
            for position in len..sequence {
                batch.ids.push(pad);
                batch.targets.push(IGNORED);
                // Padding sees itself alone, so that its softmax has something to sum over.
                batch.starts.push(position_of(position));
            }
        }
        batch
    }

    /// Appends the tokens of a window.
    fn push_row(&self, batch: &mut Batch, (start, end): (usize, usize), apart: bool) {
        batch.ids.extend_from_slice(&self.ids[start..end]);
        let mut document = self.documents.partition_point(|document| document.start <= start) - 1;
        let mut position = start;
        while position < end {
            let Document { start: document_start, learned_from } = self.documents[document];
            let document_end = self.end(document);
            let first_seen = if apart { position_of(document_start.saturating_sub(start)) } else { 0 };
            for token in position..document_end.min(end) {
                let next = token + 1;
                let learned = next < document_end && next >= learned_from;
                batch.targets.push(if learned { self.ids[next] } else { IGNORED });
                batch.starts.push(first_seen);
            }
            position = document_end;
            document += 1;
        }
    }
}

/// A position in a sequence, whose length is a `u32`.
fn position_of(position: usize) -> u32 {
    u32::try_from(position).expect("a position below the sequence length")
}
