//! An entry, as a job finds it and holds it.

use std::path::PathBuf;

use super::layout::{FileOnDisk, SUFFIX};
use super::{CacheError, keeps, room};
use crate::format::FileEntry;
use crate::plan::{CachePlan, Input, LoadPlan, TensorPlan};
use crate::store::{DirectoryLock, LocalStore, LockKind, Store, StoreError, is_remote, write_small};

/// What an entry says of itself to people.
pub(super) const ABOUT: &str = "entry.json";

/// Where the cache is, and what it may take.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CachePlace {
    /// The directory.
    pub root: PathBuf,
    /// Bytes that all entries together may take.
    pub max_bytes: u64,
}

/// What the cache has of a plan.
#[derive(Debug)]
pub struct Found {
    /// The entry's name: its key.
    pub key: String,
    /// Bytes that the load reads from the cache.
    pub cached_bytes: u64,
    /// Bytes that it makes, and that the entry lacks.
    pub missing_bytes: u64,
    place: CachePlace,
    about: Vec<u8>,
    lock: Option<DirectoryLock>,
}

/// The entry of a job, held until this is dropped.
#[derive(Debug)]
pub struct CacheClaim {
    _lock: DirectoryLock,
}

/// Looks `plan` up in the cache: what an entry has is read from there. Nothing is changed in the cache but for files that do not
/// hold, which are removed. Nothing is returned when nothing of the plan belongs into a cache.
///
/// # Errors
/// [`CacheError`] when the cache or a file of the model cannot be read.
pub fn attach(plan: &mut LoadPlan, place: &CachePlace) -> Result<Option<Found>, CacheError> {
    if is_remote(&place.root) {
        return Err(CacheError::Remote { found: place.root.display().to_string() });
    }
    // A web server that tells no versions may have another file under the same name.
    let is_known = !is_remote(&plan.root) || plan.versions.len() == plan.files.len();
    if !is_known || !plan.tensors.iter().any(|tensor| keeps(plan, tensor)) {
        return Ok(None);
    }
    let key = super::key::key(plan)?;
    let cache = LocalStore::new(&place.root);
    remove_leftovers(&cache, &key)?;
    // While it is held nobody removes it; without an entry there is nothing to hold.
    let lock = cache.lock(&key, LockKind::Shared)?;
    let entry = LocalStore::new(place.root.join(&key));
    let files = if lock.is_some() { files(&entry)? } else { Vec::new() };
    let about = serde_json::json!({
        "model": plan.model,
        "formats": formats(plan),
        "program": concat!("weightcast ", env!("CARGO_PKG_VERSION")),
    });
    let mut found = Found {
        cached_bytes: 0,
        missing_bytes: 0,
        place: place.clone(),
        about: serde_json::to_vec_pretty(&about).expect("texts always become JSON"),
        key,
        lock,
    };
    let mut used = CachePlan { root: entry.describe(""), files: Vec::new(), digest_tables: Vec::new(), writes: false };
    let first = u32::try_from(plan.files.len()).unwrap_or(u32::MAX);
    let mut numbers: Vec<Option<u32>> = vec![None; files.len()];
    for index in 0..plan.tensors.len() {
        let Some(tensor) = plan.tensors.get(index).filter(|tensor| keeps(plan, tensor)) else { continue };
        let bytes: u64 = tensor.components().iter().map(|component| component.bytes).sum();
        let next = first.saturating_add(u32::try_from(used.files.len()).unwrap_or(u32::MAX));
        let stored = files.iter().zip(&mut numbers).find_map(|(file, number)| {
            let parts = file.parts(tensor, number.unwrap_or(next))?;
            if number.replace(number.unwrap_or(next)).is_none() {
                used.files.push(FileEntry { name: file.name.clone(), len_bytes: file.len_bytes });
                used.digest_tables.push(file.digest_table);
            }
            Some(parts)
        });
        match (stored, plan.tensors.get_mut(index)) {
            (Some((parts, nested_offset)), Some(tensor)) => {
                tensor.input = Input::Stored { parts, nested_offset };
                found.cached_bytes += bytes;
            }
            _ => found.missing_bytes += bytes,
        }
    }
    plan.cache = Some(used);
    Ok(Some(found))
}

impl Found {
    /// Holds the entry for a job, whose readers then write into it what it lacks, if there is room.
    ///
    /// # Errors
    /// [`CacheError`] when the directory cannot be made or changed.
    pub fn claim(mut self, plan: &mut LoadPlan) -> Result<CacheClaim, CacheError> {
        let cache = LocalStore::new(&self.place.root);
        let lock = loop {
            match self.lock.take() {
                Some(lock) => break lock,
                None => {
                    cache.create_dir(&self.key)?;
                    // Somebody may remove it before it is locked; who does has nothing to wait for.
                    self.lock = cache.lock(&self.key, LockKind::Shared)?;
                }
            }
        };
        lock.touch()?;
        if self.missing_bytes > 0 {
            let has_room = room::make_room(&self.place, &self.key, self.missing_bytes)?;
            if let Some(used) = plan.cache.as_mut().filter(|_| has_room) {
                used.writes = true;
                match write_small(&cache, &format!("{}/{ABOUT}", self.key), &self.about) {
                    Ok(()) | Err(StoreError::Exists { .. }) => {}
                    Err(error) => return Err(error.into()),
                }
            }
        }
        Ok(CacheClaim { _lock: lock })
    }
}

/// The forms of an entry's tensors, each once.
fn formats(plan: &LoadPlan) -> Vec<String> {
    let mut names: Vec<String> = plan
        .tensors
        .iter()
        .filter(|tensor| keeps(plan, tensor))
        .map(|tensor: &TensorPlan| tensor.encoding.name())
        .collect();
    names.sort_unstable();
    names.dedup();
    names
}

/// The files of an entry; those that do not hold are removed.
pub(super) fn files(entry: &LocalStore) -> Result<Vec<FileOnDisk>, CacheError> {
    let mut files = Vec::new();
    for name in entry.list("")?.iter().filter(|name| name.ends_with(SUFFIX)) {
        match FileOnDisk::open(entry, name) {
            Ok(file) => files.push(file),
            Err(error) => {
                tracing::warn!(%error, "a damaged file of the cache is removed");
                remove_file(entry, name)?;
            }
        }
    }
    Ok(files)
}

/// The name under which a writer writes what becomes the file `name`; `writer` is no other's, on any host.
pub(super) fn unfinished(name: &str, writer: &str) -> String {
    format!(".{name}.{writer}")
}

/// Removes what processes that ended have left unfinished; while somebody holds the entry, it may be theirs.
fn remove_leftovers(cache: &LocalStore, key: &str) -> Result<(), StoreError> {
    let Some(_alone) = cache.lock(key, LockKind::Exclusive)? else { return Ok(()) };
    for name in cache.list(key)?.iter().filter(|name| name.starts_with('.')) {
        cache.remove(&format!("{key}/{name}"))?;
    }
    Ok(())
}

/// Removes a file and its digests.
pub(super) fn remove_file(entry: &dyn Store, name: &str) -> Result<(), StoreError> {
    entry.remove(name)?;
    entry.remove(&crate::checkpoint::table_name(name))
}

/// Removes the file `name` of an entry, which does not hold; whether it is gone.
pub(crate) fn discard(entry: &dyn Store, name: &str) -> bool {
    remove_file(entry, name).inspect_err(|error| tracing::warn!(%error, "a damaged file of the cache stays")).is_ok()
}
