//! The files that a plan reads from, open.

use std::collections::BTreeSet;

use super::LoadError;
use super::jobs::{Work, jobs};
use super::report::{Meters, timed};
use crate::checkpoint::VerifiedFile;
use crate::plan::{Input, LoadPlan};
use crate::store::{ReadAt, Store};
use crate::types::{ByteRange, Fqn, Rank, as_usize};

/// All files of a plan.
#[derive(Debug)]
pub(super) enum Files {
    /// A model's: their headers were checked when the plan was made.
    Model(Vec<Box<dyn ReadAt>>),
    /// A checkpoint's: every touched block is verified. Those that this rank reads nothing of are not opened, so that
    /// many ranks do not all read the digests of all.
    Checkpoint(Vec<Option<VerifiedFile>>),
}

impl Files {
    /// Opens the files that `rank` reads and checks their lengths against the plan.
    pub(super) fn open(plan: &LoadPlan, rank: Rank, store: &dyn Store) -> Result<Self, LoadError> {
        if plan.digest_tables.is_empty() {
            let mut files = Vec::with_capacity(plan.files.len());
            for entry in &plan.files {
                let file = store.open(&entry.name)?;
                if file.len_bytes() != entry.len_bytes {
                    return Err(LoadError::Changed {
                        path: store.describe(&entry.name),
                        expected_bytes: entry.len_bytes,
                        found_bytes: file.len_bytes(),
                    });
                }
                expect_version(plan, files.len(), file.as_ref(), &|| store.describe(&entry.name))?;
                files.push(file);
            }
            return Ok(Self::Model(files));
        }
        let read = stored_files(plan, rank);
        let mut files = Vec::with_capacity(plan.files.len());
        for (index, (entry, table)) in (0..).zip(plan.files.iter().zip(&plan.digest_tables)) {
            let open = || VerifiedFile::open(store, &entry.name, entry.len_bytes, *table);
            files.push(read.contains(&index).then(open).transpose()?);
        }
        Ok(Self::Checkpoint(files))
    }

    /// Fills `into` with a file's bytes from `offset`, for tensor `fqn`.
    pub(super) fn read(
        &self,
        fqn: &Fqn,
        (file, offset): (u32, u64),
        into: &mut [u8],
        meters: &Meters,
    ) -> Result<(), LoadError> {
        let unlisted = || LoadError::Plan { fqn: fqn.clone(), what: "it names a file that is not listed" };
        let file = as_usize(u64::from(file));
        timed(&meters.read_ns, || match self {
            Self::Model(files) => files
                .get(file)
                .ok_or_else(unlisted)?
                .read_exact_at(offset, into)
                .map_err(|source| LoadError::Read { fqn: fqn.clone(), source }),
            Self::Checkpoint(files) => Ok(files
                .get(file)
                .and_then(Option::as_ref)
                .ok_or_else(unlisted)?
                .read_exact_at(offset, into, fqn.as_str())?),
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

/// The files of a checkpoint that the jobs of `rank` touch.
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
