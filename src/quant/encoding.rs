//! How a tensor is encoded, and which components (arrays of bytes) that makes.
//!
//! `PL-1`: the components of an encoding depend on the shape alone, so every rank knows every size before a byte is read.

use serde::{Deserialize, Serialize};

use super::affine::{CodeBits, GroupAxis, MlxRule};
use super::pack::{GptqVersion, HqqPacking};
use super::{BlockSize, FourBitCode};
use crate::format::GgmlType;
use crate::types::{ByteRange, DType, Shape, ShapeOverflow, as_u64};

/// Blocks that share one entry of nested statistics (bitsandbytes' `nested_blocksize`).
const NESTED_BLOCK: u64 = super::nested::NESTED_BLOCK as u64;

/// The form in which a tensor is kept, sent and stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Encoding {
    /// The elements themselves.
    Plain {
        /// Their type, after conversion.
        dtype: DType,
    },
    /// bitsandbytes' 4-bit codes with a statistic per block.
    FourBit {
        /// The code book.
        code: FourBitCode,
        /// Elements per block.
        block: BlockSize,
        /// Whether the statistics are themselves quantized (double quantization).
        nested: bool,
        /// The type that the tensor stands for, as written into bitsandbytes' quant state.
        dtype: DType,
    },
    /// LLM.int8: a signed byte per element and a scale per row.
    Int8,
    /// MLX's affine codes, with a scale and a bias for each group of a row; rows are whole groups.
    Mlx {
        /// Bits and group size.
        rule: MlxRule,
        /// The type of scales and biases, which the tensor stands for.
        dtype: DType,
    },
    /// Blocks of GGUF, rows in the order of the Hugging Face model; rows are whole blocks.
    Ggml {
        /// The type of the blocks.
        ggml_type: GgmlType,
    },
    /// HQQ's codes with a scale and a zero for each group.
    Hqq {
        /// Bits of a code.
        bits: CodeBits,
        /// Elements per group; the elements are whole groups.
        group: u32,
        /// How the groups lie: `Runs` is HQQ's `axis=1`, `Columns` its `axis=0`.
        axis: GroupAxis,
        /// The type of scales and zeros, which the tensor stands for.
        dtype: DType,
    },
    /// GPTQ's codes of a linear layer, input-major.
    Gptq {
        /// Bits of a code: 2, 3, 4 or 8.
        bits: CodeBits,
        /// Inputs per group.
        group: u32,
        /// How zeros are stored.
        version: GptqVersion,
        /// Whether `g_idx` is there, which says each input's group.
        indexed: bool,
        /// The type of scales, which the tensor stands for.
        dtype: DType,
    },
    /// AWQ's 4-bit codes of a linear layer in the layout of its `gemm` version, input-major.
    Awq {
        /// Inputs per group.
        group: u32,
        /// The type of scales, which the tensor stands for.
        dtype: DType,
    },
    /// FP8 E4M3 with scales.
    Fp8 {
        /// What shares a scale.
        scales: Fp8Scales,
        /// The type of the scales.
        scale_dtype: DType,
        /// The type that the tensor stands for.
        dtype: DType,
    },
}

/// What shares a scale of an FP8 weight `[out, in]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fp8Scales {
    /// The whole tensor: `weight_scale` of one value.
    Tensor,
    /// A row: `weight_scale` `[out, 1]`.
    Row,
    /// A block, as in DeepSeek's `weight_scale_inv`.
    Block {
        /// Rows of a block.
        rows: u32,
        /// Columns of a block.
        columns: u32,
    },
}

/// The role of one array of bytes in an encoding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Part {
    /// The elements (`Plain`), the packed codes (`FourBit`) or the bytes (`Int8`).
    Weight,
    /// f32 absmax per block, or its u8 codes when nested.
    Absmax,
    /// f32 absmax per group of 256 blocks (bitsandbytes' `nested_blocksize`).
    NestedAbsmax,
    /// The f32 mean of the statistics; one value, kept by every rank.
    NestedOffset,
    /// f32 absmax per row (`Int8`).
    RowAbsmax,
    /// A scale per group (`Mlx`, `Hqq`, `Gptq`, `Awq`), or what [`Fp8Scales`] says.
    Scales,
    /// A bias per group (`Mlx`).
    Biases,
    /// A zero per group (`Hqq`, `Gptq`, `Awq`).
    Zeros,
    /// The group of each input (`Gptq`).
    GroupIndex,
}

/// Along what a tensor can be cut over ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// Rows of the tensor: a rank's part of every component is what its rows need.
    Rows,
    /// Dim 0 of each component by itself, because its packing mixes rows: the parts mean something only together.
    Components,
}

/// One array of bytes of an encoded tensor, whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Component {
    /// Its role.
    pub part: Part,
    /// Element type as stored.
    pub dtype: DType,
    /// Shape as stored; dim 0 is the one that is cut.
    pub shape: Shape,
    /// Length in bytes.
    pub bytes: u64,
}

impl Encoding {
    /// The components of a tensor of `shape`, in the order in which they are kept, sent and stored.
    ///
    /// # Errors
    /// [`ShapeOverflow`] when sizes do not fit 64 bits.
    pub fn components(&self, shape: &Shape) -> Result<Vec<Component>, ShapeOverflow> {
        let elements = shape.elements()?;
        let component =
            |part, dtype: DType, shape: Shape| Ok(Component { part, dtype, bytes: shape.bytes(dtype)?, shape });
        match *self {
            Self::Plain { dtype } => Ok(vec![component(Part::Weight, dtype, shape.clone())?]),
            Self::FourBit { block, nested, .. } => {
                let blocks = elements.div_ceil(u64::from(block.get()));
                let mut parts = vec![component(Part::Weight, DType::U8, [elements.div_ceil(2), 1].into())?];
                if nested {
                    parts.push(component(Part::Absmax, DType::U8, [blocks].into())?);
                    parts.push(component(Part::NestedAbsmax, DType::F32, [blocks.div_ceil(NESTED_BLOCK)].into())?);
                    parts.push(component(Part::NestedOffset, DType::F32, [1].into())?);
                } else {
                    parts.push(component(Part::Absmax, DType::F32, [blocks].into())?);
                }
                Ok(parts)
            }
            Self::Int8 => Ok(vec![
                component(Part::Weight, DType::I8, shape.clone())?,
                component(Part::RowAbsmax, DType::F32, [shape.rows()].into())?,
            ]),
            Self::Mlx { rule, dtype } => {
                let rows = shape.rows();
                let row = elements.checked_div(rows).unwrap_or(0);
                let (words, groups) = (packed_bytes(rule, row) / 4, row / as_u64(rule.group()));
                Ok(vec![
                    component(Part::Weight, DType::U32, [rows, words].into())?,
                    component(Part::Scales, dtype, [rows, groups].into())?,
                    component(Part::Biases, dtype, [rows, groups].into())?,
                ])
            }
            Self::Ggml { ggml_type } => {
                let rows = shape.rows();
                let row = elements.checked_div(rows).unwrap_or(0);
                let row_bytes = ggml_type.bytes_for(row).map_err(|_| ShapeOverflow { shape: shape.clone() })?;
                Ok(vec![component(Part::Weight, DType::U8, [rows, row_bytes].into())?])
            }
            Self::Hqq { bits, group, axis, dtype } => {
                let groups = elements / u64::from(group.max(1));
                let (rows, columns, statistics) = match axis {
                    GroupAxis::Runs => (groups, u64::from(group), [groups, 1]),
                    GroupAxis::Columns => (u64::from(group), groups, [1, groups]),
                };
                let word = if HqqPacking::word_bytes(bits) == 4 { DType::I32 } else { DType::U8 };
                let rows = rows.div_ceil(as_u64(HqqPacking::parts(bits)));
                Ok(vec![
                    component(Part::Weight, word, [rows, columns].into())?,
                    component(Part::Scales, dtype, statistics.into())?,
                    component(Part::Zeros, dtype, statistics.into())?,
                ])
            }
            Self::Gptq { bits, group, indexed, dtype, .. } => {
                let (outputs, inputs) = matrix(shape);
                let groups = inputs.div_ceil(u64::from(group.max(1)));
                let words = |codes: u64| codes.saturating_mul(u64::from(bits.get())).div_ceil(32);
                let mut parts = vec![
                    component(Part::Weight, DType::I32, [words(inputs), outputs].into())?,
                    component(Part::Zeros, DType::I32, [groups, words(outputs)].into())?,
                    component(Part::Scales, dtype, [groups, outputs].into())?,
                ];
                if indexed {
                    parts.push(component(Part::GroupIndex, DType::I32, [inputs].into())?);
                }
                Ok(parts)
            }
            Self::Awq { group, dtype } => {
                let (outputs, inputs) = matrix(shape);
                let groups = inputs / u64::from(group.max(1));
                Ok(vec![
                    component(Part::Weight, DType::I32, [inputs, outputs / 8].into())?,
                    component(Part::Zeros, DType::I32, [groups, outputs / 8].into())?,
                    component(Part::Scales, dtype, [groups, outputs].into())?,
                ])
            }
            Self::Fp8 { scales, scale_dtype, .. } => {
                let (outputs, inputs) = matrix(shape);
                let of_scales = match scales {
                    Fp8Scales::Tensor => [1].into(),
                    Fp8Scales::Row => [outputs, 1].into(),
                    Fp8Scales::Block { rows, columns } => {
                        [outputs.div_ceil(u64::from(rows.max(1))), inputs.div_ceil(u64::from(columns.max(1)))].into()
                    }
                };
                Ok(vec![
                    component(Part::Weight, DType::F8E4M3, shape.clone())?,
                    component(Part::Scales, scale_dtype, of_scales)?,
                ])
            }
        }
    }

    /// Along what the tensor can be cut.
    #[must_use]
    pub const fn cut(&self) -> Cut {
        match self {
            Self::Plain { .. } | Self::FourBit { .. } | Self::Int8 | Self::Mlx { .. } | Self::Ggml { .. } => Cut::Rows,
            Self::Hqq { .. } | Self::Gptq { .. } | Self::Awq { .. } | Self::Fp8 { .. } => Cut::Components,
        }
    }

    /// The smallest number of rows that can be cut off a tensor whose rows have `row_elements`, without cutting a block.
    #[must_use]
    pub fn row_granule(&self, row_elements: u64) -> u64 {
        match *self {
            Self::Plain { .. }
            | Self::Int8
            | Self::Mlx { .. }
            | Self::Ggml { .. }
            | Self::Hqq { .. }
            | Self::Gptq { .. }
            | Self::Awq { .. }
            | Self::Fp8 { .. } => 1,
            Self::FourBit { block, .. } => {
                let block = u64::from(block.get());
                block / greatest_common_divisor(block, row_elements.max(1))
            }
        }
    }

    /// The bytes of component `part` that belong to the elements `elements` of a tensor whose rows have `row_elements`; with
    /// [`Cut::Components`] those of no part belong to some elements alone, and this is empty.
    ///
    /// With `claim` = [`Claim::Kept`] these are all bytes needed to use the elements; nested groups that straddle a cut
    /// are in the ranges of both sides. With [`Claim::Owned`] each byte belongs to exactly one side of every cut.
    #[must_use]
    pub fn part_range(&self, part: Part, elements: ByteRange, row_elements: u64, claim: Claim) -> ByteRange {
        let (start, end) = (elements.start(), elements.end());
        if elements.is_empty() {
            return ByteRange::default();
        }
        let (start, end) = match (*self, part) {
            (Self::Plain { dtype }, _) => (start * dtype.size_bytes(), end * dtype.size_bytes()),
            (Self::Int8, Part::Weight) => (start, end),
            (Self::Int8, _) => {
                let row = row_elements.max(1);
                (start / row * 4, end.div_ceil(row) * 4)
            }
            (Self::Mlx { rule, .. }, Part::Weight) => (packed_bytes(rule, start), packed_bytes(rule, end)),
            (Self::Mlx { rule, dtype }, _) => {
                let (group, size) = (as_u64(rule.group()), dtype.size_bytes());
                (start / group * size, end.div_ceil(group) * size)
            }
            (Self::Ggml { ggml_type }, _) => {
                let (block, size) = (ggml_type.block_elements(), ggml_type.block_bytes());
                (start / block * size, end.div_ceil(block) * size)
            }
            (Self::Hqq { .. } | Self::Gptq { .. } | Self::Awq { .. } | Self::Fp8 { .. }, _) => (0, 0),
            (Self::FourBit { .. }, Part::Weight) => (start / 2, end.div_ceil(2)),
            (Self::FourBit { .. }, Part::NestedOffset) => (0, 4),
            (Self::FourBit { block, nested, .. }, part) => {
                let block = u64::from(block.get());
                let (first, last) = (start / block, end.div_ceil(block));
                match part {
                    Part::NestedAbsmax => {
                        let first_group = match claim {
                            Claim::Kept => first / NESTED_BLOCK,
                            Claim::Owned => first.div_ceil(NESTED_BLOCK),
                        };
                        (first_group * 4, last.div_ceil(NESTED_BLOCK) * 4)
                    }
                    _ if nested => (first, last),
                    _ => (first * 4, last * 4),
                }
            }
        };
        ByteRange::new(start, end).unwrap_or_default()
    }

    /// Whether a value of this encoding depends on elements outside a cut, so that a part cannot be quantized alone.
    #[must_use]
    pub const fn needs_whole_tensor(&self) -> bool {
        matches!(self, Self::FourBit { nested: true, .. }) || self.is_made_at_once()
    }

    /// Whether it is made of all elements of a tensor at once, and not of spans in turn.
    #[must_use]
    pub const fn is_made_at_once(&self) -> bool {
        matches!(self.cut(), Cut::Components)
    }

    /// The name of the format as job files and messages write it.
    #[must_use]
    pub fn name(&self) -> String {
        match self {
            Self::Plain { dtype } => dtype.torch_name().to_owned(),
            Self::FourBit { code, nested, .. } => format!("{}{}", code.name(), if *nested { "-double" } else { "" }),
            Self::Int8 => "int8".to_owned(),
            Self::Mlx { rule, .. } => format!("mlx-{}bit", rule.bits().get()),
            Self::Ggml { ggml_type } => ggml_type.name().to_owned(),
            Self::Hqq { bits, .. } => format!("hqq-{}bit", bits.get()),
            Self::Gptq { bits, .. } => format!("gptq-{}bit", bits.get()),
            Self::Awq { .. } => "awq-4bit".to_owned(),
            Self::Fp8 { .. } => "fp8-e4m3".to_owned(),
        }
    }
}

/// Outputs and inputs of a linear layer's weight `[out, in]`; 0 where it is none.
fn matrix(shape: &Shape) -> (u64, u64) {
    match shape.0[..] {
        [outputs, inputs] => (outputs, inputs),
        _ => (0, 0),
    }
}

/// The bytes of the bit stream of `elements` codes, which are whole groups.
fn packed_bytes(rule: MlxRule, elements: u64) -> u64 {
    elements / 8 * u64::from(rule.bits().get())
}

/// Which bytes of a cut component are meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Claim {
    /// All that a rank needs.
    Kept,
    /// What a rank alone answers for in a checkpoint.
    Owned,
}

fn greatest_common_divisor(mut a: u64, mut b: u64) -> u64 {
    while b != 0 {
        (a, b) = (b, a % b);
    }
    a
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nf4(nested: bool) -> Encoding {
        Encoding::FourBit {
            code: FourBitCode::Nf4,
            block: BlockSize::new(64).expect("64 is allowed"),
            nested,
            dtype: DType::BF16,
        }
    }

    /// By hand from formats.md: 64 x 1024 elements are 32,768 packed bytes, 1,024 blocks, 4 nested groups.
    #[test]
    fn sizes_of_the_golden_layer() {
        let sizes = |encoding: Encoding| {
            let parts = encoding.components(&[64, 1024].into()).expect("small");
            parts.iter().map(|part| part.bytes).collect::<Vec<_>>()
        };
        assert_eq!(sizes(nf4(false)), [32_768, 4_096]);
        assert_eq!(sizes(nf4(true)), [32_768, 1_024, 16, 4]);
        assert_eq!(sizes(Encoding::Int8), [65_536, 256]);
        assert_eq!(sizes(Encoding::Plain { dtype: DType::BF16 }), [131_072]);
        // 64 rows of 1024: 4 bits of each, and 16 groups of a row with a scale and a bias of 2 bytes.
        let rule = MlxRule::new(CodeBits::B4, 64).expect("known");
        assert_eq!(sizes(Encoding::Mlx { rule, dtype: DType::BF16 }), [32_768, 2_048, 2_048]);
        let rule = MlxRule::new(CodeBits::B3, 128).expect("known");
        assert_eq!(sizes(Encoding::Mlx { rule, dtype: DType::F32 }), [24_576, 2_048, 2_048]);
    }

    #[test]
    fn granules_by_hand() {
        assert_eq!(nf4(false).row_granule(1024), 1);
        assert_eq!(nf4(false).row_granule(192), 1);
        assert_eq!(nf4(false).row_granule(100), 16);
        assert_eq!(nf4(false).row_granule(7), 64);
        assert_eq!(Encoding::Int8.row_granule(7), 1);
    }

    /// A group that straddles a cut is kept by both sides and owned by the side where it starts.
    #[test]
    fn nested_groups_overlap_when_kept_and_not_when_owned() {
        let group = 64 * NESTED_BLOCK;
        let left = ByteRange::new(0, group + 64).expect("ordered");
        let right = ByteRange::new(group + 64, 3 * group).expect("ordered");
        let range = |elements, claim| nf4(true).part_range(Part::NestedAbsmax, elements, 64, claim);
        assert_eq!(range(left, Claim::Kept), ByteRange::new(0, 8).expect("ordered"));
        assert_eq!(range(right, Claim::Kept), ByteRange::new(4, 12).expect("ordered"));
        assert_eq!(range(left, Claim::Owned), ByteRange::new(0, 8).expect("ordered"));
        assert_eq!(range(right, Claim::Owned), ByteRange::new(8, 12).expect("ordered"));
    }
}
