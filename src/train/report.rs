//! What a run tells people: rank 0 writes lines, metrics and progress.
//!
//! Owns: rates and the time left. Refuses to know: what is trained.

use std::collections::VecDeque;
use std::path::Path;

use crate::clock::Instant;
use crate::data::Dataset;
use crate::membership::TrainingProgress;
use crate::metrics::{EvaluationRecord, MetricsWriter, StepRecord, line};
use crate::types::as_f64;

use super::TrainError;
use super::control::Control;

/// Losses that `weightcast status` draws.
const RECENT: usize = 64;
/// The weight of the newest step in the mean time of a step.
const NEWEST: f64 = 0.1;

/// What one step gave, on all ranks together.
#[derive(Clone, Copy, Debug)]
pub(super) struct StepFigures {
    pub(super) step: u64,
    pub(super) epoch: f64,
    /// Mean loss per token in nats.
    pub(super) loss: f32,
    pub(super) learning_rate: f64,
    pub(super) gradient_norm: f64,
    /// Tokens that went through the model.
    pub(super) tokens: u64,
    pub(super) seconds: f64,
}

/// What the training data are, and which lines of it were passed over.
pub(super) fn data(dataset: &Dataset) {
    let counts = dataset.counts();
    tracing::info!("training data: {}", counts.train);
    if counts.evaluation.sequences > 0 {
        tracing::info!("held-out data: {}", counts.evaluation);
    }
    for line in dataset.bad_lines() {
        tracing::warn!("passed over: {line}");
    }
}

/// Rank 0's reporter; other ranks have none.
pub(super) struct Reporter {
    metrics: Option<MetricsWriter>,
    total_steps: u64,
    mean_seconds: Option<f64>,
    recent: VecDeque<f32>,
    progress: TrainingProgress,
    control: Control,
    started: Instant,
}

impl Reporter {
    /// Goes on in `directory` after `from_step`.
    pub(super) fn open(
        directory: Option<&Path>,
        (from_step, total_steps): (u64, u64),
        control: Control,
    ) -> Result<Self, TrainError> {
        let metrics = directory.map(|directory| MetricsWriter::open(directory, from_step)).transpose()?;
        let progress = TrainingProgress { step: from_step, total_steps, ..TrainingProgress::default() };
        let started = crate::clock::now();
        Ok(Self { metrics, total_steps, mean_seconds: None, recent: VecDeque::new(), progress, control, started })
    }

    pub(super) fn step(&mut self, figures: StepFigures) -> Result<(), TrainError> {
        let mean = self.mean_seconds.map_or(figures.seconds, |mean| mean + NEWEST * (figures.seconds - mean));
        self.mean_seconds = Some(mean);
        let remaining_seconds = mean * as_f64(self.total_steps.saturating_sub(figures.step));
        let tokens_per_second = as_f64(figures.tokens) / figures.seconds.max(1e-9);
        let record = StepRecord {
            step: figures.step,
            epoch: figures.epoch,
            loss: f64::from(figures.loss),
            learning_rate: figures.learning_rate,
            gradient_norm: figures.gradient_norm,
            tokens: figures.tokens,
            tokens_per_second,
            seconds: figures.seconds,
            peak_resident_bytes: crate::worker::peak_resident_bytes(),
            remaining_seconds,
        };
        tracing::info!("{}", line(&record, self.total_steps));
        if self.recent.len() == RECENT {
            self.recent.pop_front();
        }
        self.recent.push_back(figures.loss);
        self.progress = TrainingProgress {
            step: figures.step,
            loss: figures.loss,
            learning_rate: figures.learning_rate,
            tokens_per_second,
            remaining_seconds,
            recent_losses: self.recent.iter().copied().collect(),
            step_s: figures.seconds,
            gradient_norm: figures.gradient_norm,
            tokens: self.progress.tokens + figures.tokens,
            ..std::mem::take(&mut self.progress)
        };
        self.control.set_progress(self.progress.clone());
        match &mut self.metrics {
            Some(metrics) => Ok(metrics.step(&record, self.total_steps)?),
            None => Ok(()),
        }
    }

    pub(super) fn evaluation(
        &mut self,
        record: &EvaluationRecord,
        (loss, best): (f32, Option<u64>),
    ) -> Result<(), TrainError> {
        let note = if record.best { "  best" } else { "" };
        tracing::info!(
            "evaluation after step {}: loss {:.4}, perplexity {:.2}, {} tokens{note}",
            record.step,
            record.loss,
            record.perplexity,
            record.tokens
        );
        self.progress.evaluation_loss = Some(loss);
        self.progress.best_step = best;
        self.control.set_progress(self.progress.clone());
        match &mut self.metrics {
            Some(metrics) => Ok(metrics.evaluation(record, self.total_steps)?),
            None => Ok(()),
        }
    }

    pub(super) fn end(&self, step: u64, how: &str) {
        let seconds = crate::clock::now().saturating_duration_since(self.started).as_secs_f64();
        tracing::info!("training {how} after step {step} of {}, in {seconds:.1} s", self.total_steps);
    }
}
