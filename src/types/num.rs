//! Conversions between numbers that cannot lose bits on the platforms we build for, and an f32 that can be compared.

use serde::{Deserialize, Serialize};

const _: () = assert!(usize::BITS == 64, "weightcast addresses tensors larger than 4 GiB and needs a 64-bit target");

/// The same number as `usize`; lossless, because the target is 64-bit (checked at compile time).
#[inline]
#[must_use]
#[expect(clippy::cast_possible_truncation, reason = "usize is 64-bit, asserted above")]
pub const fn as_usize(value: u64) -> usize {
    value as usize
}

/// The same number as `u64`; lossless, because the target is 64-bit (checked at compile time).
#[inline]
#[must_use]
pub const fn as_u64(value: usize) -> u64 {
    value as u64
}

/// The nearest `f64`; exact below 2^53.
#[inline]
#[must_use]
#[expect(clippy::cast_precision_loss, reason = "counts of steps, tokens and bytes for people and rates")]
pub const fn as_f64(value: u64) -> f64 {
    value as f64
}

/// An f32 by its bits, so that plans compare and hash exactly.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
#[expect(non_camel_case_types, reason = "it stands for the primitive type")]
pub struct f32Bits(pub u32);
