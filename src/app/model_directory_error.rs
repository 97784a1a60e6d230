//! Why a PyTorch checkpoint cannot be read, and a model directory not written or shown.

use super::adapter_source::AdapterSourceError;
use crate::error::{Classify, Kind};
use crate::model::ModelError;
use crate::store::StoreError;

/// Why a `ckpt.pt` cannot be converted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CkptError {
    /// Storage failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The archive is damaged or none.
    #[error("{path}: {what}")]
    Archive {
        /// The file.
        path: String,
        /// What is wrong.
        what: &'static str,
    },
    /// The pickle asks for a call that no checkpoint of tensors needs. Nothing was called.
    #[error("{path}: the pickle calls {callable}, which is not run: only tensors and plain values are read")]
    Call {
        /// The file.
        path: String,
        /// The function or class.
        callable: String,
    },
    /// The pickle is damaged or of a form that is not read.
    #[error("{path}: the pickle is damaged at byte {at}: {what}")]
    Pickle {
        /// The file.
        path: String,
        /// The byte of the pickle.
        at: usize,
        /// What is wrong.
        what: String,
    },
    /// The checkpoint is not of the expected form.
    #[error("{path}: {what}: expected {expected}, found {found}")]
    Form {
        /// The file.
        path: String,
        /// Which part.
        what: String,
        /// What it should be.
        expected: String,
        /// What it is.
        found: String,
    },
    /// The configuration that was made of model_args does not hold.
    #[error("{path}: model_args: {source}")]
    Model {
        /// The file.
        path: String,
        /// The reason.
        source: ModelError,
    },
    /// The model directory cannot be written.
    #[error(transparent)]
    Directory(#[from] DirectoryError),
}

impl Classify for CkptError {
    fn kind(&self) -> Kind {
        match self {
            Self::Store(source) => source.kind(),
            Self::Archive { .. } | Self::Pickle { .. } => Kind::Corrupt,
            Self::Call { .. } | Self::Form { .. } => Kind::Invalid,
            Self::Model { source, .. } => source.kind(),
            Self::Directory(source) => source.kind(),
        }
    }
}

/// Why a model directory cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DirectoryError {
    /// Storage failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A name is not of the form.
    #[error(
        "model directory {name:?}: expected {{architecture}}-{{size}}-{{dataset}}-{{training_type}}[-{{version}}], such as \
         gpt-38M-tinystories-pretrain: {what}"
    )]
    Name {
        /// The name.
        name: String,
        /// Which part is wrong.
        what: String,
    },
    /// A name says another size than the model has.
    #[error("model directory {name}: expected a model of {expected}, found {found}")]
    Size {
        /// The name.
        name: String,
        /// The name's size.
        expected: String,
        /// The model's size.
        found: String,
    },
    /// An adapter does not fit the model that it lies with.
    #[error(transparent)]
    Adapter {
        /// Which, and what does not fit.
        source: Box<AdapterSourceError>,
    },
    /// Models of different sizes are in one directory.
    #[error(
        "{directory}: sizes are mixed: {first} is of {first_size}, {other} of {other_size}; give each size a directory"
    )]
    MixedSizes {
        /// The directory.
        directory: String,
        /// A model.
        first: String,
        /// Its size.
        first_size: String,
        /// Another model.
        other: String,
        /// Its size.
        other_size: String,
    },
    /// Something else is where the output is to be.
    #[error("{directory}: expected nothing there, or what this run wrote; give the model another version, such as -v2")]
    Exists {
        /// The directory.
        directory: String,
    },
    /// export_meta.json does not hold.
    #[error("{path}: {source}")]
    Meta {
        /// The file.
        path: String,
        /// The parser's error.
        source: serde_json::Error,
    },
    /// There is no model.
    #[error("{directory}: no model directory")]
    None {
        /// The directory.
        directory: String,
    },
    /// A stage may not follow another.
    #[error("{directory}: stage {to} cannot follow {from}; the order is pretrain, lora, merged, deployed")]
    Stage {
        /// The directory.
        directory: String,
        /// The stage that is.
        from: String,
        /// The stage that was asked for.
        to: String,
    },
}

impl Classify for DirectoryError {
    fn kind(&self) -> Kind {
        match self {
            Self::Store(source) => source.kind(),
            Self::Adapter { source } => source.kind(),
            Self::Name { .. } | Self::Size { .. } | Self::Stage { .. } | Self::MixedSizes { .. } => Kind::Invalid,
            Self::Exists { .. } => Kind::Conflict,
            Self::Meta { .. } => Kind::Corrupt,
            Self::None { .. } => Kind::NotFound,
        }
    }
}
