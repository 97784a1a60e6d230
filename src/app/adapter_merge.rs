//! `weightcast adapter merge`: base and adapter become one full-precision model, tensor by tensor.
//!
//! Owns: the order of work and what is refused. The arithmetic is [`crate::adapter::merge`]'s. In memory are the adapter and
//! one tensor of the base, as stored, in f32 and as written.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;

use super::adapter_figure::{Figure, QuantizationFigure};
use super::adapter_source::{AdapterSource, AdapterSourceError, narrow, widen};
use super::companions::copy_companions;
use super::model_directory::{plan_merged, write_meta};
use super::model_directory_error::DirectoryError;
use super::source::{ModelSource, SourceError, open_model};
use super::weight_files::{OutputTensor, WeightFiles};
use crate::adapter::{AdapterError, LoadedModule, linears, merge};
use crate::error::{Classify, Kind};
use crate::format::Encoding;
use crate::hub::Progress;
use crate::quant::{FourBitCode, QuantError};
use crate::store::{LocalStore, Store, StoreError, write_small};
use crate::types::{DType, Fqn};

/// Bytes of tensors in one file, unless the user says otherwise: what most published models have.
pub const DEFAULT_SHARD_BYTES: u64 = 5_000_000_000;

/// What is merged into what.
#[derive(Debug)]
pub struct MergeRequest<'a> {
    /// The adapter.
    pub adapter: &'a AdapterSource,
    /// The base model; without it the one that the adapter's configuration names.
    pub base: Option<&'a str>,
    /// The element type of all weights; without it each keeps the base's.
    pub dtype: Option<DType>,
    /// Bytes of tensors in one file at most; see [`DEFAULT_SHARD_BYTES`].
    pub max_file_bytes: u64,
    /// The 4-bit code of the base that the adapter was trained on, if it was one.
    pub trained_on: Option<FourBitCode>,
}

/// What was merged.
#[derive(Clone, Debug)]
pub struct Merged {
    /// The base model.
    pub base: String,
    /// The number of modules that an adapter was merged into.
    pub modules: usize,
    /// The number of weight files.
    pub files: usize,
    /// The bytes of the tensors.
    pub bytes: u64,
    /// How far the base of the training was from this one.
    pub quantization: Option<QuantizationFigure>,
}

/// Why an adapter cannot be merged.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MergeError {
    /// The adapter cannot be read.
    #[error(transparent)]
    Adapter(#[from] AdapterSourceError),
    /// The base cannot be opened.
    #[error("base model {base}{named}: {source}")]
    Base {
        /// The reference.
        base: String,
        /// Who named it, where that was the adapter.
        named: &'static str,
        /// The reason.
        source: Box<SourceError>,
    },
    /// Nobody says what the base is.
    #[error("{place}: adapter_config.json does not name a base model, and no --base was given")]
    NoBase {
        /// The adapter.
        place: String,
    },
    /// The base is quantized.
    #[error(
        "base model {base}: its weights are quantized ({format}): merging would round them a second time and lose what was \
         trained; merge into the full-precision model that it was made from (--base)"
    )]
    Quantized {
        /// The base.
        base: String,
        /// Its format.
        format: String,
    },
    /// Storage failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The output's name says another size, or the base's record does not hold.
    #[error(transparent)]
    Directory(#[from] DirectoryError),
    /// The arithmetic was given what does not fit.
    #[error("tensor {fqn}: {source}")]
    Arithmetic {
        /// The tensor.
        fqn: Fqn,
        /// The reason.
        source: AdapterError,
    },
    /// A tensor cannot be converted.
    #[error("tensor {fqn}: {source}")]
    Convert {
        /// The tensor.
        fqn: Fqn,
        /// The reason.
        source: QuantError,
    },
    /// A merged value is no number in the type that is written.
    #[error("tensor {fqn}: {count} merged values are infinite or not a number as {dtype}")]
    NotFinite {
        /// The tensor.
        fqn: Fqn,
        /// How many.
        count: usize,
        /// The type.
        dtype: DType,
    },
    /// config.json is no object.
    #[error("{path}: {source}")]
    Config {
        /// The file.
        path: String,
        /// The parser's error.
        source: serde_json::Error,
    },
}

impl Classify for MergeError {
    fn kind(&self) -> Kind {
        match self {
            Self::Adapter(source) => source.kind(),
            Self::Base { source, .. } => source.kind(),
            Self::Store(source) => source.kind(),
            Self::Directory(source) => source.kind(),
            Self::Arithmetic { source, .. } => source.kind(),
            Self::Convert { source, .. } => source.kind(),
            Self::NoBase { .. } | Self::Quantized { .. } | Self::NotFinite { .. } | Self::Config { .. } => {
                Kind::Invalid
            }
        }
    }
}

/// Writes base and adapter as one model into `output`, which must not have one. config.json goes last, so that a directory
/// with one is complete. `progress` hears of downloads.
///
/// # Errors
/// [`MergeError`]; the files written so far stay.
pub fn merge_adapter(
    request: &MergeRequest<'_>,
    output: &Path,
    progress: &dyn Fn(Progress<'_>),
) -> Result<Merged, MergeError> {
    let base = base_reference(request)?;
    let named = if request.base.is_some() { "" } else { " (named by the adapter; --base names another)" };
    let model = open_base(&base, named, progress)?;
    let adapter = request.adapter.read(&linears(&model.skeleton))?;
    let modules: BTreeMap<Fqn, &LoadedModule> =
        adapter.modules.iter().map(|module| (format!("{}.weight", module.target.module).into(), module)).collect();

    let meta = plan_merged(&model.root, (output, &model.skeleton), (&request.adapter.place, &adapter.config))?;
    let files = WeightFiles::sharded(outputs(&model, request.dtype), request.max_file_bytes);
    let from = LocalStore::new(&model.root);
    let to = LocalStore::new(output);
    to.create_dir("")?;
    let mut figure = request.trained_on.map(Figure::new);
    files.write(&to, |tensor, bytes| {
        model.read(&from, &tensor.0, bytes)?;
        let stored = model.entry(&tensor.0).map_or(tensor.1, |entry| entry.dtype);
        one_tensor(tensor, stored, modules.get(&tensor.0).copied(), (bytes, figure.as_mut()))
    })?;
    if let Some(index) = files.index_json() {
        write_small(&to, "model.safetensors.index.json", index.as_bytes())?;
    }
    copy_companions(&from, &from, &to)?;
    if let Some(meta) = meta {
        write_meta(&to, &meta)?;
        to.create_dir("adapters")?;
    }
    if let Some(config) = &model.config_json {
        write_small(&to, "config.json", config_with_dtype(&from, config, request.dtype)?.as_bytes())?;
    }
    to.sync_dir("")?;
    let quantization = figure.map(Figure::finish);
    let (count, bytes) = (files.count(), files.total_bytes());
    Ok(Merged { base, modules: modules.len(), files: count, bytes, quantization })
}

/// The base that was asked for, or the one that the adapter names, with its revision.
fn base_reference(request: &MergeRequest<'_>) -> Result<String, MergeError> {
    if let Some(base) = request.base {
        return Ok(base.to_owned());
    }
    let config = &request.adapter.config;
    let place = request.adapter.place.clone();
    let base = config.base_model_name_or_path.as_deref().filter(|base| !base.is_empty());
    let base = base.ok_or(MergeError::NoBase { place })?;
    match &config.revision {
        Some(revision) if !Path::new(base).exists() => Ok(format!("{base}@{revision}")),
        _ => Ok(base.to_owned()),
    }
}

fn open_base(base: &str, named: &'static str, progress: &dyn Fn(Progress<'_>)) -> Result<ModelSource, MergeError> {
    let quantized = |format: &str| MergeError::Quantized { base: base.to_owned(), format: format.to_owned() };
    let model = open_model(base, progress).map_err(|source| match source {
        SourceError::Keys { source, .. } if source.prequantized.is_some() => {
            quantized(source.prequantized.unwrap_or_default())
        }
        source => MergeError::Base { base: base.to_owned(), named, source: Box::new(source) },
    })?;
    if let Some(method) = model.skeleton.config.as_ref().and_then(|config| config.quant_method.as_deref()) {
        return Err(quantized(method));
    }
    match model.index.tensors.values().find_map(|entry| match &entry.encoding {
        Encoding::Ggml(_) => Some("GGUF".to_owned()),
        Encoding::Packed(packed) => Some(packed.encoding.name()),
        Encoding::Plain => None,
    }) {
        Some(format) => Err(quantized(&format)),
        None => Ok(model),
    }
}

/// The tensors of the merged model by the architecture's names; those that the base lacks are lacking there too.
fn outputs(model: &ModelSource, dtype: Option<DType>) -> Vec<OutputTensor> {
    let output = |tensor: &crate::model::SkeletonTensor| {
        let found = model.entry(&tensor.fqn)?;
        let to = dtype.filter(|_| found.dtype.is_weight_float()).unwrap_or(found.dtype);
        Some((tensor.fqn.clone(), to, tensor.shape.clone()))
    };
    model.skeleton.tensors.iter().filter_map(output).collect()
}

/// Turns the base's bytes of a tensor into those that are written.
fn one_tensor(
    (fqn, dtype, _): &OutputTensor,
    from: DType,
    module: Option<&LoadedModule>,
    (bytes, figure): (&mut Vec<u8>, Option<&mut Figure>),
) -> Result<(), MergeError> {
    let convert = |source| MergeError::Convert { fqn: fqn.clone(), source };
    if module.is_none() && *dtype == from {
        return Ok(());
    }
    let mut values = widen(from, bytes).map_err(convert)?;
    if let Some(module) = module {
        if let Some(figure) = figure {
            figure.add(fqn, from, bytes, &values).map_err(convert)?;
        }
        merge(&mut values, module.target.matrix(), &module.low_rank())
            .map_err(|source| MergeError::Arithmetic { fqn: fqn.clone(), source })?;
    }
    // The largest finite f16 is 65504; what rounds to more is infinite there.
    let limit = if *dtype == DType::F16 { 65_520.0 } else { f32::MAX };
    match values.iter().filter(|value| value.is_nan() || value.abs() > limit).count() {
        0 => {}
        count => return Err(MergeError::NotFinite { fqn: fqn.clone(), count, dtype: *dtype }),
    }
    bytes.clear();
    narrow(&values, *dtype, bytes).map_err(convert)
}

/// config.json as the base has it, but for the element type where it was changed.
fn config_with_dtype(from: &LocalStore, config: &str, dtype: Option<DType>) -> Result<String, MergeError> {
    let Some(dtype) = dtype else { return Ok(config.to_owned()) };
    let path = from.describe("config.json");
    let mut fields: serde_json::Map<String, Value> =
        serde_json::from_str(config).map_err(|source| MergeError::Config { path, source })?;
    // transformers before version 5 writes torch_dtype.
    let key = if fields.contains_key("torch_dtype") { "torch_dtype" } else { "dtype" };
    fields.insert(key.to_owned(), Value::from(dtype.torch_name()));
    let mut text = serde_json::to_string_pretty(&fields).expect("a value always becomes text");
    text.push('\n');
    Ok(text)
}
