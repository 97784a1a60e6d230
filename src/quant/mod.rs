//! Block-wise quantization of weights on slices: bitsandbytes NF4, FP4, double quantization and LLM.int8, and conversions;
//! below, what HQQ, MLX, GPTQ and AWQ have in common ([`affine`], [`pack`]), and FP8 ([`fp8`]).
//!
//! Owns: the codebooks, the rules of rounding, the SIMD kernels and the JSON text of a quantization state. The rules are
//! those of bitsandbytes 0.50 on CPU (`quantize_4bit`, `int8_vectorwise_quant`), so files are equal to its files byte for byte.
//! Refuses to know: files, tensor names, configuration, devices, who calls. It starts no thread of its own but the scoped
//! ones of [`Kernels::quantize_4bit_threads`].
//!
//! - `QU-1`: every kernel gives the bytes of the scalar reference, for every input, NaN and infinities included.
//! - `QU-2`: parts that are cut at block boundaries and quantized apart concatenate to the bytes of the whole.
//! - `QU-3`: no input makes a function panic; lengths that do not fit are a [`QuantError`].
//!
//! # Special values
//! "Infinite" and "NaN" are what the value is in f32 (for int8: after the cast to f16).
//!
//! | input | 4-bit block, nested group | int8 row |
//! |---|---|---|
//! | a NaN in it | statistic NaN (`0x7fc00000`), every code the highest (NF4 15, FP4 3, nested 255) | `SCB` NaN, codes 0 |
//! | an infinity, no NaN | statistic +inf; finite values become 0, infinities the highest code | `SCB` +inf, codes 0 |
//! | all zero | statistic 0 (a short last 4-bit block: 1e-38), the code of 0: NF4 7, FP4 0, nested 127 | `SCB` 0, codes 0 |
//! | statistic under 1e-38 | kept as it is, but values are scaled by 1e38 | cannot happen in f16 |
//! | subnormals | ordinary values; nothing is flushed to zero | the same |
//! | a tie between two codes | the lower code (FP4: the one of lower value) | to even |
//! | -0.0 | the same as 0.0 | the same as 0.0 |
//!
//! A poisoned block follows bitsandbytes, whose `max` passes a NaN on. Whoever loads weights should refuse the tensor: the
//! quantizers return how many values were not finite.

pub mod affine;
mod convert;
mod encoding;
mod error;
mod four_bit;
pub mod fp8;
mod int8;
mod kernels;
mod nested;
pub mod pack;
mod source;
mod state;

#[cfg(test)]
mod tests;

pub use encoding::{Claim, Component, Cut, Encoding, Fp8Scales, Part};
pub use error::QuantError;
pub use four_bit::{BlockSize, FourBit, FourBitCode};
pub use kernels::Kernels;
pub use nested::{DynamicMap, NESTED_BLOCK, NestedStatistics, OffsetSum, absmax_offset};
pub use source::Source;
pub use state::{NestedState, QuantState, QuantStateError};
