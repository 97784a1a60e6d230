//! All sequences of a run, and batches of them.
//!
//! Owns: [`Dataset`], the two splits, counts, the digest. Reading is in `load`, cutting in `pack`.

use std::num::NonZeroU64;

use sha2::{Digest as _, Sha256};

use super::pack::Sequences;
use super::{BadLine, DataConfig, DataError, Tokenizer, load};
use crate::recipe::order::Order;

/// The target of a token that has none.
pub const IGNORED: u32 = u32::MAX;

/// Which part of the data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// What is trained on.
    Train,
    /// What is held out.
    Evaluation,
}

/// What became of one part of the data. `Display` gives it as a line for people.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SplitCounts {
    /// Records that were read, without the bad lines.
    pub records: u64,
    /// Records without any text, which were left out.
    pub empty_records: u64,
    /// Lines that could not be used and were skipped.
    pub bad_lines: u64,
    /// Records that were cut at the end of a sequence (without packing).
    pub truncated_records: u64,
    /// The tokens cut off them.
    pub truncated_tokens: u64,
    /// Records that were left out because no token to learn fits into a sequence (without packing).
    pub unlearnable_records: u64,
    /// Sequences.
    pub sequences: u64,
    /// Tokens of all sequences, without padding.
    pub tokens: u64,
    /// Tokens that count in the loss.
    pub targets: u64,
}

/// What became of the data.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Of the training files, without what is held out of them. Bad lines are counted here.
    pub train: SplitCounts,
    /// Of the evaluation.
    pub evaluation: SplitCounts,
}

impl std::fmt::Display for SplitCounts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { records, sequences, tokens, targets, .. } = self;
        write!(f, "{records} records, {sequences} sequences, {tokens} tokens, {targets} of them learned")?;
        for (count, what) in [
            (self.bad_lines, "bad lines skipped"),
            (self.empty_records, "empty records"),
            (self.truncated_records, "records truncated"),
            (self.unlearnable_records, "records with nothing to learn left out"),
        ] {
            if count > 0 {
                write!(f, ", {count} {what}")?;
            }
        }
        Ok(())
    }
}

/// Sequences side by side, row after row: `batch` rows of `sequence` tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// Token ids. A row that is shorter ends with padding, which is an ordinary id.
    pub ids: Vec<u32>,
    /// The token after each in its document, or [`IGNORED`]. A batch may have no target at all.
    pub targets: Vec<u32>,
    /// The first position of the row that each token attends to; the last is the token itself.
    pub starts: Vec<u32>,
    /// Rows.
    pub batch: usize,
    /// Tokens of a row.
    pub sequence: usize,
}

impl Batch {
    /// The number of targets that are not [`IGNORED`]: by which the sum of the losses is divided.
    #[must_use]
    pub fn target_count(&self) -> u64 {
        crate::types::as_u64(self.targets.iter().filter(|&&target| target != IGNORED).count())
    }
}

/// The data of a run in memory: 4 bytes a token and 16 bytes a document.
#[derive(Debug)]
pub struct Dataset {
    pub(super) train: Sequences,
    pub(super) evaluation: Sequences,
    pub(super) bad_lines: Vec<BadLine>,
    pad: u32,
    apart: bool,
    shuffle: bool,
}

impl Dataset {
    /// Reads, tokenizes and packs the data of `config`. It takes all processors while it tokenizes.
    ///
    /// # Errors
    /// [`DataError`]: a configuration that cannot work, a file that cannot be read, a bad line where these are fatal, no
    /// token to learn.
    pub fn load(config: &DataConfig, tokenizer: &Tokenizer) -> Result<Self, DataError> {
        config.validate()?;
        let mut dataset = Self {
            train: Sequences::new(config.sequence_length, config.packing),
            evaluation: Sequences::new(config.sequence_length, config.packing),
            bad_lines: Vec::new(),
            pad: tokenizer.eos().unwrap_or(0),
            apart: config.document_attention,
            shuffle: config.shuffle,
        };
        load::fill(&mut dataset, config, tokenizer)?;
        for (part, sequences, needed) in
            [("training", &dataset.train, true), ("evaluation", &dataset.evaluation, config.evaluates())]
        {
            if needed && sequences.counts.targets == 0 {
                let SplitCounts { records, bad_lines: skipped, .. } = sequences.counts;
                return Err(DataError::Nothing { part, records, skipped });
            }
        }
        Ok(dataset)
    }

    /// The number of sequences of a part; that of training is never 0.
    #[must_use]
    pub fn sequences(&self, split: Split) -> u64 {
        self.part(split).len()
    }

    /// What became of the data.
    #[must_use]
    pub fn counts(&self) -> Counts {
        let with_len = |sequences: &Sequences| SplitCounts { sequences: sequences.len(), ..sequences.counts };
        Counts { train: with_len(&self.train), evaluation: with_len(&self.evaluation) }
    }

    /// The first lines that were skipped, each with its place; [`SplitCounts::bad_lines`] counts them all.
    #[must_use]
    pub fn bad_lines(&self) -> &[BadLine] {
        &self.bad_lines
    }

    /// The order of training for a seed, by the configuration's `shuffle`.
    ///
    /// # Panics
    /// Never: a dataset has a sequence to train on.
    #[must_use]
    pub fn order(&self, seed: u64) -> Order {
        let len = NonZeroU64::new(self.train.len()).expect("load refuses data without a training sequence");
        if self.shuffle { Order::shuffled(seed, len) } else { Order::sequential(len) }
    }

    /// The largest token id of the data: it must be below the model's vocabulary size.
    #[must_use]
    pub fn largest_id(&self) -> u32 {
        self.train.largest_id().max(self.evaluation.largest_id()).unwrap_or(0).max(self.pad)
    }

    /// The sequences at `indices` of a part, as rows padded to the longest of them.
    ///
    /// # Panics
    /// When an index is not below [`Dataset::sequences`].
    #[must_use]
    pub fn batch(&self, split: Split, indices: &[u64]) -> Batch {
        self.part(split).batch(indices, self.pad, self.apart)
    }

    /// SHA-256 of all that [`Dataset::batch`] can give, as `sha256:<hex>`: a resumed run refuses data with another.
    #[must_use]
    pub fn digest(&self) -> String {
        let mut hash = Sha256::new();
        hash.update(b"weightcast-data-1\0");
        hash.update([u8::from(self.apart)]);
        hash.update(self.pad.to_le_bytes());
        for sequences in [&self.train, &self.evaluation] {
            sequences.digest(&mut hash);
        }
        let hex: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        format!("sha256:{hex}")
    }

    fn part(&self, split: Split) -> &Sequences {
        match split {
            Split::Train => &self.train,
            Split::Evaluation => &self.evaluation,
        }
    }
}
