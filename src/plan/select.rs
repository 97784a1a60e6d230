//! Rules that give each tensor its encoding.

use serde::{Deserialize, Serialize};

use super::{Encoding, GgmlMix};
use crate::model::{Role, SkeletonTensor};
use crate::quant::affine::{CodeBits, GroupAxis, MlxRule};
use crate::quant::pack::HqqPacking;
use crate::quant::{BlockSize, FourBitCode};
use crate::types::{DType, Shape, as_u64, as_usize};

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
    /// HQQ's codes for linear layers whose elements are whole groups that fill their words.
    Hqq {
        /// Bits of a code.
        bits: CodeBits,
        /// Elements per group.
        group: u32,
        /// How the groups lie.
        axis: GroupAxis,
        /// As above.
        skip: Vec<String>,
    },
    /// Blocks of GGUF for linear layers whose rows are whole blocks of 32 or 256.
    Ggml {
        /// Which type of blocks.
        mix: GgmlMix,
        /// As above.
        skip: Vec<String>,
    },
    /// Different rules for different modules.
    Mixed {
        /// The first that names a module counts.
        modules: Vec<ModuleRule>,
        /// For modules that none names.
        otherwise: Box<QuantizationRule>,
    },
}

/// A rule for some modules.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModuleRule {
    /// Patterns of names of tensors ([`names`]).
    pub patterns: Vec<String>,
    /// What is quantized.
    pub rule: QuantizationRule,
    /// The type of what is not, where it is not the job's.
    pub dtype: Option<DType>,
}

/// Whether `pattern` names `tensor`: a pattern with `*`, which stands for any text, must fit the whole name, with or without
/// `.weight` or `.bias` at its end; one without must occur in it, as with `skip`.
#[must_use]
pub fn names(pattern: &str, tensor: &str) -> bool {
    if !pattern.contains('*') {
        return tensor.contains(pattern);
    }
    let module = tensor.strip_suffix(".weight").or_else(|| tensor.strip_suffix(".bias"));
    fits(pattern, tensor) || module.is_some_and(|module| fits(pattern, module))
}

fn fits(pattern: &str, text: &str) -> bool {
    let mut parts = pattern.split('*');
    let Some(mut rest) = text.strip_prefix(parts.next().unwrap_or_default()) else { return false };
    let mut parts: Vec<&str> = parts.collect();
    let Some(last) = parts.pop() else { return rest.is_empty() };
    for part in parts {
        let Some(at) = rest.find(part) else { return false };
        rest = rest.get(at + part.len()..).unwrap_or_default();
    }
    rest.ends_with(last)
}

impl QuantizationRule {
    /// A pattern that names none of `tensors`, if there is one.
    #[must_use]
    pub fn idle_pattern<'a>(&'a self, tensors: &[SkeletonTensor]) -> Option<&'a str> {
        let Self::Mixed { modules, .. } = self else { return None };
        let mut patterns = modules.iter().flat_map(|module| &module.patterns);
        let idle = patterns.find(|pattern| !tensors.iter().any(|tensor| names(pattern, tensor.fqn.as_str())));
        idle.map(String::as_str)
    }

    /// The encoding of a tensor of a model with `layers` layers: linear layers' matrices by the format, all else plain. Embeddings, norms, biases and
    /// the head are never quantized, as in transformers with bitsandbytes.
    #[must_use]
    pub fn encoding(&self, tensor: &SkeletonTensor, layers: u32, source: DType, dtype: DTypeRule) -> Encoding {
        let SkeletonTensor { fqn, shape, role, .. } = tensor;
        let kept = dtype.apply(source);
        let eligible = |skip: &[String]| {
            *role == Role::Linear
                && shape.dims() == 2
                && source.is_weight_float()
                && !skip.iter().any(|module| fqn.as_str().contains(module.as_str()))
        };
        match self {
            Self::Mixed { modules, otherwise } => {
                let named = |module: &&ModuleRule| module.patterns.iter().any(|pattern| names(pattern, fqn.as_str()));
                match modules.iter().find(named) {
                    Some(ModuleRule { rule, dtype: own, .. }) => {
                        let dtype = own.map_or(dtype, DTypeRule::Convert);
                        rule.encoding(tensor, layers, source, dtype)
                    }
                    None => otherwise.encoding(tensor, layers, source, dtype),
                }
            }
            Self::FourBit { code, block, nested, skip } if eligible(skip) => {
                Encoding::FourBit { code: *code, block: *block, nested: *nested, dtype: kept }
            }
            Self::Int8 { skip } if eligible(skip) => Encoding::Int8,
            Self::Mlx { rule, skip } if eligible(skip) && row_is_whole(shape, *rule) => {
                Encoding::Mlx { rule: *rule, dtype: kept }
            }
            Self::Hqq { bits, group, axis, skip } if eligible(skip) && fills_words(shape, (*bits, *group, *axis)) => {
                Encoding::Hqq { bits: *bits, group: *group, axis: *axis, dtype: kept }
            }
            Self::Ggml { mix, skip } if eligible(skip) => {
                let columns = shape.0.last().copied().unwrap_or(0);
                let plain = Encoding::Plain { dtype: kept };
                mix.ggml_type(fqn, columns, layers).map_or(plain, |ggml_type| Encoding::Ggml { ggml_type })
            }
            _ => Encoding::Plain { dtype: kept },
        }
    }
}

/// Whether the elements are whole groups, and the matrix of groups has as many rows as its packing wants.
fn fills_words(shape: &Shape, (bits, group, axis): (CodeBits, u32, GroupAxis)) -> bool {
    let elements = as_usize(shape.elements().unwrap_or(0));
    let group = as_usize(u64::from(group));
    let Some(groups) = elements.checked_div(group).filter(|groups| groups * group == elements && *groups > 0) else {
        return false;
    };
    let (rows, columns) = if axis == GroupAxis::Runs { (groups, group) } else { (group, groups) };
    HqqPacking::new(bits, rows, columns).is_ok()
}

fn row_is_whole(shape: &Shape, rule: MlxRule) -> bool {
    shape.0.last().is_some_and(|columns| *columns > 0 && columns.is_multiple_of(as_u64(rule.group())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_by_hand() {
        let name = "model.layers.11.mlp.down_proj.weight";
        for pattern in [
            "down_proj",
            "layers.11.",
            "model.layers.*.mlp.down_proj",
            "*.down_proj",
            "model.*",
            "*.weight",
            "*1*mlp*",
            "*",
        ] {
            assert!(names(pattern, name), "{pattern}");
        }
        for pattern in ["up_proj", "layers.*.mlp", "*.mlp", "model.layers.1.*", "*down_proj*x", "*.weight.weight"] {
            assert!(!names(pattern, name), "{pattern}");
        }
        assert!(names("model.layers.*1.mlp.*", name), "1 is the end of 11");
        assert!(!names("a*a", "a"), "two ends do not share a character");
    }
}
