//! The two ends of a commit: beginning an attempt, and sealing and publishing it (`CK-1`).

use super::CheckpointError;
use super::names::{LATEST, MANIFEST, TMP, attempt_directory, parse_attempt_name, step_name, table_name};
use super::read::check_length;
use crate::manifest::{SealRequest, ShardReceipt, seal};
use crate::store::{Store, StoreError, write_small};
use crate::types::{Attempt, Step};

/// Begins a try at saving `step`: chooses an attempt number never used in this root and makes its directory.
///
/// # Errors
/// [`CheckpointError::Committed`] when the step exists; storage's error when the root cannot be written.
pub fn begin(store: &dyn Store, step: Step) -> Result<(Attempt, String), CheckpointError> {
    if !store.renames() {
        return super::claimed::begin(store, step);
    }
    let committed = step_name(step);
    if store.list("")?.contains(&committed) {
        return Err(CheckpointError::Committed { step, root: store.describe("") });
    }
    let used = store.list(TMP)?.iter().filter_map(|name| parse_attempt_name(name)).map(|(_, attempt)| attempt.0).max();
    let attempt = Attempt(used.unwrap_or(0) + 1);
    let directory = attempt_directory(step, attempt);
    store.create_dir(&directory)?;
    store.sync_dir(TMP)?;
    store.sync_dir("")?;
    Ok((attempt, directory))
}

/// Checks the files of an attempt against their receipts, seals the manifest, and publishes the directory. When this
/// returns, the checkpoint is committed and durable; its directory's name is returned.
///
/// # Errors
/// [`CheckpointError`]; nothing is published then.
pub fn commit(
    store: &dyn Store,
    request: &SealRequest<'_>,
    receipts: Vec<ShardReceipt>,
) -> Result<String, CheckpointError> {
    if !store.renames() {
        return super::claimed::commit(store, request, receipts);
    }
    let (step, directory) = (request.step, attempt_directory(request.step, request.attempt));
    check_files(store, &directory, &receipts)?;
    let manifest = seal(request, receipts).map_err(|source| CheckpointError::Seal { step, source })?;
    write_small(store, &format!("{directory}/{MANIFEST}"), &manifest.encode())?;
    store.sync_dir(&directory)?;
    let committed = step_name(step);
    store.publish(&directory, &committed)?;
    tidy_up(replace_hint(store, &committed).and_then(|()| remove_given_up(store, step)));
    Ok(committed)
}

/// The files of an attempt are as long as their receipts say.
pub(super) fn check_files(
    store: &dyn Store,
    directory: &str,
    receipts: &[ShardReceipt],
) -> Result<(), CheckpointError> {
    for file in receipts.iter().filter_map(|receipt| receipt.file.as_ref()) {
        let shard = format!("{directory}/{}", file.name);
        check_length(&store.describe(&shard), file.bytes, store.open(&shard)?.len_bytes())?;
        let table = table_name(&shard);
        check_length(&store.describe(&table), file.digest_table.bytes, store.open(&table)?.len_bytes())?;
    }
    Ok(())
}

pub(super) fn replace_hint(store: &dyn Store, committed: &str) -> Result<(), StoreError> {
    store.remove(LATEST)?;
    write_small(store, LATEST, committed.as_bytes())
}

/// The hint and the given-up tries are conveniences: the commit stands whatever becomes of them.
pub(super) fn tidy_up(result: Result<(), StoreError>) {
    if let Err(error) = result {
        tracing::warn!(%error, "cannot tidy up after the commit");
    }
}

/// Deletes tries at this and earlier steps: with the step committed nobody will finish them.
fn remove_given_up(store: &dyn Store, committed: Step) -> Result<(), StoreError> {
    for name in store.list(TMP)? {
        if parse_attempt_name(&name).is_some_and(|(step, _)| step <= committed) {
            store.remove(&format!("{TMP}/{name}"))?;
        }
    }
    Ok(())
}
