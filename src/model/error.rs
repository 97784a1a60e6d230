//! Why a configuration gives no skeleton, and why keys do not match one.

use std::fmt;

use crate::error::{Classify, Kind};
use crate::types::{DType, Fqn, Shape};

/// A model's configuration cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// The text is no JSON of the expected form.
    #[error("config.json cannot be read: {source}")]
    Json {
        /// The parser's error.
        #[from]
        source: serde_json::Error,
    },
    /// The architecture is not one that this build knows.
    #[error("unknown architecture {found:?}; known are {known}")]
    UnknownArchitecture {
        /// The name in `architectures` or `model_type`.
        found: String,
        /// The known names.
        known: String,
    },
    /// A field that the architecture needs is absent.
    #[error("config.json has no {field}")]
    MissingField {
        /// The field's name.
        field: &'static str,
    },
    /// A field is zero or absurdly large.
    #[error("config.json: {field}: expected 1 to {limit}, found {found}")]
    OutOfRange {
        /// The field's name.
        field: &'static str,
        /// The largest accepted value.
        limit: u64,
        /// The value.
        found: u64,
    },
    /// Two fields contradict each other.
    #[error("config.json: {field} is {found}, which does not divide by {divisor_field} = {divisor}")]
    NotDivisible {
        /// The field to be divided.
        field: &'static str,
        /// Its value.
        found: u64,
        /// The field that divides.
        divisor_field: &'static str,
        /// Its value.
        divisor: u64,
    },
    /// A switch of GPT-2 that changes its attention, which this build does not follow.
    #[error("config.json: {field}: expected {expected}, found {found}")]
    Unsupported {
        /// The field's name.
        field: &'static str,
        /// The value that is followed.
        expected: bool,
        /// The value.
        found: bool,
    },
    /// Blocks cannot be inserted so.
    #[error("{what}: expected {expected}, found {found}")]
    Expansion {
        /// What does not fit.
        what: &'static str,
        /// What would.
        expected: String,
        /// What there is.
        found: String,
    },
    /// Layers with and without a window alternate.
    #[error(
        "config.json: layer_types: expected full_attention first and sliding_attention after it, found another order"
    )]
    LayerTypes,
    /// The rotary embedding is of a kind that this build cannot compute.
    #[error("unknown rope_type {found:?}; known are default, linear, dynamic, yarn and llama3")]
    UnknownRope {
        /// The kind.
        found: String,
    },
    /// A parameter of the rotary embedding is absent or makes no sense.
    #[error("rope parameters of type {rope_type}: {field} is missing or not positive")]
    Rope {
        /// The kind.
        rope_type: String,
        /// The parameter.
        field: &'static str,
    },
}

impl Classify for ModelError {
    fn kind(&self) -> Kind {
        Kind::Invalid
    }
}

/// Keys that are named at most in each list of a [`KeyMismatch`]; the counts are always exact.
pub const MAX_NAMED_KEYS: usize = 16;

/// Some keys, and how many there are in all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KeyList {
    /// The first [`MAX_NAMED_KEYS`] keys.
    pub first: Vec<Fqn>,
    /// The number of keys.
    pub count: usize,
}

impl KeyList {
    pub(super) fn push(&mut self, key: &Fqn) {
        self.count += 1;
        if self.first.len() < MAX_NAMED_KEYS {
            self.first.push(key.clone());
        }
    }
}

/// A tensor whose shape in the files is not the skeleton's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShapeMismatch {
    /// The tensor, by the skeleton's name.
    pub fqn: Fqn,
    /// The skeleton's shape.
    pub expected: Shape,
    /// The files' shape.
    pub found: Shape,
}

/// A parameter whose element type in the files is none of floating point.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DTypeMismatch {
    /// The tensor, by the skeleton's name.
    pub fqn: Fqn,
    /// The files' element type.
    pub found: DType,
}

/// The tensors of the files are not those of the skeleton; everything that differs, at once.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct KeyMismatch {
    /// The architecture of the skeleton.
    pub architecture: &'static str,
    /// Keys that the skeleton needs and the files lack.
    pub missing: KeyList,
    /// Keys of the files that the skeleton does not know.
    pub unexpected: KeyList,
    /// The first [`MAX_NAMED_KEYS`] tensors of another shape.
    pub mismatched: Vec<ShapeMismatch>,
    /// The number of tensors of another shape.
    pub mismatched_count: usize,
    /// The first [`MAX_NAMED_KEYS`] parameters that are no floating point numbers.
    pub not_float: Vec<DTypeMismatch>,
    /// The number of parameters that are no floating point numbers.
    pub not_float_count: usize,
    /// The format of weights that are quantized already, if the unexpected keys betray one.
    pub prequantized: Option<&'static str>,
}

impl KeyMismatch {
    pub(super) fn is_empty(&self) -> bool {
        self.missing.count + self.unexpected.count + self.mismatched_count + self.not_float_count == 0
    }
}

impl fmt::Display for KeyMismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the tensors are not those of {}", self.architecture)?;
        let mut separator = ": ";
        for (list, what) in [(&self.missing, "missing"), (&self.unexpected, "unexpected")] {
            if list.count > 0 {
                write!(f, "{separator}{} {what} (", list.count)?;
                write_list(f, &list.first, list.count)?;
                separator = ", ";
            }
        }
        if self.mismatched_count > 0 {
            write!(f, "{separator}{} of another shape (", self.mismatched_count)?;
            let texts: Vec<String> = self
                .mismatched
                .iter()
                .map(|one| format!("{}: expected {}, found {}", one.fqn, one.expected, one.found))
                .collect();
            write_list(f, &texts, self.mismatched_count)?;
            separator = ", ";
        }
        if self.not_float_count > 0 {
            write!(f, "{separator}{} of another type (", self.not_float_count)?;
            let text = |one: &DTypeMismatch| format!("{}: expected floating point, found {}", one.fqn, one.found);
            let texts: Vec<String> = self.not_float.iter().map(text).collect();
            write_list(f, &texts, self.not_float_count)?;
        }
        match self.prequantized {
            Some(format) => write!(f, "; the weights are quantized already, by {format}"),
            None => Ok(()),
        }
    }
}

fn write_list(f: &mut fmt::Formatter<'_>, items: &[impl fmt::Display], count: usize) -> fmt::Result {
    for (position, item) in items.iter().enumerate() {
        write!(f, "{}{item}", if position > 0 { ", " } else { "" })?;
    }
    match count.saturating_sub(items.len()) {
        0 => write!(f, ")"),
        more => write!(f, " and {more} more)"),
    }
}

impl std::error::Error for KeyMismatch {}

impl Classify for KeyMismatch {
    fn kind(&self) -> Kind {
        Kind::Invalid
    }
}
