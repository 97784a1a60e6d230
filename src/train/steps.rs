//! The steps of a run: gradients of this rank's samples, their exchange, the update, evaluation, and when to save.
//!
//! Owns: the order of collectives in a step (`TR-1`) and what all ranks agree on in it. Refuses to know: how the run was
//! set up.

use std::ops::Range;

use crate::data::{Dataset, Split};
use crate::manifest::{BestEvaluation, TrainingState};
use crate::metrics::EvaluationRecord;
use crate::nn::{DropoutKey, Tokens};
use crate::plan::f32Bits;
use crate::recipe::order::Order;
use crate::recipe::schedule::LearningRate;
use crate::types::{Step, as_f64};

use super::TrainError;
use super::adamw::AdamW;
use super::config::Recipe;
use super::control::Control;
use super::engine::{Engine, LossSum};
use super::exchange::Exchange;
use super::parameters::ModelParameters;
use super::report::{Reporter, StepFigures};
use super::run::Ended;
use super::snapshot::Writer;
use super::state::{Layout, Shards};

/// A run between two steps.
pub(super) struct Run<'a, 'c> {
    pub(super) recipe: Recipe,
    pub(super) total_steps: u64,
    pub(super) rate: LearningRate,
    pub(super) dataset: Dataset,
    pub(super) order: Order,
    pub(super) layout: Layout,
    pub(super) shards: Shards,
    pub(super) parameters: ModelParameters,
    pub(super) engine: Engine<'a>,
    pub(super) exchange: Exchange<'c>,
    pub(super) writer: Option<Writer>,
    pub(super) reporter: Option<Reporter>,
    pub(super) control: Control,
    pub(super) step: u64,
    pub(super) training: TrainingState,
    /// The step of the newest checkpoint of this run.
    pub(super) saved: Option<u64>,
    pub(super) last_save: crate::clock::Instant,
    /// The newest request for a checkpoint that a snapshot has answered; 0 for none.
    pub(super) answered: u64,
    /// All parameters as the layout's whole buffer.
    pub(super) whole: Vec<f32>,
    pub(super) dealt: Vec<f32>,
}

/// What all ranks agree on at a step boundary.
#[derive(Clone, Copy, Debug, Default)]
struct Agreed {
    loss: LossSum,
    stop: bool,
    save: bool,
}

impl Run<'_, '_> {
    /// Trains to the end, or to where it is asked to stop; every snapshot is committed when this returns.
    pub(super) fn go(&mut self) -> Result<Ended, TrainError> {
        let mut stop = self.agree(LossSum::default())?.stop;
        while !stop && !self.is_done() {
            // A run that was stopped within an evaluation makes it up.
            let evaluated = self.evaluate_if_due()?;
            if evaluated.stop || self.is_done() {
                stop = evaluated.stop;
                break;
            }
            let agreed = self.learn()?;
            stop = agreed.stop;
            if stop {
                break;
            }
            let evaluated = self.evaluate_if_due()?;
            stop = evaluated.stop;
            let every = self.recipe.checkpoint.every_steps;
            let due = every > 0 && self.step.is_multiple_of(every);
            let best = self.recipe.checkpoint.keep_best && evaluated.best;
            if !stop && (due || best || agreed.save) {
                self.save()?;
            }
        }
        self.save()?;
        if let Some(writer) = &mut self.writer {
            writer.finish()?;
        }
        let how = if stop { Ended::Stopped } else { Ended::Finished };
        if let Some(reporter) = &self.reporter {
            reporter.end(self.step, if stop { "stopped" } else { "finished" });
        }
        Ok(how)
    }

    /// Whether there is nothing left to learn. The evaluation after the last step belongs to it.
    fn is_done(&self) -> bool {
        let patience = self.recipe.evaluation.patience;
        let out_of_patience = patience > 0 && self.training.evaluations_since_best >= patience;
        (self.step >= self.total_steps || out_of_patience) && !self.evaluation_is_due()
    }

    /// One optimizer step.
    fn learn(&mut self) -> Result<Agreed, TrainError> {
        let started = crate::clock::now();
        let number = self.step + 1;
        let first = self.training.samples;
        self.engine.gradients.fill(0.0);
        let mut loss = LossSum::default();
        for samples in self.rounds(self.recipe.batch_size) {
            if samples.is_empty() {
                self.engine.take_part(true, &mut self.exchange)?;
                continue;
            }
            let indices: Vec<u64> = samples.clone().map(|sample| self.order.sample(first + sample).1).collect();
            let tokens = tokens(&self.dataset, Split::Train, &indices);
            let dropout = DropoutKey { seed: self.recipe.seed, step: number, first_sample: samples.start };
            let part = self.engine.learn(&tokens, Some(dropout), &self.layout, &mut self.exchange)?;
            loss.nats += part.nats;
            loss.tokens += part.tokens;
        }
        let agreed = self.agree(loss)?;
        let (learning_rate, gradient_norm) = self.update(number, agreed.loss.tokens)?;
        self.step = number;
        self.training.samples = first + self.recipe.batch_size;
        self.training.tokens += agreed.loss.tokens;
        crate::faults::point("train.stepped");
        let mean = mean(agreed.loss);
        if let Some(reporter) = &mut self.reporter {
            reporter.step(StepFigures {
                step: number,
                epoch: as_f64(self.training.samples) / as_f64(self.order.len()),
                loss: mean,
                learning_rate,
                gradient_norm,
                tokens: self.recipe.batch_size * u64::from(self.recipe.data.sequence_length),
                seconds: crate::clock::now().saturating_duration_since(started).as_secs_f64(),
            })?;
        }
        if mean.is_finite() {
            Ok(agreed)
        } else {
            Err(TrainError::Diverged { step: Step(number), what: "loss", found: f64::from(mean) })
        }
    }

    /// This rank's samples of `count`, in micro-batches; as many for every rank, so some may be empty.
    fn rounds(&self, count: u64) -> Vec<Range<u64>> {
        let (world, rank) = (u64::from(self.exchange.world().get()), u64::from(self.exchange.rank().0));
        let own = count * rank / world..count * (rank + 1) / world;
        let rounds = count.div_ceil(world).div_ceil(self.recipe.micro_batch_size);
        let micro = self.recipe.micro_batch_size;
        (0..rounds)
            .map(|round| {
                let start = (own.start + round * micro).min(own.end);
                start..(start + micro).min(own.end)
            })
            .collect()
    }

    /// Sums the losses of all ranks, and takes every rank's wishes for everybody's.
    fn agree(&mut self, loss: LossSum) -> Result<Agreed, TrainError> {
        let minutes = self.recipe.checkpoint.every_minutes;
        let age = crate::clock::now().saturating_duration_since(self.last_save).as_secs_f64();
        let asked = self.control.save_request() > self.answered;
        let due = self.exchange.rank().0 == 0 && (asked || (minutes > 0.0 && age >= 60.0 * minutes));
        let flag = |set: bool| if set { 1.0 } else { 0.0 };
        // Token counts are exact in f32 up to 2^24 in each half.
        let (high, low) = (loss.tokens >> 20, loss.tokens & 0xf_ffff);
        let float = |value: u64| {
            f32::from(u16::try_from(value >> 16).unwrap_or(u16::MAX)) * 65536.0
                + f32::from(u16::try_from(value & 0xffff).unwrap_or(0))
        };
        let mut values = [loss.nats, float(high), float(low), flag(self.control.is_stopping()), flag(due)];
        self.exchange.all_reduce(&mut values)?;
        if self.control.is_cancelled() {
            return Err(TrainError::Cancelled);
        }
        let [nats, high, low, stop, save] = values;
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "sums of whole numbers")]
        let tokens = ((high as u64) << 20) + low as u64;
        Ok(Agreed { loss: LossSum { nats, tokens }, stop: stop > 0.0, save: save > 0.0 })
    }

    /// Exchanges gradients, clips, updates this rank's part and gathers everybody's. Gives learning rate and norm.
    #[expect(clippy::cast_possible_truncation, reason = "the arithmetic is f32's")]
    fn update(&mut self, number: u64, tokens: u64) -> Result<(f64, f64), TrainError> {
        let counts = self.layout.counts();
        let own = counts.get(self.exchange.rank().index()).copied().unwrap_or(0);
        self.layout.deal(&self.engine.gradients, &mut self.dealt);
        let mut gradients = vec![0.0; own];
        self.exchange.reduce_scatter(&self.dealt, &mut gradients, &counts)?;
        let mean = if tokens == 0 { 0.0 } else { 1.0 / as_f64(tokens) };
        let squares = gradients.iter().map(|&value| f64::from(value) * f64::from(value)).sum();
        let norm = self.exchange.all_gather_f64(squares)?.iter().sum::<f64>().sqrt() * mean;
        if !norm.is_finite() {
            return Err(TrainError::Diverged { step: Step(number), what: "gradient norm", found: norm });
        }
        let limit = self.recipe.optimizer.max_gradient_norm;
        // As torch's clip_grad_norm_.
        let clip = if limit > 0.0 { (limit / (norm + 1e-6)).min(1.0) } else { 1.0 };
        let learning_rate = self.rate.at(number - 1);
        let adam = AdamW::at(&self.recipe.optimizer, number, learning_rate);
        let scaled = (gradients.as_slice(), (mean * clip) as f32);
        self.shards.update(&self.layout, adam, scaled, self.recipe.optimizer.weight_decay);
        self.spread()?;
        Ok((learning_rate, norm))
    }

    /// Gives every rank all parameters.
    pub(super) fn spread(&mut self) -> Result<(), TrainError> {
        let bytes: Vec<usize> = self.layout.counts().iter().map(|count| count * size_of::<f32>()).collect();
        self.dealt.resize(self.layout.elements(), 0.0);
        let own = bytemuck::cast_slice(&self.shards.parameters);
        self.exchange.all_gather(own, bytemuck::cast_slice_mut(&mut self.dealt), &bytes)?;
        self.layout.gather(&self.dealt, &mut self.whole);
        self.parameters.set(&self.layout, &self.whole)
    }

    fn evaluation_is_due(&self) -> bool {
        let every = self.recipe.evaluation.every_steps;
        let boundary = self.step.is_multiple_of(every.max(1)) || self.step >= self.total_steps;
        let held_out = self.dataset.sequences(Split::Evaluation) > 0;
        every > 0 && held_out && boundary && self.training.last_evaluation != Some(Step(self.step))
    }

    fn evaluate_if_due(&mut self) -> Result<Evaluated, TrainError> {
        let sequences = self.dataset.sequences(Split::Evaluation);
        if !self.evaluation_is_due() {
            return Ok(Evaluated::default());
        }
        let mut sum = LossSum::default();
        let (mut total, mut tokens_seen) = (0.0_f64, 0);
        for samples in self.rounds(sequences) {
            if samples.is_empty() {
                self.engine.take_part(false, &mut self.exchange)?;
            } else {
                let indices: Vec<u64> = samples.collect();
                let tokens = tokens(&self.dataset, Split::Evaluation, &indices);
                sum = self.engine.evaluate(&tokens, &mut self.exchange)?;
            }
            let agreed = self.agree(std::mem::take(&mut sum))?;
            if agreed.stop {
                return Ok(Evaluated { stop: true, best: false });
            }
            total += f64::from(agreed.loss.nats);
            tokens_seen += agreed.loss.tokens;
            crate::faults::point("train.evaluating");
        }
        self.evaluated(total, tokens_seen)
    }

    #[expect(clippy::cast_possible_truncation, reason = "a mean of f32 losses")]
    fn evaluated(&mut self, total: f64, tokens: u64) -> Result<Evaluated, TrainError> {
        let loss = (total / as_f64(tokens.max(1))) as f32;
        let training = &mut self.training;
        // Before the first step there is nothing that could be kept.
        let best = self.step > 0 && training.best.is_none_or(|best| loss < f32::from_bits(best.loss.0));
        if self.step == 0 {
            training.evaluations_since_best = 0;
        } else if best {
            training.best = Some(BestEvaluation { step: Step(self.step), loss: f32Bits(loss.to_bits()) });
            training.evaluations_since_best = 0;
        } else {
            training.evaluations_since_best += 1;
        }
        training.last_evaluation = Some(Step(self.step));
        let best_step = training.best.map(|best| best.step.0);
        if let Some(reporter) = &mut self.reporter {
            let perplexity = f64::from(loss).exp();
            let (step, mean) = (self.step, f64::from(loss));
            reporter.evaluation(&EvaluationRecord { step, loss: mean, perplexity, tokens, best }, (loss, best_step))?;
        }
        Ok(Evaluated { stop: false, best })
    }

    /// Takes a snapshot of this step, unless there is a checkpoint of it.
    fn save(&mut self) -> Result<(), TrainError> {
        let Some(writer) = self.writer.as_mut().filter(|_| self.saved != Some(self.step)) else { return Ok(()) };
        let training = (self.exchange.rank().0 == 0).then(|| Box::new(self.training.clone()));
        let started = crate::clock::now();
        // What is asked for while the snapshot is taken waits for the next step.
        let answers = self.control.save_request();
        writer.take((Step(self.step), answers), (&self.layout, &self.shards), training)?;
        self.answered = answers;
        self.last_save = crate::clock::now();
        self.saved = Some(self.step);
        let stall = self.last_save.saturating_duration_since(started);
        self.control.stalled(stall);
        let stall_ms = stall.as_secs_f64() * 1e3;
        tracing::debug!(step = self.step, stall_ms, "snapshot taken");
        Ok(())
    }
}

/// How an evaluation ended.
#[derive(Clone, Copy, Debug, Default)]
struct Evaluated {
    stop: bool,
    best: bool,
}

/// Sequences of a dataset as a model takes them.
pub(crate) fn tokens(dataset: &Dataset, part: Split, indices: &[u64]) -> Tokens {
    let batch = dataset.batch(part, indices);
    Tokens { ids: batch.ids, targets: batch.targets, starts: batch.starts, batch: batch.batch, seq: batch.sequence }
}

#[expect(clippy::cast_possible_truncation, reason = "a mean of f32 losses")]
fn mean(loss: LossSum) -> f32 {
    (f64::from(loss.nats) / as_f64(loss.tokens.max(1))) as f32
}
