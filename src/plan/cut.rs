//! Cutting tensors over ranks (`PL-2`).

use super::{Claim, Component, Cut, LoadPlan, TensorPlan};
use crate::types::{ByteRange, Rank, WorldSize};

/// What one rank holds of one component.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holding {
    /// The component, whole.
    pub component: Component,
    /// The bytes of it that the rank keeps in memory.
    pub kept: ByteRange,
    /// The bytes of it that the rank writes into a checkpoint; always within `kept`.
    pub owned: ByteRange,
}

impl TensorPlan {
    /// The elements that belong to `rank`, cut at rows and never inside a block. Parts differ by at most one granule.
    #[must_use]
    pub fn elements_of(&self, rank: Rank, world: WorldSize) -> ByteRange {
        let elements = self.elements();
        if !self.sharded {
            return ByteRange::new(0, elements).unwrap_or_default();
        }
        if let Some(owner) = self.owner {
            // An empty range still has its place in the order of ranks.
            let start = if rank > owner { elements } else { 0 };
            let end = if rank < owner { 0 } else { elements };
            return ByteRange::new(start, end).unwrap_or_default();
        }
        let (rows, row) = (self.shape.rows(), self.row_elements());
        let granule = self.encoding.row_granule(row);
        let granules = rows.div_ceil(granule);
        let boundary = |index: u64| {
            let wide = u128::from(granules) * u128::from(index) / u128::from(world.get());
            // The quotient is at most `granules`, so it fits again.
            u64::try_from(wide).unwrap_or(granules).saturating_mul(granule).min(rows) * row
        };
        let rank = u64::from(rank.0);
        ByteRange::new(boundary(rank), boundary(rank + 1)).unwrap_or_default()
    }

    /// The bytes of a component that belong to `rank` when each is cut at rows of its own.
    fn component_of(&self, component: &Component, rank: Rank, world: WorldSize) -> ByteRange {
        if let Some(owner) = self.owner {
            let start = if rank > owner { component.bytes } else { 0 };
            let end = if rank < owner { 0 } else { component.bytes };
            return ByteRange::new(start, end).unwrap_or_default();
        }
        let rows = component.shape.rows();
        let row_bytes = component.bytes.checked_div(rows).unwrap_or(0);
        let boundary = |index: u64| {
            let wide = u128::from(rows) * u128::from(index) / u128::from(world.get());
            // The quotient is at most `rows`, so it fits again.
            u64::try_from(wide).unwrap_or(rows) * row_bytes
        };
        let rank = u64::from(rank.0);
        ByteRange::new(boundary(rank), boundary(rank + 1)).unwrap_or_default()
    }

    /// What `rank` holds of each component, in the components' order.
    #[must_use]
    pub fn holdings(&self, rank: Rank, world: WorldSize) -> Vec<Holding> {
        let elements = self.elements_of(rank, world);
        let row = self.row_elements();
        let hold = |component: Component| {
            let whole = ByteRange::new(0, component.bytes).unwrap_or_default();
            let (kept, owned) = if self.sharded && self.encoding.cut() == Cut::Components {
                let part = self.component_of(&component, rank, world);
                (part, part)
            } else if self.sharded && component.part != super::Part::NestedOffset {
                let range = |claim| self.encoding.part_range(component.part, elements, row, claim);
                (range(Claim::Kept), range(Claim::Owned))
            } else if self.reader == rank {
                (whole, whole)
            } else {
                (whole, ByteRange::default())
            };
            Holding { component, kept, owned }
        };
        self.components().into_iter().map(hold).collect()
    }

    /// The bytes that `rank` keeps of this tensor, without padding.
    #[must_use]
    pub fn kept_bytes(&self, rank: Rank, world: WorldSize) -> u64 {
        self.holdings(rank, world).iter().map(|holding| holding.kept.len()).sum()
    }
}

impl LoadPlan {
    /// The bytes of weights and statistics that `rank` keeps all the time, without padding.
    #[must_use]
    pub fn kept_bytes(&self, rank: Rank) -> u64 {
        self.tensors
            .iter()
            .filter(|tensor| !self.streams(tensor))
            .map(|tensor| tensor.kept_bytes(rank, self.world))
            .sum()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::{Encoding, Input, Part};
    use super::*;
    use crate::format::GgmlType;
    use crate::quant::affine::{CodeBits, GroupAxis, MlxRule};
    use crate::quant::pack::GptqVersion;
    use crate::quant::{BlockSize, FourBitCode, Fp8Scales};
    use crate::types::{DType, Shape};

    fn tensor(shape: Shape, encoding: Encoding) -> TensorPlan {
        let input = Input::Stored { parts: Vec::new(), nested_offset: None };
        TensorPlan { fqn: "w".into(), shape, encoding, sharded: true, owner: None, reader: Rank(0), input }
    }

    fn mlx(bits: CodeBits) -> Encoding {
        Encoding::Mlx { rule: MlxRule::new(bits, 32).expect("known"), dtype: DType::BF16 }
    }

    fn encodings() -> impl Strategy<Value = Encoding> {
        let four_bit = |nested| {
            let block = BlockSize::new(64).expect("64 is allowed");
            Encoding::FourBit { code: FourBitCode::Nf4, block, nested, dtype: DType::BF16 }
        };
        prop_oneof![
            Just(Encoding::Plain { dtype: DType::BF16 }),
            Just(Encoding::Int8),
            Just(mlx(CodeBits::B4)),
            Just(mlx(CodeBits::B3)),
            Just(four_bit(false)),
            Just(four_bit(true)),
            Just(Encoding::Ggml { ggml_type: GgmlType::Q4_K }),
            Just(Encoding::Hqq { bits: CodeBits::B4, group: 64, axis: GroupAxis::Runs, dtype: DType::F16 }),
            Just(Encoding::Hqq { bits: CodeBits::B3, group: 64, axis: GroupAxis::Columns, dtype: DType::F16 }),
            Just(Encoding::Gptq {
                bits: CodeBits::B4,
                group: 64,
                version: GptqVersion::V1,
                indexed: true,
                dtype: DType::F16
            }),
            Just(Encoding::Awq { group: 64, dtype: DType::F16 }),
            Just(Encoding::Fp8 {
                scales: Fp8Scales::Block { rows: 128, columns: 128 },
                scale_dtype: DType::F32,
                dtype: DType::BF16
            }),
        ]
    }

    proptest! {
        /// PL-2: owned ranges are disjoint, in order and complete, and lie within the kept ones, which hold every block
        /// that the rank's elements need.
        #[test]
        fn pl_2_every_byte_has_one_owner(
            rows in 1_u64..400, row in 1_u64..700, world in 1_u32..17, encoding in encodings(),
        ) {
            let world = WorldSize::new(world).expect("not zero");
            // Rows of MLX are whole groups, those of GGUF and the packed formats whole blocks.
            let row = match encoding {
                Encoding::Mlx { .. } => row.next_multiple_of(32),
                Encoding::Plain { .. } | Encoding::Int8 | Encoding::FourBit { .. } => row,
                _ => row.next_multiple_of(256),
            };
            let tensor = tensor([rows, row].into(), encoding);
            for (index, component) in tensor.components().into_iter().enumerate() {
                if component.part == Part::NestedOffset {
                    continue;
                }
                let mut next = 0;
                for rank in world.ranks() {
                    let holding = &tensor.holdings(rank, world)[index];
                    if !holding.owned.is_empty() {
                        prop_assert_eq!(holding.owned.start(), next);
                        next = holding.owned.end();
                        prop_assert!(holding.kept.start() <= holding.owned.start());
                        prop_assert!(holding.owned.end() <= holding.kept.end());
                    }
                    if component.part == Part::Weight && !matches!(encoding, Encoding::FourBit { .. }) {
                        prop_assert_eq!(holding.kept, holding.owned);
                    }
                }
                prop_assert_eq!(next, component.bytes);
            }
        }
    }

    /// What happened: the elements of a row were counted without a look at the number of rows, and did not fit 64 bits.
    #[test]
    fn rows_that_are_too_long_to_count_are_kept_by_nobody() {
        let world = WorldSize::new(3).expect("not zero");
        let tensor = tensor([0, 1 << 40, 1 << 40].into(), Encoding::Plain { dtype: DType::F32 });
        for rank in world.ranks() {
            assert!(tensor.holdings(rank, world).iter().all(|holding| holding.kept.is_empty()));
        }
    }

    /// By hand: 10 rows over 4 ranks are cut at 2, 5, 7; at granule 16, 100 rows of 100 over 3 are cut at 32 and 64.
    #[test]
    fn cuts_by_hand() {
        let cuts = |tensor: &TensorPlan, world: u32| {
            let world = WorldSize::new(world).expect("not zero");
            let row = tensor.row_elements();
            world.ranks().map(|rank| tensor.elements_of(rank, world).end() / row).collect::<Vec<_>>()
        };
        assert_eq!(cuts(&tensor([10, 3].into(), Encoding::Plain { dtype: DType::F32 }), 4), [2, 5, 7, 10]);
        let block = BlockSize::new(64).expect("64 is allowed");
        let nf4 = Encoding::FourBit { code: FourBitCode::Nf4, block, nested: true, dtype: DType::BF16 };
        assert_eq!(cuts(&tensor([100, 100].into(), nf4), 3), [32, 64, 100]);
    }
}
