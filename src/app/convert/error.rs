//! Why a model is not converted.

use crate::app::model_directory_error::DirectoryError;
use crate::app::source::SourceError;
use crate::config::ConfigError;
use crate::error::{Classify, Kind};
use crate::format::FormatError;
use crate::load::LoadError;
use crate::plan::PlanError;
use crate::store::StoreError;

/// Why a model is not converted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConvertError {
    /// The model cannot be opened.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The request does not hold.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// There is no plan.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// Reading or quantizing failed.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// Storage failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The output is there already.
    #[error(transparent)]
    Directory(#[from] DirectoryError),
    /// The format needs a configuration that the model does not have.
    #[error("{model}: expected a config.json, found none")]
    NoConfig {
        /// The model.
        model: String,
    },
    /// A header is damaged, or cannot hold what the model has.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// llama.cpp has nothing for a part of the model.
    #[error("{model}: {place}: expected {expected}, which llama.cpp has; found {found}")]
    NoCounterpart {
        /// The model.
        model: String,
        /// The field of config.json, or the tensor.
        place: String,
        /// What would do.
        expected: &'static str,
        /// What is there.
        found: String,
    },
    /// A file of the tokenizer does not hold.
    #[error("{path}: {what}")]
    Tokenizer {
        /// The file.
        path: String,
        /// What is wrong with it.
        what: String,
    },
}

impl Classify for ConvertError {
    fn kind(&self) -> Kind {
        match self {
            Self::Source(source) => source.kind(),
            Self::Config(source) => source.kind(),
            Self::Plan(source) => source.kind(),
            Self::Load(source) => source.kind(),
            Self::Store(source) => source.kind(),
            Self::Directory(source) => source.kind(),
            Self::NoConfig { .. } => Kind::NotFound,
            Self::Format(source) => source.kind(),
            Self::NoCounterpart { .. } | Self::Tokenizer { .. } => Kind::Invalid,
        }
    }
}
