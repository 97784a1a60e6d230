//! The time that training stands still for a checkpoint, beside one copy of the state.

use std::path::Path;

use super::{BenchError, Figure};
use crate::store::{LocalStore, Store as _};
use crate::types::WorldSize;

const RUNS: u64 = 9;

/// Milliseconds of a snapshot of a training state of `bytes` bytes on one rank, and of a copy of as many, in turn.
///
/// # Errors
/// [`BenchError`].
pub fn stall(directory: &Path, bytes: u64) -> Result<Vec<Figure>, BenchError> {
    LocalStore::new(directory).create_dir("").map_err(BenchError::of)?;
    let base = super::checkpoint::plan(WorldSize::ONE, 1 << 20);
    let times = crate::train::stalls(&base, directory, (bytes, RUNS)).map_err(BenchError::of)?;
    let median = |mut times: Vec<f64>| {
        times.sort_by(f64::total_cmp);
        times.get(times.len() / 2).copied().unwrap_or(f64::NAN)
    };
    let stalled = median(times.iter().map(|(stalled, _)| stalled.as_secs_f64() * 1e3).collect());
    let copied = median(times.iter().map(|(_, copied)| copied.as_secs_f64() * 1e3).collect());
    Ok(vec![Figure::new("snapshot of a training state", stalled, "ms", (copied, "one copy of as many bytes"))])
}
