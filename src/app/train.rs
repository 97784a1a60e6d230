//! Preparing a training run: what is trained, where it goes on from, and all that can be refused before a process starts.

use std::path::Path;

use super::model_directory_error::DirectoryError;
use super::train_output::OutputPlace;
use crate::adapter::{AdapterConfig, AdapterError};
use crate::checkpoint::{Checkpoint, CheckpointError, plan_state};
use crate::config::{ConfigError, JobConfig, QuantizationFormat};
use crate::error::{Classify, Kind, chain};
use crate::format::ModelIndex;
use crate::load::{ScanError, scan};
use crate::model::{ModelConfig, ModelError, Skeleton};
use crate::plan::{Input, LoadPlan, Resumed, StepSizes, TrainMemory, TrainPlan, state_plan};
use crate::quant::FourBitCode;
use crate::store::{LocalStore, StoreError, read_small};
use crate::train::{Method, Recipe, Trained, is_trainable, trained_tensors};
use crate::types::{Fqn, Shape};

/// An adapter's configuration is a few kilobytes.
const MAX_CONFIG_BYTES: u64 = 16 << 20;
const ADAPTER_CONFIG: &str = "adapter_config.json";
const ADAPTER_MODEL: &str = "adapter_model.safetensors";

/// Why a training run cannot be started.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrainPlanError {
    /// The adapter does not fit.
    #[error("train.lora: {0}")]
    Adapter(#[from] AdapterError),
    /// The adapter to start from cannot be read.
    #[error("train.lora.adapter: {0}")]
    Scan(#[from] ScanError),
    /// The adapter to start from cannot be read.
    #[error("train.lora.adapter: {0}")]
    Store(#[from] StoreError),
    /// The adapter to start from lacks a tensor, or has it in another shape.
    #[error("train.lora.adapter: {path}: tensor {fqn}: expected shape {expected}, found {found}")]
    AdapterTensor {
        /// The file.
        path: String,
        /// The tensor.
        fqn: Fqn,
        /// The shape that the base needs.
        expected: Shape,
        /// What the file has.
        found: String,
    },
    /// The model cannot be trained.
    #[error("{model} cannot be trained: {reason}")]
    Model {
        /// The model.
        model: String,
        /// Why.
        reason: String,
    },
    /// The model directory that the run is to write cannot be.
    #[error("train.output: {0}")]
    Output(#[from] DirectoryError),
    /// The checkpoint to go on from is of another run.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
}

impl Classify for TrainPlanError {
    fn kind(&self) -> Kind {
        match self {
            Self::Adapter(source) => source.kind(),
            Self::Scan(source) => source.kind(),
            Self::Store(source) => source.kind(),
            Self::AdapterTensor { .. } | Self::Model { .. } => Kind::Invalid,
            // A name that does not fit is a configuration that cannot work, not a bad input.
            Self::Output(source) => match source.kind() {
                Kind::Invalid => Kind::Conflict,
                kind => kind,
            },
            Self::Checkpoint(source) => source.kind(),
        }
    }
}

/// Checks the `[train]` section against the rest of the job, and lets it decide what is quantized: `qlora` means NF4 with
/// double quantization unless the job says which format.
///
/// # Errors
/// [`ConfigError::Value`], the first.
pub(super) fn apply_recipe(config: &mut JobConfig) -> Result<(), ConfigError> {
    let Some(recipe) = &mut config.train else { return Ok(()) };
    let value = |key, expected, found: &str| Err(ConfigError::Value { key, expected, found: found.to_owned() });
    recipe.check().map_err(|(key, expected, found)| ConfigError::Value { key, expected, found })?;
    if let Err(error) = recipe.data.validate() {
        return value("train.data", "data that can be read", &chain(&error));
    }
    if recipe.evaluation.every_steps > 0 && !recipe.data.evaluates() {
        let expected = "evaluation or evaluation-fraction, because train.evaluation.every-steps is set";
        return value("train.data", expected, "neither");
    }
    if config.checkpoint.directory.is_none() {
        return value("checkpoint.directory", "a directory, because the job trains", "nothing");
    }
    if config.job.hold {
        return value("job.hold", "false, because the job ends with its training", "true");
    }
    let quantization = &mut config.quantization;
    // That of all modules, or else of some.
    let formats = quantization.rules.iter().map(|rule| rule.format);
    let made = std::iter::once(quantization.format).chain(formats).find(|format| *format != QuantizationFormat::None);
    match (recipe.method, made.unwrap_or_default()) {
        (Method::Qlora, QuantizationFormat::None) => {
            quantization.format = QuantizationFormat::Nf4;
            quantization.double = true;
            quantization.implied = true;
        }
        (Method::Qlora, _) | (Method::Full | Method::Lora, QuantizationFormat::None) => {}
        (Method::Lora, _) => return value("train.type", "\"qlora\", because the base is quantized", "\"lora\""),
        (Method::Full, _) => {
            return value("quantization.format", "none, because all weights are trained", "a quantized format");
        }
    }
    recipe.base_quantization = match quantization.format {
        QuantizationFormat::Nf4 => Some(FourBitCode::Nf4),
        QuantizationFormat::Fp4 => Some(FourBitCode::Fp4),
        _ => None,
    };
    // The run writes its own checkpoints.
    config.checkpoint.save = false;
    Ok(())
}

/// The training part of a plan whose base is `base`; `resumed` is the checkpoint that the run goes on from.
///
/// # Errors
/// [`TrainPlanError`].
pub(super) fn train_plan(
    recipe: &Recipe,
    base: &LoadPlan,
    checkpoint_root: &Path,
    resumed: Option<&Checkpoint>,
) -> Result<TrainPlan, TrainPlanError> {
    let skeleton = skeleton(base)?;
    OutputPlace::check(recipe, &skeleton, checkpoint_root)?;
    check_layers(recipe, &skeleton, base)?;
    let start = recipe.lora.adapter.as_deref().filter(|_| recipe.method != Method::Full);
    let config = match (resumed.and_then(|checkpoint| checkpoint.manifest.trainer.training.as_ref()), start) {
        (Some(training), _) => training.adapter.as_ref().map(AdapterConfig::from_value).transpose()?,
        (None, Some(directory)) => Some(read_config(directory)?),
        (None, None) => None,
    };
    let trained = trained_tensors(recipe, &skeleton, config)?;
    let mut state = state_plan(base, &trained.tensors);
    state.root = super::prepare::absolute(checkpoint_root);
    let initial = match (start, resumed) {
        (Some(directory), None) => Some(Box::new(initial_plan(&state, &trained, directory)?)),
        _ => None,
    };
    let resumed = match resumed {
        None => None,
        Some(checkpoint) => {
            state = plan_state(state, checkpoint)?;
            let training = checkpoint.manifest.trainer.training.clone();
            training.map(|training| Resumed { step: checkpoint.manifest.step, training })
        }
    };
    let adapter = trained.adapter.map(|(mut config, _)| {
        config.base_model_name_or_path.get_or_insert_with(|| base.model.clone());
        config.to_value()
    });
    let sizes = skeleton.config.as_ref().map(|config| step_sizes(recipe, config, &state));
    let memory = sizes.map_or_else(Vec::new, |sizes| {
        base.world.ranks().map(|rank| TrainMemory::new(base, &state, &sizes, rank)).collect()
    });
    let recipe = serde_json::to_value(recipe).unwrap_or_default();
    if let Some(resumed) = &resumed {
        warn_of_changes(&resumed.training.recipe, &recipe);
    }
    Ok(TrainPlan { recipe, adapter, state, initial, resumed, memory })
}

fn check_layers(recipe: &Recipe, skeleton: &Skeleton, base: &LoadPlan) -> Result<(), TrainPlanError> {
    let config = skeleton.config.as_ref();
    let mismatch = config.and_then(|config| recipe.layers.mismatch(config.num_hidden_layers, &config.expanded_layers));
    match mismatch {
        None => Ok(()),
        Some((expected, found)) => Err(TrainPlanError::Model {
            model: base.model.clone(),
            reason: format!("train.layers: expected {expected}, found {found}"),
        }),
    }
}

fn step_sizes(recipe: &Recipe, config: &ModelConfig, state: &LoadPlan) -> StepSizes {
    let layers = u64::from(config.num_hidden_layers);
    let count = state.tensors.len() / 3;
    // A rank's share of a step may be less than a micro-batch.
    let sequences = recipe.micro_batch_size.min(recipe.batch_size.div_ceil(u64::from(state.world.get())));
    let ranks = state.tensors.iter().take(count).filter(|tensor| tensor.fqn.as_str().ends_with(".lora_A.weight"));
    StepSizes {
        tokens: sequences * u64::from(recipe.data.sequence_length),
        layers,
        hidden: config.hidden_size,
        query: config.num_attention_heads * config.head_dim,
        key_value: config.num_key_value_heads * config.head_dim,
        intermediate: config.intermediate_size,
        vocabulary: config.vocab_size,
        adapter_ranks: ranks.map(|tensor| tensor.shape.rows()).sum::<u64>() / layers.max(1),
        checkpointing: recipe.activation_checkpointing,
    }
}

fn skeleton(base: &LoadPlan) -> Result<Skeleton, TrainPlanError> {
    let refused = |reason: String| TrainPlanError::Model { model: base.model.clone(), reason };
    let json = base.config_json.as_deref().ok_or_else(|| refused("it has no config.json".to_owned()))?;
    let skeleton = Skeleton::from_config(json.as_bytes()).map_err(|error: ModelError| refused(chain(&error)))?;
    let trainable = skeleton.config.as_ref().is_some_and(is_trainable);
    if trainable {
        Ok(skeleton)
    } else {
        let name = skeleton.architecture.name();
        let experts = skeleton.architecture.has_experts();
        let what =
            if experts { ", a mixture of experts, which can be loaded and saved but not trained yet" } else { "" };
        Err(refused(format!(
            "config.json: architectures: expected a causal language model of llama, mistral, qwen2, qwen3 or gpt2, found {name}{what}"
        )))
    }
}

fn read_config(directory: &Path) -> Result<AdapterConfig, TrainPlanError> {
    let bytes = read_small(&LocalStore::new(directory), ADAPTER_CONFIG, MAX_CONFIG_BYTES)?;
    Ok(AdapterConfig::parse(&bytes)?)
}

/// The load of an adapter's parameters from its file, cut as the state is.
fn initial_plan(state: &LoadPlan, trained: &Trained, directory: &Path) -> Result<LoadPlan, TrainPlanError> {
    let store = LocalStore::new(directory);
    let index: ModelIndex = scan(&store, &[ADAPTER_MODEL.to_owned()], None)?;
    let mut plan = state.clone();
    plan.tensors.truncate(trained.tensors.len());
    plan.root = super::prepare::absolute(directory);
    plan.files.clone_from(&index.files);
    for tensor in &mut plan.tensors {
        let found = index.tensors.get(tensor.fqn.as_str());
        let Some(entry) = found.filter(|entry| entry.shape == tensor.shape) else {
            return Err(TrainPlanError::AdapterTensor {
                path: directory.join(ADAPTER_MODEL).display().to_string(),
                fqn: tensor.fqn.clone(),
                expected: tensor.shape.clone(),
                found: found.map_or_else(|| "nothing".to_owned(), |entry| entry.shape.to_string()),
            });
        };
        let (file, range, dtype, encoding) = (entry.file, entry.range, entry.dtype, entry.encoding.clone());
        tensor.input = Input::Elements { file, range, dtype, encoding };
    }
    Ok(plan)
}

/// A run may go on with another recipe; people should know that it does.
fn warn_of_changes(before: &serde_json::Value, after: &serde_json::Value) {
    let (Some(before), Some(after)) = (before.as_object(), after.as_object()) else { return };
    for (key, now) in after {
        let was = before.get(key).unwrap_or(&serde_json::Value::Null);
        if was != now && !["steps", "epochs", "output"].contains(&key.as_str()) {
            tracing::warn!("train.{key} is {now}; the run began with {was}");
        }
    }
}
