//! What can be wrong with the arguments of a quantizer. Owns the enum; knows no format.

use crate::error::{Classify, Kind};
use crate::types::DType;

/// Arguments that do not fit together; nothing was written.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum QuantError {
    /// A block size that bitsandbytes does not have.
    #[error("block size: expected a power of two from 32 to 4096, found {found}")]
    BlockSize {
        /// The number of values per block as asked.
        found: u64,
    },
    /// Weights of a type that is neither F16, BF16 nor F32.
    #[error("dtype: expected F16, BF16 or F32, found {found}")]
    DType {
        /// The type as asked.
        found: DType,
    },
    /// Bytes that are no whole number of elements.
    #[error("bytes: expected a multiple of the {dtype} element size, found {found}")]
    RaggedBytes {
        /// The type of an element.
        dtype: DType,
        /// The number of bytes given.
        found: usize,
    },
    /// A slice whose length does not follow from the others.
    #[error("length of {what}: expected {expected}, found {found}")]
    Length {
        /// The argument's name.
        what: &'static str,
        /// Its length as it follows from the other arguments, in elements.
        expected: usize,
        /// Its length as given, in elements.
        found: usize,
    },
    /// A row of no columns, or a number of values that is no whole number of rows.
    #[error("columns: expected a divisor of {values} values, found {columns}")]
    Columns {
        /// The number of values of one row as given.
        columns: usize,
        /// The number of values given.
        values: usize,
    },
    /// A width of codes that a format does not have.
    #[error("bits of {format}: expected {expected}, found {found}")]
    Bits {
        /// The format.
        format: &'static str,
        /// The widths that it has.
        expected: &'static str,
        /// The width as given.
        found: u8,
    },
    /// Groups of no weights, or weights that are no whole number of groups.
    #[error("group size: expected a divisor of {values} weights, found {found}")]
    GroupSize {
        /// Weights per group as given.
        found: usize,
        /// The number of weights.
        values: usize,
    },
    /// A group size that MLX does not have.
    #[error("group size of mlx: expected 32, 64 or 128, found {found}")]
    MlxGroup {
        /// Weights per group as asked.
        found: usize,
    },
    /// An entry of `g_idx` that names no group.
    #[error("g_idx of input {input}: expected a group below {groups}, found {found}")]
    GroupIndex {
        /// The input feature.
        input: usize,
        /// How many groups there are.
        groups: usize,
        /// The entry.
        found: i32,
    },
    /// A size that a packing cannot have.
    #[error("{what}: expected a multiple of {expected}, found {found}")]
    Parts {
        /// What is packed together.
        what: &'static str,
        /// How many of them make a unit.
        expected: usize,
        /// How many there are.
        found: usize,
    },
    /// A part that is not inside the whole.
    #[error("{what}: expected at most {bound}, found {count} from {start} on")]
    Range {
        /// What is counted.
        what: &'static str,
        /// The first one.
        start: usize,
        /// How many.
        count: usize,
        /// How many there are.
        bound: usize,
    },
    /// A library's blocks cannot be made or read.
    #[error("blocks: {what}")]
    Blocks {
        /// What is wrong.
        what: String,
    },
    /// A format that this build reads and does not make.
    #[error("{format} is read as it is, and not made here")]
    ReadOnly {
        /// The format.
        format: String,
    },
    /// A dynamic map that is not ascending or not finite.
    #[error("dynamic map: expected 256 finite ascending values, found a break at index {index}")]
    UnsortedMap {
        /// The first index whose value is not finite or less than its predecessor.
        index: usize,
    },
}

impl Classify for QuantError {
    fn kind(&self) -> Kind {
        match self {
            Self::UnsortedMap { .. } | Self::GroupIndex { .. } => Kind::Corrupt,
            _ => Kind::Invalid,
        }
    }
}

/// Checks one slice's length.
pub(super) fn expect_len(what: &'static str, found: usize, expected: usize) -> Result<(), QuantError> {
    if found == expected { Ok(()) } else { Err(QuantError::Length { what, expected, found }) }
}
