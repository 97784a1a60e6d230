//! The inner loops, in three instruction sets that give the same bytes (`QU-1`), and the choice among them.
//!
//! Owns: which instructions run. Refuses to know: checks of arguments (its callers did them), formats.
#![cfg_attr(
    target_arch = "x86_64",
    expect(unsafe_code, reason = "calls into functions that need instructions which were found at run time")
)]

mod affine;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod scalar;

use half::bf16;

use super::source::WeightFloat;
use super::{FourBit, Source};

pub(super) use affine::{HqqErrors, HqqGroup, round_to_code};
pub(super) use scalar::quantize_short_block;

/// The instruction set of the inner loops; every one gives the same bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kernels {
    level: Level,
}

/// `KE-1`: a level other than `Scalar` is made only after the processor said that it has the instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Level {
    Scalar,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

/// Calls the kernel of a level. An instruction set that has no kernel of its own for it uses the next lower one. None uses
/// gathers: with them nested quantization took 17 ns for each statistic, twice the scalar time.
macro_rules! dispatch {
    ($level:expr, $scalar:path, $avx2:path, $avx512:path, $args:tt) => {
        match $level {
            Level::Scalar => $scalar $args,
            // SAFETY: KE-1, the level exists only where the processor has AVX2 and F16C.
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => unsafe { $avx2 $args },
            // SAFETY: KE-1, the level exists only where the processor has AVX-512 F, BW, DQ and VL, and all of AVX2's.
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => unsafe { $avx512 $args },
        }
    };
}

impl Kernels {
    /// The fastest that this processor has. The answer is cached by the standard library; calling often is cheap.
    #[must_use]
    pub fn detect() -> Self {
        Self::avx512().or_else(Self::avx2).unwrap_or(Self::scalar())
    }

    /// The reference; runs everywhere.
    #[must_use]
    pub const fn scalar() -> Self {
        Self { level: Level::Scalar }
    }

    /// AVX2 with F16C, where the processor has them.
    #[must_use]
    pub fn avx2() -> Option<Self> {
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("f16c") {
            return Some(Self { level: Level::Avx2 });
        }
        None
    }

    /// AVX-512 F, BW, DQ and VL, where the processor has them.
    #[must_use]
    pub fn avx512() -> Option<Self> {
        #[cfg(target_arch = "x86_64")]
        if Self::avx2().is_some()
            && is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
        {
            return Some(Self { level: Level::Avx512 });
        }
        None
    }

    /// `scalar`, `avx2` or `avx512`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self.level {
            Level::Scalar => "scalar",
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => "avx512",
        }
    }

    /// Whole blocks only; the lengths fit. Returns the number of values that are not finite.
    pub(super) fn quantize_full_blocks(
        self,
        format: FourBit,
        source: Source<'_>,
        packed: &mut [u8],
        absmax: &mut [f32],
    ) -> u64 {
        dispatch!(
            self.level,
            scalar::quantize_4bit,
            avx2::quantize_4bit,
            avx512::quantize_4bit,
            (format, source, packed, absmax)
        )
    }

    /// Any number of values, the last block may be short; the lengths fit.
    pub(super) fn dequantize_blocks(self, format: FourBit, packed: &[u8], absmax: &[f32], out: &mut [f32]) {
        dispatch!(
            self.level,
            scalar::dequantize_4bit,
            avx2::dequantize_4bit,
            avx512::dequantize_4bit,
            (format, packed, absmax, out)
        );
    }

    /// Any number of values, the last block may be short; the lengths fit.
    pub(super) fn dequantize_blocks_bf16(self, format: FourBit, packed: &[u8], absmax: &[f32], out: &mut [bf16]) {
        dispatch!(
            self.level,
            scalar::dequantize_4bit_bf16,
            avx2::dequantize_4bit_bf16,
            avx2::dequantize_4bit_bf16,
            (format, packed, absmax, out)
        );
    }

    /// One row; the lengths fit. Returns the number of values that are not finite as f16.
    pub(super) fn quantize_int8_row(self, row: Source<'_>, q: &mut [u8], scb: &mut f32) -> u64 {
        dispatch!(self.level, scalar::quantize_int8, avx2::quantize_int8, avx2::quantize_int8, (row, q, scb))
    }

    /// One row; the lengths fit.
    pub(super) fn dequantize_int8_row(self, q: &[u8], scb: f32, out: &mut [f32]) {
        dispatch!(self.level, scalar::dequantize_int8, avx2::dequantize_int8, avx2::dequantize_int8, (q, scb, out));
    }

    /// At most 256 statistics; the lengths fit. Returns the nested statistic.
    pub(super) fn nested_quantize_group(
        self,
        absmax: &[f32],
        offset: f32,
        thresholds: &[f32; 256],
        codes: &mut [u8],
    ) -> f32 {
        match self.level {
            // SAFETY: KE-1, the level exists only where the processor has AVX-512 F, BW, DQ and VL.
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => unsafe { avx512::nested_quantize(absmax, offset, thresholds, codes) },
            _ => scalar::nested_quantize(absmax, offset, thresholds, codes),
        }
    }

    /// One group; the lengths are equal.
    pub(super) fn hqq_targets(self, group: HqqGroup, weights: &[f32], targets: &mut [f32]) -> HqqErrors {
        dispatch!(
            self.level,
            affine::hqq_targets,
            affine::hqq_targets_avx2,
            affine::hqq_targets_avx2,
            (group, weights, targets)
        )
    }

    /// Between two different types; the lengths fit.
    pub(super) fn convert_elements(self, source: Source<'_>, to: WeightFloat, out: &mut [u8]) {
        dispatch!(self.level, scalar::convert, avx2::convert, avx2::convert, (source, to, out));
    }
}
