//! Headers of weight files: bytes in, [`ModelIndex`] out.
//!
//! Owns: the safetensors header, the sharded index, the merge of files into one index, GGUF headers and blocks,
//! the components of quantized tensors.
//! Refuses to know: files, directories, architectures, placement.
//!
//! `FO-1`: no header makes a parser panic, allocate beyond its named limit, or accept bytes outside the file; tensors of
//! one file neither overlap nor leave holes.

mod blocks;
mod error;
mod ggml;
pub mod gguf;
mod index;
mod json;
pub mod packed;
pub mod safetensors;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

pub use blocks::{dequantize, quantize};
pub use error::FormatError;
pub use ggml::{GgmlTensor, GgmlType, RowOrder};
pub use gguf::{Gguf, GgufHead};
pub use index::{IndexJson, merge, parse_index_json};
pub use packed::PackedTensor;
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

impl TensorEntry {
    /// Bytes in the files, all components together.
    #[must_use]
    pub fn stored_bytes(&self) -> u64 {
        match &self.encoding {
            Encoding::Packed(packed) => packed.parts.iter().map(|(_, range)| range.len()).fold(0, u64::saturating_add),
            Encoding::Plain | Encoding::Ggml(_) => self.range.len(),
        }
    }

    /// The name of its element type, blocks or format.
    #[must_use]
    pub fn format_name(&self) -> String {
        match &self.encoding {
            Encoding::Plain => self.dtype.name().to_owned(),
            Encoding::Ggml(blocks) => blocks.ggml_type.name().to_owned(),
            Encoding::Packed(packed) => packed.encoding.name(),
        }
    }
}

/// How a tensor's bytes are encoded in its file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Encoding {
    /// Elements, little-endian, row-major.
    Plain,
    /// Blocks of a GGUF file.
    Ggml(GgmlTensor),
    /// Components of a quantized tensor, which lie in tensors of their own.
    Packed(Box<PackedTensor>),
}
