//! Headers of weight files: bytes in, [`ModelIndex`] out.
//!
//! Owns: the safetensors header, the sharded index, the merge of files into one index, GGUF headers and blocks.
//! Refuses to know: files, directories, architectures, placement.
//!
//! `FO-1`: no header makes a parser panic, allocate beyond its named limit, or accept bytes outside the file; tensors of
//! one file neither overlap nor leave holes.

mod dequantize;
mod error;
mod ggml;
pub mod gguf;
mod index;
mod json;
pub mod safetensors;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

pub use dequantize::dequantize;
pub use error::FormatError;
pub use ggml::{GgmlTensor, GgmlType, RowOrder};
pub use gguf::{Gguf, GgufHead};
pub use index::{IndexJson, merge, parse_index_json};
pub use safetensors::{Header, HeaderTensor};

use crate::types::{ByteRange, DType, Fqn, Shape};

/// Where every tensor of a model is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ModelIndex {
    /// The files.
    pub files: Vec<FileEntry>,
    /// The tensors by name.
    pub tensors: BTreeMap<Fqn, TensorEntry>,
    /// `__metadata__` of all files together.
    pub metadata: BTreeMap<String, String>,
}

/// One file of a model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    /// Its path relative to the model's directory.
    pub name: String,
    /// Its length in bytes.
    pub len_bytes: u64,
}

/// One tensor in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorEntry {
    /// Element type; for encoded blocks the type that they decode to.
    pub dtype: DType,
    /// Logical shape.
    pub shape: Shape,
    /// Index into [`ModelIndex::files`].
    pub file: u32,
    /// The bytes in the file, from the file's start.
    pub range: ByteRange,
    /// How the bytes are encoded.
    pub encoding: Encoding,
}

/// How a tensor's bytes are encoded in its file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Encoding {
    /// Elements, little-endian, row-major.
    Plain,
    /// Blocks of a GGUF file.
    Ggml(GgmlTensor),
}
