//! `weightcast model export`: the weights that a run has trained become a model that transformers loads, and this program.
//!
//! Owns: what is written, and that nothing of it is seen before all of it is there. In memory is one tensor at a time,
//! as f32 and as written, whatever the number of ranks that trained it.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::adapter_source::{narrow, widen};
use super::companions::copy_companions;
use super::model_directory::{ExportMeta, ModelName, Stage, check_size, history_of, write_meta};
use super::model_directory_error::DirectoryError;
use super::run_tensors::{RunTensors, RunTensorsError, StepChoice};
use super::source::{ModelSource, SourceError, open_local_model};
use super::weight_files::{OutputTensor, WeightFiles};
use crate::adapter::AdapterConfig;
use crate::error::{Classify, Kind};
use crate::hub::{HubConfig, Reference, resolve};
use crate::manifest::TrainingState;
use crate::metrics::LOG_FILE;
use crate::model::{Architecture, ModelConfig, ModelError, Skeleton};
use crate::quant::QuantError;
use crate::store::{LocalStore, Store, StoreError, absolute, read_small, write_small};
use crate::train::TrainedLayers;
use crate::types::{DType, Fqn, Shape, Step, as_usize};

/// A million lines of a log.
const MAX_LOG_BYTES: u64 = 256 << 20;

/// Why a run cannot be exported as a model.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelExportError {
    /// The checkpoint cannot be read.
    #[error(transparent)]
    Checkpoint(#[from] RunTensorsError),
    /// Storage failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The output's name does not fit, or it is there already.
    #[error(transparent)]
    Directory(#[from] DirectoryError),
    /// The base, of which the run has trained a part, cannot be opened.
    #[error(transparent)]
    Base(#[from] Box<SourceError>),
    /// The adapter of the run cannot be written.
    #[error(transparent)]
    Adapter(#[from] super::adapter_export::ExportError),
    /// The checkpoint is of a model that was only loaded.
    #[error("{place}: the checkpoint is not of a training run")]
    NotTrained {
        /// The checkpoint.
        place: String,
    },
    /// The run has trained an adapter.
    #[error(
        "{place}: the run has trained an adapter and no weights of a model: take the adapter with `weightcast adapter \
         export`, or a model with `weightcast adapter merge`"
    )]
    HasAdapter {
        /// The checkpoint.
        place: String,
    },
    /// The model's configuration is not known.
    #[error("{place}: config.json of the model: {reason}")]
    Config {
        /// The checkpoint.
        place: String,
        /// What is wrong.
        reason: String,
    },
    /// The checkpoint does not have a tensor of the model.
    #[error("{place}: tensor {fqn}: expected shape {expected}, found {found}")]
    Tensor {
        /// The checkpoint.
        place: String,
        /// The tensor.
        fqn: Fqn,
        /// The shape that the model has.
        expected: Shape,
        /// What the checkpoint has.
        found: String,
    },
    /// A tensor cannot be converted.
    #[error("tensor {fqn}: {source}")]
    Convert {
        /// The tensor.
        fqn: Fqn,
        /// The reason.
        source: QuantError,
    },
    /// A trained value is no number in the type that is written.
    #[error("tensor {fqn}: {count} values are infinite or not a number as {dtype}")]
    NotFinite {
        /// The tensor.
        fqn: Fqn,
        /// How many.
        count: usize,
        /// The type.
        dtype: DType,
    },
}

impl Classify for ModelExportError {
    fn kind(&self) -> Kind {
        match self {
            Self::Checkpoint(source) => source.kind(),
            Self::Store(source) => source.kind(),
            Self::Directory(source) => source.kind(),
            Self::Adapter(source) => source.kind(),
            Self::Base(source) => source.kind(),
            Self::NotTrained { .. } => Kind::NotFound,
            Self::HasAdapter { .. } | Self::Config { .. } | Self::NotFinite { .. } => Kind::Invalid,
            Self::Tensor { .. } => Kind::Corrupt,
            Self::Convert { source, .. } => source.kind(),
        }
    }
}

/// What was written.
#[derive(Clone, Debug)]
pub struct ExportedModel {
    /// The checkpoint's step.
    pub step: Step,
    /// The number of parameters.
    pub parameters: u64,
    /// The bytes of the tensors.
    pub bytes: u64,
}

/// A checkpoint of a training run, whose tensors have not been read.
#[derive(Debug)]
pub struct TrainedRun {
    pub(super) tensors: RunTensors,
    pub(super) training: Box<TrainingState>,
    pub(super) skeleton: Skeleton,
    config: Map<String, Value>,
    /// The root of its checkpoints.
    root: PathBuf,
    /// Where the base's files are, if that is known.
    base: Option<PathBuf>,
}

impl TrainedRun {
    /// Opens a checkpoint of the run whose checkpoints are below `root`.
    ///
    /// # Errors
    /// [`ModelExportError`].
    pub fn open(root: &Path, choice: StepChoice) -> Result<Self, ModelExportError> {
        let root = real(root);
        let tensors = RunTensors::open(&root, choice)?;
        let place = tensors.place.clone();
        let not_trained = || ModelExportError::NotTrained { place: place.clone() };
        let training = tensors.training.clone().ok_or_else(not_trained)?;
        let bad = |reason: String| ModelExportError::Config { place: place.clone(), reason };
        let text = tensors.config_json.as_deref().ok_or_else(|| bad("expected one, found none".to_owned()))?;
        let skeleton = Skeleton::from_config(text.as_bytes()).map_err(|error: ModelError| bad(error.to_string()))?;
        let config = serde_json::from_str(text).map_err(|error| bad(error.to_string()))?;
        let base = base_directory(&training.base_model);
        Ok(Self { tensors, training, skeleton, config, root, base })
    }

    /// The step.
    #[must_use]
    pub const fn step(&self) -> Step {
        self.tensors.step
    }

    /// Takes the base's files from `directory`, for whoever knows it better than the checkpoint does.
    pub(super) fn with_base(self, directory: &Path) -> Self {
        Self { base: Some(directory.to_owned()), ..self }
    }

    /// The base, where the run has trained a part of its blocks and the others are as they were.
    fn untrained(&self) -> Result<Option<ModelSource>, ModelExportError> {
        let everything = serde_json::to_value(TrainedLayers::default()).unwrap_or_default();
        match self.training.recipe.get("layers") {
            None => Ok(None),
            Some(layers) if *layers == everything => Ok(None),
            Some(_) => Ok(Some(open_local_model(&self.training.base_model, &|_| {}).map_err(Box::new)?)),
        }
    }

    /// The model's tensors as they are written.
    fn outputs(&self, dtype: DType, base: Option<&ModelSource>) -> Result<Vec<OutputTensor>, ModelExportError> {
        let place = &self.tensors.place;
        if self.training.adapter.is_some() {
            return Err(ModelExportError::HasAdapter { place: place.clone() });
        }
        let found = self.tensors.plain(|fqn| !fqn.as_str().starts_with("optimizer."))?;
        let mut outputs = Vec::with_capacity(self.skeleton.tensors.len());
        for tensor in &self.skeleton.tensors {
            let untrained = base.and_then(|base| base.entry(&tensor.fqn)).map(|_| &tensor.shape);
            let shape = found.get(&tensor.fqn).map(|(_, shape)| shape).or(untrained);
            if shape != Some(&tensor.shape) {
                return Err(ModelExportError::Tensor {
                    place: place.clone(),
                    fqn: tensor.fqn.clone(),
                    expected: tensor.shape.clone(),
                    found: shape.map_or_else(|| "none".to_owned(), Shape::to_string),
                });
            }
            outputs.push((tensor.fqn.clone(), dtype, tensor.shape.clone()));
        }
        Ok(outputs)
    }

    /// Fills `bytes` with a tensor in the type that is written.
    fn fill(
        &self,
        (fqn, dtype, shape): &OutputTensor,
        base: Option<&(LocalStore, ModelSource)>,
        bytes: &mut Vec<u8>,
    ) -> Result<(), ModelExportError> {
        let convert = |source| ModelExportError::Convert { fqn: fqn.clone(), source };
        let stored = match base.filter(|_| !self.tensors.contains(fqn)) {
            Some((files, base)) => {
                base.read(files, fqn, bytes)?;
                base.entry(fqn).map_or(DType::F32, |entry| entry.dtype)
            }
            None => {
                bytes.resize(as_usize(shape.bytes(DType::F32).unwrap_or(0)), 0);
                self.tensors.read(fqn, bytes)?;
                DType::F32
            }
        };
        let values = widen(stored, bytes).map_err(convert)?;
        // The largest finite f16 is 65504; what rounds to more is infinite there.
        let limit = if *dtype == DType::F16 { 65_520.0 } else { f32::MAX };
        match values.iter().filter(|value| value.is_nan() || value.abs() > limit).count() {
            0 => {}
            count => return Err(ModelExportError::NotFinite { fqn: fqn.clone(), count, dtype: *dtype }),
        }
        if stored == *dtype {
            return Ok(());
        }
        bytes.clear();
        narrow(&values, *dtype, bytes).map_err(convert)
    }

    /// The record of a model directory that this run has brought to `stage`.
    pub(super) fn meta(&self, name: &ModelName, stage: Stage) -> Result<ExportMeta, DirectoryError> {
        let mut meta = ExportMeta::new(name, stage, self.skeleton.parameters(), &self.tensors.place);
        if let Some(base) = &self.base {
            let last = std::mem::replace(&mut meta.history, history_of(base)?);
            meta.history.extend(last);
        }
        if let (Some(adapter), Some(entry)) = (&self.training.adapter, meta.history.last_mut())
            && let Ok(config) = AdapterConfig::from_value(adapter)
        {
            entry.from = format!("{} (r {}, alpha {})", entry.from, config.r, config.lora_alpha);
        }
        Ok(meta)
    }

    /// What a model directory has beside weights and adapters; config.json, which goes last, is left to the caller.
    pub(super) fn write_records(&self, to: &LocalStore, meta: &ExportMeta) -> Result<(), ModelExportError> {
        to.create_dir("adapters")?;
        if let Some(config) = &self.skeleton.config {
            write_small(to, "model_args.json", pretty(&model_args(config)).as_bytes())?;
        }
        match read_small(&LocalStore::new(self.root.join("metrics")), LOG_FILE, MAX_LOG_BYTES) {
            Ok(log) => write_small(to, LOG_FILE, &log)?,
            Err(error) if error.kind() == Kind::NotFound => {}
            Err(error) => return Err(error.into()),
        }
        Ok(write_meta(to, meta)?)
    }

    /// config.json as transformers reads it, with the run's configuration in it, which transformers passes over. `dtype` is
    /// the type of the weights that lie with it.
    pub(super) fn config_json(&self, dtype: Option<DType>) -> String {
        let mut config = self.config.clone();
        if let Some(dtype) = dtype {
            // transformers before version 5 writes torch_dtype.
            let key = if config.contains_key("torch_dtype") { "torch_dtype" } else { "dtype" };
            config.insert(key.to_owned(), Value::from(dtype.torch_name()));
        }
        config.insert("training_config".to_owned(), self.training.recipe.clone());
        pretty(&Value::Object(config))
    }

    fn copy_companions(&self, to: &LocalStore) -> Result<(), StoreError> {
        let tokenizer = self.training.recipe.get("tokenizer").and_then(Value::as_str).map(PathBuf::from);
        let Some(base) = self.base.clone().or_else(|| tokenizer.clone()) else {
            tracing::warn!(base = self.training.base_model, "the base's files are not here: no tokenizer was copied");
            return Ok(());
        };
        let tokenizer = LocalStore::new(tokenizer.unwrap_or_else(|| base.clone()));
        copy_companions(&LocalStore::new(base), &tokenizer, to)
    }
}

/// Writes the weights of a run whose type is `full` as a model into `output`, which must not be there: `model.safetensors` in
/// `dtype`, the base's tokenizer, and config.json. A directory whose name is of the form of model directories gets
/// `model_args.json`, `export_meta.json`, `training_log.txt` and `adapters/` too.
///
/// # Errors
/// [`ModelExportError`]; nothing is left in `output` then.
pub fn export_model(run: &TrainedRun, dtype: DType, output: &Path) -> Result<ExportedModel, ModelExportError> {
    let base = run.untrained()?;
    let files = WeightFiles::one("model.safetensors", run.outputs(dtype, base.as_ref())?);
    let base = base.map(|base| (LocalStore::new(&base.root), base));
    let meta = match ModelName::of(output) {
        Ok(name) => {
            check_size(&name, &run.skeleton)?;
            Some(run.meta(&name, Stage::Pretrain)?)
        }
        Err(_) => None,
    };
    publish_directory(output, |to| {
        files.write(to, |tensor, bytes| run.fill(tensor, base.as_ref(), bytes))?;
        if let Some(meta) = &meta {
            run.write_records(to, meta)?;
        }
        run.copy_companions(to)?;
        Ok::<(), ModelExportError>(write_small(to, "config.json", run.config_json(Some(dtype)).as_bytes())?)
    })?;
    Ok(ExportedModel { step: run.step(), parameters: run.skeleton.parameters(), bytes: files.total_bytes() })
}

/// Makes the directory `target`, which must not exist, of what `write` puts into the store that it is given. It is seen when
/// it is whole (one rename); until then there is `.<name>.part` beside it.
pub(super) fn publish_directory<E: From<StoreError> + From<DirectoryError>>(
    target: &Path,
    write: impl FnOnce(&LocalStore) -> Result<(), E>,
) -> Result<(), E> {
    let name = target.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let parent = target.parent().filter(|parent| *parent != Path::new("")).unwrap_or_else(|| Path::new("."));
    let store = LocalStore::new(parent);
    store.create_dir("")?;
    if store.list("")?.contains(&name) {
        return Err(DirectoryError::Exists { directory: target.display().to_string() }.into());
    }
    let part = format!(".{name}.part");
    store.remove(&part)?;
    store.create_dir(&part)?;
    write(&LocalStore::new(parent.join(&part)))?;
    store.sync_dir(&part)?;
    crate::faults::point("output.written");
    Ok(store.publish(&part, &name)?)
}

/// A path without links and `..`, so that equal places have equal names.
pub(super) fn real(path: &Path) -> PathBuf {
    path.canonicalize().unwrap_or_else(|_| absolute(path))
}

/// Where the files of a model are that was here when it was loaded; nothing is downloaded.
fn base_directory(reference: &str) -> Option<PathBuf> {
    match Reference::parse(reference).ok()? {
        Reference::Directory(path) => Some(path),
        Reference::File(path) => path.parent().map(Path::to_owned),
        hub @ Reference::Hub { .. } => {
            let config = HubConfig { offline: true, ..HubConfig::from_vars(&crate::config::variable).ok()? };
            Some(resolve(&hub, &config, &|_| {}).ok()?.root)
        }
    }
}

/// What the model's shape is made from: nanoGPT's names for GPT-2, transformers' for others.
pub(super) fn model_args(config: &ModelConfig) -> Value {
    let positions = config.max_position_embeddings;
    if config.architecture == Architecture::Gpt2 {
        return json!({
            "n_layer": config.num_hidden_layers, "n_head": config.num_attention_heads, "n_embd": config.hidden_size,
            "block_size": positions, "bias": true, "vocab_size": config.vocab_size, "dropout": 0.0,
        });
    }
    json!({
        "architecture": config.architecture.name(), "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers, "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads, "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size, "max_position_embeddings": positions,
        "vocab_size": config.vocab_size, "tie_word_embeddings": config.tie_word_embeddings,
    })
}

/// JSON as text, with a line's end.
pub(super) fn pretty(value: &Value) -> String {
    format!("{}\n", serde_json::to_string_pretty(value).expect("a value always becomes text"))
}
