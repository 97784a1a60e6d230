//! `weightcast model expand`: a decoder with more blocks that computes what the smaller one does, for training the new ones.
//!
//! Owns: files. Which block is made from which is [`crate::model::Expansion`]'s. In memory is one tensor at a time.

use std::path::Path;

use serde_json::{Map, Value};

use super::companions::copy_companions;
use super::model_directory_error::DirectoryError;
use super::model_export::{pretty, publish_directory};
use super::source::{ModelSource, SourceError, open_model};
use super::weight_files::{OutputTensor, WeightFiles};
use crate::error::{Classify, Kind};
use crate::format::Encoding;
use crate::hub::Progress;
use crate::model::{Expansion, ModelError, Skeleton, renumber, writes_residual};
use crate::store::{LocalStore, StoreError, write_small};
use crate::types::{Fqn, as_usize};

/// Why a model cannot be expanded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExpandError {
    /// The model cannot be opened.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// Storage failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The output is there already.
    #[error(transparent)]
    Directory(#[from] DirectoryError),
    /// The blocks cannot be inserted so.
    #[error("model {model}: {source}")]
    Model {
        /// The model.
        model: String,
        /// The reason.
        source: ModelError,
    },
    /// The model is not a safetensors model with its configuration.
    #[error("model {model}: expected unquantized safetensors with a config.json, found {found}")]
    Unsuitable {
        /// The model.
        model: String,
        /// What it is.
        found: String,
    },
}

impl Classify for ExpandError {
    fn kind(&self) -> Kind {
        match self {
            Self::Source(source) => source.kind(),
            Self::Store(source) => source.kind(),
            Self::Directory(source) => source.kind(),
            Self::Model { source, .. } => source.kind(),
            Self::Unsuitable { .. } => Kind::Invalid,
        }
    }
}

/// What was written.
#[derive(Clone, Debug)]
pub struct ExpandedModel {
    /// The numbers of the new blocks.
    pub inserted: Vec<u32>,
    /// The number of parameters.
    pub parameters: u64,
    /// The bytes of the tensors.
    pub bytes: u64,
}

/// Where a tensor of the larger model comes from.
struct Origin {
    fqn: Fqn,
    zero: bool,
}

/// Writes the model `reference` with `blocks` more blocks into `output`, which must not be there; each weight keeps its type.
/// `max_file_bytes` bounds the weight files. `progress` hears of downloads.
///
/// # Errors
/// [`ExpandError`]; nothing is left in `output` then.
pub fn expand_model(
    reference: &str,
    blocks: u32,
    (output, max_file_bytes): (&Path, u64),
    progress: &dyn Fn(Progress<'_>),
) -> Result<ExpandedModel, ExpandError> {
    let model = open_model(reference, progress)?;
    let named = |source| ExpandError::Model { model: reference.to_owned(), source };
    let (expansion, config) = plan(&model, reference, blocks)?;
    let text = pretty(&Value::Object(expansion.config(&config)));
    let larger = Skeleton::from_config(text.as_bytes()).map_err(named)?;
    let outputs: Vec<OutputTensor> = larger
        .tensors
        .iter()
        .filter_map(|tensor| {
            let origin = origin(expansion, &tensor.fqn);
            let source = model.binding.source(&origin.fqn)?;
            Some((tensor.fqn.clone(), model.index.tensors.get(source)?.dtype, tensor.shape.clone()))
        })
        .collect();
    let files = WeightFiles::sharded(outputs, max_file_bytes);
    let from = LocalStore::new(&model.root);
    publish_directory(output, |to| {
        files.write(to, |tensor, bytes| {
            let origin = origin(expansion, &tensor.0);
            if origin.zero {
                bytes.resize(as_usize(tensor.2.bytes(tensor.1).unwrap_or(0)), 0);
                return Ok(());
            }
            model.read(&from, &origin.fqn, bytes)
        })?;
        if let Some(index) = files.index_json() {
            write_small(to, "model.safetensors.index.json", index.as_bytes())?;
        }
        copy_companions(&from, &from, to)?;
        Ok::<(), ExpandError>(write_small(to, "config.json", text.as_bytes())?)
    })?;
    Ok(ExpandedModel { inserted: expansion.inserted(), parameters: larger.parameters(), bytes: files.total_bytes() })
}

/// The expansion of a model that can be expanded, and its configuration.
fn plan(model: &ModelSource, reference: &str, blocks: u32) -> Result<(Expansion, Map<String, Value>), ExpandError> {
    let unsuitable = |found: &str| ExpandError::Unsuitable { model: reference.to_owned(), found: found.to_owned() };
    let (Some(text), Some(config)) = (&model.config_json, &model.skeleton.config) else {
        return Err(unsuitable("no config.json"));
    };
    if let Some(method) = &config.quant_method {
        return Err(unsuitable(&format!("weights quantized by {method}")));
    }
    if let Some(entry) = model.index.tensors.values().find(|entry| entry.encoding != Encoding::Plain) {
        return Err(unsuitable(&format!("weights in {}", entry.format_name())));
    }
    let fields: Map<String, Value> = serde_json::from_str(text).map_err(|error| unsuitable(&error.to_string()))?;
    let expansion =
        Expansion::new(config, blocks).map_err(|source| ExpandError::Model { model: reference.to_owned(), source })?;
    Ok((expansion, fields))
}

fn origin(expansion: Expansion, fqn: &Fqn) -> Origin {
    let block = fqn.layer().and_then(|layer| expansion.blocks().nth(as_usize(u64::from(layer))));
    let renamed = block.and_then(|block| renumber(fqn, block.layer));
    let zero = block.is_some_and(|block| block.inserted) && writes_residual(fqn);
    Origin { fqn: renamed.unwrap_or_else(|| fqn.clone()), zero }
}
