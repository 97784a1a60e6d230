//! Element types, as safetensors names them.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The type of one tensor element. Every one has a whole number of bytes; packed 4-bit codes are `U8`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
#[expect(missing_docs, reason = "the names are the field's own")]
pub enum DType {
    Bool,
    U8,
    I8,
    F8E5M2,
    F8E4M3,
    I16,
    U16,
    F16,
    BF16,
    I32,
    U32,
    F32,
    F64,
    I64,
    U64,
}

/// A name that is no element type of safetensors that this build reads.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown dtype {found:?}")]
pub struct UnknownDType {
    /// The name as found.
    pub found: String,
}

impl DType {
    /// All element types.
    pub const ALL: [Self; 15] = [
        Self::Bool,
        Self::U8,
        Self::I8,
        Self::F8E5M2,
        Self::F8E4M3,
        Self::I16,
        Self::U16,
        Self::F16,
        Self::BF16,
        Self::I32,
        Self::U32,
        Self::F32,
        Self::F64,
        Self::I64,
        Self::U64,
    ];

    /// Bytes of one element.
    #[must_use]
    pub const fn size_bytes(self) -> u64 {
        match self {
            Self::Bool | Self::U8 | Self::I8 | Self::F8E5M2 | Self::F8E4M3 => 1,
            Self::I16 | Self::U16 | Self::F16 | Self::BF16 => 2,
            Self::I32 | Self::U32 | Self::F32 => 4,
            Self::F64 | Self::I64 | Self::U64 => 8,
        }
    }

    /// The name in a safetensors header.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Bool => "BOOL",
            Self::U8 => "U8",
            Self::I8 => "I8",
            Self::F8E5M2 => "F8_E5M2",
            Self::F8E4M3 => "F8_E4M3",
            Self::I16 => "I16",
            Self::U16 => "U16",
            Self::F16 => "F16",
            Self::BF16 => "BF16",
            Self::I32 => "I32",
            Self::U32 => "U32",
            Self::F32 => "F32",
            Self::F64 => "F64",
            Self::I64 => "I64",
            Self::U64 => "U64",
        }
    }

    /// The name that PyTorch prints, such as `bfloat16`.
    #[must_use]
    pub const fn torch_name(self) -> &'static str {
        match self {
            Self::Bool => "bool",
            Self::U8 => "uint8",
            Self::I8 => "int8",
            Self::F8E5M2 => "float8_e5m2",
            Self::F8E4M3 => "float8_e4m3fn",
            Self::I16 => "int16",
            Self::U16 => "uint16",
            Self::F16 => "float16",
            Self::BF16 => "bfloat16",
            Self::I32 => "int32",
            Self::U32 => "uint32",
            Self::F32 => "float32",
            Self::F64 => "float64",
            Self::I64 => "int64",
            Self::U64 => "uint64",
        }
    }

    /// Whether this is a floating point type of any width: what parameters are.
    #[must_use]
    pub const fn is_float(self) -> bool {
        matches!(self, Self::F8E5M2 | Self::F8E4M3 | Self::F16 | Self::BF16 | Self::F32 | Self::F64)
    }

    /// Whether this is `F16`, `BF16` or `F32`: the types that weights are converted between and quantized from.
    #[must_use]
    pub const fn is_weight_float(self) -> bool {
        matches!(self, Self::F16 | Self::BF16 | Self::F32)
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for DType {
    type Err = UnknownDType;

    /// Reads a safetensors name (`BF16`) or PyTorch's (`bfloat16`, `torch.bfloat16`).
    fn from_str(text: &str) -> Result<Self, UnknownDType> {
        let torch = text.strip_prefix("torch.").unwrap_or(text);
        Self::ALL
            .into_iter()
            .find(|dtype| dtype.name() == text || dtype.torch_name() == torch)
            .ok_or_else(|| UnknownDType { found: text.to_owned() })
    }
}

impl From<DType> for String {
    fn from(dtype: DType) -> Self {
        dtype.name().to_owned()
    }
}

impl TryFrom<String> for DType {
    type Error = UnknownDType;

    fn try_from(text: String) -> Result<Self, UnknownDType> {
        text.parse()
    }
}
