//! How each tool packs small codes into bytes and words, and how words become codes again.
//!
//! Owns: the layouts of HQQ, MLX, GPTQ and AWQ. Codes are one u8 each on the other side; packed data are the little-endian
//! bytes that a file holds. Refuses to know: scales, files, keys.
//!
//! - `PK-1`: unpacking what was packed gives the codes; packing is equal to the tools' to the byte.
//! - `PK-2`: nothing here panics for any bytes and sizes; what does not fit is a [`QuantError`](crate::quant::QuantError).

mod awq;
mod bit_stream;
mod gptq;
mod hqq;
mod region;
mod words;

pub use awq::{Awq, AwqShape, pack_awq};
pub use bit_stream::{bit_stream_bytes, pack_bit_stream, unpack_bit_stream};
pub use gptq::{Gptq, GptqShape, GptqTensors, GptqVersion, pack_gptq_weight, pack_gptq_zeros};
pub use hqq::HqqPacking;
pub use region::Region;
