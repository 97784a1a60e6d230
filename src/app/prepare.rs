//! Preparing a job: everything that can be decided and refused before a process is started.

use std::path::Path;

use super::source::{ModelSource, Peeked, SourceError, open_model, peek_model};
use super::train::{TrainPlanError, apply_recipe, train_plan};
use crate::cache::{self, CacheClaim, CacheError, Found};
use crate::checkpoint::{self, Checkpoint, CheckpointError, Skipped, plan_resume};
use crate::config::{ConfigError, JobConfig, OtherModelConfig, ResumePolicy};
use crate::device::{self, Device, DeviceError, LocalRank};
use crate::error::{Classify, Kind};
use crate::hub::Progress;
use crate::plan::{
    Chunking, DeviceBudget, DeviceRule, LoadPlan, LoadRequest, OWN_MODEL, OtherModel, PlanError, Quantized, Strategy,
    plan,
};
use crate::store::{self, is_remote, open_root};
use crate::train::Recipe;
use crate::types::{DeviceWish, Step, WorldSize};

/// Bytes that a resume reads at once. Nothing is encoded, so the cache does not matter, and every piece reads whole digest
/// blocks at its two ends: with pieces of 256 KiB a resume read 1.045 to 1.064 of what it needs.
pub(super) const RESUME_CHUNK_BYTES: u64 = 2 << 20;
/// Pieces that may wait: 16 MiB, as in a load.
pub(super) const RESUME_QUEUE_CHUNKS: u32 = 8;

/// A job that can be started.
#[derive(Debug)]
pub struct Prepared {
    /// What the ranks will carry out.
    pub plan: LoadPlan,
    /// The checkpoint that is loaded, if one is.
    pub resumed_from: Option<String>,
    /// Newer checkpoints that were passed over.
    pub skipped: Vec<Skipped>,
    /// The step that a checkpoint of this job will have.
    pub step: Step,
    /// What the cache has of each model, the job's own first, if the job has a cache.
    pub cached: Vec<Option<Found>>,
}

impl Prepared {
    /// Holds the entries of the cache for the job, which then writes into them what they lack. They are held until what is
    /// returned is dropped.
    ///
    /// # Errors
    /// [`PrepareError::Cache`].
    pub fn claim_cache(&mut self) -> Result<Vec<CacheClaim>, PrepareError> {
        let mut own = std::mem::take(&mut self.plan.others);
        let plans = std::iter::once(&mut self.plan).chain(own.iter_mut().map(|other| &mut other.plan));
        let claimed = std::mem::take(&mut self.cached).into_iter().zip(plans);
        let claimed = claimed.filter_map(|(found, plan)| Some(found?.claim(plan))).collect::<Result<_, _>>();
        self.plan.others = own;
        Ok(claimed?)
    }
}

/// Why a job cannot be started.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PrepareError {
    /// The configuration cannot work.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The model cannot be opened.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The checkpoint cannot be used.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// There is no plan.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// There are no such devices.
    #[error("load.device: {0}")]
    Device(#[from] DeviceError),
    /// The cache cannot be used.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// The training run cannot be started.
    #[error(transparent)]
    Train(#[from] TrainPlanError),
    /// The checkpoints are not what the job needs.
    #[error("{root}/{directory} is of {found}: {advice}")]
    OtherCheckpoint {
        /// The root.
        root: String,
        /// The checkpoint.
        directory: String,
        /// What it is.
        found: &'static str,
        /// What to do.
        advice: &'static str,
    },
}

impl Classify for PrepareError {
    fn kind(&self) -> Kind {
        match self {
            Self::Config(source) => source.kind(),
            Self::Source(source) => source.kind(),
            Self::Checkpoint(source) => source.kind(),
            Self::Plan(source) => source.kind(),
            Self::Device(source) => source.kind(),
            Self::Train(source) => source.kind(),
            Self::Cache(source) => source.kind(),
            Self::OtherCheckpoint { .. } => Kind::Conflict,
        }
    }
}

/// Plans the job on `world` ranks of this host and checks it against the memory of host and devices.
///
/// # Errors
/// [`PrepareError`].
pub fn prepare(
    config: &JobConfig,
    world: WorldSize,
    progress: &dyn Fn(Progress<'_>),
) -> Result<Prepared, PrepareError> {
    prepare_with(config, world, crate::config::available_memory_bytes(), progress)
}

/// As [`prepare`], with the host's memory given. Without it the ranks' hosts are not known: then neither memory nor
/// devices are looked at, and with `device = "auto"` each rank takes what it finds.
///
/// # Errors
/// [`PrepareError`].
pub fn prepare_with(
    config: &JobConfig,
    world: WorldSize,
    host_bytes: Option<u64>,
    progress: &dyn Fn(Progress<'_>),
) -> Result<Prepared, PrepareError> {
    prepare_of(config, world, host_bytes, &mut |reference| open_model(reference, progress))
}

/// As [`prepare_with`], to look at the plan and not to carry it out: nothing is downloaded from a hub. What was
/// seen there of the job's models comes back too.
///
/// # Errors
/// [`PrepareError`].
pub fn prepare_peek(
    config: &JobConfig,
    world: WorldSize,
    host_bytes: Option<u64>,
) -> Result<(Prepared, Vec<Peeked>), PrepareError> {
    let mut seen = Vec::new();
    let prepared = prepare_of(config, world, host_bytes, &mut |reference| {
        let (source, peeked) = peek_model(reference, &|_| {})?;
        seen.extend(peeked);
        Ok(source)
    })?;
    Ok((prepared, seen))
}

/// Opens a model by its reference.
type Open<'a> = dyn FnMut(&str) -> Result<ModelSource, SourceError> + 'a;

fn prepare_of(
    config: &JobConfig,
    world: WorldSize,
    host_bytes: Option<u64>,
    open: &mut Open<'_>,
) -> Result<Prepared, PrepareError> {
    let mut config = config.clone();
    apply_recipe(&mut config)?;
    let config = &config;
    if config.checkpoint.save && config.checkpoint.directory.is_none() {
        let (key, expected) = ("checkpoint.directory", "a directory, because checkpoint.save is set");
        return Err(ConfigError::Value { key, expected, found: "nothing".to_owned() }.into());
    }
    let (device, devices) = match host_bytes {
        Some(_) => choose_device(config, world)?,
        None => (config.device_rule(), None),
    };
    let mut prepared = match (newest(config)?, &config.train) {
        (found, Some(recipe)) => train(config, recipe, world, (found, open))?,
        (Some((checkpoint, skipped)), None) => {
            expect_model(config, &checkpoint)?;
            resume(config, world, &checkpoint, skipped)?
        }
        (None, None) => fresh(config, world, open)?,
    };
    prepared.plan.device = device;
    for (name, model) in &config.models {
        let other = other_model(config, (name, model), world, open)?;
        prepared.plan.others.push(OtherModel { name: name.clone(), plan: LoadPlan { device, ..other.plan } });
        prepared.cached.extend(other.cached);
    }
    prepared.plan.check_memory(config.memory_budget(host_bytes, devices))?;
    Ok(prepared)
}

/// What this host's devices make of the job's wish, and what is free on them.
fn choose_device(config: &JobConfig, world: WorldSize) -> Result<(DeviceRule, Option<DeviceBudget>), PrepareError> {
    let mut rule = config.device_rule();
    if rule.device == DeviceWish::Cpu {
        return Ok((rule, None));
    }
    let probe = device::probe();
    let local = LocalRank { index: 0, count: world.get() };
    let chosen = device::assign(rule.device, rule.sharing, local, &probe)?;
    if chosen == Device::Host {
        let gpus = probe.devices.len().saturating_sub(1);
        if gpus > 0 {
            tracing::info!(ranks = world.get(), gpus, "fewer devices than ranks: the weights stay on the host");
        }
        rule.device = DeviceWish::Cpu;
        return Ok((rule, None));
    }
    rule.device = DeviceWish::Cuda;
    let free = device::free_bytes(world.get(), &probe)?;
    Ok((rule, free.map(|(free_bytes, count)| DeviceBudget { count, free_bytes })))
}

/// A model beside the job's own: loaded as it is, with a type and a quantization of its own.
fn other_model(
    config: &JobConfig,
    (name, model): (&str, &OtherModelConfig),
    world: WorldSize,
    open: &mut Open<'_>,
) -> Result<Prepared, PrepareError> {
    let is_word = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    if name == OWN_MODEL || name.is_empty() || !name.chars().all(is_word) {
        let expected = "a name of letters, digits, - and _, other than base, which is the job's own model";
        return Err(ConfigError::Value { key: "models", expected, found: name.to_owned() }.into());
    }
    let mut alone = config.clone();
    alone.model.source = Some(model.source.clone());
    alone.load.dtype.clone_from(&model.dtype);
    alone.quantization = model.quantization.clone();
    // Nobody reads it layer by layer.
    alone.load.strategy = alone.load.strategy.filter(|strategy| *strategy != Strategy::Streaming);
    fresh(&alone, world, open)
}

/// The checkpoint to load, if the policy and the directory give one.
fn newest(config: &JobConfig) -> Result<Option<(Checkpoint, Vec<Skipped>)>, PrepareError> {
    let policy = config.checkpoint.resume;
    let Some(root) = config.checkpoint.directory.as_deref().filter(|_| policy != ResumePolicy::Never) else {
        return match policy {
            ResumePolicy::Must => Err(ConfigError::Value {
                key: "checkpoint.directory",
                expected: "a directory to resume from",
                found: "nothing".to_owned(),
            }
            .into()),
            _ => Ok(None),
        };
    };
    let store = open_root(root).map_err(CheckpointError::from)?.store;
    match checkpoint::newest(store.as_ref()) {
        Ok(found) => Ok(Some(found)),
        Err(CheckpointError::None { .. }) if policy == ResumePolicy::Auto => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Every request takes a while to be answered, so many are under way: 16 of 1 MiB, where the answers wait 30 ms, are half a
/// gigabyte per second.
const REMOTE_CHUNK_BYTES: u64 = 1 << 20;
const REMOTE_READER_THREADS: u32 = 16;
/// Chunks that may wait: 16 MiB, as of local files.
const REMOTE_QUEUE_CHUNKS: u32 = 16;

/// How the files at `root` are cut: as the job says, else as suits what serves them.
fn chunking(config: &JobConfig, root: &Path) -> Result<Chunking, ConfigError> {
    let mut chunking = config.chunking()?;
    if is_remote(root) {
        chunking.queue_chunks = REMOTE_QUEUE_CHUNKS;
        if config.load.chunk_bytes.is_none() {
            chunking.chunk_bytes = REMOTE_CHUNK_BYTES;
        }
        if config.load.reader_threads.is_none() {
            chunking.reader_threads = REMOTE_READER_THREADS;
        }
    }
    Ok(chunking)
}

fn request(config: &JobConfig, world: WorldSize, root: &Path, strategy: Strategy) -> Result<LoadRequest, ConfigError> {
    Ok(LoadRequest {
        model: config.model.source.clone().unwrap_or_default(),
        root: absolute(root),
        config_json: None,
        world,
        strategy: config.load.strategy.unwrap_or(strategy),
        placement: config.load.placement,
        dtype: config.dtype_rule()?,
        quantization: config.quantization_rule()?,
        quantized: if config.quantization.implied { Quantized::Keep } else { Quantized::Refuse },
        chunking: chunking(config, root)?,
        digests: config.load.digests,
        device: config.device_rule(),
        split: config.load.split.clone(),
    })
}

fn fresh(config: &JobConfig, world: WorldSize, open: &mut Open<'_>) -> Result<Prepared, PrepareError> {
    let reference = config.model.source.as_deref().ok_or_else(|| ConfigError::Value {
        key: "model.source",
        expected: "a model directory, file or hub id",
        found: "nothing".to_owned(),
    })?;
    let source = open(reference)?;
    let is_here = is_remote(&source.root) || source.root.is_dir();
    let mut request = request(config, world, &source.root, Strategy::LowMemory)?;
    request.config_json = source.config_json;
    let mut plan = plan(request, &source.index, &source.skeleton, &source.binding)?;
    plan.versions = source.versions;
    // What is in a hub alone has no files here that a cache could know.
    let place = config.cache_place().filter(|_| is_here);
    let cached = place.map(|place| cache::attach(&mut plan, &place)).transpose()?.flatten();
    let step = Step(config.checkpoint.step);
    Ok(Prepared { plan, resumed_from: None, skipped: Vec::new(), step, cached: vec![cached] })
}

fn resume(
    config: &JobConfig,
    world: WorldSize,
    checkpoint: &Checkpoint,
    skipped: Vec<Skipped>,
) -> Result<Prepared, PrepareError> {
    let root = config.checkpoint.directory.as_deref().unwrap_or_else(|| Path::new(""));
    // From a checkpoint each rank reads its own bytes: they are packed already, so nobody has work to share.
    let mut request = request(config, world, root, Strategy::Full)?;
    if config.load.chunk_bytes.is_none() && !is_remote(root) {
        request.chunking.chunk_bytes = RESUME_CHUNK_BYTES;
        request.chunking.queue_chunks = RESUME_QUEUE_CHUNKS;
    }
    let plan = plan_resume(request, checkpoint)?;
    let resumed_from = Some(checkpoint.directory.clone());
    Ok(Prepared { plan, resumed_from, skipped, step: checkpoint.manifest.step, cached: vec![None] })
}

type Resumable = Option<(Checkpoint, Vec<Skipped>)>;

/// A training run: the base from the model, the state from a checkpoint if there is one.
fn train(
    config: &JobConfig,
    recipe: &Recipe,
    world: WorldSize,
    (found, open): (Resumable, &mut Open<'_>),
) -> Result<Prepared, PrepareError> {
    let root = config.checkpoint.directory.as_deref().unwrap_or_else(|| Path::new(""));
    if let Some((checkpoint, _)) = &found
        && checkpoint.manifest.trainer.training.is_none()
    {
        return Err(PrepareError::OtherCheckpoint {
            root: root.display().to_string(),
            directory: checkpoint.directory.clone(),
            found: "a model that was loaded, not of a training run",
            advice: "give the run a checkpoint.directory of its own",
        });
    }
    let mut prepared = fresh(config, world, open)?;
    let checkpoint = found.as_ref().map(|(checkpoint, _)| checkpoint);
    let plan = train_plan(recipe, &prepared.plan, root, checkpoint)?;
    prepared.step = checkpoint.map_or(Step(0), |checkpoint| checkpoint.manifest.step);
    prepared.plan.train = Some(Box::new(plan));
    if let Some((checkpoint, skipped)) = found {
        prepared.resumed_from = Some(checkpoint.directory);
        prepared.skipped = skipped;
    } else if !checkpoint::list(open_root(root).map_err(CheckpointError::from)?.store.as_ref())?.is_empty() {
        return Err(PrepareError::OtherCheckpoint {
            root: root.display().to_string(),
            directory: "step-*".to_owned(),
            found: "a run that this job does not go on with",
            advice: "resume it, or give the new run a checkpoint.directory of its own",
        });
    }
    Ok(prepared)
}

/// A training run's checkpoint has no base in it.
fn expect_model(config: &JobConfig, checkpoint: &Checkpoint) -> Result<(), PrepareError> {
    if checkpoint.manifest.trainer.training.is_none() {
        return Ok(());
    }
    let root = config.checkpoint.directory.as_deref().unwrap_or_else(|| Path::new(""));
    Err(PrepareError::OtherCheckpoint {
        root: root.display().to_string(),
        directory: checkpoint.directory.clone(),
        found: "a training run, without the model that it trains",
        advice: "go on with it by a [train] section, or take its adapter with `weightcast adapter export`",
    })
}

/// Ranks may have another working directory.
pub(super) fn absolute(path: &Path) -> String {
    store::absolute(path).display().to_string()
}
