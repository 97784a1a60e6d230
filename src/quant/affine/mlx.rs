//! MLX's affine quantizer, with the bits of mlx 0.32 on CPU.
//!
//! Owns: the rule (`mlx/backend/cpu/quantized.cpp`). Refuses to know: packing.
//!
//! In f32, for each run of 32, 64 or 128 weights, with `n = 2^bits - 1`: `scale = max((max - min) / n, 1e-7)`, negative unless
//! `|min| > |max|`; `edge` is whichever of both is further from 0; `k = round(edge / scale)`; where `k` is not 0, `scale =
//! edge / k` and `bias = edge`, so that the edge and 0 are exact, else `bias = 0`. Codes are
//! `clamp(round((w - bias) / scale), 0, n)`, ties to even, from the f32 scale and bias, before these are rounded to the dtype
//! of the weights for the file. So the caller widens bf16 or f16 weights, quantizes, and rounds scales and biases.
//!
//! Dequantized `q * scale + bias` in two roundings of f32 ([`AffineGroups`](super::AffineGroups)), which equals mlx on f32
//! weights. On bf16 and f16 mlx rounds the product and the sum to that type; f32 is the more exact.

use serde::{Deserialize, Serialize};

use super::CodeBits;
use crate::quant::QuantError;
use crate::quant::error::expect_len;
use crate::quant::kernels::round_to_code;

/// The least magnitude of a scale before it is fitted to the edge.
const LEAST_SCALE: f32 = 1e-7;

/// A format that `mx.quantize` has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "Raw")]
pub struct MlxRule {
    bits: CodeBits,
    group: usize,
}

#[derive(Deserialize)]
struct Raw {
    bits: CodeBits,
    group: usize,
}

impl TryFrom<Raw> for MlxRule {
    type Error = QuantError;

    fn try_from(raw: Raw) -> Result<Self, QuantError> {
        Self::new(raw.bits, raw.group)
    }
}

impl MlxRule {
    /// Codes of `bits` bits in groups of `group`.
    ///
    /// # Errors
    /// [`QuantError::Bits`] unless 2, 3, 4, 5, 6 or 8; [`QuantError::MlxGroup`] unless 32, 64 or 128.
    pub const fn new(bits: CodeBits, group: usize) -> Result<Self, QuantError> {
        if bits.get() < 2 {
            return Err(QuantError::Bits { format: "mlx", expected: "2, 3, 4, 5, 6 or 8", found: bits.get() });
        }
        match group {
            32 | 64 | 128 => Ok(Self { bits, group }),
            found => Err(QuantError::MlxGroup { found }),
        }
    }

    /// Bits of a code.
    #[must_use]
    pub const fn bits(self) -> CodeBits {
        self.bits
    }

    /// Weights per group.
    #[must_use]
    pub const fn group(self) -> usize {
        self.group
    }

    /// Quantizes whole groups: one code for each weight, one scale and bias for each group. Parts of whole groups
    /// concatenate. What is not finite gets some code, and makes its group's scale or bias not finite.
    ///
    /// # Errors
    /// [`QuantError::GroupSize`] when a group is cut, [`QuantError::Length`] when an output does not fit.
    pub fn quantize(
        self,
        weights: &[f32],
        codes: &mut [u8],
        scales: &mut [f32],
        biases: &mut [f32],
    ) -> Result<(), QuantError> {
        if !weights.len().is_multiple_of(self.group) {
            return Err(QuantError::GroupSize { found: self.group, values: weights.len() });
        }
        expect_len("codes", codes.len(), weights.len())?;
        expect_len("scales", scales.len(), weights.len() / self.group)?;
        expect_len("biases", biases.len(), weights.len() / self.group)?;
        let mask = self.bits.max_code();
        let max_code = f32::from(mask);
        let groups = weights.chunks_exact(self.group).zip(codes.chunks_exact_mut(self.group));
        for ((weights, codes), parameters) in groups.zip(scales.iter_mut().zip(biases)) {
            let (scale, bias) = parameters_of_group(weights, max_code);
            (*parameters.0, *parameters.1) = (scale, bias);
            for (code, weight) in codes.iter_mut().zip(weights) {
                *code = round_to_code(((weight - bias) / scale).clamp(0.0, max_code), mask);
            }
        }
        Ok(())
    }
}

fn parameters_of_group(weights: &[f32], max_code: f32) -> (f32, f32) {
    let (min, max) = weights
        .iter()
        .fold((f32::INFINITY, f32::NEG_INFINITY), |(min, max), weight| (weight.min(min), weight.max(max)));
    let negative_edge = min.abs() > max.abs();
    let magnitude = ((max - min) / max_code).max(LEAST_SCALE);
    let (scale, edge) = if negative_edge { (magnitude, min) } else { (-magnitude, max) };
    let steps = (edge / scale).round_ties_even();
    if steps == 0.0 { (scale, 0.0) } else { (edge / steps, edge) }
}
