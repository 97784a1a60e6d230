//! The words of the house: small value types that every module shares.
//!
//! Owns: ids (rank, generation, step), tensor names, element types, shapes, byte ranges, digests, checked numbers.
//! Refuses to know: files, sockets, clocks, configuration, any format.

mod addresses;
mod digest;
mod dtype;
mod ids;
mod num;
mod range;
mod shape;
mod wish;

pub use addresses::{BadAddresses, pack_addresses, unpack_addresses};
pub use digest::{BlockDigests, DIGEST_BLOCK_BYTES, DigestTable, TensorDigest, crc32c};
pub use dtype::{DType, UnknownDType};
pub use ids::{Attempt, Fqn, Generation, JobId, Rank, Step, WorldSize, ZeroWorld};
pub use num::{as_f64, as_u64, as_usize, f32Bits};
pub use range::ByteRange;
pub use shape::{Shape, ShapeOverflow};
pub use wish::{BackendWish, DeviceWish, Sharing};
