//! AWQ's GEMM layout: 4 bits, packed along the outputs in an order of its own.
//!
//! Owns: `qweight` and `qzeros` as autoawq 0.2.9 reads and writes them (`version` "gemm"). Refuses to know: how codes are found.
//!
//! In little-endian 32-bit words: `qweight [in, out / 8]`, `qzeros [in / group, out / 8]`, `scales [in / group, out]` in f16.
//! Nibble `i` of a word, the lowest first, is output `[0, 2, 4, 6, 1, 3, 5, 7][i]` of its eight.
//! `W[k, n] = (q - zero) * scale`, with no one subtracted; exact in f32 for f16 scales.
//!
//! Cuts: along `out` at multiples of 8, along `in` at multiples of the group, files can be cut without unpacking.

use super::gptq::scales_of;
use super::region::{Region, TILE};
use super::words::Words;
use crate::quant::QuantError;
use crate::quant::error::expect_len;
use crate::quant::source::Source;

/// The output of each nibble.
const ORDER: [usize; 8] = [0, 2, 4, 6, 1, 3, 5, 7];

/// How far each output's code is shifted: the inverse of [`ORDER`] in bits.
const SHIFTS: [u32; 8] = [0, 16, 4, 20, 8, 24, 12, 28];

/// The size of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AwqShape {
    /// Input features, whole groups.
    pub inputs: usize,
    /// Output features, a multiple of 8.
    pub outputs: usize,
    /// Inputs per group.
    pub group: usize,
}

impl AwqShape {
    /// The number of groups.
    fn groups(&self) -> Result<usize, QuantError> {
        if !self.outputs.is_multiple_of(8) {
            return Err(QuantError::Parts { what: "outputs", expected: 8, found: self.outputs });
        }
        match self.inputs.checked_div(self.group) {
            Some(groups) if groups * self.group == self.inputs => Ok(groups),
            _ => Err(QuantError::GroupSize { found: self.group, values: self.inputs }),
        }
    }
}

/// A layer whose sizes have been checked.
#[derive(Clone, Debug)]
pub struct Awq<'a> {
    shape: AwqShape,
    groups: usize,
    qweight: Words<'a>,
    qzeros: Words<'a>,
    scales: Source<'a>,
}

impl<'a> Awq<'a> {
    /// The tensors of a layer as a file holds them: little-endian bytes at any alignment.
    ///
    /// # Errors
    /// [`QuantError::Parts`], [`QuantError::GroupSize`] or [`QuantError::Length`] for sizes that do not fit.
    pub fn new(shape: AwqShape, qweight: &'a [u8], qzeros: &'a [u8], scales: Source<'a>) -> Result<Self, QuantError> {
        let groups = shape.groups()?;
        let qweight = Words::new("qweight", qweight, shape.inputs, shape.outputs / 8)?;
        let qzeros = Words::new("qzeros", qzeros, groups, shape.outputs / 8)?;
        expect_len("scales", scales.len(), groups.saturating_mul(shape.outputs))?;
        Ok(Self { shape, groups, qweight, qzeros, scales })
    }

    /// The codes of the region, input-major: `[inputs, outputs]`.
    ///
    /// # Errors
    /// [`QuantError::Range`] when the region lies outside, [`QuantError::Length`] when `out` does not fit it.
    pub fn codes(&self, region: &Region, out: &mut [u8]) -> Result<(), QuantError> {
        self.check(region, out.len())?;
        for (row, codes) in region.inputs.clone().zip(out.chunks_exact_mut(region.outputs.len().max(1))) {
            unpack_row(self.qweight, row, region.outputs.start, codes);
        }
        Ok(())
    }

    /// The zeros of outputs `outputs` of every group, `[groups, outputs]`.
    ///
    /// # Errors
    /// As [`Self::codes`].
    pub fn zeros(&self, outputs: std::ops::Range<usize>, out: &mut [u8]) -> Result<(), QuantError> {
        let region = Region { inputs: 0..0, outputs };
        region.check(self.shape.inputs, self.shape.outputs)?;
        expect_len("zeros", out.len(), self.groups * region.outputs.len())?;
        for (group, zeros) in out.chunks_exact_mut(region.outputs.len().max(1)).enumerate() {
            unpack_row(self.qzeros, group, region.outputs.start, zeros);
        }
        Ok(())
    }

    /// The weights of the region in f32 as torch's `weight` has them: `[outputs, inputs]`.
    ///
    /// # Errors
    /// As [`Self::codes`].
    pub fn dequantize(&self, region: &Region, out: &mut [f32]) -> Result<(), QuantError> {
        self.check(region, out.len())?;
        let count = region.outputs.len();
        let scales = scales_of(self.scales, self.groups, self.shape.outputs, region);
        let mut zeros = vec![0; self.groups * count];
        self.zeros(region.outputs.clone(), &mut zeros)?;
        let zeros: Vec<f32> = zeros.into_iter().map(f32::from).collect();
        region.turn(out, |input, tile, weights| {
            let mut codes = [0; TILE];
            let codes = &mut codes[..weights.len()];
            unpack_row(self.qweight, input, region.outputs.start + tile, codes);
            let start = input / self.shape.group * count + tile;
            let parameters = scales[start..].iter().zip(&zeros[start..]);
            for ((weight, code), (scale, zero)) in weights.iter_mut().zip(codes).zip(parameters) {
                *weight = (f32::from(*code) - zero) * scale;
            }
        });
        Ok(())
    }

    fn check(&self, region: &Region, out: usize) -> Result<(), QuantError> {
        region.check(self.shape.inputs, self.shape.outputs)?;
        expect_len("weights of the region", out, region.len())
    }
}

/// The codes of outputs `first ..` of a row.
fn unpack_row(words: Words<'_>, row: usize, first: usize, codes: &mut [u8]) {
    let words = words.row(row);
    let eight = |word: &[u8; 4]| {
        let word = u32::from_le_bytes(*word);
        SHIFTS.map(|shift| (word >> shift).to_le_bytes()[0] & 15)
    };
    // The rest of a word that the range begins in, whole words, and the start of one that it ends in.
    let (head, rest) = codes.split_at_mut(codes.len().min(first.next_multiple_of(8) - first));
    if !head.is_empty() {
        head.copy_from_slice(&eight(&words[first / 8])[first % 8..][..head.len()]);
    }
    let words = words.get(first.div_ceil(8)..).unwrap_or_default();
    let (whole, tail) = rest.as_chunks_mut::<8>();
    whole.iter_mut().zip(words).for_each(|(codes, word)| *codes = eight(word));
    if let Some(word) = words.get(whole.len()) {
        tail.copy_from_slice(&eight(word)[..tail.len()]);
    }
}

/// Packs codes `[rows, outputs]` into words: `qweight` with a row for each input, `qzeros` with one for each group. Bits
/// above the fourth are dropped.
///
/// # Errors
/// [`QuantError::Parts`] unless there is a multiple of 8 codes, [`QuantError::Length`] when `packed` does not fit.
pub fn pack_awq(codes: &[u8], packed: &mut [u8]) -> Result<(), QuantError> {
    if !codes.len().is_multiple_of(8) {
        return Err(QuantError::Parts { what: "codes", expected: 8, found: codes.len() });
    }
    expect_len("packed bytes", packed.len(), codes.len() / 2)?;
    for (word, codes) in packed.as_chunks_mut::<4>().0.iter_mut().zip(codes.as_chunks::<8>().0) {
        let packed = ORDER.iter().rev().fold(0, |word: u32, output| (word << 4) | u32::from(codes[*output] & 15));
        *word = packed.to_le_bytes();
    }
    Ok(())
}
