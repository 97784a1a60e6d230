//! Group-wise affine codes: small unsigned integers with a scale and an offset per group of weights.
//!
//! Owns: one concept for what HQQ, GPTQ, AWQ and MLX store, and the quantizers of HQQ and MLX. Codes are one u8 each here;
//! `crate::quant::pack` turns them into each tool's words. Refuses to know: files, keys, packings, threads.
//!
//! | format | weight of code `q` | offset stored | groups |
//! |---|---|---|---|
//! | HQQ | `(q - zero) * scale` | f32 zero, not an integer | runs (`axis=1`) or columns (`axis=0`) of the tensor seen as a matrix |
//! | GPTQ, AWQ | `(q - zero) * scale` | integer zero | along the input of each output |
//! | MLX | `q * scale + bias` | bias, of the weights' dtype | runs of 32, 64 or 128 along a row |
//!
//! - `AF-1`: a group is quantized from its own weights alone, but for the HQQ solver's decision to stop, which is one for
//!   the whole tensor ([`HqqStop`]).
//! - `AF-2`: the number of parts, threads or ranks changes no bit of a result, the decision to stop included ([`ErrorSum`]).

mod bits;
mod dequantize;
mod hqq;
mod hqq_error;
mod mlx;
mod torch_sum;

pub use bits::CodeBits;
pub use dequantize::{AffineGroups, GroupAxis, Offset};
pub use hqq::{HqqRule, HqqSolver, quantize_hqq};
pub use hqq_error::{ErrorSum, HqqStop};
pub use mlx::MlxRule;
