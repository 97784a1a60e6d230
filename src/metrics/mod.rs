//! What a training run writes for people and tools: lines, JSONL, TensorBoard event files; and what Prometheus scrapes.
//!
//! Owns: the records of steps and evaluations, their text, and the files `metrics.jsonl`, `training_log.txt` and
//! `events.out.tfevents.*`; the table of metrics and their exposition. Refuses to know: models, optimizers, where output goes on a terminal.
//!
//! `ME-1`: after a resume from step S, `metrics.jsonl` and what TensorBoard shows read as one run: nothing of what came
//! after S before the resume remains in them.

mod calls;
mod events;
mod exposition;
mod table;
mod text;
mod writer;

use serde::{Deserialize, Serialize};

pub use calls::Calls;
pub use exposition::{CONTENT_TYPE, Samples, Value};
pub use table::{METRICS, Metric, MetricId, MetricKind, reference};
pub use text::{evaluation_line, line, sparkline};
pub use writer::{LOG_FILE, METRICS_FILE, MetricsError, MetricsWriter};

/// One optimizer step. A number that is not finite is `null` in JSON.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepRecord {
    /// Optimizer steps done, this one included: the first step is 1.
    pub step: u64,
    /// Passes over the training data done, with the fraction of the current one.
    #[serde(deserialize_with = "number")]
    pub epoch: f64,
    /// Mean cross-entropy of the step's targets over all ranks, in nats.
    #[serde(deserialize_with = "number")]
    pub loss: f64,
    /// The rate that the step used.
    #[serde(deserialize_with = "number")]
    pub learning_rate: f64,
    /// Norm of all gradients before clipping.
    #[serde(deserialize_with = "number")]
    pub gradient_norm: f64,
    /// Tokens of the step that counted in the loss, over all ranks.
    pub tokens: u64,
    /// Tokens a second, over all ranks.
    #[serde(deserialize_with = "number")]
    pub tokens_per_second: f64,
    /// The step's duration.
    #[serde(deserialize_with = "number")]
    pub seconds: f64,
    /// The most host memory that a rank has used so far.
    pub peak_resident_bytes: u64,
    /// The time that the remaining steps will take.
    #[serde(deserialize_with = "number")]
    pub remaining_seconds: f64,
}

/// One evaluation. A number that is not finite is `null` in JSON.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct EvaluationRecord {
    /// Optimizer steps done before it.
    pub step: u64,
    /// Mean cross-entropy of the held-out targets, in nats.
    #[serde(deserialize_with = "number")]
    pub loss: f64,
    /// e to the loss.
    #[serde(deserialize_with = "number")]
    pub perplexity: f64,
    /// Targets that were evaluated.
    pub tokens: u64,
    /// Whether the loss is the lowest of the run so far.
    pub best: bool,
}

/// A line of `metrics.jsonl`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum MetricsLine {
    /// `{"kind": "step", …}`.
    Step(StepRecord),
    /// `{"kind": "evaluation", …}`.
    Evaluation(EvaluationRecord),
}

impl MetricsLine {
    /// Optimizer steps done.
    #[must_use]
    pub const fn step(&self) -> u64 {
        match self {
            Self::Step(record) => record.step,
            Self::Evaluation(record) => record.step,
        }
    }
}

/// A number, or the `null` that stands for one that is not finite.
fn number<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or(f64::NAN))
}
