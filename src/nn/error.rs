//! Why a model cannot be built or computed.

use crate::error::{Classify, Kind};
use crate::types::{Fqn, Shape};

/// A model cannot be built, or one of its parts cannot be computed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NnError {
    /// A frozen weight was needed while its slot was empty.
    #[error("{fqn}: its slot is empty; fill it before the forward and before the backward")]
    EmptyWeight {
        /// The weight.
        fqn: Fqn,
    },
    /// A tensor of the model was not given.
    #[error("{fqn}: no parameter of this name was given")]
    MissingParameter {
        /// The tensor.
        fqn: Fqn,
    },
    /// A tensor has another shape than the configuration says.
    #[error("{fqn}: expected shape {expected}, found {found}")]
    ParameterShape {
        /// The tensor, or the adapter's tensor.
        fqn: Fqn,
        /// The configuration's shape.
        expected: Shape,
        /// The shape given.
        found: Shape,
    },
    /// An adapter is for a module that the model does not have.
    #[error("{module}: the model has no linear layer of this name to adapt")]
    UnknownModule {
        /// The module.
        module: String,
    },
    /// The configuration asks for something that this module does not compute.
    #[error("{field}: expected {expected}, found {found}")]
    Unsupported {
        /// The field of the configuration.
        field: &'static str,
        /// What is computed.
        expected: &'static str,
        /// What was asked for.
        found: String,
    },
    /// Tokens do not fit the model or contradict each other.
    #[error("tokens: {field} at index {index}: expected {expected}, found {found}")]
    Tokens {
        /// The vector in question.
        field: &'static str,
        /// The index of the first bad element.
        index: usize,
        /// The limit that it breaks, in words.
        expected: String,
        /// The value.
        found: u64,
    },
    /// A block that the model does not have.
    #[error("block {found}: the model has blocks 0 to {last}")]
    NoSuchBlock {
        /// The index.
        found: usize,
        /// The last block.
        last: usize,
    },
    /// The tensor library failed.
    #[error("tensor operation failed: {source}")]
    Tensor {
        /// Its error.
        #[from]
        source: candle_core::Error,
    },
}

impl Classify for NnError {
    fn kind(&self) -> Kind {
        match self {
            Self::EmptyWeight { .. } | Self::NoSuchBlock { .. } | Self::Tensor { .. } => Kind::Internal,
            Self::MissingParameter { .. } => Kind::NotFound,
            Self::ParameterShape { .. }
            | Self::UnknownModule { .. }
            | Self::Unsupported { .. }
            | Self::Tokens { .. } => Kind::Invalid,
        }
    }
}

impl From<NnError> for candle_core::Error {
    /// For operations of ours that the tensor library calls back.
    fn from(error: NnError) -> Self {
        match error {
            NnError::Tensor { source } => source,
            other => Self::wrap(other),
        }
    }
}
