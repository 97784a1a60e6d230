//! A rectangle of a matrix: what a rank's shard needs of a packed weight.
//!
//! Owns: its check, and the turn from input-major to output-major. Refuses to know: packings.

use std::ops::Range;

use crate::quant::QuantError;

/// Rows turned at a time: 16 f32 are one line of cache.
const ROWS_AT_ONCE: usize = 16;

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

    /// Fills `out`, `[outputs, inputs]` of this region, from rows that `fill` makes: the weights of one input.
    pub(super) fn turn(&self, out: &mut [f32], mut fill: impl FnMut(usize, &mut [f32])) {
        let (inputs, outputs) = (self.inputs.len(), self.outputs.len());
        if self.is_empty() {
            return;
        }
        let mut rows = vec![0.0; ROWS_AT_ONCE.min(inputs) * outputs];
        for start in (0..inputs).step_by(ROWS_AT_ONCE) {
            let count = ROWS_AT_ONCE.min(inputs - start);
            for (row, values) in rows.chunks_exact_mut(outputs).take(count).enumerate() {
                fill(self.inputs.start + start + row, values);
            }
            for (output, values) in out.chunks_exact_mut(inputs).enumerate() {
                let places = values[start..start + count].iter_mut();
                places.zip(rows[output..].iter().step_by(outputs)).for_each(|(place, value)| *place = *value);
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
