//! LLM.int8 of bitsandbytes: one scale for each row of a matrix.
//!
//! Owns: the checks and the rule. With `x` rounded to f16 first, `SCB` is the largest `|x|` of the row and
//! `q = round_half_even(x * ((1 / SCB) * 127))` in f32, for torch divides a number by a tensor so; dequantized `(q * SCB) * (1/127)`, two roundings (bitsandbytes 0.50,
//! `int8_vectorwise_quant` and `int8_vectorwise_dequant`). There is no outlier threshold: weights have none.

use super::error::expect_len;
use super::{Kernels, QuantError, Source};

/// What bitsandbytes multiplies by instead of dividing by 127 (it writes 7.874015718698502e-3).
pub(super) const INVERSE_127: f32 = 1.0 / 127.0;

/// The number of rows of `values` elements.
fn rows(values: usize, columns: usize) -> Result<usize, QuantError> {
    match values.checked_div(columns) {
        Some(rows) if rows * columns == values => Ok(rows),
        _ => Err(QuantError::Columns { columns, values }),
    }
}

impl Kernels {
    /// Quantizes whole rows of `columns` elements. `q` gets one two's complement byte for each element, `scb` one f32 for
    /// each row. Returns the number of elements that are not finite as f16.
    ///
    /// # Errors
    /// [`QuantError::Columns`] when a row is cut, [`QuantError::Length`] when `q` or `scb` does not fit.
    pub fn quantize_int8_rows(
        self,
        source: Source<'_>,
        columns: usize,
        q: &mut [u8],
        scb: &mut [f32],
    ) -> Result<u64, QuantError> {
        let rows = rows(source.len(), columns)?;
        expect_len("q", q.len(), source.len())?;
        expect_len("scb", scb.len(), rows)?;
        let rows = source.chunks(columns).zip(q.chunks_exact_mut(columns)).zip(scb);
        Ok(rows.map(|((row, q), scb)| self.quantize_int8_row(row, q, scb)).sum())
    }

    /// The f32 values of whole rows of `columns` codes.
    ///
    /// # Errors
    /// [`QuantError::Columns`] when a row is cut, [`QuantError::Length`] when `scb` or `out` does not fit.
    pub fn dequantize_int8_rows(
        self,
        columns: usize,
        q: &[u8],
        scb: &[f32],
        out: &mut [f32],
    ) -> Result<(), QuantError> {
        let rows = rows(q.len(), columns)?;
        expect_len("scb", scb.len(), rows)?;
        expect_len("out", out.len(), q.len())?;
        for ((q, scb), out) in q.chunks_exact(columns).zip(scb).zip(out.chunks_exact_mut(columns)) {
            self.dequantize_int8_row(q, *scb, out);
        }
        Ok(())
    }
}
