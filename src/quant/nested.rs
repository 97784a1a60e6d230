//! Double quantization: the f32 statistics of a 4-bit tensor as 8-bit codes of a dynamic map, in groups of 256.
//!
//! Owns: the dynamic map, the offset, the groups. Refuses to know: the 4-bit codes.
//!
//! `NE-1`: the offset is one f64 sum in the order of the tensor, rounded once, so it does not depend on how the tensor was
//! cut. A group spans 256 blocks of the whole tensor: a shard keeps its phase ([`NestedStatistics::first_block`]).
//!
//! For a group of `v = absmax - offset`: `nested_absmax` is the largest `|v|`, `t = v * (1 / max(nested_absmax, 1e-38))`,
//! the code is the number of midpoints of the map strictly below `t`; a short last group does the same. That is the rule of
//! bitsandbytes' CUDA kernel; its CPU library looks `t` up in a table of 65,536 bins and differs by a code now and then.

use super::error::expect_len;
use super::{Kernels, QuantError};
use crate::types::as_usize;

/// The number of statistics that share one nested statistic; bitsandbytes has no other.
pub const NESTED_BLOCK: usize = 256;

/// The 256 ascending values of an 8-bit code.
#[derive(Clone, Debug, PartialEq)]
pub struct DynamicMap([f32; 256]);

impl DynamicMap {
    /// bitsandbytes' signed dynamic map: seven decades, the means of neighbours of `linspace(0.1, 1, 2^i + 1)` times
    /// `10^(i-6)`, both signs, 0 and 1. torch builds differ in the last bits of `linspace`; these are the bits of a build
    /// with 8-lane vectors (equal to the golden table).
    #[must_use]
    pub fn standard() -> Self {
        let mut values = [0.0_f32; 256];
        let mut positive = Vec::with_capacity(127);
        for (exponent, scale) in [1e-6_f32, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0].into_iter().enumerate() {
            let points: Vec<f32> = (0..=1_u16 << exponent).map(|point| linspace_point(point, 1 << exponent)).collect();
            positive.extend(points.windows(2).map(|pair| scale * ((pair[0] + pair[1]) / 2.0)));
        }
        // The decades do not overlap and each ascends: `positive` is sorted.
        for (index, value) in positive.into_iter().enumerate() {
            values[126 - index] = -value;
            values[128 + index] = value;
        }
        values[255] = 1.0;
        Self(values)
    }

    /// The map that a file holds as `nested_quant_map`.
    ///
    /// # Errors
    /// [`QuantError::UnsortedMap`] when a value is not finite or less than the one before it.
    pub fn from_values(values: [f32; 256]) -> Result<Self, QuantError> {
        let broken = |index: &usize| {
            let value = values[*index];
            !value.is_finite() || (*index > 0 && value < values[*index - 1])
        };
        match (0..256).find(broken) {
            Some(index) => Err(QuantError::UnsortedMap { index }),
            None => Ok(Self(values)),
        }
    }

    /// The value of each code.
    #[must_use]
    pub const fn values(&self) -> &[f32; 256] {
        &self.0
    }

    /// The f32 midpoints of neighbours, and an infinity that no value exceeds.
    pub(super) fn thresholds(&self) -> [f32; 256] {
        std::array::from_fn(|code| self.0.get(code + 1).map_or(f32::INFINITY, |next| (self.0[code] + next) / 2.0))
    }
}

/// Point `index` of `torch.linspace(0.1, 1, steps + 1)` in f32 as a build with 8-lane vectors computes it: from the nearer
/// end, fused; in whole runs of 16 points only the first of 8 lanes is, and the others add `lane * step`, rounded twice.
fn linspace_point(index: u16, steps: u16) -> f32 {
    let (start, end) = (0.1_f32, 1.0_f32);
    let step = (end - start) / f32::from(steps);
    let points = steps + 1;
    let fused = |index: u16| {
        if index < points / 2 {
            step.mul_add(f32::from(index), start)
        } else {
            (-step).mul_add(f32::from(steps - index), end)
        }
    };
    if index < points / 16 * 16 {
        let lane = index % 8;
        fused(index - lane) + f32::from(lane) * step
    } else {
        fused(index)
    }
}

/// The running mean of a tensor's statistics, in tensor order (`NE-1`).
#[derive(Clone, Copy, Debug, Default)]
pub struct OffsetSum {
    sum: f64,
    count: u64,
}

impl OffsetSum {
    /// Adds the next statistics of the tensor. 2^53 of them would be needed before the count itself rounds.
    pub fn add(&mut self, absmax: &[f32]) {
        for value in absmax {
            self.sum += f64::from(*value);
        }
        self.count += crate::types::as_u64(absmax.len());
    }

    /// The mean so far, rounded once to f32; 0 for no statistics.
    #[must_use]
    #[expect(clippy::cast_possible_truncation, reason = "the one rounding to f32")]
    #[expect(clippy::cast_precision_loss, reason = "exact under 2^53 statistics")]
    pub fn mean(self) -> f32 {
        if self.count == 0 { 0.0 } else { (self.sum / self.count as f64) as f32 }
    }
}

/// The mean of all statistics of a tensor: what is subtracted before they are quantized.
#[must_use]
pub fn absmax_offset(absmax: &[f32]) -> f32 {
    let mut sum = OffsetSum::default();
    sum.add(absmax);
    sum.mean()
}

impl Kernels {
    /// Quantizes statistics from a group boundary on (a multiple of 256 blocks of the tensor); only the tensor's last part
    /// may end inside a group. `codes` has the length of `absmax`, `nested_absmax` a 256th of it, rounded up.
    ///
    /// # Errors
    /// [`QuantError::Length`] when a length does not fit.
    pub fn nested_quantize(
        self,
        absmax: &[f32],
        offset: f32,
        map: &DynamicMap,
        codes: &mut [u8],
        nested_absmax: &mut [f32],
    ) -> Result<(), QuantError> {
        expect_len("codes", codes.len(), absmax.len())?;
        expect_len("nested_absmax", nested_absmax.len(), absmax.len().div_ceil(NESTED_BLOCK))?;
        let thresholds = map.thresholds();
        let groups = absmax.chunks(NESTED_BLOCK).zip(codes.chunks_mut(NESTED_BLOCK)).zip(nested_absmax);
        for ((absmax, codes), nested_absmax) in groups {
            *nested_absmax = self.nested_quantize_group(absmax, offset, &thresholds, codes);
        }
        Ok(())
    }
}

/// Quantized statistics of a run of blocks, wherever in the tensor the run starts.
#[derive(Clone, Copy, Debug)]
pub struct NestedStatistics<'a> {
    /// One code for each block of the run.
    pub codes: &'a [u8],
    /// The index in the whole tensor of the block of `codes[0]`; only its phase, modulo 256, matters.
    pub first_block: u64,
    /// The nested statistics from the group of `codes[0]` to the group of the last code.
    pub nested_absmax: &'a [f32],
    /// The mean that was subtracted.
    pub offset: f32,
    /// The map of the file.
    pub map: &'a DynamicMap,
}

impl NestedStatistics<'_> {
    /// Writes `map[code] * nested_absmax + offset`, two roundings as in bitsandbytes, for each block.
    ///
    /// # Errors
    /// [`QuantError::Length`] when `out` or `nested_absmax` does not fit `codes`.
    pub fn dequantize(&self, out: &mut [f32]) -> Result<(), QuantError> {
        let phase = as_usize(self.first_block % 256);
        expect_len("out", out.len(), self.codes.len())?;
        let groups = if self.codes.is_empty() { 0 } else { (phase + self.codes.len()).div_ceil(NESTED_BLOCK) };
        expect_len("nested_absmax", self.nested_absmax.len(), groups)?;
        let (mut codes, mut out) = (self.codes, out);
        let mut room = NESTED_BLOCK - phase;
        for nested_absmax in self.nested_absmax {
            let count = room.min(codes.len());
            let (group, rest) = codes.split_at(count);
            let (group_out, rest_out) = out.split_at_mut(count);
            for (out, code) in group_out.iter_mut().zip(group) {
                *out = self.map.0[usize::from(*code)] * nested_absmax + self.offset;
            }
            (codes, out, room) = (rest, rest_out, NESTED_BLOCK);
        }
        Ok(())
    }
}
