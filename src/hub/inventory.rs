//! What the hub's cache holds, and making it smaller: what no snapshot names, what was left unfinished, or a whole model.
//!
//! Owns: the sums. Refuses to know: which models are still wanted.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Serialize;

use super::cache::Repository;
use super::{HubConfig, HubError, Reference};

const PREFIX: &str = "models--";
const INCOMPLETE: &str = ".incomplete";

/// A model of the cache.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct CachedModel {
    /// Its hub id.
    pub id: String,
    /// Branches and tags that were looked up, each with its commit.
    pub revisions: Vec<(String, String)>,
    /// Commits of which there is something.
    pub snapshots: Vec<String>,
    /// Bytes of files that a snapshot names.
    pub bytes: u64,
    /// Bytes of files that none names.
    pub unnamed_bytes: u64,
    /// Bytes of downloads that are under way or broke off.
    pub unfinished_bytes: u64,
}

/// What a pruning has freed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Freed {
    /// Files that are gone.
    pub files: u64,
    /// Their bytes.
    pub bytes: u64,
}

/// All models of the cache, by id.
///
/// # Errors
/// [`HubError::Io`].
pub fn inventory(config: &HubConfig) -> Result<Vec<CachedModel>, HubError> {
    let mut models = Vec::new();
    for (name, path) in entries(&config.cache)? {
        let Some(id) = name.strip_prefix(PREFIX) else { continue };
        let id = id.replacen("--", "/", 1);
        let named = named_blobs(&path)?;
        let (mut bytes, mut unnamed_bytes, mut unfinished_bytes) = (0, 0, 0);
        for (blob, file) in entries(&path.join("blobs"))? {
            let size = file.metadata().map_or(0, |metadata| metadata.len());
            match blob {
                blob if blob.ends_with(INCOMPLETE) => unfinished_bytes += size,
                blob if named.contains(&blob) => bytes += size,
                _ => unnamed_bytes += size,
            }
        }
        let mut revisions = Vec::new();
        collect_revisions(&path.join("refs"), "", &mut revisions)?;
        let snapshots = entries(&path.join("snapshots"))?.into_iter().map(|(commit, _)| commit).collect();
        models.push(CachedModel { id, revisions, snapshots, bytes, unnamed_bytes, unfinished_bytes });
    }
    Ok(models)
}

/// Removes what no snapshot names and what broke off, of all models; and `models` with all that there is of them. A download
/// that is under way is left alone.
///
/// # Errors
/// [`HubError`], also for a name that is none of a hub.
pub fn prune_cache(config: &HubConfig, models: &[String]) -> Result<Freed, HubError> {
    let mut freed = Freed::default();
    for model in models {
        let Reference::Hub { id, .. } = Reference::parse(model)? else {
            let (index, place) = (model.clone(), config.cache.display().to_string());
            return Err(HubError::MissingFile { index, file: format!("{PREFIX}{model}"), place });
        };
        let root = config.cache.join(format!("{PREFIX}{}", id.replace('/', "--")));
        for (_, file) in entries(&root.join("blobs"))? {
            freed.files += 1;
            freed.bytes += file.metadata().map_or(0, |metadata| metadata.len());
        }
        match fs::remove_dir_all(&root) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(HubError::io("remove", &root)(error));
            }
            _ => {}
        }
    }
    for model in inventory(config)? {
        let root = config.cache.join(format!("{PREFIX}{}", model.id.replace('/', "--")));
        let repository = Repository::new(&config.cache, &model.id);
        let named = named_blobs(&root)?;
        for (blob, file) in entries(&root.join("blobs"))?.into_iter().filter(|(blob, _)| !named.contains(blob)) {
            // Who downloads it has its lock.
            let etag = blob.strip_suffix(INCOMPLETE).unwrap_or(&blob);
            let Ok(_lock) = repository.lock(etag, Duration::ZERO, &mut || 0) else { continue };
            let size = file.metadata().map_or(0, |metadata| metadata.len());
            fs::remove_file(&file).map_err(HubError::io("remove", &file))?;
            freed.files += 1;
            freed.bytes += size;
        }
    }
    Ok(freed)
}

/// The entries of a directory, sorted; none when it does not exist.
fn entries(path: &Path) -> Result<Vec<(String, PathBuf)>, HubError> {
    let listed = match fs::read_dir(path) {
        Ok(listed) => listed,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(HubError::io("list", path)(error)),
    };
    let mut found = Vec::new();
    for entry in listed {
        let entry = entry.map_err(HubError::io("list", path))?;
        if let Ok(name) = entry.file_name().into_string() {
            found.push((name, entry.path()));
        }
    }
    found.sort_unstable();
    Ok(found)
}

/// The names of the blobs that links in snapshots lead to.
fn named_blobs(root: &Path) -> Result<BTreeSet<String>, HubError> {
    let mut named = BTreeSet::new();
    let mut waiting = vec![root.join("snapshots")];
    while let Some(directory) = waiting.pop() {
        for (_, path) in entries(&directory)? {
            match fs::read_link(&path) {
                Ok(target) => {
                    named.extend(target.file_name().and_then(|name| name.to_str()).map(str::to_owned));
                }
                Err(_) if path.is_dir() => waiting.push(path),
                Err(_) => {}
            }
        }
    }
    Ok(named)
}

fn collect_revisions(directory: &Path, prefix: &str, found: &mut Vec<(String, String)>) -> Result<(), HubError> {
    for (name, path) in entries(directory)? {
        let name = format!("{prefix}{name}");
        if path.is_dir() {
            collect_revisions(&path, &format!("{name}/"), found)?;
        } else if let Ok(commit) = fs::read_to_string(&path) {
            found.push((name, commit.trim().to_owned()));
        }
    }
    Ok(())
}
