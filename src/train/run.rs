//! A training run on one rank, from the loaded base to the end.
//!
//! Owns: setting a run up, fresh or from a checkpoint, and the checks that all ranks and the checkpoint mean the same run.
//! Refuses to know: processes, RPC.

use std::path::{Path, PathBuf};

use crate::adapter::AdapterConfig;
use crate::comm::{Communicator, Group};
use crate::data::{Dataset, Split, Tokenizer};
use crate::device::Device;
use crate::load::{LoadError, LoadOptions, load};
use crate::manifest::TrainingState;
use crate::model::Skeleton;
use crate::nn::Decoder;
use crate::plan::{LoadPlan, TrainPlan};
use crate::recipe::schedule::LearningRate;
use crate::state::StateDict;
use crate::store::{LocalStore, is_remote, open_root};

use super::base::Base;
use super::config::Recipe;
use super::control::Control;
use super::engine::Engine;
use super::exchange::Exchange;
use super::parameters::{ModelParameters, first_values};
use super::report::{self, Reporter};
use super::snapshot::{Tell, Writer};
use super::state::{Layout, Shards};
use super::steps::Run;
use super::{TrainError, Trained, trained_tensors};

/// What a run needs.
pub struct TrainRequest<'a, 'c> {
    /// The base's plan, with the training part.
    pub plan: &'a LoadPlan,
    /// This rank's part of the base, as far as it stays in memory.
    pub base: &'a StateDict,
    /// The communicator; none for a world of one.
    pub comm: Option<&'c mut dyn Communicator>,
    /// The memory that it moves.
    pub comm_device: Device,
    /// Who we are.
    pub group: Group,
    /// The root of checkpoints on this host, which the metrics are written below.
    pub checkpoint_root: Option<PathBuf>,
    /// The line to whoever runs this.
    pub control: Control,
    /// Who is told of snapshots and shards.
    pub tell: Tell,
}

impl std::fmt::Debug for TrainRequest<'_, '_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "TrainRequest(rank {} of {})", self.group.rank, self.group.world)
    }
}

/// How a run ended without failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// There was nothing left to learn.
    Finished,
    /// It was asked to stop.
    Stopped,
}

/// Trains until the recipe is done or [`Control::stop`] is called. All checkpoints are committed on return.
///
/// # Errors
/// [`TrainError`]; the caller aborts the communicator then.
pub fn train(request: TrainRequest<'_, '_>) -> Result<Ended, TrainError> {
    let plan = request.plan;
    let train = plan.train.as_deref().ok_or_else(|| bad("the plan", "a training part", "none"))?;
    let recipe: Recipe = serde_json::from_value(train.recipe.clone())
        .map_err(|error| bad("the recipe", "a [train] section", &error.to_string()))?;
    let exchange = Exchange::new(request.comm, request.group, request.comm_device);
    let setup = Setup {
        plan,
        train,
        recipe,
        base: request.base,
        group: request.group,
        root: request.checkpoint_root,
        control: request.control,
    };
    setup.run(exchange, request.tell)?.go()
}

struct Setup<'a> {
    plan: &'a LoadPlan,
    train: &'a TrainPlan,
    recipe: Recipe,
    base: &'a StateDict,
    group: Group,
    root: Option<PathBuf>,
    control: Control,
}

impl<'a> Setup<'a> {
    fn run<'c>(self, mut exchange: Exchange<'c>, tell: Tell) -> Result<Run<'a, 'c>, TrainError> {
        let dataset = self.data(&mut exchange)?;
        let skeleton = self.skeleton()?;
        let trained = self.trained(&skeleton)?;
        let layout = Layout::new(&self.train.state, self.group.rank);
        let device = compute_device(self.base.device())?;
        let parameters = ModelParameters::new(self.plan, &layout, &trained, &device)?;
        let mut base = Base::new(self.plan, self.base, parameters.slots.clone(), device.clone())?;
        let base_digest = base.digest(&mut exchange)?;
        let shards = match &self.train.resumed {
            Some(_) => self.load(&layout)?,
            None => Shards::fresh(match &self.train.initial {
                Some(initial) => {
                    let store = LocalStore::new(&initial.root);
                    let (state, _) = load(initial, &LoadOptions::on_host(self.group.rank, &store), None)?;
                    layout.own_parameters(&state)?
                }
                None => {
                    let at = (&mut base, &mut exchange);
                    layout.own_part(&first_values(&layout, &trained, self.recipe.seed, at)?)
                }
            }),
        };
        let config =
            skeleton.config.as_ref().ok_or_else(|| bad("the model", "a known architecture", "bare tensors"))?;
        let decoder = Decoder::new(config, &parameters.parameters, device)?;
        let variables = (parameters.variables.clone(), &layout);
        let engine = Engine::new(decoder, base, variables, self.recipe.activation_checkpointing);
        let step = self.train.resumed.as_ref().map_or(0, |resumed| resumed.step.0);
        let training = self.training_state(base_digest, dataset.digest())?;
        let sequences = dataset.sequences(Split::Train);
        let total_steps = self.recipe.total_steps(sequences);
        let reporter = self.reporter(step, total_steps)?;
        if self.recipe.evaluation.every_steps > 0 && dataset.sequences(Split::Evaluation) == 0 {
            return Err(bad("train.evaluation.every-steps", "held-out data to evaluate on", "none"));
        }
        if reporter.is_some() {
            report::data(&dataset);
        }
        let elements = layout.elements();
        let writer = self.writer((&layout, &shards), tell)?;
        let mut run = Run {
            total_steps,
            rate: self.rate(total_steps),
            order: dataset.order(self.recipe.seed),
            dataset,
            layout,
            shards,
            parameters,
            engine,
            exchange,
            writer,
            reporter,
            control: self.control,
            step,
            training,
            saved: self.train.resumed.as_ref().map(|resumed| resumed.step.0),
            last_save: crate::clock::now(),
            answered: 0,
            whole: vec![0.0; elements],
            dealt: Vec::with_capacity(elements),
            recipe: self.recipe,
        };
        run.spread()?;
        Ok(run)
    }

    /// The data, the same on every rank.
    fn data(&self, exchange: &mut Exchange<'_>) -> Result<Dataset, TrainError> {
        let directory = self.recipe.tokenizer.clone().unwrap_or_else(|| PathBuf::from(&self.plan.root));
        let tokenizer = match is_remote(&directory) {
            true => Tokenizer::load(open_root(&directory).map_err(LoadError::from)?.store.as_ref())?,
            false => Tokenizer::open(&directory)?,
        };
        let dataset = Dataset::load(&self.recipe.data, &tokenizer)?;
        let digests = exchange.all_gather_text(&dataset.digest())?;
        match digests.iter().all(|digest| Some(digest) == digests.first()) {
            true => Ok(dataset),
            false => Err(TrainError::DifferentData { found: digests.join(", ") }),
        }
    }

    fn skeleton(&self) -> Result<Skeleton, TrainError> {
        let json = self.plan.config_json.as_deref().ok_or_else(|| bad("the model", "a config.json", "none"))?;
        Skeleton::from_config(json.as_bytes())
            .map_err(|error| bad("the model", "a known config.json", &error.to_string()))
    }

    fn trained(&self, skeleton: &Skeleton) -> Result<Trained, TrainError> {
        let failed = |error: crate::adapter::AdapterError| bad("the adapter", "one that fits", &error.to_string());
        let adapter = self.train.adapter.as_ref().map(AdapterConfig::from_value).transpose().map_err(failed)?;
        trained_tensors(&self.recipe, skeleton, adapter).map_err(failed)
    }

    /// This rank's part of the state in the checkpoint.
    fn load(&self, layout: &Layout) -> Result<Shards, TrainError> {
        let state = &self.train.state;
        let root = self.root.as_deref().unwrap_or_else(|| Path::new(&state.root));
        let store = open_root(root).map_err(LoadError::from)?.store;
        let (state, _) = load(state, &LoadOptions::on_host(self.group.rank, store.as_ref()), None)?;
        Shards::from_state(layout, &state)
    }

    /// Where the run stands: at its beginning, or where the checkpoint says, if base and data are the same.
    fn training_state(&self, base_digest: String, data_digest: String) -> Result<TrainingState, TrainError> {
        let Some(resumed) = &self.train.resumed else {
            return Ok(TrainingState {
                recipe: self.train.recipe.clone(),
                adapter: self.train.adapter.clone(),
                base_model: self.plan.model.clone(),
                base_digest,
                data_digest,
                samples: 0,
                tokens: 0,
                best: None,
                evaluations_since_best: 0,
                last_evaluation: None,
            });
        };
        let same = |what, expected: &str, found: &str| match expected == found {
            true => Ok(()),
            false => Err(TrainError::OtherRun {
                step: resumed.step,
                what,
                expected: expected.to_owned(),
                found: found.to_owned(),
            }),
        };
        same("the digest of the base model", &resumed.training.base_digest, &base_digest)?;
        same("the digest of the training data", &resumed.training.data_digest, &data_digest)?;
        let recipe = self.train.recipe.clone();
        Ok(TrainingState { recipe, ..(*resumed.training).clone() })
    }

    fn rate(&self, total_steps: u64) -> LearningRate {
        let optimizer = &self.recipe.optimizer;
        LearningRate {
            peak: optimizer.learning_rate,
            schedule: optimizer.schedule,
            warmup_steps: optimizer.warmup_steps,
            total_steps,
            min_ratio: optimizer.min_learning_rate_ratio,
        }
    }

    /// The snapshot's memory is touched here, so that the first snapshot is no slower than the others.
    fn writer(&self, (layout, shards): (&Layout, &Shards), tell: Tell) -> Result<Option<Writer>, TrainError> {
        if self.root.is_none() {
            return Ok(None);
        }
        let state = &self.train.state;
        let mut memory = StateDict::allocate(state, self.group.rank, Device::Host)?;
        shards.copy_to(layout, &mut memory)?;
        let writer = Writer::start(state.clone(), memory, self.control.clone(), tell);
        writer.map(Some).map_err(|error| bad("the thread that writes checkpoints", "to start", &error.to_string()))
    }

    fn reporter(&self, step: u64, total_steps: u64) -> Result<Option<Reporter>, TrainError> {
        if self.group.rank.0 != 0 {
            return Ok(None);
        }
        // Files that grow line by line cannot lie in an object store.
        let local = self.root.as_deref().filter(|root| !is_remote(root));
        if local.is_none() && self.root.is_some() {
            tracing::info!("the checkpoints are remote: the run's metrics go to this log alone");
        }
        let directory = local.map(|root| root.join("metrics"));
        Reporter::open(directory.as_deref(), (step, total_steps), self.control.clone()).map(Some)
    }
}

/// Where the arithmetic is done: where the weights are, if this build can.
fn compute_device(weights: Device) -> Result<candle_core::Device, TrainError> {
    match weights {
        Device::Host => Ok(candle_core::Device::Cpu),
        Device::Cuda { .. } if !cfg!(feature = "cuda") => Err(bad(
            "the device",
            "the host, because this build computes on CPUs only (the cargo feature cuda adds GPUs; load.device = \"cpu\" \
             trains without one)",
            &weights.to_string(),
        )),
        Device::Cuda { ordinal, .. } => Ok(candle_core::Device::new_cuda(crate::types::as_usize(u64::from(ordinal)))?),
    }
}

fn bad(what: &'static str, expected: &str, found: &str) -> TrainError {
    TrainError::Plan { what, expected: expected.to_owned(), found: found.to_owned() }
}
