//! Why a load stops.

use crate::checkpoint::CheckpointError;
use crate::comm::CommError;
use crate::device::DeviceError;
use crate::error::{Classify, Kind};
use crate::format::FormatError;
use crate::quant::QuantError;
use crate::store::StoreError;
use crate::types::Fqn;

/// A rank cannot carry out its plan.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// Reading a model's file failed.
    #[error("tensor {fqn}: {source}")]
    Read {
        /// The tensor.
        fqn: Fqn,
        /// Storage's error.
        source: StoreError,
    },
    /// A file cannot be opened.
    #[error(transparent)]
    Open(#[from] StoreError),
    /// A file has another length than when the plan was made.
    #[error("{path} has changed since the plan was made: expected {expected_bytes} bytes, found {found_bytes}")]
    Changed {
        /// The file.
        path: String,
        /// The plan's figure.
        expected_bytes: u64,
        /// The file's length.
        found_bytes: u64,
    },
    /// A file is another version than when the plan was made.
    #[error("{path} has changed since the plan was made: expected {expected}, found {found}")]
    Version {
        /// The file.
        path: String,
        /// The plan's version.
        expected: String,
        /// The one that is there.
        found: String,
    },
    /// A checkpoint's bytes do not hold.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// A file of the cache does not hold.
    #[error("{source}; {outcome}")]
    Cache {
        /// What is wrong with it.
        source: CheckpointError,
        /// What became of it, and what to do.
        outcome: &'static str,
    },
    /// Encoding failed.
    #[error("tensor {fqn}: {source}")]
    Encode {
        /// The tensor.
        fqn: Fqn,
        /// The quantizer's error.
        source: QuantError,
    },
    /// Blocks of a GGUF file cannot be decoded.
    #[error("tensor {fqn}: {source}")]
    Decode {
        /// The tensor.
        fqn: Fqn,
        /// The decoder's error.
        source: FormatError,
    },
    /// The plan names a file that it does not list, or a range that is not the tensor's.
    #[error("tensor {fqn}: the plan is inconsistent: {what}")]
    Plan {
        /// The tensor.
        fqn: Fqn,
        /// What does not fit.
        what: &'static str,
    },
    /// Memory cannot be had.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// A collective failed.
    #[error("tensor {fqn}: {source}")]
    Comm {
        /// The tensor that was moving.
        fqn: Fqn,
        /// The communicator's error.
        source: CommError,
    },
    /// Somebody ended the load.
    #[error("the load was cancelled")]
    Cancelled,
}

impl Classify for LoadError {
    fn kind(&self) -> Kind {
        match self {
            Self::Read { source, .. } => source.kind(),
            Self::Open(source) => source.kind(),
            Self::Changed { .. } | Self::Version { .. } => Kind::Corrupt,
            Self::Checkpoint(source) | Self::Cache { source, .. } => source.kind(),
            Self::Encode { source, .. } => source.kind(),
            Self::Decode { source, .. } => source.kind(),
            Self::Plan { .. } => Kind::Internal,
            Self::Device(source) => source.kind(),
            Self::Comm { source, .. } => source.kind(),
            Self::Cancelled => Kind::Unavailable,
        }
    }
}
