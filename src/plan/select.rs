//! Rules that give each tensor its encoding.

use serde::{Deserialize, Serialize};

use super::Encoding;
use crate::model::Role;
use crate::quant::affine::MlxRule;
use crate::quant::{BlockSize, FourBitCode};
use crate::types::{DType, Fqn, Shape, as_u64};

/// The element type of tensors that are not quantized.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DTypeRule {
    /// As in the source.
    #[default]
    Keep,
    /// f32, f16 and bf16 become this type; other types stay.
    Convert(DType),
}

impl DTypeRule {
    /// The type that `source` becomes.
    #[must_use]
    pub const fn apply(self, source: DType) -> DType {
        match self {
            Self::Convert(to) if source.is_weight_float() => to,
            _ => source,
        }
    }
}

/// Which tensors are quantized, and how.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "format", rename_all = "kebab-case")]
pub enum QuantizationRule {
    /// Nothing is quantized.
    #[default]
    None,
    /// bitsandbytes' 4-bit codes for linear layers.
    FourBit {
        /// The code book.
        code: FourBitCode,
        /// Elements per block.
        block: BlockSize,
        /// Double quantization.
        nested: bool,
        /// Modules whose name contains one of these stay as they are, as in transformers' `llm_int8_skip_modules`.
        skip: Vec<String>,
    },
    /// LLM.int8 rows for linear layers.
    Int8 {
        /// As above.
        skip: Vec<String>,
    },
    /// MLX's affine codes for linear layers whose rows are whole groups.
    Mlx {
        /// Bits and group size.
        rule: MlxRule,
        /// As above.
        skip: Vec<String>,
    },
}

impl QuantizationRule {
    /// The encoding of a tensor: linear layers' matrices by the format, all else plain. Embeddings, norms, biases and
    /// the head are never quantized, as in transformers with bitsandbytes.
    #[must_use]
    pub fn encoding(&self, fqn: &Fqn, shape: &Shape, role: Role, source: DType, dtype: DTypeRule) -> Encoding {
        let kept = dtype.apply(source);
        let eligible = |skip: &[String]| {
            role == Role::Linear
                && shape.dims() == 2
                && source.is_weight_float()
                && !skip.iter().any(|module| fqn.as_str().contains(module.as_str()))
        };
        match self {
            Self::FourBit { code, block, nested, skip } if eligible(skip) => {
                Encoding::FourBit { code: *code, block: *block, nested: *nested, dtype: kept }
            }
            Self::Int8 { skip } if eligible(skip) => Encoding::Int8,
            Self::Mlx { rule, skip } if eligible(skip) && row_is_whole(shape, *rule) => {
                Encoding::Mlx { rule: *rule, dtype: kept }
            }
            _ => Encoding::Plain { dtype: kept },
        }
    }
}

fn row_is_whole(shape: &Shape, rule: MlxRule) -> bool {
    shape.0.last().is_some_and(|columns| *columns > 0 && columns.is_multiple_of(as_u64(rule.group())))
}
