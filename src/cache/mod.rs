//! The cache of what loads make: quantized and converted weights are kept as they are made, so that the next load of the
//! same model in the same form reads them and makes nothing, and one that was interrupted goes on where it was.
//!
//! Owns: an entry's key, its files, their place in a plan, and the room that all entries take.
//! Refuses to know: how bytes are made and moved (`load`), jobs.
//!
//! Invariants:
//! - `CA-1`: the key covers everything that the bytes follow from: the files' versions, what is read of them, the form that
//!   it becomes, and this program's version.
//! - `CA-2`: a file is there under its name when it is whole. Its name and bytes follow from the tensors in it, so processes
//!   that write the same file at the same time write the same bytes, and the first one wins.
//! - `CA-3`: no byte is used before its block digest held. A file that does not hold is removed.
//! - `CA-4`: an entry that a job holds is not removed to make room.

mod entry;
mod error;
mod key;
mod layout;
mod room;
mod writer;

#[cfg(test)]
mod tests;

pub(crate) use entry::discard;
pub use entry::{CacheClaim, CachePlace, Found, attach};
pub use error::CacheError;

/// What tells the files of a plan from others of the same names and sizes: their versions, or of local files the times of their
/// last changes and samples of their content. Empty when nothing does.
///
/// # Errors
/// A file of the model cannot be read.
pub fn files_id(plan: &crate::plan::LoadPlan) -> Result<String, CacheError> {
    key::files_id(plan)
}
pub use room::{CheckedEntry, ListedEntry, list, make_room, verify};
pub(crate) use writer::CacheWriter;

use crate::plan::{Input, LoadPlan, TensorPlan};
use crate::store::is_remote;

/// Whether an entry has the tensor: what is made and has fewer bytes than what it is made of, and of a remote model
/// everything. What lies in a local file as the plan has it is not kept a second time.
fn keeps(plan: &LoadPlan, tensor: &TensorPlan) -> bool {
    let made = match &tensor.input {
        Input::Elements { range, .. } => {
            tensor.components().iter().map(|component| component.bytes).sum::<u64>() < range.len()
        }
        Input::Stored { .. } => false,
    };
    made || is_remote(&plan.root)
}
