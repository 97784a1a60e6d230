//! A repository of a hub: pinned, selected, downloaded; or, offline, whatever the cache has of it.

use std::path::Path;

use super::cache::{Repository, is_commit};
use super::download::{ensure_blob, is_complete};
use super::http::{FileFacts, Http};
use super::local::{directory, indexed_names, read_json};
use super::select::{INDEX_NAME, Selection, confined, select};
use super::{HubConfig, HubError, ModelFiles, Progress};
use crate::error::{Classify, Kind};

/// Files beside the weights that loading, training and publishing use, where a repository has them.
pub(super) const COMPANIONS: [&str; 10] = [
    "config.json",
    "adapter_config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
];

/// The files of a repository at a revision.
pub(super) fn resolve(
    id: &str,
    revision: &str,
    config: &HubConfig,
    progress: &dyn Fn(Progress<'_>),
) -> Result<ModelFiles, HubError> {
    let repository = Repository::new(&config.cache, id);
    if config.offline {
        return offline(&repository, id, revision, &config.cache);
    }
    let http = Http::new(config)?;
    let place = format!("{id}@{revision}");
    // Everything after this request is of one commit (`HU-3`).
    let listing = http.listing(id, revision)?;
    if is_commit(revision) && listing.commit != revision {
        let what = format!("sha: expected {revision}, found {}", listing.commit);
        return Err(HubError::Answer { url: place, what });
    }
    let job = Job { http: &http, repository: &repository, id, commit: &listing.commit, progress };
    let mut wanted: Vec<String> = COMPANIONS.iter().map(|&name| name.to_owned()).collect();
    wanted.retain(|name| listing.names.contains(name));
    match select(&place, &listing.names)? {
        Selection::Gguf(name) => wanted.push(name),
        Selection::Safetensors(names) => wanted.extend(names),
        Selection::Sharded => {
            job.fetch(&[INDEX_NAME.to_owned()])?;
            let text = read_json(&repository.snapshot(&listing.commit).join(INDEX_NAME))?;
            let names = indexed_names(&place, &text)?;
            if let Some(file) = names.iter().find(|name| !listing.names.contains(*name)) {
                let index = format!("{place}/{INDEX_NAME}");
                return Err(HubError::MissingFile { index, file: file.clone(), place });
            }
            wanted.extend(names);
        }
    }
    job.fetch(&wanted)?;
    repository.note_commit(revision, &listing.commit)?;
    let files = directory(&repository.snapshot(&listing.commit))?;
    Ok(ModelFiles { commit: Some(listing.commit), ..files })
}

/// What the cache has, without a request. A part that is missing is named.
fn offline(repository: &Repository, id: &str, revision: &str, cache: &Path) -> Result<ModelFiles, HubError> {
    let missing = |what: String| HubError::Offline {
        id: id.to_owned(),
        revision: revision.to_owned(),
        cache: cache.to_owned(),
        what,
    };
    let commit = repository.commit(revision).ok_or_else(|| missing(format!("revision {revision}")))?;
    let snapshot = repository.snapshot(&commit);
    if !snapshot.is_dir() {
        return Err(missing(format!("snapshot {commit}")));
    }
    match directory(&snapshot) {
        Ok(files) => Ok(ModelFiles { commit: Some(commit), ..files }),
        Err(HubError::NoWeights { .. }) => Err(missing("every weight file".to_owned())),
        Err(HubError::MissingFile { file, .. }) => Err(missing(file)),
        Err(HubError::Io { path, source, action }) => {
            let error = HubError::Io { path: path.clone(), source, action };
            // A link whose blob was removed.
            if error.kind() == Kind::NotFound { Err(missing(path.display().to_string())) } else { Err(error) }
        }
        Err(error) => Err(error),
    }
}

/// The download of files at one commit.
struct Job<'a> {
    http: &'a Http,
    repository: &'a Repository,
    id: &'a str,
    commit: &'a str,
    progress: &'a dyn Fn(Progress<'_>),
}

impl Job<'_> {
    /// Sees to it that all of `names` are in the snapshot with the sizes that the server states.
    fn fetch(&self, names: &[String]) -> Result<(), HubError> {
        let place = format!("{}@{}", self.id, self.commit);
        let mut files: Vec<(&String, FileFacts)> = Vec::with_capacity(names.len());
        for name in names {
            confined(&place, name)?;
            files.push((name, self.http.facts(self.id, self.commit, name)?));
        }
        let total_bytes = files.iter().map(|(_, facts)| facts.len_bytes).fold(0, u64::saturating_add);
        let snapshot = self.repository.snapshot(self.commit);
        let (here, missing): (Vec<_>, Vec<_>) =
            files.into_iter().partition(|(name, facts)| is_complete(&snapshot.join(name), facts));
        let mut done_bytes: u64 = here.iter().map(|(_, facts)| facts.len_bytes).sum();
        for (name, facts) in missing {
            let report = |of_file: u64| {
                (self.progress)(Progress { file: name, done_bytes: done_bytes.saturating_add(of_file), total_bytes });
            };
            report(0);
            ensure_blob(self.http, self.repository, &facts, &report)?;
            self.repository.link(self.commit, name, &facts.etag)?;
            report(facts.len_bytes);
            done_bytes += facts.len_bytes;
        }
        Ok(())
    }
}
