//! How a tensor is encoded, and which components (arrays of bytes) that makes.
//!
//! `PL-1`: the components of an encoding depend on the shape alone, so every rank knows every size before a byte is read.

use serde::{Deserialize, Serialize};

use crate::quant::affine::MlxRule;
use crate::quant::{BlockSize, FourBitCode};
use crate::types::{ByteRange, DType, Shape, ShapeOverflow, as_u64};

/// Blocks that share one entry of nested statistics (bitsandbytes' `nested_blocksize`).
pub const NESTED_BLOCK: u64 = 256;

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
}

/// The role of one array of bytes in an encoding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Part {
    /// The elements (`Plain`), the packed codes (`FourBit`) or the bytes (`Int8`).
    Weight,
    /// f32 absmax per block, or its u8 codes when nested.
    Absmax,
    /// f32 absmax per group of [`NESTED_BLOCK`] blocks.
    NestedAbsmax,
    /// The f32 mean of the statistics; one value, kept by every rank.
    NestedOffset,
    /// f32 absmax per row (`Int8`).
    RowAbsmax,
    /// A scale per group (`Mlx`).
    Scales,
    /// A bias per group (`Mlx`).
    Biases,
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
        }
    }

    /// The smallest number of rows that can be cut off a tensor whose rows have `row_elements`, without cutting a block.
    #[must_use]
    pub fn row_granule(&self, row_elements: u64) -> u64 {
        match *self {
            Self::Plain { .. } | Self::Int8 | Self::Mlx { .. } => 1,
            Self::FourBit { block, .. } => {
                let block = u64::from(block.get());
                block / greatest_common_divisor(block, row_elements.max(1))
            }
        }
    }

    /// The bytes of component `part` that belong to the elements `elements` of a tensor whose rows have `row_elements`.
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
        matches!(self, Self::FourBit { nested: true, .. })
    }

    /// The name of the format as job files and messages write it.
    #[must_use]
    pub fn name(&self) -> String {
        match self {
            Self::Plain { dtype } => dtype.torch_name().to_owned(),
            Self::FourBit { code, nested, .. } => format!("{}{}", code.name(), if *nested { "-double" } else { "" }),
            Self::Int8 => "int8".to_owned(),
            Self::Mlx { rule, .. } => format!("mlx-{}bit", rule.bits().get()),
        }
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
    use crate::quant::affine::CodeBits;

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
