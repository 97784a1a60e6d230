//! `weightcast checkpoint`.

use std::path::Path;

use serde_json::json;

use super::args::CheckpointCommand;
use super::output::{bytes, data, fail, json, say};
use crate::checkpoint::{Checkpoint, CheckpointError, Delete, Depth, list, newest, open, prune, verify};
use crate::error::chain;
use crate::store::{Store, open_root};
use crate::types::Step;

pub(super) fn run(command: &CheckpointCommand) -> u8 {
    let result = match command {
        CheckpointCommand::List { directory, json } => list_all(directory, *json),
        CheckpointCommand::Inspect { directory, step, json } => inspect(directory, *step, *json),
        CheckpointCommand::Verify { directory, step, deep } => check(directory, *step, *deep),
        CheckpointCommand::Prune { directory, keep, dry_run } => remove(directory, *keep, *dry_run),
    };
    match result {
        Ok(()) => 0,
        Err(error) => fail(&error),
    }
}

fn total_bytes(checkpoint: &Checkpoint) -> u64 {
    checkpoint.manifest.files.iter().map(|file| file.bytes).sum()
}

fn list_all(directory: &Path, as_json: bool) -> Result<(), CheckpointError> {
    let listed = list(open_root(directory)?.store.as_ref())?;
    if as_json {
        let entries: Vec<_> = listed
            .iter()
            .map(|entry| match &entry.checkpoint {
                Ok(checkpoint) => json!({
                    "step": entry.step, "directory": entry.directory, "usable": true,
                    "world": checkpoint.manifest.world, "bytes": total_bytes(checkpoint),
                }),
                Err(error) => json!({
                    "step": entry.step, "directory": entry.directory, "usable": false, "reason": chain(error),
                }),
            })
            .collect();
        json(&entries);
        return Ok(());
    }
    if listed.is_empty() {
        say(&format!("no checkpoint in {}", directory.display()));
    }
    for entry in listed {
        match &entry.checkpoint {
            Ok(checkpoint) => data(&format!(
                "{}  {:>12}  {} ranks  {} tensors",
                entry.directory,
                bytes(total_bytes(checkpoint)),
                checkpoint.manifest.world,
                checkpoint.manifest.tensors.len()
            )),
            Err(error) => data(&format!("{}  damaged: {}", entry.directory, chain(error))),
        }
    }
    Ok(())
}

fn find(store: &dyn Store, step: Option<u64>) -> Result<Checkpoint, CheckpointError> {
    match step {
        Some(step) => open(store, Step(step)),
        None => newest(store).map(|(checkpoint, skipped)| {
            for skipped in skipped {
                say(&format!("warning: {} was passed over: {}", skipped.directory, skipped.reason));
            }
            checkpoint
        }),
    }
}

fn inspect(directory: &Path, step: Option<u64>, as_json: bool) -> Result<(), CheckpointError> {
    let checkpoint = find(open_root(directory)?.store.as_ref(), step)?;
    let manifest = &checkpoint.manifest;
    if as_json {
        json(manifest);
        return Ok(());
    }
    data(&format!(
        "checkpoint  {} (attempt {}, generation {})",
        checkpoint.directory, manifest.attempt, manifest.generation
    ));
    data(&format!("model       {}", manifest.model));
    data(&format!("written by  {} ranks", manifest.world));
    for file in &manifest.files {
        data(&format!("file        {}  {}", file.name, bytes(file.bytes)));
    }
    for tensor in &manifest.tensors {
        data(&format!("tensor      {}  {}  {}  {}", tensor.fqn, tensor.shape, tensor.encoding.name(), tensor.digest));
    }
    Ok(())
}

fn check(directory: &Path, step: Option<u64>, deep: bool) -> Result<(), CheckpointError> {
    let store = open_root(directory)?.store;
    let checkpoint = find(store.as_ref(), step)?;
    let depth = if deep { Depth::Deep } else { Depth::Shallow };
    let verified = verify(store.as_ref(), &checkpoint, depth)?;
    data(&format!(
        "{} holds: {} tensors in {} files{}",
        checkpoint.directory,
        verified.tensors,
        verified.files,
        if deep {
            format!(", {} read and verified", bytes(verified.bytes))
        } else {
            " (manifest, lengths and tables; --deep reads every byte)".to_owned()
        }
    ));
    Ok(())
}

fn remove(directory: &Path, keep: u32, dry_run: bool) -> Result<(), CheckpointError> {
    let delete = if dry_run { Delete::DryRun } else { Delete::Now };
    let keep = crate::types::as_usize(u64::from(keep));
    let pruned = prune(open_root(directory)?.store.as_ref(), keep, delete)?;
    for name in &pruned.deleted {
        data(&format!("{} {name}", if dry_run { "would delete" } else { "deleted" }));
    }
    for name in &pruned.damaged {
        say(&format!("warning: {name} is damaged and was left alone"));
    }
    Ok(())
}
