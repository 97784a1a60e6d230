//! Loading: carries out a [`LoadPlan`] on one rank and gives its [`StateDict`].
//!
//! Owns: the bounded pipeline read → encode → send at a reader, receive → place at the others, and its figures.
//! Refuses to know: how the plan was made, processes, RPC, training.
//!
//! Invariants:
//! - `LD-1`: every rank makes the same calls of the communicator in the same order, that of the plan's pieces.
//! - `LD-2`: the bytes in flight at a reader never exceed the plan's window.
//! - `LD-3`: what a tensor becomes does not depend on threads, chunks or ranks: chunks are whole blocks, statistics are
//!   finished over the whole tensor in order.

mod dequantize;
mod encode;
mod error;
mod jobs;
mod ordered;
mod pipeline;
mod place;
mod report;
mod run;
mod scan;
mod source;
mod statistics;

#[cfg(test)]
mod tests;

pub use dequantize::WholeTensor;
pub use error::LoadError;
pub use place::Sink;
pub use report::{LoadReport, Meters, StageTimes, logical_digests};
pub use run::{Cancel, LoadOptions, load, stream};
pub use scan::{ScanError, scan};
