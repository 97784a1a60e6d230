//! What goes into one forward: the tokens, and what all blocks need of them.

use std::sync::{Arc, OnceLock};

use candle_core::{Device, Tensor};

use super::NnError;
use crate::types::as_u64;

/// Sequences of token ids, each vector `[batch, seq]` row-major.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tokens {
    /// The ids.
    pub ids: Vec<u32>,
    /// For each token the one after it, or [`Tokens::IGNORED`] where there is nothing to learn.
    pub targets: Vec<u32>,
    /// For each token the first index within its row that it may attend to: where its document starts.
    pub starts: Vec<u32>,
    /// Rows.
    pub batch: usize,
    /// Tokens of a row.
    pub seq: usize,
}

impl Tokens {
    /// The target of a token that the loss does not count.
    pub const IGNORED: u32 = u32::MAX;

    /// That the vectors agree, ids and targets are below `vocab`, and no document starts after one of its tokens.
    pub(super) fn check(&self, vocab: usize) -> Result<(), NnError> {
        let rows = self.batch * self.seq;
        for (field, values) in [("ids", &self.ids), ("targets", &self.targets), ("starts", &self.starts)] {
            if values.len() != rows {
                let expected = format!("{} * {} values", self.batch, self.seq);
                return Err(NnError::Tokens { field, index: 0, expected, found: as_u64(values.len()) });
            }
        }
        let limit = u32::try_from(vocab).unwrap_or(u32::MAX);
        let bad = |field, index: usize, expected: String, found: u32| NnError::Tokens {
            field,
            index,
            expected,
            found: u64::from(found),
        };
        for (index, &id) in self.ids.iter().enumerate() {
            if id >= limit {
                return Err(bad("ids", index, format!("below {vocab}"), id));
            }
        }
        for (index, &target) in self.targets.iter().enumerate() {
            if target >= limit && target != Self::IGNORED {
                return Err(bad("targets", index, format!("below {vocab} or {}", Self::IGNORED), target));
            }
        }
        for (index, &start) in self.starts.iter().enumerate() {
            let position = index % self.seq;
            if u32::try_from(position).map_or(true, |position| start > position) {
                return Err(bad("starts", index, format!("at most {position}"), start));
            }
        }
        Ok(())
    }

    /// The number of targets that the loss counts.
    #[must_use]
    pub fn counted(&self) -> u64 {
        as_u64(self.targets.iter().filter(|&&target| target != Self::IGNORED).count())
    }

    /// The positions within the documents, `[batch * seq]`.
    pub(super) fn positions(&self) -> impl Iterator<Item = u32> + '_ {
        let seq = u32::try_from(self.seq.max(1)).unwrap_or(u32::MAX);
        (0_u32..).zip(&self.starts).map(move |(index, start)| (index % seq).saturating_sub(*start))
    }
}

/// What dropout depends on beside module, position and feature (`NN-4`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DropoutKey {
    /// The run's seed.
    pub seed: u64,
    /// The optimizer step.
    pub step: u64,
    /// The number of row 0 of the batch within the step, over all ranks and micro-batches.
    pub first_sample: u64,
}

/// What the blocks need of the tokens in one forward and its backward; made by [`super::Decoder::pass`]. Clones share.
#[derive(Clone, Debug)]
pub struct Pass {
    /// Rows.
    pub(super) batch: usize,
    /// Tokens of a row.
    pub(super) seq: usize,
    /// As [`Tokens::starts`].
    pub(super) starts: Arc<Vec<u32>>,
    /// Cosine and sine of the rotary embedding, each f32 `[batch * seq, rotated dims / 2]`.
    pub(super) rotary: Option<(Tensor, Tensor)>,
    /// Present while training with dropout.
    pub(super) dropout: Option<DropoutKey>,
    /// The composed attention's masks, f32 `[batch, 1, seq, seq]`: without and with the window.
    masks: Arc<[OnceLock<Tensor>; 2]>,
}

impl Pass {
    pub(super) fn new(tokens: &Tokens, rotary: Option<(Tensor, Tensor)>, dropout: Option<DropoutKey>) -> Self {
        Self {
            batch: tokens.batch,
            seq: tokens.seq,
            starts: Arc::new(tokens.starts.clone()),
            rotary,
            dropout,
            masks: Arc::new([OnceLock::new(), OnceLock::new()]),
        }
    }

    /// 0 where a token attends, minus infinity where it does not. A model has one size of window at most.
    pub(super) fn mask(&self, window: Option<usize>, device: &Device) -> candle_core::Result<Tensor> {
        let cell = &self.masks[usize::from(window.is_some())];
        if let Some(mask) = cell.get() {
            return Ok(mask.clone());
        }
        let mut values = vec![f32::NEG_INFINITY; self.batch * self.seq * self.seq];
        for (row, line) in values.chunks_exact_mut(self.seq).enumerate() {
            let position = row % self.seq;
            line[first_key(self.starts[row], position, window)..=position].fill(0.0);
        }
        let mask = Tensor::from_vec(values, (self.batch, 1, self.seq, self.seq), device)?;
        Ok(cell.get_or_init(|| mask).clone())
    }
}

/// The first position that the token at `position` of a row attends to.
pub(super) fn first_key(start: u32, position: usize, window: Option<usize>) -> usize {
    let start = usize::try_from(start).unwrap_or(usize::MAX);
    window.map_or(start, |window| start.max((position + 1).saturating_sub(window)))
}
