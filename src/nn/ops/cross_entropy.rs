//! The loss over a head, by chunks of tokens: logits of one chunk at a time, and the gradients with them.

use candle_core::Result;
use rayon::prelude::*;

use super::matrix::{Matrix, View};
use super::vector::{TASK, exp, largest, sum, wide};
use crate::nn::Tokens;

/// Logits that are there at once: 64 MiB, 341 tokens of a vocabulary of 49,152.
const LOGITS: usize = 1 << 24;
/// Fewer tokens at once would read the head too often.
const MIN_TOKENS: usize = 32;

/// The loss and what its gradient is for a gradient of 1.
#[derive(Debug)]
pub(in crate::nn) struct Loss {
    /// The sum of the negative log likelihoods, in nats.
    pub(in crate::nn) total: f64,
    /// The gradient of the input, `[tokens, hidden]`.
    pub(in crate::nn) input: Option<Matrix>,
    /// The gradient of the head, `[vocab, hidden]`.
    pub(in crate::nn) head: Option<Matrix>,
}

/// Which gradients are computed on the way.
#[derive(Clone, Copy, Debug)]
pub(in crate::nn) struct Wanted {
    pub(in crate::nn) input: bool,
    pub(in crate::nn) head: bool,
}

/// Of inputs `[tokens, hidden]` and a head `[vocab, hidden]`. Tokens without a target cost nothing.
pub(in crate::nn) fn cross_entropy(
    x: &Matrix,
    (head, vocab): (View<'_>, usize),
    targets: &[u32],
    wanted: Wanted,
) -> Result<Loss> {
    in_chunks(x, (head, vocab), targets, wanted, (LOGITS / vocab).max(MIN_TOKENS))
}

/// As [`cross_entropy`], of `chunk` tokens at a time.
pub(in crate::nn) fn in_chunks(
    x: &Matrix,
    (head, vocab): (View<'_>, usize),
    targets: &[u32],
    wanted: Wanted,
    chunk: usize,
) -> Result<Loss> {
    let hidden = x.columns();
    let counted: Vec<usize> =
        targets.iter().enumerate().filter(|(_, target)| **target != Tokens::IGNORED).map(|(row, _)| row).collect();
    let mut loss = Loss {
        total: 0.0,
        input: wanted.input.then(|| Matrix::zeros(x.rows(), hidden)),
        head: wanted.head.then(|| Matrix::zeros(vocab, hidden)),
    };
    for rows in counted.chunks(chunk) {
        let line = |row: usize| row * hidden..(row + 1) * hidden;
        let mut chunk = Vec::with_capacity(rows.len() * hidden);
        rows.iter().for_each(|&row| chunk.extend_from_slice(&x.data()[line(row)]));
        let chunk = Matrix::new(chunk, hidden);
        let mut slopes = chunk.view().times(head.t());
        let lines = slopes.data_mut().par_chunks_mut(vocab).zip(rows);
        let losses: Vec<f32> = lines.map(|(logits, &row)| wide(|| of_token(logits, targets[row]))).collect();
        loss.total += losses.into_iter().map(f64::from).sum::<f64>();
        if let Some(total) = &mut loss.head {
            total.add_product(slopes.view().t(), chunk.view(), 1.0);
        }
        if let Some(input) = &mut loss.input {
            let part = slopes.view().times(head);
            for (&row, part) in rows.iter().zip(part.data().chunks_exact(hidden)) {
                input.data_mut()[line(row)].copy_from_slice(part);
            }
        }
    }
    Ok(loss)
}

/// One token's negative log likelihood; its logits become the loss's gradient of them, `softmax - one hot`.
#[inline(always)]
fn of_token(logits: &mut [f32], target: u32) -> f32 {
    let target = usize::try_from(target).unwrap_or(usize::MAX);
    let peak = largest(logits);
    let likely = logits[target] - peak;
    // A vocabulary's worth of small terms is summed in parts.
    let mut total = 0.0_f64;
    for part in logits.chunks_mut(TASK / 16) {
        part.iter_mut().for_each(|logit| *logit = exp(*logit - peak));
        total += f64::from(sum(part));
    }
    #[expect(clippy::cast_possible_truncation, reason = "rounding to f32 is the point")]
    let (inverse, log_sum) = ((1.0 / total) as f32, total.ln() as f32);
    logits.iter_mut().for_each(|value| *value *= inverse);
    logits[target] -= 1.0;
    log_sum - likely
}
