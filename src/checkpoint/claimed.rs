//! The two ends of a commit in a store that does not rename (docs/FORMAT.md, 6a).
//!
//! Owns: the order in which objects are created. Refuses to know: what is in them.
//!
//! - `CL-1`: an attempt's number belongs to one committer, who created its claim, so no two write the same name.
//! - `CL-2`: the step's manifest is created last and never replaced: of several committers of a step exactly one succeeds,
//!   and the others are told.

use super::CheckpointError;
use super::commit::{check_files, replace_hint, tidy_up};
use super::names::{CLAIM, MANIFEST, claimed_directory, claimed_name, parse_claimed_name, parse_step_name, step_name};
use crate::manifest::{SealRequest, ShardReceipt, seal};
use crate::store::{Store, StoreError, write_small};
use crate::types::{Attempt, Step};

/// Numbers that are tried: so many committers at once are a mistake.
const MAX_CLAIMS: u64 = 64;

/// As [`super::begin`].
pub(super) fn begin(store: &dyn Store, step: Step) -> Result<(Attempt, String), CheckpointError> {
    let names = store.list(&step_name(step))?;
    if names.iter().any(|name| name == MANIFEST) {
        return Err(committed(store, step));
    }
    let used = names.iter().filter_map(|name| parse_claimed_name(name)).map(|attempt| attempt.0).max().unwrap_or(0);
    let mark = mark();
    let mut number = used + 1;
    loop {
        let attempt = Attempt(number);
        let directory = claimed_directory(step, attempt);
        match write_small(store, &format!("{directory}/{CLAIM}"), mark.as_bytes()) {
            Ok(()) => return Ok((attempt, directory)),
            Err(error) if is_taken(&error) && number < used + MAX_CLAIMS => number += 1,
            Err(error) => return Err(error.into()),
        }
    }
}

/// As [`super::commit`].
pub(super) fn commit(
    store: &dyn Store,
    request: &SealRequest<'_>,
    mut receipts: Vec<ShardReceipt>,
) -> Result<String, CheckpointError> {
    let (step, attempt) = (request.step, request.attempt);
    let directory = step_name(step);
    if store.list(&directory)?.iter().any(|name| name == MANIFEST) {
        return Err(committed(store, step));
    }
    // The manifest lies beside the attempt and names its files from there.
    for file in receipts.iter_mut().filter_map(|receipt| receipt.file.as_mut()) {
        file.name = format!("{}/{}", claimed_name(attempt), file.name);
    }
    check_files(store, &directory, &receipts)?;
    let manifest = seal(request, receipts).map_err(|source| CheckpointError::Seal { step, source })?;
    crate::faults::point("store.publish");
    // `CL-2`: this creation is the commit.
    match write_small(store, &format!("{directory}/{MANIFEST}"), &manifest.encode()) {
        Err(error) if is_taken(&error) => return Err(committed(store, step)),
        result => result?,
    }
    crate::faults::point("store.published");
    tidy_up(replace_hint(store, &directory).and_then(|()| remove_given_up(store, step, attempt)));
    Ok(directory)
}

fn committed(store: &dyn Store, step: Step) -> CheckpointError {
    CheckpointError::Committed { step, root: store.describe("") }
}

const fn is_taken(error: &StoreError) -> bool {
    matches!(error, StoreError::Exists { .. })
}

/// Deletes the other tries at this step, and earlier steps that nobody has committed: nobody will finish them.
fn remove_given_up(store: &dyn Store, step: Step, own: Attempt) -> Result<(), StoreError> {
    for name in store.list(&step_name(step))? {
        if parse_claimed_name(&name).is_some_and(|attempt| attempt != own) {
            store.remove(&format!("{}/{name}", step_name(step)))?;
        }
    }
    let steps = store.list("")?;
    for earlier in steps.iter().filter_map(|name| parse_step_name(name)).filter(|earlier| *earlier < step) {
        let directory = step_name(earlier);
        if !store.list(&directory)?.iter().any(|name| name == MANIFEST) {
            store.remove(&directory)?;
        }
    }
    Ok(())
}

/// 16 bytes that nobody else writes, in hexadecimal: two claims of one number must differ.
fn mark() -> String {
    let mut bytes = [0_u8; 16];
    let mut filled = 0;
    while let Some(rest) = bytes.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        match rustix::rand::getrandom(rest, rustix::rand::GetRandomFlags::empty()) {
            Ok(count) => filled += count,
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => panic!("the operating system gives no random bytes: {errno}"),
        }
    }
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
