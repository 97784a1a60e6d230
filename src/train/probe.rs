//! One forward, and the gradients of one adapter, exactly as a training step computes them.
//!
//! Owns: setting the model up on one rank without a run, and the mean over targets. Refuses to know: files, recipes,
//! optimizers. Dropout is off, so that another tool can compute the same.

use crate::adapter::LoadedAdapter;
use crate::comm::Group;
use crate::device::Device;
use crate::model::ModelConfig;
use crate::nn::{Decoder, Tokens};
use crate::plan::{LoadPlan, state_plan};
use crate::state::StateDict;
use crate::types::{Fqn, Rank, Shape, WorldSize, as_f64};

use super::base::Base;
use super::engine::Engine;
use super::exchange::Exchange;
use super::parameters::ModelParameters;
use super::state::Layout;
use super::{TrainError, Trained};

/// A base that was loaded in a world of one, and what is computed over it.
#[derive(Debug)]
pub(crate) struct Probe<'a> {
    /// The base's plan.
    pub(crate) plan: &'a LoadPlan,
    /// The base in host memory, as far as it stays there.
    pub(crate) base: &'a StateDict,
    /// What `plan` is a plan of.
    pub(crate) config: &'a ModelConfig,
    /// Trained matrices beside it.
    pub(crate) adapter: Option<&'a LoadedAdapter>,
}

/// What a loss leads to.
#[derive(Debug)]
pub(crate) struct Gradients {
    /// The mean negative log likelihood of the targets that count, in nats.
    pub(crate) loss: f32,
    /// Its gradient by the adapter's tensors, f32, row-major.
    pub(crate) tensors: Vec<(Fqn, Shape, Vec<f32>)>,
}

impl Probe<'_> {
    /// The logits, f32 `[batch * seq, vocab]` row-major, and the loss with its gradients where they are `wanted`.
    ///
    /// # Errors
    /// [`TrainError`]: the model is not one that is computed here, or the tokens do not fit it.
    pub(crate) fn run(&self, tokens: &Tokens, wanted: Wanted) -> Result<(Vec<f32>, Option<Gradients>), TrainError> {
        self.with_engine(|engine, layout, exchange| {
            let logits = engine.logits(tokens, exchange)?;
            if wanted == Wanted::Logits {
                return Ok((logits, None));
            }
            let sum = engine.learn(tokens, None, layout, exchange)?;
            Ok((logits, Some(mean(layout, &engine.gradients, (sum.nats, sum.tokens)))))
        })
    }

    /// The sum of the negative log likelihoods of all targets that count, in nats, and their number.
    ///
    /// # Errors
    /// As [`Self::run`].
    pub(crate) fn evaluate(&self, batches: impl Iterator<Item = Tokens>) -> Result<(f64, u64), TrainError> {
        self.with_engine(|engine, _, exchange| {
            let (mut nats, mut tokens) = (0.0, 0);
            for batch in batches {
                let sum = engine.evaluate(&batch, exchange)?;
                nats += f64::from(sum.nats);
                tokens += sum.tokens;
            }
            Ok((nats, tokens))
        })
    }

    /// Sets the model up and gives it to `compute`.
    fn with_engine<R>(
        &self,
        compute: impl FnOnce(&mut Engine<'_>, &Layout, &mut Exchange<'_>) -> Result<R, TrainError>,
    ) -> Result<R, TrainError> {
        let trained = self.trained();
        let layout = Layout::new(&state_plan(self.plan, &trained.tensors), Rank::ZERO);
        let device = candle_core::Device::Cpu;
        let parameters = ModelParameters::new(self.plan, &layout, &trained, &device)?;
        if let Some(adapter) = self.adapter {
            // The order of `trained`, which is that of the layout.
            let parts = |module: &crate::adapter::LoadedModule| {
                [Some(module.a.clone()), Some(module.b.clone()), module.magnitude.clone()].into_iter().flatten()
            };
            let whole: Vec<f32> = adapter.modules.iter().flat_map(parts).flatten().collect();
            parameters.set(&layout, &whole)?;
        }
        let base = Base::new(self.plan, self.base, parameters.slots.clone(), device.clone())?;
        let decoder = Decoder::new(self.config, &parameters.parameters, device)?;
        let mut engine = Engine::new(decoder, base, (parameters.variables.clone(), &layout), true);
        let mut exchange = Exchange::new(None, Group { rank: Rank::ZERO, world: WorldSize::ONE }, Device::Host);
        compute(&mut engine, &layout, &mut exchange)
    }

    /// All tensors of the adapter.
    fn trained(&self) -> Trained {
        let Some(adapter) = self.adapter else { return Trained { tensors: Vec::new(), adapter: None } };
        let targets: Vec<_> = adapter.modules.iter().map(|module| module.target.clone()).collect();
        let tensors = adapter.config.tensors(&targets).into_iter().map(|tensor| (tensor.fqn, tensor.shape)).collect();
        Trained { tensors, adapter: Some((adapter.config.clone(), targets)) }
    }
}

/// How far a probe goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wanted {
    /// Forward only.
    Logits,
    /// Forward, loss and backward.
    Gradients,
}

/// Means of the sums that the engine makes.
#[expect(clippy::cast_possible_truncation, reason = "means of f32 sums")]
fn mean(layout: &Layout, sums: &[f32], (nats, tokens): (f32, u64)) -> Gradients {
    let tokens = as_f64(tokens.max(1));
    let mean = |sum: f32| (f64::from(sum) / tokens) as f32;
    let tensor = |(fqn, range, dims): &(Fqn, std::ops::Range<usize>, Vec<usize>)| {
        let values = sums.get(range.clone()).unwrap_or_default().iter().map(|&sum| mean(sum)).collect();
        (fqn.clone(), Shape(dims.iter().map(|&size| crate::types::as_u64(size)).collect()), values)
    };
    Gradients { loss: mean(nats), tensors: layout.tensors().iter().map(tensor).collect() }
}
