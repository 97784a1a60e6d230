//! Resuming: a checkpoint's manifest becomes the plan of a load on any number of ranks.

use super::{Checkpoint, CheckpointError};
use crate::format::FileEntry;
use crate::manifest::SavedTensor;
use crate::model::Role;
use crate::plan::{Encoding, Input, LoadPlan, LoadRequest, StoredChunk, TensorPlan, assemble};
use crate::types::{DType, Rank};

/// Plans the load of a checkpoint. The encoding of every tensor is the checkpoint's; `request` gives world, strategy and
/// placement, and its root must be the checkpoint's directory.
///
/// # Errors
/// [`CheckpointError::Plan`].
pub fn plan_resume(mut request: LoadRequest, checkpoint: &Checkpoint) -> Result<LoadPlan, CheckpointError> {
    let manifest = &checkpoint.manifest;
    request.config_json.clone_from(&manifest.config_json);
    request.model.clone_from(&manifest.model);
    let files = files(checkpoint);
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

/// Plans the load of a training run's state: `fresh` says what the run has on the ranks that there are now, the checkpoint
/// where each tensor's bytes are.
///
/// # Errors
/// [`CheckpointError::State`] when the checkpoint lacks a tensor, or has it in another shape or form.
pub fn plan_state(mut fresh: LoadPlan, checkpoint: &Checkpoint) -> Result<LoadPlan, CheckpointError> {
    let manifest = &checkpoint.manifest;
    let f32 = Encoding::Plain { dtype: DType::F32 };
    for tensor in &mut fresh.tensors {
        let saved: Option<&SavedTensor> = manifest.tensors.iter().find(|saved| saved.fqn == tensor.fqn);
        let Some(saved) = saved.filter(|saved| saved.shape == tensor.shape && saved.encoding == f32) else {
            return Err(CheckpointError::State {
                directory: checkpoint.directory.clone(),
                fqn: tensor.fqn.as_str().to_owned(),
                expected: format!("f32 {}", tensor.shape),
                found: saved.map_or_else(|| "nothing".to_owned(), |saved| saved.shape.to_string()),
            });
        };
        let chunk =
            |chunk: &crate::manifest::SavedChunk| StoredChunk { file: chunk.file, range: chunk.range, at: chunk.at };
        let parts = saved.parts.iter().map(|part| part.chunks.iter().map(chunk).collect()).collect();
        tensor.input = Input::Stored { parts, nested_offset: None };
    }
    fresh.files = files(checkpoint);
    fresh.digest_tables = manifest.files.iter().map(|file| file.digest_table).collect();
    Ok(fresh)
}

fn files(checkpoint: &Checkpoint) -> Vec<FileEntry> {
    let entry = |file: &crate::manifest::ShardFile| FileEntry {
        name: format!("{}/{}", checkpoint.directory, file.name),
        len_bytes: file.bytes,
    };
    checkpoint.manifest.files.iter().map(entry).collect()
}
