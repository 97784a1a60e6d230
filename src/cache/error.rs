//! Why the cache cannot be used.

use crate::checkpoint::CheckpointError;
use crate::error::{Classify, Kind};
use crate::store::StoreError;

/// The cache, or a model that is looked up in it, cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CacheError {
    /// The cache's directory fails.
    #[error("the cache: {0}")]
    Store(#[from] StoreError),
    /// The directory of the cache is an address.
    #[error("load.cache: expected a directory of this machine, found {found}")]
    Remote {
        /// What it is.
        found: String,
    },
    /// A file is none of the cache's.
    #[error("{path}: {reason}")]
    Header {
        /// The file.
        path: String,
        /// What is wrong with its header.
        reason: String,
    },
    /// A file's bytes do not hold.
    #[error(transparent)]
    Damaged(#[from] CheckpointError),
}

impl Classify for CacheError {
    fn kind(&self) -> Kind {
        match self {
            Self::Store(source) => source.kind(),
            Self::Remote { .. } => Kind::Conflict,
            Self::Header { .. } => Kind::Corrupt,
            Self::Damaged(source) => source.kind(),
        }
    }
}
