//! Why an adapter's configuration cannot be used, does not fit, or cannot be merged.

use std::fmt;

use super::loaded::MAX_NAMED_TENSORS;
use crate::error::{Classify, Kind};
use crate::types::{DType, Fqn, Shape};

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
    /// The tensors are not those that the configuration asks for on this model.
    #[error("the adapter's tensors do not fit: {0}")]
    Tensors(TensorMismatch),
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

/// What differs between the tensors that there should be and those that there are; the first few of each kind by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TensorMismatch {
    /// Tensors that are not there.
    pub missing: Vec<Fqn>,
    /// Tensors that no target has.
    pub unexpected: Vec<Fqn>,
    /// Tensors of another shape: name, expected, found.
    pub shapes: Vec<(Fqn, Shape, Shape)>,
    /// Tensors that are no weights: name, found.
    pub dtypes: Vec<(Fqn, DType)>,
}

impl TensorMismatch {
    pub(super) const fn is_empty(&self) -> bool {
        self.missing.is_empty() && self.unexpected.is_empty() && self.shapes.is_empty() && self.dtypes.is_empty()
    }
}

impl fmt::Display for TensorMismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = |list: &[Fqn]| list.iter().map(Fqn::to_string).collect::<Vec<_>>();
        let shape = |(fqn, expected, found): &(Fqn, Shape, Shape)| format!("{fqn}: expected {expected}, found {found}");
        let dtype = |(fqn, found): &(Fqn, DType)| format!("{fqn}: expected F32, F16 or BF16, found {found}");
        let lists = [
            ("missing", names(&self.missing)),
            ("unexpected", names(&self.unexpected)),
            ("of another shape", self.shapes.iter().map(shape).collect()),
            ("of another type", self.dtypes.iter().map(dtype).collect()),
        ];
        let mut separator = "";
        for (what, items) in lists.iter().filter(|(_, items)| !items.is_empty()) {
            let named: Vec<&str> = items.iter().take(MAX_NAMED_TENSORS).map(String::as_str).collect();
            let more = items.len() - named.len();
            let and_more = if more > 0 { format!(" and {more} more") } else { String::new() };
            write!(f, "{separator}{} {what} ({}{and_more})", items.len(), named.join(", "))?;
            separator = ", ";
        }
        Ok(())
    }
}

impl Classify for AdapterError {
    fn kind(&self) -> Kind {
        match self {
            Self::Length { .. } => Kind::Internal,
            _ => Kind::Invalid,
        }
    }
}
