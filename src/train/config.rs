//! The `[train]` section: what is trained, on what, for how long.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::data::DataConfig;
use crate::quant::FourBitCode;
use crate::recipe::schedule::ScheduleKind;
use crate::types::Fqn;

/// What of the model is trained.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Method {
    /// All weights, in f32.
    Full,
    /// Low-rank adapters over weights as the model's files have them.
    Lora,
    /// Low-rank adapters over 4-bit weights.
    #[default]
    Qlora,
}

/// A training run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Recipe {
    /// What is trained.
    #[serde(rename = "type", default)]
    pub method: Method,
    /// Optimizer steps; or `epochs`.
    #[serde(default)]
    pub steps: Option<u64>,
    /// Passes over the training data; 1 unless `steps` is given.
    #[serde(default)]
    pub epochs: Option<f64>,
    /// Sequences of one optimizer step, over all ranks.
    #[serde(default = "batch_size")]
    pub batch_size: u64,
    /// Sequences that a rank computes at a time; gradients of several are summed.
    #[serde(default = "micro_batch_size")]
    pub micro_batch_size: u64,
    /// Which blocks are trained by type `full`.
    #[serde(default)]
    pub layers: TrainedLayers,
    /// Seed of everything that is random.
    #[serde(default)]
    pub seed: u64,
    /// Compute the inside of each block again in the backward pass instead of keeping it.
    #[serde(default = "yes")]
    pub activation_checkpointing: bool,
    /// The 4-bit format of the base; filled in from the job's `[quantization]`.
    #[serde(default)]
    pub base_quantization: Option<FourBitCode>,
    /// The directory of `tokenizer.json`; the model's by default.
    #[serde(default)]
    pub tokenizer: Option<PathBuf>,
    /// The model directory that the run writes when it is done, named
    /// `{architecture}-{size}-{dataset}-{training_type}[-{version}]`.
    #[serde(default)]
    pub output: Option<PathBuf>,
    /// `[train.data]`.
    pub data: DataConfig,
    /// `[train.lora]`.
    #[serde(default)]
    pub lora: LoraRecipe,
    /// `[train.optimizer]`.
    #[serde(default)]
    pub optimizer: OptimizerRecipe,
    /// `[train.evaluation]`.
    #[serde(default)]
    pub evaluation: EvaluationRecipe,
    /// `[train.checkpoint]`.
    #[serde(default)]
    pub checkpoint: CheckpointRecipe,
}

/// Which blocks of a model are trained where whole weights are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum TrainedLayers {
    /// `all`, and the tensors outside blocks too; or `expanded`, the blocks that `weightcast model expand` inserted.
    Named(LayerSet),
    /// These alone.
    Numbers(Vec<u32>),
}

/// Blocks that have a name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LayerSet {
    /// Everything.
    #[default]
    All,
    /// What config.json lists in `expanded_layers`.
    Expanded,
}

impl Default for TrainedLayers {
    fn default() -> Self {
        Self::Named(LayerSet::All)
    }
}

impl TrainedLayers {
    /// Whether a tensor of a model whose inserted blocks are `expanded` is trained.
    #[must_use]
    pub fn contains(&self, fqn: &Fqn, expanded: &[u32]) -> bool {
        let is_in = |numbers: &[u32]| fqn.layer().is_some_and(|layer| numbers.contains(&layer));
        match self {
            Self::Named(LayerSet::All) => true,
            Self::Named(LayerSet::Expanded) => is_in(expanded),
            Self::Numbers(numbers) => is_in(numbers),
        }
    }

    /// What is wrong with it for a model of `layers` blocks: what was expected and found.
    #[must_use]
    pub fn mismatch(&self, layers: u32, expanded: &[u32]) -> Option<(String, String)> {
        match self {
            Self::Named(LayerSet::Expanded) if expanded.is_empty() => {
                let expected = "a model that `weightcast model expand` made";
                Some((expected.to_owned(), "no expanded_layers in its config.json".to_owned()))
            }
            Self::Numbers(numbers) => {
                let beyond = numbers.iter().find(|number| **number >= layers).map(u32::to_string);
                let found = if numbers.is_empty() { Some("none".to_owned()) } else { beyond };
                found.map(|found| (format!("blocks from 0 to {}", layers.saturating_sub(1)), found))
            }
            Self::Named(_) => None,
        }
    }
}

/// `[train.lora]`, in PEFT's terms.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct LoraRecipe {
    /// The rank of the update (PEFT's `r`).
    pub r: u32,
    /// The update is scaled by alpha / r.
    pub alpha: f64,
    /// The part of a module's inputs that is dropped while training.
    pub dropout: f32,
    /// Modules: a list of names or endings of names, a pattern, or `all-linear`.
    pub target_modules: Targets,
    /// Scale by alpha / sqrt(r) (rsLoRA).
    pub rslora: bool,
    /// Train a magnitude for each output as well (DoRA).
    pub dora: bool,
    /// Start from this PEFT adapter, whose configuration then stands for this section's.
    pub adapter: Option<PathBuf>,
}

impl Default for LoraRecipe {
    /// PEFT's rank and alpha; all linear layers, as the QLoRA paper found best.
    fn default() -> Self {
        let target_modules = Targets::One("all-linear".to_owned());
        Self { r: 8, alpha: 16.0, dropout: 0.0, target_modules, rslora: false, dora: false, adapter: None }
    }
}

/// Which modules get an adapter.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Targets {
    /// A pattern over whole names, or `all-linear`.
    One(String),
    /// Names or endings of names.
    Many(Vec<String>),
}

/// `[train.optimizer]`: AdamW and its learning rate.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct OptimizerRecipe {
    /// The highest learning rate.
    pub learning_rate: f64,
    /// How it changes.
    pub schedule: ScheduleKind,
    /// Steps in which it rises from 0.
    pub warmup_steps: u64,
    /// What the cosine schedule ends with, as a part of the highest.
    pub min_learning_rate_ratio: f64,
    /// Decay of weights with two dims or more; adapters included.
    pub weight_decay: f64,
    /// AdamW's betas.
    pub betas: (f64, f64),
    /// AdamW's epsilon.
    pub epsilon: f64,
    /// Gradients with a larger norm are scaled down to it; 0 for no limit.
    pub max_gradient_norm: f64,
}

impl Default for OptimizerRecipe {
    /// The learning rate of the QLoRA paper for small models; the rest as torch and transformers have it.
    fn default() -> Self {
        Self {
            learning_rate: 2e-4,
            schedule: ScheduleKind::Cosine,
            warmup_steps: 0,
            min_learning_rate_ratio: 0.0,
            weight_decay: 0.0,
            betas: (0.9, 0.999),
            epsilon: 1e-8,
            max_gradient_norm: 1.0,
        }
    }
}

/// `[train.evaluation]`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct EvaluationRecipe {
    /// Evaluate before the first step, after every so many steps, and at the end; 0 for never.
    pub every_steps: u64,
    /// End after so many evaluations without a better one; 0 for never.
    pub patience: u32,
}

/// `[train.checkpoint]`: when checkpoints are written, and which stay.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct CheckpointRecipe {
    /// Write one after every so many steps; 0 for none but the last.
    pub every_steps: u64,
    /// And when so many minutes have passed since the last one; 0 for never.
    pub every_minutes: f64,
    /// The newest ones that stay; 0 keeps all.
    pub keep_last: u64,
    /// Those of steps that are multiples of this stay as well; 0 for none.
    pub keep_every: u64,
    /// Write one after each best evaluation, and keep the best.
    pub keep_best: bool,
}

impl Default for CheckpointRecipe {
    fn default() -> Self {
        Self { every_steps: 0, every_minutes: 15.0, keep_last: 3, keep_every: 0, keep_best: true }
    }
}

const fn batch_size() -> u64 {
    8
}

const fn micro_batch_size() -> u64 {
    1
}

const fn yes() -> bool {
    true
}

impl Recipe {
    /// What is wrong with the values: the key, what was expected, what was found.
    ///
    /// # Errors
    /// The first such.
    pub fn check(&self) -> Result<(), (&'static str, &'static str, String)> {
        let positive = |key, value: u64| match value {
            0 => Err((key, "at least 1", "0".to_owned())),
            _ => Ok(()),
        };
        let within = |key, expected, value: f64, holds: bool| match holds {
            true => Ok(()),
            false => Err((key, expected, value.to_string())),
        };
        positive("train.batch-size", self.batch_size)?;
        positive("train.micro-batch-size", self.micro_batch_size)?;
        positive("train.lora.r", u64::from(self.lora.r))?;
        if let Some(steps) = self.steps {
            positive("train.steps", steps)?;
        }
        if let (Some(_), Some(epochs)) = (self.steps, self.epochs) {
            return Err(("train.epochs", "either steps or epochs", epochs.to_string()));
        }
        if self.method != Method::Full && self.layers != TrainedLayers::default() {
            let expected = "only with type = \"full\": where an adapter goes is train.lora.target-modules";
            return Err(("train.layers", expected, "it".to_owned()));
        }
        let optimizer = &self.optimizer;
        let (rate, epochs) = (optimizer.learning_rate, self.epochs.unwrap_or(1.0));
        within("train.epochs", "more than 0", epochs, epochs > 0.0 && epochs.is_finite())?;
        within("train.optimizer.learning-rate", "0 or more", rate, rate >= 0.0 && rate.is_finite())?;
        for beta in [optimizer.betas.0, optimizer.betas.1] {
            within("train.optimizer.betas", "from 0 to below 1", beta, (0.0..1.0).contains(&beta))?;
        }
        within("train.optimizer.epsilon", "more than 0", optimizer.epsilon, optimizer.epsilon > 0.0)?;
        let (norm, decay) = (optimizer.max_gradient_norm, optimizer.weight_decay);
        within("train.optimizer.max-gradient-norm", "0 or more", norm, norm >= 0.0)?;
        within("train.optimizer.weight-decay", "0 or more", decay, decay >= 0.0)?;
        let dropout = f64::from(self.lora.dropout);
        within("train.lora.dropout", "from 0 to below 1", dropout, (0.0..1.0).contains(&dropout))?;
        let (alpha, minutes) = (self.lora.alpha, self.checkpoint.every_minutes);
        within("train.lora.alpha", "more than 0", alpha, alpha > 0.0)?;
        within("train.checkpoint.every-minutes", "0 or more", minutes, minutes >= 0.0)
    }

    /// Makes relative paths relative to `base`; a hub's or a program's name of a path is none.
    pub fn resolve_paths(&mut self, base: &Path) {
        let against =
            |path: &mut PathBuf| *path = std::path::absolute(base.join(&*path)).unwrap_or_else(|_| base.join(&*path));
        self.tokenizer.iter_mut().for_each(against);
        self.output.iter_mut().for_each(against);
        self.lora.adapter.iter_mut().for_each(against);
        self.data.resolve(base);
    }

    /// Optimizer steps for `sequences` sequences of training data.
    #[must_use]
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a positive number of steps, checked")]
    pub fn total_steps(&self, sequences: u64) -> u64 {
        let of_epochs = || {
            let per_epoch = crate::types::as_f64(sequences) / crate::types::as_f64(self.batch_size);
            ((self.epochs.unwrap_or(1.0) * per_epoch).ceil() as u64).max(1)
        };
        self.steps.unwrap_or_else(of_epochs)
    }
}
