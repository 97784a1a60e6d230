//! From a model reference to index, skeleton and binding.

use std::path::{Path, PathBuf};

use super::remote_model;
use crate::error::{Classify, Kind};
use crate::format::packed::gather;
use crate::format::{FormatError, GgufHead, ModelIndex, TensorEntry, gguf, parse_index_json};
use crate::hub::{HubConfig, HubError, HubPeek, ModelKind, PeekedFile, Progress, Reference, resolve};
use crate::load::{ScanError, scan};
use crate::model::{Binding, KeyMismatch, ModelError, Skeleton};
use crate::store::{LocalStore, RemoteAddress, Store, StoreError, is_remote, open_pinned};
use crate::types::{Fqn, as_usize};

/// A model whose headers were read and whose keys fit.
#[derive(Debug)]
pub struct ModelSource {
    /// The directory, or the remote place, that file names are relative to.
    pub root: PathBuf,
    /// The version of each file of the index, where the files are remote; else empty.
    pub versions: Vec<String>,
    /// The text of config.json.
    pub config_json: Option<String>,
    /// Where every tensor is.
    pub index: ModelIndex,
    /// What the architecture has.
    pub skeleton: Skeleton,
    /// Which is which.
    pub binding: Binding,
}

impl ModelSource {
    /// Where a tensor of the skeleton lies, if the model has it.
    #[must_use]
    pub fn entry(&self, fqn: &Fqn) -> Option<&TensorEntry> {
        self.binding.source(fqn).and_then(|source| self.index.tensors.get(source))
    }

    /// Fills `bytes` with a tensor as it is stored; with nothing where the model lacks it. `from` is the store at `root`.
    ///
    /// # Errors
    /// Storage fails.
    pub fn read(&self, from: &dyn Store, fqn: &Fqn, bytes: &mut Vec<u8>) -> Result<(), StoreError> {
        bytes.clear();
        let Some(entry) = self.entry(fqn) else { return Ok(()) };
        let file = self.index.files.get(as_usize(u64::from(entry.file))).expect("an index names files that it lists");
        bytes.resize(as_usize(entry.range.len()), 0);
        from.open(&file.name)?.read_exact_at(entry.range.start(), bytes)
    }
}

/// The bytes of a tensor.
fn read_entry(store: &dyn Store, index: &ModelIndex, entry: &TensorEntry) -> Result<Vec<u8>, SourceError> {
    let mut bytes = vec![0; as_usize(entry.range.len())];
    store.open(index.file_name(entry.file))?.read_exact_at(entry.range.start(), &mut bytes)?;
    Ok(bytes)
}

/// Why a model cannot be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SourceError {
    /// The reference leads to no files.
    #[error(transparent)]
    Hub(#[from] HubError),
    /// Storage failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Headers do not hold.
    #[error(transparent)]
    Scan(#[from] ScanError),
    /// The index does not hold.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// A remote place has no weights.
    #[error(
        "{address} has no weights: expected model.safetensors, model.safetensors.index.json or other *.safetensors"
    )]
    NoWeights {
        /// The place.
        address: String,
    },
    /// The model is remote, and the command wants more of it than its weights.
    #[error("{address}: expected a model of this machine or a hub id, because this command copies its tokenizer too")]
    NotLocal {
        /// Its address.
        address: String,
    },
    /// A GGUF file is remote.
    #[error("{address}: a GGUF file is read from this machine only, because its rows are small: copy it here first")]
    RemoteGguf {
        /// The file.
        address: String,
    },
    /// config.json cannot be used.
    #[error("{path}: {source}")]
    Config {
        /// The file.
        path: String,
        /// What is wrong.
        source: ModelError,
    },
    /// The keys do not fit.
    #[error("{directory}: {source}")]
    Keys {
        /// The directory.
        directory: String,
        /// What does not fit.
        source: Box<KeyMismatch>,
    },
}

impl Classify for SourceError {
    fn kind(&self) -> Kind {
        match self {
            Self::Hub(source) => source.kind(),
            Self::Store(source) => source.kind(),
            Self::Scan(source) => source.kind(),
            Self::Format(source) => source.kind(),
            Self::NoWeights { .. } => Kind::NotFound,
            Self::RemoteGguf { .. } | Self::NotLocal { .. } => Kind::Invalid,
            Self::Config { source, .. } => source.kind(),
            Self::Keys { source, .. } => source.kind(),
        }
    }
}

/// Opens a model: a Hugging Face directory, a safetensors or GGUF file, the address of a remote place, or a hub id, which is
/// downloaded into the cache first. Of local and remote files only headers are read. `progress` hears of downloads.
///
/// # Errors
/// [`SourceError`], naming file and tensor.
pub fn open_model(reference: &str, progress: &dyn Fn(Progress<'_>)) -> Result<ModelSource, SourceError> {
    if is_remote(reference) {
        return open_remote(reference);
    }
    let config = HubConfig::from_vars(&crate::config::variable)?;
    let files = resolve(&Reference::parse(reference)?, &config, progress)?;
    let store = LocalStore::new(&files.root);
    let names: Vec<String> = files.files.into_iter().map(|file| file.name).collect();
    if files.kind == ModelKind::Gguf {
        let name = names.first().map_or("", String::as_str);
        let (index, config_json) = read_gguf(&store, name)?;
        return finish(&files.root, Some(config_json.into_bytes()), index);
    }
    let index_json = match &files.index_json {
        Some((name, bytes)) => Some(parse_index_json(&store.describe(name), bytes)?),
        None => None,
    };
    let index = scan(&store, &names, index_json.as_ref())?;
    let index = gather(index, files.config_json.as_deref(), &mut |index, entry| read_entry(&store, index, entry))?;
    finish(&files.root, files.config_json, index)
}

/// What was looked at in a hub.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peeked {
    /// The commit.
    pub commit: String,
    /// The files that a download brings.
    pub files: Vec<PeekedFile>,
    /// Bytes of files that were fetched to look at it.
    pub fetched_bytes: u64,
}

/// As [`open_model`], to look at the model and not to load it: of one that is in a hub alone, headers are fetched and nothing is
/// downloaded. Then its root is a name, and no directory.
///
/// # Errors
/// As [`open_model`].
pub fn peek_model(
    reference: &str,
    progress: &dyn Fn(Progress<'_>),
) -> Result<(ModelSource, Option<Peeked>), SourceError> {
    let config = HubConfig::from_vars(&crate::config::variable)?;
    if is_remote(reference) || config.offline {
        return Ok((open_model(reference, progress)?, None));
    }
    let Reference::Hub { id, revision } = Reference::parse(reference)? else {
        return Ok((open_model(reference, progress)?, None));
    };
    let hub = HubPeek::open(&id, &revision, &config)?;
    let model = hub.model()?;
    let files = hub.files(&model, &config)?;
    let (index, config_json) = if model.kind == ModelKind::Gguf {
        let (index, config_json) = read_gguf(&hub, model.names.first().map_or("", String::as_str))?;
        (index, Some(config_json.into_bytes()))
    } else {
        let index_json = match &model.index_json {
            Some((name, bytes)) => Some(parse_index_json(&hub.describe(name), bytes)?),
            None => None,
        };
        let index = scan(&hub, &model.names, index_json.as_ref())?;
        let mut read = |index: &ModelIndex, entry: &TensorEntry| read_entry(&hub, index, entry);
        (gather(index, model.config_json.as_deref(), &mut read)?, model.config_json)
    };
    let source = finish(Path::new(&format!("{id}@{}", hub.commit())), config_json, index)?;
    let peeked = Peeked { commit: hub.commit().to_owned(), files, fetched_bytes: hub.fetched_bytes() };
    Ok((source, Some(peeked)))
}

/// As [`open_model`], for a command that takes other files beside the model's too, which are looked for on this machine.
///
/// # Errors
/// As [`open_model`], and [`SourceError::NotLocal`].
pub(super) fn open_local_model(reference: &str, progress: &dyn Fn(Progress<'_>)) -> Result<ModelSource, SourceError> {
    match is_remote(reference) {
        true => Err(SourceError::NotLocal { address: RemoteAddress::parse(reference)?.to_string() }),
        false => open_model(reference, progress),
    }
}

/// Opens a model in an object store or on a web server. Every file stays the version that it is now, here and on all ranks.
fn open_remote(reference: &str) -> Result<ModelSource, SourceError> {
    let (address, file) = remote_model::place(reference)?;
    let store = open_pinned(&address)?;
    let model = remote_model::find(store.as_ref(), &address, file)?;
    let index_json = match &model.index_json {
        Some((name, bytes)) => Some(parse_index_json(&store.describe(name), bytes)?),
        None => None,
    };
    let names = index_json.as_ref().map_or(model.names, crate::format::IndexJson::files);
    let index = scan(store.as_ref(), &names, index_json.as_ref())?;
    let mut read = |index: &ModelIndex, entry: &TensorEntry| read_entry(store.as_ref(), index, entry);
    let index = gather(index, model.config_json.as_deref(), &mut read)?;
    let mut versions = Vec::with_capacity(index.files.len());
    for file in &index.files {
        versions.extend(store.open(&file.name)?.version());
    }
    let source = finish(Path::new(&address.to_string()), model.config_json, index)?;
    Ok(ModelSource { versions, ..source })
}

/// Reads as much of a GGUF file as its header takes.
fn read_gguf(store: &dyn Store, name: &str) -> Result<(ModelIndex, String), SourceError> {
    let file = store.open(name)?;
    let mut wanted = gguf::FIRST_HEAD_BYTES;
    loop {
        let mut head = vec![0; as_usize(wanted.min(file.len_bytes()))];
        file.read_exact_at(0, &mut head)?;
        match gguf::parse(&store.describe(name), &head, file.len_bytes())? {
            // The index names the file as the plan will open it.
            GgufHead::Whole(parsed) => return Ok(parsed.into_index(name)?),
            GgufHead::Longer { read_bytes } => wanted = read_bytes,
        }
    }
}

fn finish(directory: &Path, config: Option<Vec<u8>>, index: ModelIndex) -> Result<ModelSource, SourceError> {
    let skeleton = match &config {
        Some(json) => Skeleton::from_config(json).map_err(|source| SourceError::Config {
            path: directory.join("config.json").display().to_string(),
            source,
        })?,
        None => Skeleton::generic(&index),
    };
    let index = skeleton.with_experts_apart(index);
    let binding = skeleton
        .bind(&index)
        .map_err(|source| SourceError::Keys { directory: directory.display().to_string(), source })?;
    let config_json = config.map(|json| String::from_utf8_lossy(&json).into_owned());
    Ok(ModelSource { root: directory.to_owned(), versions: Vec::new(), config_json, index, skeleton, binding })
}
