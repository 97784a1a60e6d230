//! A repository of a hub, looked at and not downloaded: the names and sizes of its files, and ranges of them.
//!
//! Owns: one commit of a repository as a [`Store`] that only reads, and the count of what was fetched. What the cache has
//! already is read from there.
//! Refuses to know: what the files say.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::cache::Repository;
use super::download::is_complete;
use super::http::{FileFacts, Http};
use super::local::{MAX_JSON_BYTES, indexed_names};
use super::remote::COMPANIONS;
use super::select::{INDEX_NAME, Selection, confined, select};
use super::{HubConfig, HubError, ModelKind};
use crate::error::{Classify as _, Kind};
use crate::store::{LocalStore, NewFile, Operation, ReadAt, Store, StoreError, read_small};
use crate::types::as_u64;

/// One commit of a repository.
#[derive(Debug)]
pub struct HubPeek {
    http: Arc<Http>,
    cached: LocalStore,
    id: String,
    commit: String,
    names: Vec<String>,
    facts: Mutex<BTreeMap<String, FileFacts>>,
    fetched: Arc<AtomicU64>,
}

/// The files of a model in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeekedModel {
    /// The weight files, sorted by name.
    pub names: Vec<String>,
    /// Their format.
    pub kind: ModelKind,
    /// config.json, if there is one.
    pub config_json: Option<Vec<u8>>,
    /// The sharded index's name and text, if there is one.
    pub index_json: Option<(String, Vec<u8>)>,
}

/// A file that a download would bring.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeekedFile {
    /// Its name.
    pub name: String,
    /// Its length in bytes.
    pub len_bytes: u64,
    /// Bytes of it that the cache has: all, or what a download that broke off has left.
    pub cached_bytes: u64,
    /// Whether it has weights.
    pub is_weights: bool,
}

impl HubPeek {
    /// The repository `id` at the commit that `revision` has now.
    ///
    /// # Errors
    /// [`HubError`]; offline, that the hub is not asked.
    pub fn open(id: &str, revision: &str, config: &HubConfig) -> Result<Self, HubError> {
        if config.offline {
            let what = "its headers, which are asked of the hub".to_owned();
            let (id, revision) = (id.to_owned(), revision.to_owned());
            return Err(HubError::Offline { id, revision, cache: config.cache.clone(), what });
        }
        let http = Http::new(config)?;
        let listing = http.listing(id, revision)?;
        let repository = Repository::new(&config.cache, id);
        Ok(Self {
            http: Arc::new(http),
            cached: LocalStore::new(repository.snapshot(&listing.commit)),
            id: id.to_owned(),
            commit: listing.commit,
            names: listing.names,
            facts: Mutex::default(),
            fetched: Arc::default(),
        })
    }

    /// The commit.
    #[must_use]
    pub fn commit(&self) -> &str {
        &self.commit
    }

    /// Bytes of files that were asked of the hub so far.
    #[must_use]
    pub fn fetched_bytes(&self) -> u64 {
        self.fetched.load(Ordering::Relaxed)
    }

    /// Which of the files are the model's.
    ///
    /// # Errors
    /// [`HubError`], as for a download; [`StoreError`] becomes the hub's refusal.
    pub fn model(&self) -> Result<PeekedModel, StoreError> {
        let place = format!("{}@{}", self.id, self.commit);
        let has = |name: &str| self.names.iter().any(|known| known == name);
        let optional = |name: &str| has(name).then(|| read_small(self, name, MAX_JSON_BYTES)).transpose();
        let config_json = optional("config.json")?;
        let failed = |error| self.failure("", error);
        let (names, kind, index_json) = match select(&place, &self.names).map_err(failed)? {
            Selection::Gguf(name) => (vec![name], ModelKind::Gguf, None),
            Selection::Safetensors(names) => (names, ModelKind::Safetensors, None),
            Selection::Sharded => {
                let text = read_small(self, INDEX_NAME, MAX_JSON_BYTES)?;
                let names = indexed_names(&place, &text).map_err(failed)?;
                (names, ModelKind::Safetensors, Some((INDEX_NAME.to_owned(), text)))
            }
        };
        Ok(PeekedModel { names, kind, config_json, index_json })
    }

    /// What a download of `model` would bring, weights last.
    ///
    /// # Errors
    /// As [`Self::model`].
    pub fn files(&self, model: &PeekedModel, config: &HubConfig) -> Result<Vec<PeekedFile>, StoreError> {
        let repository = Repository::new(&config.cache, &self.id);
        let index = model.index_json.iter().map(|(name, _)| name.as_str());
        let beside =
            COMPANIONS.iter().copied().filter(|name| self.names.iter().any(|known| known == name)).chain(index);
        let all = beside.map(|name| (name, false)).chain(model.names.iter().map(|name| (name.as_str(), true)));
        all.map(|(name, is_weights)| {
            let facts = self.facts(name)?;
            let here = is_complete(&repository.snapshot(&self.commit).join(name), &facts)
                || is_complete(&repository.blob(&facts.etag), &facts);
            let begun = || repository.incomplete(&facts.etag).metadata().map_or(0, |metadata| metadata.len());
            let cached_bytes = if here { facts.len_bytes } else { begun().min(facts.len_bytes) };
            Ok(PeekedFile { name: name.to_owned(), len_bytes: facts.len_bytes, cached_bytes, is_weights })
        })
        .collect()
    }

    fn facts(&self, name: &str) -> Result<FileFacts, StoreError> {
        if let Some(known) = self.facts.lock().unwrap_or_else(PoisonError::into_inner).get(name) {
            return Ok(known.clone());
        }
        let place = format!("{}@{}", self.id, self.commit);
        confined(&place, name).map_err(|error| self.failure(name, error))?;
        let facts = self.http.facts(&self.id, &self.commit, name).map_err(|error| self.failure(name, error))?;
        self.facts.lock().unwrap_or_else(PoisonError::into_inner).insert(name.to_owned(), facts.clone());
        Ok(facts)
    }

    fn failure(&self, name: &str, error: HubError) -> StoreError {
        failure(Operation::Open, self.describe(name), error)
    }

    fn read_only<T>(&self, operation: Operation, name: &str) -> Result<T, StoreError> {
        let source = std::io::Error::new(std::io::ErrorKind::PermissionDenied, "a hub is only read");
        Err(StoreError::Io { operation, path: self.describe(name), source })
    }
}

/// The hub's refusal as an error of a store, with the kind that it has.
fn failure(operation: Operation, path: String, error: HubError) -> StoreError {
    let kind = match error.kind() {
        Kind::NotFound => std::io::ErrorKind::NotFound,
        Kind::Invalid | Kind::Conflict => std::io::ErrorKind::PermissionDenied,
        _ => std::io::ErrorKind::Other,
    };
    StoreError::Io { operation, path, source: std::io::Error::new(kind, error) }
}

impl Store for HubPeek {
    fn open(&self, name: &str) -> Result<Box<dyn ReadAt>, StoreError> {
        let facts = self.facts(name)?;
        if let Ok(file) = self.cached.open(name)
            && file.len_bytes() == facts.len_bytes
        {
            return Ok(file);
        }
        let (path, http) = (self.describe(name), Arc::clone(&self.http));
        Ok(Box::new(PeekFile { http, facts, path, fetched: Arc::clone(&self.fetched) }))
    }

    fn create(&self, name: &str, _len_bytes: u64) -> Result<Box<dyn NewFile>, StoreError> {
        self.read_only(Operation::Create, name)
    }

    fn create_dir(&self, name: &str) -> Result<(), StoreError> {
        self.read_only(Operation::Create, name)
    }

    fn list(&self, directory: &str) -> Result<Vec<String>, StoreError> {
        let prefix = if directory.is_empty() { String::new() } else { format!("{directory}/") };
        let below = self.names.iter().filter_map(|name| name.strip_prefix(&prefix));
        let mut names: Vec<String> = below.filter(|name| !name.contains('/')).map(str::to_owned).collect();
        names.sort_unstable();
        Ok(names)
    }

    fn publish(&self, _from: &str, to: &str) -> Result<(), StoreError> {
        self.read_only(Operation::Publish, to)
    }

    fn sync_dir(&self, name: &str) -> Result<(), StoreError> {
        self.read_only(Operation::Sync, name)
    }

    fn remove(&self, name: &str) -> Result<(), StoreError> {
        self.read_only(Operation::Remove, name)
    }

    fn describe(&self, name: &str) -> String {
        format!("{}@{}/{name}", self.id, self.commit)
    }
}

#[derive(Debug)]
struct PeekFile {
    http: Arc<Http>,
    facts: FileFacts,
    path: String,
    fetched: Arc<AtomicU64>,
}

impl ReadAt for PeekFile {
    fn len_bytes(&self) -> u64 {
        self.facts.len_bytes
    }

    fn read_exact_at(&self, offset: u64, into: &mut [u8]) -> Result<(), StoreError> {
        if into.is_empty() {
            return Ok(());
        }
        let end = offset.saturating_add(as_u64(into.len()));
        if end > self.facts.len_bytes {
            let (expected_bytes, found_bytes) = (end, self.facts.len_bytes);
            return Err(StoreError::Truncated { path: self.path.clone(), expected_bytes, found_bytes });
        }
        let part = self.http.part(&self.facts, offset, into);
        part.map_err(|error| failure(Operation::Read, self.path.clone(), error))?;
        self.fetched.fetch_add(as_u64(into.len()), Ordering::Relaxed);
        Ok(())
    }
}
