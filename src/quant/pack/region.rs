//! A rectangle of a matrix: what a rank's shard needs of a packed weight.
//!
//! Owns: its check, and the turn from input-major to output-major. Refuses to know: packings.

use std::ops::Range;

use crate::quant::QuantError;

/// Inputs turned at a time: 16 f32 are one line of cache.
const ROWS_AT_ONCE: usize = 16;

/// Outputs turned at a time: with 16 inputs 4 KiB, which stay in the first cache.
pub(super) const TILE: usize = 64;

/// Some inputs and outputs of a linear layer's weight.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Region {
    /// Input features: rows of `[in, out]` as GPTQ and AWQ store it, columns of torch's `weight`.
    pub inputs: Range<usize>,
    /// Output features.
    pub outputs: Range<usize>,
}

impl Region {
    /// The whole of a weight.
    #[must_use]
    pub const fn whole(inputs: usize, outputs: usize) -> Self {
        Self { inputs: 0..inputs, outputs: 0..outputs }
    }

    /// The number of weights.
    #[must_use]
    pub fn len(&self) -> usize {
        self.inputs.len().saturating_mul(self.outputs.len())
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub(super) fn check(&self, inputs: usize, outputs: usize) -> Result<(), QuantError> {
        check_range("inputs", &self.inputs, inputs)?;
        check_range("outputs", &self.outputs, outputs)
    }

    /// Fills `out`, `[outputs, inputs]` of this region, from runs that `fill(input, first, run)` makes: the weights of one
    /// input and of outputs `first ..` of the region, at most [`TILE`].
    pub(super) fn turn(&self, out: &mut [f32], mut fill: impl FnMut(usize, usize, &mut [f32])) {
        let inputs = self.inputs.len();
        if self.is_empty() {
            return;
        }
        let mut tile = [[0.0; TILE]; ROWS_AT_ONCE];
        for (out, first) in out.chunks_mut(TILE * inputs).zip((0..).step_by(TILE)) {
            let outputs = out.len() / inputs;
            for start in (0..inputs).step_by(ROWS_AT_ONCE) {
                let count = ROWS_AT_ONCE.min(inputs - start);
                for (row, run) in tile[..count].iter_mut().enumerate() {
                    fill(self.inputs.start + start + row, first, &mut run[..outputs]);
                }
                for (output, values) in out.chunks_exact_mut(inputs).enumerate() {
                    let places = values[start..start + count].iter_mut();
                    places.zip(&tile).for_each(|(place, run)| *place = run[output]);
                }
            }
        }
    }
}

fn check_range(what: &'static str, range: &Range<usize>, bound: usize) -> Result<(), QuantError> {
    if range.start <= range.end && range.end <= bound {
        Ok(())
    } else {
        Err(QuantError::Range { what, start: range.start, count: range.len(), bound })
    }
}
