//! The files that a plan reads from, open.

use std::collections::BTreeSet;

use super::LoadError;
use super::jobs::{Work, jobs};
use super::report::{Meters, timed};
use crate::checkpoint::{CheckpointError, VerifiedFile};
use crate::error::{Classify as _, Kind};
use crate::format::FileEntry;
use crate::plan::{Input, LoadPlan};
use crate::store::{ReadAt, Store};
use crate::types::{ByteRange, DigestTable, Fqn, Rank, as_usize};

/// All files of a plan: its own, then those of the cache.
#[derive(Debug)]
pub(super) struct Files<'a> {
    files: Vec<OpenFile>,
    /// The number of the first file of the cache, and where it is.
    cache: (usize, Option<&'a dyn Store>),
}

#[derive(Debug)]
enum OpenFile {
    /// A model's: its header was checked when the plan was made.
    Model(Box<dyn ReadAt>),
    /// A checkpoint's, or of the cache: every touched block is verified.
    Verified(VerifiedFile),
    /// This rank reads nothing of it; so many ranks do not all read the digests of all.
    Closed,
}

impl<'a> Files<'a> {
    /// No files, for a rank that reads none.
    pub(super) const fn none() -> Self {
        Self { files: Vec::new(), cache: (0, None) }
    }

    /// Opens the files that `rank` reads and checks their lengths against the plan. `cache` is the entry that the plan names.
    pub(super) fn open(
        plan: &LoadPlan,
        rank: Rank,
        store: &dyn Store,
        cache: Option<&'a dyn Store>,
    ) -> Result<Self, LoadError> {
        let mut files = Vec::with_capacity(plan.files.len());
        let read = stored_files(plan, rank);
        let verified = |number: usize, store: &dyn Store, entry: &FileEntry, table: DigestTable| {
            let wanted = u32::try_from(number).is_ok_and(|number| read.contains(&number));
            let open = || VerifiedFile::open(store, &entry.name, entry.len_bytes, table).map(OpenFile::Verified);
            if wanted { open() } else { Ok(OpenFile::Closed) }
        };
        if plan.digest_tables.is_empty() {
            for entry in &plan.files {
                files.push(OpenFile::Model(open_model(plan, files.len(), entry, store)?));
            }
        } else {
            for (entry, table) in plan.files.iter().zip(&plan.digest_tables) {
                files.push(verified(files.len(), store, entry, *table)?);
            }
        }
        let first = files.len();
        if let (Some(used), Some(cache)) = (&plan.cache, cache) {
            for (entry, table) in used.files.iter().zip(&used.digest_tables) {
                let open = verified(files.len(), cache, entry, *table);
                files.push(open.map_err(|source| damaged(cache, &entry.name, source))?);
            }
        }
        Ok(Self { files, cache: (first, cache) })
    }

    /// Fills `into` with a file's bytes from `offset`, for tensor `fqn`.
    pub(super) fn read(
        &self,
        fqn: &Fqn,
        (file, offset): (u32, u64),
        into: &mut [u8],
        meters: &Meters,
    ) -> Result<(), LoadError> {
        let number = as_usize(u64::from(file));
        let unlisted = LoadError::Plan { fqn: fqn.clone(), what: "it names a file that is not listed" };
        timed(&meters.read_ns, || match self.files.get(number) {
            None | Some(OpenFile::Closed) => Err(unlisted),
            Some(OpenFile::Model(file)) => {
                file.read_exact_at(offset, into).map_err(|source| LoadError::Read { fqn: fqn.clone(), source })
            }
            Some(OpenFile::Verified(file)) => {
                file.read_exact_at(offset, into, fqn.as_str()).map_err(|source| match self.cache {
                    (first, Some(cache)) if number >= first => damaged(cache, file.name(), source),
                    _ => source.into(),
                })
            }
        })
    }

    /// Fills `into` with the bytes `wanted` of a component that is stored in `chunks`.
    pub(super) fn read_stored(
        &self,
        fqn: &Fqn,
        chunks: &[crate::plan::StoredChunk],
        wanted: ByteRange,
        into: &mut [u8],
        meters: &Meters,
    ) -> Result<(), LoadError> {
        let mut filled = 0;
        for chunk in chunks {
            let whole = ByteRange::with_len(chunk.at, chunk.range.len()).unwrap_or_default();
            let Some(part) = whole.intersect(wanted) else { continue };
            let offset = chunk.range.start() + (part.start() - chunk.at);
            let target = as_usize(part.start() - wanted.start())..as_usize(part.end() - wanted.start());
            let target = into.get_mut(target).unwrap_or_default();
            self.read(fqn, (chunk.file, offset), target, meters)?;
            filled += part.len();
        }
        if filled == wanted.len() {
            Ok(())
        } else {
            Err(LoadError::Plan { fqn: fqn.clone(), what: "its stored chunks have a hole" })
        }
    }
}

fn open_model(
    plan: &LoadPlan,
    number: usize,
    entry: &FileEntry,
    store: &dyn Store,
) -> Result<Box<dyn ReadAt>, LoadError> {
    let file = store.open(&entry.name)?;
    if file.len_bytes() != entry.len_bytes {
        return Err(LoadError::Changed {
            path: store.describe(&entry.name),
            expected_bytes: entry.len_bytes,
            found_bytes: file.len_bytes(),
        });
    }
    expect_version(plan, number, file.as_ref(), &|| store.describe(&entry.name))?;
    Ok(file)
}

/// A file of the cache that does not hold is removed, so that the next load makes its tensors anew.
fn damaged(cache: &dyn Store, name: &str, source: CheckpointError) -> LoadError {
    let holds_not = matches!(source.kind(), Kind::Corrupt | Kind::NotFound);
    let outcome = match holds_not && crate::cache::discard(cache, name) {
        true => "it was removed from the cache; start the job again, which makes it anew",
        false => "a file of the cache cannot be read; load without it, or remove it",
    };
    LoadError::Cache { source, outcome }
}

/// A file that has the length of before may still be another: where the plan names its version, this is the one.
fn expect_version(
    plan: &LoadPlan,
    index: usize,
    file: &dyn ReadAt,
    path: &dyn Fn() -> String,
) -> Result<(), LoadError> {
    let Some(expected) = plan.versions.get(index) else { return Ok(()) };
    let found = file.version().unwrap_or_else(|| "no version".to_owned());
    if found == *expected {
        return Ok(());
    }
    Err(LoadError::Version { path: path(), expected: expected.clone(), found })
}

/// The files of a checkpoint, or of the cache, that the jobs of `rank` touch.
fn stored_files(plan: &LoadPlan, rank: Rank) -> BTreeSet<u32> {
    let mut files = BTreeSet::new();
    for job in jobs(plan, rank) {
        let input = plan.tensors.get(job.tensor).map(|tensor| &tensor.input);
        let (Some(Input::Stored { parts, .. }), Work::Copy { component, range }) = (input, job.work) else { continue };
        for chunk in parts.get(component).map_or(&[][..], Vec::as_slice) {
            let whole = ByteRange::with_len(chunk.at, chunk.range.len()).unwrap_or_default();
            if whole.intersect(range).is_some() {
                files.insert(chunk.file);
            }
        }
    }
    files
}
