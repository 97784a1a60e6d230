//! What is in a checkpoint root, and which checkpoint to resume from (docs/FORMAT.md, 7).

use super::names::{MANIFEST, parse_step_name, step_name};
use super::read::check_length;
use super::{CheckpointError, names};
use crate::error::{Classify as _, Kind, chain};
use crate::manifest::{MAX_MANIFEST_BYTES, Manifest};
use crate::store::{Store, read_small};
use crate::types::Step;

/// A committed checkpoint whose manifest and sizes hold.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    /// The name of its directory in the root.
    pub directory: String,
    /// Its table of contents.
    pub manifest: Manifest,
}

/// A step directory and what is known of it without reading tensors.
#[derive(Debug)]
pub struct Listed {
    /// The step.
    pub step: Step,
    /// Its directory.
    pub directory: String,
    /// The checkpoint, or why it cannot be used.
    pub checkpoint: Result<Checkpoint, CheckpointError>,
}

/// A newer step that was passed over, and why.
#[derive(Clone, Debug)]
pub struct Skipped {
    /// Its directory.
    pub directory: String,
    /// The reason in words.
    pub reason: String,
}

/// All step directories of a root, oldest first.
///
/// # Errors
/// When the root cannot be listed; a damaged step is an entry, not an error.
pub fn list(store: &dyn Store) -> Result<Vec<Listed>, CheckpointError> {
    let mut steps: Vec<Step> = store.list("")?.iter().filter_map(|name| parse_step_name(name)).collect();
    steps.sort_unstable();
    let listed = |step| Listed { step, directory: step_name(step), checkpoint: open(store, step) };
    // Where tries lie below the step's own name, a step without a manifest is one that nobody has committed.
    let is_try = |listed: &Listed| !store.renames() && listed.checkpoint.as_ref().is_err_and(lacks_manifest);
    Ok(steps.into_iter().map(listed).filter(|listed| !is_try(listed)).collect())
}

/// Opens the checkpoint of a step: manifest, version, coverage, and the length of every file.
///
/// # Errors
/// [`CheckpointError`] with the first thing that does not hold.
pub fn open(store: &dyn Store, step: Step) -> Result<Checkpoint, CheckpointError> {
    let directory = step_name(step);
    let name = format!("{directory}/{MANIFEST}");
    let bytes = match read_small(store, &name, MAX_MANIFEST_BYTES) {
        Err(source) if source.kind() == Kind::NotFound && !store.renames() => {
            return Err(CheckpointError::NoManifest { path: store.describe(&name) });
        }
        result => result?,
    };
    let manifest =
        Manifest::decode(&bytes).map_err(|source| CheckpointError::Manifest { path: store.describe(&name), source })?;
    for file in &manifest.files {
        let shard = format!("{directory}/{}", file.name);
        check_length(&store.describe(&shard), file.bytes, store.open(&shard)?.len_bytes())?;
        let table = names::table_name(&shard);
        check_length(&store.describe(&table), file.digest_table.bytes, store.open(&table)?.len_bytes())?;
    }
    Ok(Checkpoint { directory, manifest })
}

/// A file that the manifest names and that is not there is damage, and another error.
fn lacks_manifest(error: &CheckpointError) -> bool {
    matches!(error, CheckpointError::NoManifest { .. })
}

/// The newest checkpoint that holds, and the newer ones that do not.
///
/// # Errors
/// [`CheckpointError::None`] when there is no step at all, [`CheckpointError::NoneUsable`] when none holds.
pub fn newest(store: &dyn Store) -> Result<(Checkpoint, Vec<Skipped>), CheckpointError> {
    let mut skipped = Vec::new();
    for listed in list(store)?.into_iter().rev() {
        match listed.checkpoint {
            Ok(checkpoint) => return Ok((checkpoint, skipped)),
            Err(error) => skipped.push(Skipped { directory: listed.directory, reason: chain(&error) }),
        }
    }
    let root = store.describe("");
    if skipped.is_empty() {
        return Err(CheckpointError::None { root });
    }
    let reasons: Vec<String> = skipped.into_iter().map(|skipped| skipped.reason).collect();
    Err(CheckpointError::NoneUsable { root, reasons: reasons.join("; ") })
}
