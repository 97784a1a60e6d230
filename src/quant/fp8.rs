//! FP8 E4M3 weights to f32, with one scale or a scale for each block of rows and columns.
//!
//! Owns: `F8_E4M3` of safetensors, torch's `float8_e4m3fn`: a sign, 4 exponent bits (bias 7), 3 mantissa bits; no infinity,
//! `0x7f` and `0xff` are NaN, the largest magnitude is 448, the least 2^-9 (Micikevicius et al. 2022, FP8 formats for deep
//! learning). Refuses to know: keys and files. Every value is exact in f32; a product with a scale is rounded once.
//!
//! - Per tensor: `w = value * scale` (`weight_scale`).
//! - Per block, DeepSeek's layout: `w[r, c] = value * scale_inv[r / 128, c / 128]`, `weight_scale_inv` f32
//!   `[ceil(rows / 128), ceil(columns / 128)]`. Its name notwithstanding it is multiplied by.

use std::ops::Range;

use super::QuantError;
use super::error::expect_len;

/// Widens each byte, exactly. NaN becomes the quiet NaN of its sign.
///
/// # Errors
/// [`QuantError::Length`] when the lengths differ.
pub fn decode_e4m3(bytes: &[u8], out: &mut [f32]) -> Result<(), QuantError> {
    dequantize_e4m3(bytes, 1.0, out)
}

/// As [`decode_e4m3`], times `scale`.
///
/// # Errors
/// As [`decode_e4m3`].
pub fn dequantize_e4m3(bytes: &[u8], scale: f32, out: &mut [f32]) -> Result<(), QuantError> {
    expect_len("bytes", bytes.len(), out.len())?;
    run(bytes, scale, out);
    Ok(())
}

/// A matrix of E4M3 bytes with a scale for each block.
#[derive(Clone, Copy, Debug)]
pub struct Fp8Blocks<'a> {
    rows: usize,
    columns: usize,
    block_rows: usize,
    block_columns: usize,
    scale_inv: &'a [f32],
}

impl<'a> Fp8Blocks<'a> {
    /// The scales of a whole matrix `[rows, columns]` in blocks `[block_rows, block_columns]` (config.json's
    /// `weight_block_size`), row-major; blocks at the end may be cut.
    ///
    /// # Errors
    /// [`QuantError::GroupSize`] for blocks of 0, [`QuantError::Length`] when there is not one scale for each block.
    pub fn new(shape: [usize; 2], block: [usize; 2], scale_inv: &'a [f32]) -> Result<Self, QuantError> {
        let ([rows, columns], [block_rows, block_columns]) = (shape, block);
        if block_rows == 0 || block_columns == 0 {
            return Err(QuantError::GroupSize { found: 0, values: rows.saturating_mul(columns) });
        }
        let blocks = rows.div_ceil(block_rows).saturating_mul(columns.div_ceil(block_columns));
        expect_len("scale_inv", scale_inv.len(), blocks)?;
        Ok(Self { rows, columns, block_rows, block_columns, scale_inv })
    }

    /// The weights of a part, whose bytes are `bytes`: rows `rows` by columns `columns` of the whole, row-major. It may begin
    /// and end inside blocks.
    ///
    /// # Errors
    /// [`QuantError::Range`] when the part lies outside, [`QuantError::Length`] when `bytes` or `out` is not of its size.
    pub fn dequantize(
        &self,
        rows: Range<usize>,
        columns: Range<usize>,
        bytes: &[u8],
        out: &mut [f32],
    ) -> Result<(), QuantError> {
        for (what, range, bound) in [("rows", &rows, self.rows), ("columns", &columns, self.columns)] {
            if range.start > range.end || range.end > bound {
                return Err(QuantError::Range { what, start: range.start, count: range.len(), bound });
            }
        }
        let width = columns.len();
        expect_len("bytes", bytes.len(), rows.len().saturating_mul(width))?;
        expect_len("out", out.len(), bytes.len())?;
        if width == 0 {
            return Ok(());
        }
        let blocks = self.columns.div_ceil(self.block_columns);
        for (row, (bytes, out)) in rows.zip(bytes.chunks_exact(width).zip(out.chunks_exact_mut(width))) {
            let first = row / self.block_rows * blocks;
            self.row(&self.scale_inv[first..first + blocks], columns.start, bytes, out);
        }
        Ok(())
    }

    fn row(&self, scales: &[f32], mut column: usize, mut bytes: &[u8], mut out: &mut [f32]) {
        while !out.is_empty() {
            let count = out.len().min(self.block_columns - column % self.block_columns);
            let (run_bytes, rest_bytes) = bytes.split_at(count);
            let (run_out, rest_out) = out.split_at_mut(count);
            run(run_bytes, scales[column / self.block_columns], run_out);
            (bytes, out, column) = (rest_bytes, rest_out, column + count);
        }
    }
}

fn run(bytes: &[u8], scale: f32, out: &mut [f32]) {
    out.iter_mut().zip(bytes).for_each(|(out, byte)| *out = e4m3(*byte) * scale);
}

/// Selections, not branches: the loop over it is vectorized.
#[inline(always)]
fn e4m3(byte: u8) -> f32 {
    let magnitude = u32::from(byte & 0x7f);
    // Exponent and mantissa stand at f32's place after 20 bits; the bias is 127 there and 7 here.
    let normal = (magnitude << 20) + ((127 - 7) << 23);
    let subnormal = (f32::from(byte & 7) * (1.0 / 512.0)).to_bits();
    let bits = if magnitude < 8 { subnormal } else { normal };
    let bits = if magnitude == 0x7f { 0x7fc0_0000 } else { bits };
    f32::from_bits(bits | (u32::from(byte & 0x80) << 24))
}
