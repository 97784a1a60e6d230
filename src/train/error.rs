//! Why training cannot start or go on.

use crate::comm::CommError;
use crate::data::DataError;
use crate::device::DeviceError;
use crate::error::{Classify, Kind};
use crate::load::LoadError;
use crate::metrics::MetricsError;
use crate::nn::NnError;
use crate::types::{Fqn, Step};

/// Why training cannot start or go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrainError {
    /// A collective failed.
    #[error(transparent)]
    Comm(#[from] CommError),
    /// The model cannot be computed.
    #[error(transparent)]
    Model(#[from] NnError),
    /// The data cannot be used.
    #[error(transparent)]
    Data(#[from] DataError),
    /// The state of a checkpoint cannot be loaded.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The memory of the weights.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The arithmetic library.
    #[error("computing: {source}")]
    Compute {
        /// Its error.
        #[from]
        source: candle_core::Error,
    },
    /// The plan does not fit the recipe.
    #[error("the plan of the training run: {what}: expected {expected}, found {found}")]
    Plan {
        /// What does not fit.
        what: &'static str,
        /// What was expected.
        expected: String,
        /// What was found.
        found: String,
    },
    /// The checkpoint is of another run.
    #[error("the checkpoint of step {step} cannot be gone on from: {what}: expected {expected}, found {found}")]
    OtherRun {
        /// Its step.
        step: Step,
        /// What differs.
        what: &'static str,
        /// What the checkpoint says.
        expected: String,
        /// What is here.
        found: String,
    },
    /// Ranks see different data.
    #[error("the ranks do not see the same training data: {found}")]
    DifferentData {
        /// The digest of each rank's.
        found: String,
    },
    /// A weight cannot be turned into numbers.
    #[error("tensor {fqn}: {reason}")]
    Weight {
        /// The tensor.
        fqn: Fqn,
        /// Why.
        reason: String,
    },
    /// The loss or a gradient is not a number.
    #[error("step {step}: the {what} is {found}: training has diverged; a lower learning rate or clipping may help")]
    Diverged {
        /// The step.
        step: Step,
        /// Loss or gradient norm.
        what: &'static str,
        /// The value.
        found: f64,
    },
    /// Metrics cannot be written.
    #[error(transparent)]
    Metrics(#[from] MetricsError),
    /// The rank was told to end.
    #[error("training was cancelled")]
    Cancelled,
    /// The thread that writes checkpoints ended.
    #[error("the thread that writes checkpoints ended")]
    WriterEnded,
}

impl Classify for TrainError {
    fn kind(&self) -> Kind {
        match self {
            Self::Comm(source) => source.kind(),
            Self::Model(source) => source.kind(),
            Self::Data(source) => source.kind(),
            Self::Load(source) => source.kind(),
            Self::Device(source) => source.kind(),
            Self::OtherRun { .. } | Self::DifferentData { .. } => Kind::Conflict,
            Self::Weight { .. } | Self::Diverged { .. } => Kind::Invalid,
            Self::Metrics(source) => source.kind(),
            Self::Compute { .. } | Self::Plan { .. } | Self::Cancelled | Self::WriterEnded => Kind::Internal,
        }
    }
}
