//! Retention: deleting old checkpoints, counting only those that hold.

use super::names::{MANIFEST, TRASH};
use super::{CheckpointError, Depth, list, verify};
use crate::store::Store;
use crate::types::Step;

/// What pruning did, or would do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pruned {
    /// Directories that stay.
    pub kept: Vec<String>,
    /// Directories that were, or would be, deleted.
    pub deleted: Vec<String>,
    /// Directories that do not hold; they neither count nor are deleted.
    pub damaged: Vec<String>,
}

/// Decides which checkpoints go so that the `keep` newest verified ones stay, and deletes them when `delete` says so:
/// first renamed into the trash, then removed.
///
/// # Errors
/// [`CheckpointError`] when the root cannot be listed or changed.
pub fn prune(store: &dyn Store, keep: usize, delete: Delete) -> Result<Pruned, CheckpointError> {
    retain(store, delete, |newest_first, step| newest_first.iter().take(keep).any(|&kept| kept == step))
}

/// As [`prune`], where `keeps` says of a step whether it stays among those that hold, newest first.
///
/// # Errors
/// As [`prune`].
pub fn retain(
    store: &dyn Store,
    delete: Delete,
    keeps: impl Fn(&[Step], Step) -> bool,
) -> Result<Pruned, CheckpointError> {
    let mut pruned = Pruned { kept: Vec::new(), deleted: Vec::new(), damaged: Vec::new() };
    let mut holding = Vec::new();
    for listed in list(store)?.into_iter().rev() {
        let holds =
            listed.checkpoint.and_then(|checkpoint| verify(store, &checkpoint, Depth::Shallow).map(|_| ())).is_ok();
        match holds {
            false => pruned.damaged.push(listed.directory),
            true => holding.push((listed.step, listed.directory)),
        }
    }
    let steps: Vec<Step> = holding.iter().map(|&(step, _)| step).collect();
    for (step, directory) in holding {
        if keeps(&steps, step) { pruned.kept.push(directory) } else { pruned.deleted.push(directory) }
    }
    if delete == Delete::Now && !store.renames() {
        for directory in &pruned.deleted {
            // What makes the checkpoint visible goes first.
            store.remove(&format!("{directory}/{MANIFEST}"))?;
            store.remove(directory)?;
        }
    } else if delete == Delete::Now && !pruned.deleted.is_empty() {
        store.create_dir(TRASH)?;
        for directory in &pruned.deleted {
            let trashed = format!("{TRASH}/{directory}");
            store.remove(&trashed)?;
            store.publish(directory, &trashed)?;
            store.remove(&trashed)?;
        }
    }
    Ok(pruned)
}

/// See [`prune`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delete {
    /// Delete.
    Now,
    /// Only say what would be deleted.
    DryRun,
}
