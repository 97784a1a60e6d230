//! What can go wrong with a checkpoint.

use crate::device::DeviceError;
use crate::error::{Classify, Kind};
use crate::manifest::{ManifestError, SealError};
use crate::plan::PlanError;
use crate::store::StoreError;
use crate::types::Step;

/// Why a checkpoint cannot be written, found or read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// Storage failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A device does not give its bytes.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// There is no checkpoint at all.
    #[error("no checkpoint in {root}")]
    None {
        /// The checkpoint root.
        root: String,
    },
    /// There are checkpoints, but none that holds.
    #[error("no usable checkpoint in {root}: {reasons}")]
    NoneUsable {
        /// The checkpoint root.
        root: String,
        /// Why each was refused.
        reasons: String,
    },
    /// The step was not committed.
    #[error("no checkpoint: expected {path}, found nothing")]
    NoManifest {
        /// The manifest's path.
        path: String,
    },
    /// The manifest does not hold.
    #[error("{path}: {source}")]
    Manifest {
        /// The manifest's path.
        path: String,
        /// What is wrong.
        source: ManifestError,
    },
    /// A file has another length than the manifest says.
    #[error("{path}: expected {expected_bytes} bytes, found {found_bytes}")]
    Length {
        /// The file.
        path: String,
        /// The manifest's figure.
        expected_bytes: u64,
        /// The file's.
        found_bytes: u64,
    },
    /// A table of block digests does not have its own digest.
    #[error("{path}: the table of block digests is damaged: expected CRC32C {expected:08x}, found {found:08x}")]
    Table {
        /// The table.
        path: String,
        /// The manifest's figure.
        expected: u32,
        /// The table's.
        found: u32,
    },
    /// A block does not have its digest.
    #[error(
        "{path}: block {block} (bytes {start}..{end}) is damaged{tensor}: expected CRC32C {expected:08x}, found {found:08x}"
    )]
    Block {
        /// The shard file.
        path: String,
        /// The block's index.
        block: u64,
        /// Its first byte.
        start: u64,
        /// Its end.
        end: u64,
        /// The tensor that was read, in words, or nothing.
        tensor: String,
        /// The table's digest.
        expected: u32,
        /// The bytes' digest.
        found: u32,
    },
    /// A training run's state does not fit the run.
    #[error("{directory}: tensor {fqn}: the run needs {expected}, the checkpoint has {found}")]
    State {
        /// The checkpoint.
        directory: String,
        /// The tensor.
        fqn: String,
        /// What the run needs.
        expected: String,
        /// What is there.
        found: String,
    },
    /// A tensor does not have the digest that the manifest gives.
    #[error("tensor {fqn}: expected digest {expected}, found {found}")]
    Tensor {
        /// The tensor.
        fqn: String,
        /// The manifest's digest.
        expected: String,
        /// The bytes'.
        found: String,
    },
    /// The step is committed already.
    #[error("step {step} is committed already in {root}")]
    Committed {
        /// The step.
        step: Step,
        /// The checkpoint root.
        root: String,
    },
    /// The ranks' receipts do not make a checkpoint.
    #[error("step {step} cannot be committed: {source}")]
    Seal {
        /// The step.
        step: Step,
        /// What is missing.
        source: SealError,
    },
    /// The checkpoint cannot be planned onto this world.
    #[error(transparent)]
    Plan(#[from] PlanError),
}

impl Classify for CheckpointError {
    fn kind(&self) -> Kind {
        match self {
            Self::Store(source) => source.kind(),
            Self::Device(source) => source.kind(),
            Self::None { .. } | Self::NoManifest { .. } => Kind::NotFound,
            Self::NoneUsable { .. }
            | Self::Length { .. }
            | Self::Table { .. }
            | Self::Block { .. }
            | Self::Tensor { .. } => Kind::Corrupt,
            Self::Manifest { source, .. } => source.kind(),
            Self::Committed { .. } | Self::State { .. } => Kind::Conflict,
            Self::Seal { source, .. } => source.kind(),
            Self::Plan(source) => source.kind(),
        }
    }
}
