//! Training data: files in, batches of packed sequences out, in an order that is a function of (seed, epoch).
//!
//! Owns: [`DataConfig`], [`Tokenizer`], [`Dataset`]: reading records, tokenizing, packing, batches, the held-out part.
//! Refuses to know: models, devices, ranks, steps. Which sequence comes when is [`crate::recipe::order::Order`]'s.
//!
//! Invariants:
//! - `DA-1`: the same files, configuration and tokenizer give the same sequences on every rank and at every start;
//!   [`Dataset::digest`] says so.
//! - `DA-2`: no held-out token is trained on; records of equal text are on the same side.

mod config;
mod dataset;
mod error;
mod lines;
mod load;
mod pack;
mod record;
mod tokenizer;

pub use config::{AddBos, DataConfig, DataFormat, OnBadLine};
pub use dataset::{Batch, Counts, Dataset, IGNORED, Split, SplitCounts};
pub use error::{BadLine, DataError, LineProblem};
pub use tokenizer::Tokenizer;

#[cfg(test)]
mod tests;
