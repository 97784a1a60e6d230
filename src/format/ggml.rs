//! GGUF's block types: their sizes, and the order of rows that llama.cpp stores.

use serde::{Deserialize, Serialize};

use super::FormatError;

/// How a tensor of a GGUF file is encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GgmlTensor {
    /// The type of its blocks.
    pub ggml_type: GgmlType,
    /// The order of its rows.
    pub row_order: RowOrder,
}

impl GgmlTensor {
    /// The row of the file that holds row `row` of the Hugging Face tensor.
    #[must_use]
    pub const fn source_row(&self, row: u64) -> u64 {
        self.row_order.source_row(row)
    }
}

/// The order of rows in the file, relative to Hugging Face's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RowOrder {
    /// The same.
    Same,
    /// Within each head, llama.cpp interleaves the two halves that rotary embedding pairs: rows 0, h/2, 1, h/2+1 …
    InterleavedHalves {
        /// Rows of one head; even and at least 2.
        head_rows: u64,
    },
}

impl RowOrder {
    /// The row of the file that holds row `row` of the Hugging Face tensor.
    #[must_use]
    pub const fn source_row(self, row: u64) -> u64 {
        match self {
            Self::InterleavedHalves { head_rows } if head_rows >= 2 => {
                let (head, within, half) = (row / head_rows, row % head_rows, head_rows / 2);
                head * head_rows + (within % half) * 2 + within / half
            }
            _ => row,
        }
    }
}

/// An element or block type of GGUF that this build decodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the names are the field's own")]
#[expect(non_camel_case_types, reason = "the names are the field's own")]
pub enum GgmlType {
    F32,
    F16,
    BF16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2_K,
    Q3_K,
    Q4_K,
    Q5_K,
    Q6_K,
    Q8_K,
}

impl GgmlType {
    /// All types that this build decodes.
    pub const ALL: [Self; 14] = [
        Self::F32,
        Self::F16,
        Self::BF16,
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5_0,
        Self::Q5_1,
        Self::Q8_0,
        Self::Q2_K,
        Self::Q3_K,
        Self::Q4_K,
        Self::Q5_K,
        Self::Q6_K,
        Self::Q8_K,
    ];

    /// The type with this number in a GGUF file.
    #[must_use]
    pub fn from_id(id: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|ggml_type| ggml_type.id() == id)
    }

    /// Its number in a GGUF file (ggml.h, `enum ggml_type`).
    #[must_use]
    pub const fn id(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::BF16 => 30,
            Self::Q4_0 => 2,
            Self::Q4_1 => 3,
            Self::Q5_0 => 6,
            Self::Q5_1 => 7,
            Self::Q8_0 => 8,
            Self::Q2_K => 10,
            Self::Q3_K => 11,
            Self::Q4_K => 12,
            Self::Q5_K => 13,
            Self::Q6_K => 14,
            Self::Q8_K => 15,
        }
    }

    /// Its name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::BF16 => "BF16",
            Self::Q4_0 => "Q4_0",
            Self::Q4_1 => "Q4_1",
            Self::Q5_0 => "Q5_0",
            Self::Q5_1 => "Q5_1",
            Self::Q8_0 => "Q8_0",
            Self::Q2_K => "Q2_K",
            Self::Q3_K => "Q3_K",
            Self::Q4_K => "Q4_K",
            Self::Q5_K => "Q5_K",
            Self::Q6_K => "Q6_K",
            Self::Q8_K => "Q8_K",
        }
    }

    /// Elements of one block.
    #[must_use]
    pub const fn block_elements(self) -> u64 {
        match self {
            Self::F32 | Self::F16 | Self::BF16 => 1,
            Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 | Self::Q8_0 => 32,
            Self::Q2_K | Self::Q3_K | Self::Q4_K | Self::Q5_K | Self::Q6_K | Self::Q8_K => 256,
        }
    }

    /// Bytes of one block.
    #[must_use]
    pub const fn block_bytes(self) -> u64 {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
            Self::Q4_0 => 18,
            Self::Q4_1 => 20,
            Self::Q5_0 => 22,
            Self::Q5_1 => 24,
            Self::Q8_0 => 34,
            Self::Q2_K => 84,
            Self::Q3_K => 110,
            Self::Q4_K => 144,
            Self::Q5_K => 176,
            Self::Q6_K => 210,
            Self::Q8_K => 292,
        }
    }

    /// Bytes of `elements` elements, which must be whole blocks.
    ///
    /// # Errors
    /// [`FormatError::Blocks`] when they are not, or when the bytes do not fit 64 bits.
    pub fn bytes_for(self, elements: u64) -> Result<u64, FormatError> {
        let whole = elements.is_multiple_of(self.block_elements());
        let bytes = (elements / self.block_elements()).checked_mul(self.block_bytes());
        bytes.filter(|_| whole).ok_or_else(|| FormatError::Blocks {
            ggml_type: self.name(),
            what: format!("{elements} elements are not whole blocks of {}", self.block_elements()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// By hand: llama.cpp reshapes [heads, 2, half] and swaps the inner axes, so for 4 rows a head the file holds rows
    /// 0, 2, 1, 3 of the original, and the original's rows 0..4 stand at 0, 2, 1, 3; for 6 rows at 0, 2, 4, 1, 3, 5.
    #[test]
    fn interleaved_rows_by_hand() {
        let rows = |head_rows: u64, count: u64| {
            (0..count).map(|row| RowOrder::InterleavedHalves { head_rows }.source_row(row)).collect::<Vec<_>>()
        };
        assert_eq!(rows(4, 8), [0, 2, 1, 3, 4, 6, 5, 7]);
        assert_eq!(rows(6, 6), [0, 2, 4, 1, 3, 5]);
    }

    #[test]
    fn sizes_need_whole_blocks() {
        assert_eq!(GgmlType::Q4_1.bytes_for(64).expect("two blocks"), 40);
        assert_eq!(GgmlType::Q6_K.bytes_for(512).expect("two blocks"), 420);
        assert!(GgmlType::Q4_K.bytes_for(64).is_err());
        assert!(GgmlType::F32.bytes_for(u64::MAX).is_err());
        assert_eq!(GgmlType::from_id(12), Some(GgmlType::Q4_K));
        assert_eq!(GgmlType::from_id(4), None, "Q4_2 was removed from ggml");
    }
}
