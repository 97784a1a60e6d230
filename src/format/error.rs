//! What can be wrong with the header of a weight file.

use crate::error::{Classify, Kind};
use crate::types::{ByteRange, DType, Shape, ShapeOverflow};

/// A file of weights, or a model's index, cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FormatError {
    /// The file ends before its header does, or before its tensors do.
    #[error("{file} is truncated: expected at least {expected_bytes} bytes, found {found_bytes}")]
    Truncated {
        /// The file.
        file: String,
        /// The bytes that there must be.
        expected_bytes: u64,
        /// The file's length.
        found_bytes: u64,
    },
    /// Bytes follow the last tensor.
    #[error("{file} has bytes after its last tensor: expected {expected_bytes} bytes, found {found_bytes}")]
    TrailingBytes {
        /// The file.
        file: String,
        /// Where the last tensor ends.
        expected_bytes: u64,
        /// The file's length.
        found_bytes: u64,
    },
    /// The header is longer than the limit.
    #[error("{file}: header of {found_bytes} bytes, expected at most {limit_bytes}")]
    HeaderTooLong {
        /// The file.
        file: String,
        /// The limit.
        limit_bytes: u64,
        /// The length that the file gives.
        found_bytes: u64,
    },
    /// The header does not begin as JSON objects do, so the file is probably of another format.
    #[error("{file}: expected a header that begins with '{{', found byte {found:#04x}")]
    HeaderStart {
        /// The file.
        file: String,
        /// The header's first byte; 0 for an empty header.
        found: u8,
    },
    /// The header is no JSON of the expected form.
    #[error("{file}: header cannot be read: {source}")]
    Json {
        /// The file.
        file: String,
        /// The parser's error.
        source: serde_json::Error,
    },
    /// A key stands twice in one JSON object, so one of the two values would be lost.
    #[error("{file}: key {key:?} stands twice in {object}")]
    DuplicateKey {
        /// The file.
        file: String,
        /// The key.
        key: String,
        /// The object, in words.
        object: String,
    },
    /// The entry of a tensor lacks a field.
    #[error("{file}: tensor {tensor} has no {field}")]
    MissingField {
        /// The file.
        file: String,
        /// The tensor.
        tensor: String,
        /// What is missing.
        field: &'static str,
    },
    /// A tensor has an element type that this build does not read.
    #[error("{file}: tensor {tensor}: unknown dtype {found:?}")]
    UnknownDType {
        /// The file.
        file: String,
        /// The tensor.
        tensor: String,
        /// The type as found.
        found: String,
    },
    /// A tensor's size and its offsets disagree.
    #[error("{file}: tensor {tensor}: {dtype} {shape} takes {expected_bytes} bytes, its offsets give {found_bytes}")]
    Size {
        /// The file.
        file: String,
        /// The tensor.
        tensor: String,
        /// Its dtype.
        dtype: DType,
        /// Its shape.
        shape: Shape,
        /// Bytes by dtype and shape.
        expected_bytes: u64,
        /// Bytes by offsets.
        found_bytes: u64,
    },
    /// A tensor's offsets are reversed.
    #[error("{file}: tensor {tensor}: offsets are reversed: begin {start}, end {end}")]
    Reversed {
        /// The file.
        file: String,
        /// The tensor.
        tensor: String,
        /// First byte within the data.
        start: u64,
        /// End within the data.
        end: u64,
    },
    /// A tensor's offsets lie outside the file.
    #[error("{file}: tensor {tensor}: offsets {start}..{end} lie outside the data of {data_bytes} bytes")]
    OutOfRange {
        /// The file.
        file: String,
        /// The tensor.
        tensor: String,
        /// First byte within the data.
        start: u64,
        /// End within the data.
        end: u64,
        /// The data's length.
        data_bytes: u64,
    },
    /// A shape is too large to count.
    #[error("{file}: tensor {tensor}: {source}")]
    Shape {
        /// The file.
        file: String,
        /// The tensor.
        tensor: String,
        /// The overflow.
        source: ShapeOverflow,
    },
    /// A component of a quantized tensor is not as its tool writes it.
    #[error("{tensor}: {what}: expected {expected}, found {found}")]
    Packed {
        /// The tensor, or config.json.
        tensor: String,
        /// Which part of it.
        what: &'static str,
        /// What it should be.
        expected: String,
        /// What it is.
        found: String,
    },
    /// Two tensors share bytes.
    #[error("{file}: tensor {tensor} at {range} overlaps {previous}, which ends at {expected_start}")]
    Overlap {
        /// The file.
        file: String,
        /// The tensor.
        tensor: String,
        /// Its bytes within the data.
        range: ByteRange,
        /// Where it must start.
        expected_start: u64,
        /// The tensor before it.
        previous: String,
    },
    /// Bytes between two tensors belong to none.
    #[error("{file}: tensor {tensor} at {range} leaves a hole: expected it at {expected_start}, where {previous} ends")]
    Hole {
        /// The file.
        file: String,
        /// The tensor.
        tensor: String,
        /// Its bytes within the data.
        range: ByteRange,
        /// Where it must start.
        expected_start: u64,
        /// The tensor before it, or the header.
        previous: String,
    },
    /// The index names a file that is not there.
    #[error("{index} names {file} (for tensor {tensor}), which is missing")]
    MissingFile {
        /// The index file.
        index: String,
        /// The missing file.
        file: String,
        /// A tensor that should be in it.
        tensor: String,
    },
    /// The index puts a tensor into a file whose header does not have it.
    #[error("{index} puts tensor {tensor} into {file}, whose header does not have it")]
    NotInFile {
        /// The index file.
        index: String,
        /// The tensor.
        tensor: String,
        /// The file.
        file: String,
    },
    /// A file has a tensor that the index does not name.
    #[error("{index} does not name tensor {tensor}, which stands in {file}")]
    NotInIndex {
        /// The index file.
        index: String,
        /// The tensor.
        tensor: String,
        /// The file.
        file: String,
    },
    /// A tensor stands in two files.
    #[error("tensor {tensor} stands in two files: {first} and {second}")]
    TensorTwice {
        /// The tensor.
        tensor: String,
        /// One file.
        first: String,
        /// The other.
        second: String,
    },
    /// A GGUF file that cannot be used.
    #[error("{file}: {what}")]
    Gguf {
        /// The file.
        file: String,
        /// What is wrong with it.
        what: String,
    },
    /// GGUF blocks that cannot be decoded.
    #[error("GGUF blocks of {ggml_type}: {what}")]
    Blocks {
        /// The block type.
        ggml_type: &'static str,
        /// What is wrong.
        what: String,
    },
}

impl Classify for FormatError {
    fn kind(&self) -> Kind {
        match self {
            Self::MissingFile { .. } => Kind::NotFound,
            Self::UnknownDType { .. } | Self::Gguf { .. } | Self::Blocks { .. } => Kind::Invalid,
            _ => Kind::Corrupt,
        }
    }
}
