//! Why an adapter's configuration cannot be used, does not fit, or cannot be merged.

use crate::error::{Classify, Kind};

/// What is wrong with an adapter.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AdapterError {
    /// The text is no JSON object of the expected form.
    #[error("adapter_config.json cannot be read: {source}")]
    Json {
        /// The parser's error.
        #[from]
        source: serde_json::Error,
    },
    /// A field that must be there is absent.
    #[error("adapter_config.json has no {field}")]
    Missing {
        /// The field.
        field: &'static str,
    },
    /// A field has a value that makes no sense.
    #[error("adapter_config.json: {field}: expected {expected}, found {found}")]
    Field {
        /// The field.
        field: &'static str,
        /// What it may be.
        expected: &'static str,
        /// The value.
        found: String,
    },
    /// The configuration asks for what this build cannot do.
    #[error("adapter_config.json: {field} is {found}: {reason}")]
    Unsupported {
        /// The field.
        field: String,
        /// The value.
        found: String,
        /// Why it is not supported.
        reason: &'static str,
    },
    /// A pattern is no regular expression that this build can match.
    #[error("adapter_config.json: {field}: {pattern:?}: {source}")]
    Pattern {
        /// The field.
        field: &'static str,
        /// The pattern.
        pattern: String,
        /// What is wrong with it.
        source: regex::Error,
    },
    /// The targets match no linear layer of the model.
    #[error("target_modules {targets} match no linear layer of the model; there are {modules}")]
    NoMatch {
        /// The targets.
        targets: String,
        /// The last parts of the names that there are.
        modules: String,
    },
    /// The slices of a merge do not fit each other.
    #[error("{what}: expected {expected} elements, found {found}")]
    Length {
        /// Which slice.
        what: &'static str,
        /// The number that fits.
        expected: usize,
        /// The slice's.
        found: usize,
    },
}

impl Classify for AdapterError {
    fn kind(&self) -> Kind {
        match self {
            Self::Length { .. } => Kind::Internal,
            _ => Kind::Invalid,
        }
    }
}
