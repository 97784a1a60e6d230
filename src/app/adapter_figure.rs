//! What merging into full precision differs from what was trained, where the base of the training was 4-bit.
//!
//! The adapter learned beside the dequantized weights Q(W); merged into W it stands beside other numbers. The figure is the
//! relative distance of the two bases over the merged matrices, `sqrt(Σ‖Q(W) - W‖²) / sqrt(Σ‖W‖²)` in Frobenius norms.

use serde::Serialize;

use crate::quant::{BlockSize, FourBit, FourBitCode, Kernels, QuantError, Source};
use crate::types::{DType, Fqn};

/// The distance of a quantized base from the one that was merged into.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct QuantizationFigure {
    /// The code, `nf4` or `fp4`.
    pub format: &'static str,
    /// Over all merged matrices.
    pub relative_error: f64,
    /// The matrix where it is largest.
    pub worst: Option<Fqn>,
    /// There.
    pub worst_relative_error: f64,
}

/// A figure in the making.
#[derive(Debug)]
pub(super) struct Figure {
    code: FourBitCode,
    error: f64,
    norm: f64,
    worst: Option<(Fqn, f64)>,
}

impl Figure {
    pub(super) const fn new(code: FourBitCode) -> Self {
        Self { code, error: 0.0, norm: 0.0, worst: None }
    }

    /// Counts a matrix of the base: its bytes, and the same in f32. Blocks of 64, as bitsandbytes quantizes; the second
    /// quantization, of the statistics, is left out.
    pub(super) fn add(&mut self, fqn: &Fqn, dtype: DType, bytes: &[u8], values: &[f32]) -> Result<(), QuantError> {
        let format = FourBit { code: self.code, block: BlockSize::B64 };
        let mut packed = vec![0; format.packed_bytes(values.len())];
        let mut absmax = vec![0.0; format.blocks(values.len())];
        let kernels = Kernels::detect();
        kernels.quantize_4bit(format, Source::new(dtype, bytes)?, &mut packed, &mut absmax)?;
        let mut quantized = vec![0.0; values.len()];
        kernels.dequantize_4bit(format, &packed, &absmax, &mut quantized)?;
        let square = |value: f32| f64::from(value) * f64::from(value);
        let norm: f64 = values.iter().map(|&value| square(value)).sum();
        let error: f64 = values.iter().zip(&quantized).map(|(value, other)| square(value - other)).sum();
        self.norm += norm;
        self.error += error;
        let relative = relative(error, norm);
        if self.worst.as_ref().is_none_or(|(_, worst)| relative > *worst) {
            self.worst = Some((fqn.clone(), relative));
        }
        Ok(())
    }

    pub(super) fn finish(self) -> QuantizationFigure {
        let (worst, worst_relative_error) = self.worst.map_or((None, 0.0), |(fqn, error)| (Some(fqn), error));
        let relative_error = relative(self.error, self.norm);
        QuantizationFigure { format: self.code.name(), relative_error, worst, worst_relative_error }
    }
}

fn relative(error: f64, norm: f64) -> f64 {
    if norm > 0.0 { (error / norm).sqrt() } else { 0.0 }
}

/// The 4-bit code that the base of a recipe is quantized with.
#[must_use]
pub fn recipe_code(recipe: &serde_json::Value) -> Option<FourBitCode> {
    FourBitCode::from_name(recipe.get("base-quantization")?.as_str()?)
}
