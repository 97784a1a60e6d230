//! Why there is no estimate.

use crate::adapter::AdapterError;
use crate::error::{Classify, Kind};
use crate::plan::PlanError;
use crate::types::DType;

/// Why there is no estimate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EstimateError {
    /// There is no such plan.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// The adapter does not fit the model.
    #[error("adapter: {0}")]
    Adapter(#[from] AdapterError),
    /// A value cannot be.
    #[error("{field}: expected {expected}, found {found}")]
    Value {
        /// What it is of.
        field: &'static str,
        /// What it must be.
        expected: String,
        /// What it is.
        found: String,
    },
    /// Weights of this type are no numbers that can be trained or converted.
    #[error("source dtype: expected float32, float16 or bfloat16, found {}", found.torch_name())]
    DType {
        /// The type.
        found: DType,
    },
    /// Two things that do not go together.
    #[error("{what} cannot be estimated {with}: {reason}")]
    Unsupported {
        /// What was asked for.
        what: String,
        /// With what.
        with: &'static str,
        /// Why not, and what to do.
        reason: &'static str,
    },
}

impl Classify for EstimateError {
    fn kind(&self) -> Kind {
        match self {
            Self::Plan(source) => source.kind(),
            Self::Adapter(source) => source.kind(),
            Self::Value { .. } | Self::DType { .. } => Kind::Invalid,
            Self::Unsupported { .. } => Kind::Conflict,
        }
    }
}
