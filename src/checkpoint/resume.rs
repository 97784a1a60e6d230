//! Resuming: a checkpoint's manifest becomes the plan of a load on any number of ranks.

use super::{Checkpoint, CheckpointError};
use crate::format::FileEntry;
use crate::model::Role;
use crate::plan::{Encoding, Input, LoadPlan, LoadRequest, StoredChunk, TensorPlan, assemble};
use crate::types::Rank;

/// Plans the load of a checkpoint. The encoding of every tensor is the checkpoint's; `request` gives world, strategy and
/// placement, and its root must be the checkpoint's directory.
///
/// # Errors
/// [`CheckpointError::Plan`].
pub fn plan_resume(mut request: LoadRequest, checkpoint: &Checkpoint) -> Result<LoadPlan, CheckpointError> {
    let manifest = &checkpoint.manifest;
    request.config_json.clone_from(&manifest.config_json);
    request.model.clone_from(&manifest.model);
    let files = manifest
        .files
        .iter()
        .map(|file| FileEntry { name: format!("{}/{}", checkpoint.directory, file.name), len_bytes: file.bytes })
        .collect();
    let tensor = |saved: &crate::manifest::SavedTensor| {
        let chunk =
            |chunk: &crate::manifest::SavedChunk| StoredChunk { file: chunk.file, range: chunk.range, at: chunk.at };
        // What was cut once can be cut again; a plain tensor's role is not stored, so matrices count as linear layers.
        let role = if matches!(saved.encoding, Encoding::Plain { .. }) && saved.shape.dims() < 2 {
            Role::Norm
        } else {
            Role::Linear
        };
        TensorPlan {
            fqn: saved.fqn.clone(),
            shape: saved.shape.clone(),
            encoding: saved.encoding,
            sharded: request.shards(&saved.shape, role),
            owner: None,
            reader: Rank::ZERO,
            input: Input::Stored {
                parts: saved.parts.iter().map(|part| part.chunks.iter().map(chunk).collect()).collect(),
                nested_offset: saved.nested_offset,
            },
        }
    };
    let tensors = manifest.tensors.iter().map(tensor).collect();
    let mut plan = assemble(request.clone(), files, tensors, manifest.aliases.clone())?;
    plan.digest_tables = manifest.files.iter().map(|file| file.digest_table).collect();
    Ok(plan)
}
