//! From a model reference to index, skeleton and binding.

use std::path::{Path, PathBuf};

use crate::error::{Classify, Kind};
use crate::format::{FormatError, ModelIndex, parse_index_json};
use crate::load::{ScanError, scan};
use crate::model::{Binding, KeyMismatch, ModelError, Skeleton};
use crate::store::{LocalStore, Store, StoreError, read_small};

/// config.json and index files are at most this long.
const MAX_JSON_BYTES: u64 = 64 << 20;
const INDEX_NAME: &str = "model.safetensors.index.json";
const SINGLE_NAME: &str = "model.safetensors";

/// A model whose headers were read and whose keys fit.
#[derive(Debug)]
pub struct ModelSource {
    /// The directory that file names are relative to.
    pub root: PathBuf,
    /// The text of config.json.
    pub config_json: Option<String>,
    /// Where every tensor is.
    pub index: ModelIndex,
    /// What the architecture has.
    pub skeleton: Skeleton,
    /// Which is which.
    pub binding: Binding,
}

/// Why a model cannot be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SourceError {
    /// There is no such directory or file.
    #[error("model {reference:?}: no such directory or file")]
    NotFound {
        /// The reference.
        reference: String,
    },
    /// There are no weights.
    #[error("{directory} has no weights: expected {SINGLE_NAME}, {INDEX_NAME} or another *.safetensors file")]
    NoWeights {
        /// The directory.
        directory: String,
    },
    /// Storage failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Headers do not hold.
    #[error(transparent)]
    Scan(#[from] ScanError),
    /// The index does not hold.
    #[error(transparent)]
    Format(#[from] FormatError),
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
            Self::NotFound { .. } | Self::NoWeights { .. } => Kind::NotFound,
            Self::Store(source) => source.kind(),
            Self::Scan(source) => source.kind(),
            Self::Format(source) => source.kind(),
            Self::Config { source, .. } => source.kind(),
            Self::Keys { source, .. } => source.kind(),
        }
    }
}

/// Opens a local model: a Hugging Face directory, or one safetensors file. Only headers are read.
///
/// # Errors
/// [`SourceError`], naming file and tensor.
pub fn open_model(reference: &str) -> Result<ModelSource, SourceError> {
    let path = Path::new(reference);
    if path.is_dir() {
        return open_directory(path);
    }
    match (path.is_file(), path.parent(), path.file_name().and_then(|name| name.to_str())) {
        (true, Some(directory), Some(name)) => {
            let store = LocalStore::new(directory);
            finish(directory, None, scan(&store, &[name.to_owned()], None)?)
        }
        _ => Err(SourceError::NotFound { reference: reference.to_owned() }),
    }
}

fn open_directory(directory: &Path) -> Result<ModelSource, SourceError> {
    let store = LocalStore::new(directory);
    let names = store.list("")?;
    let has = |name: &str| names.iter().any(|known| known == name);
    let config = if has("config.json") { Some(read_small(&store, "config.json", MAX_JSON_BYTES)?) } else { None };
    let index = if has(INDEX_NAME) {
        let index = parse_index_json(&store.describe(INDEX_NAME), &read_small(&store, INDEX_NAME, MAX_JSON_BYTES)?)?;
        scan(&store, &index.files(), Some(&index))?
    } else {
        let weights: Vec<String> = if has(SINGLE_NAME) {
            vec![SINGLE_NAME.to_owned()]
        } else {
            names.into_iter().filter(|name| name.ends_with(".safetensors")).collect()
        };
        if weights.is_empty() {
            return Err(SourceError::NoWeights { directory: directory.display().to_string() });
        }
        scan(&store, &weights, None)?
    };
    finish(directory, config, index)
}

fn finish(directory: &Path, config: Option<Vec<u8>>, index: ModelIndex) -> Result<ModelSource, SourceError> {
    let skeleton = match &config {
        Some(json) => Skeleton::from_config(json).map_err(|source| SourceError::Config {
            path: directory.join("config.json").display().to_string(),
            source,
        })?,
        None => Skeleton::generic(&index),
    };
    let binding = skeleton
        .bind(&index)
        .map_err(|source| SourceError::Keys { directory: directory.display().to_string(), source })?;
    let config_json = config.map(|json| String::from_utf8_lossy(&json).into_owned());
    Ok(ModelSource { root: directory.to_owned(), config_json, index, skeleton, binding })
}
