//! The width of a code. Owns the list of widths that a format has; knows no packing.

use serde::{Deserialize, Serialize};

use crate::quant::QuantError;

/// Bits of one code: 1, 2, 3, 4, 5, 6 or 8.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "u8", try_from = "u8")]
pub struct CodeBits(u8);

impl CodeBits {
    /// One bit.
    pub const B1: Self = Self(1);
    /// Two bits.
    pub const B2: Self = Self(2);
    /// Three bits.
    pub const B3: Self = Self(3);
    /// Four bits.
    pub const B4: Self = Self(4);
    /// Five bits.
    pub const B5: Self = Self(5);
    /// Six bits.
    pub const B6: Self = Self(6);
    /// Eight bits.
    pub const B8: Self = Self(8);

    /// Codes of `bits` bits.
    ///
    /// # Errors
    /// [`QuantError::Bits`] unless `bits` is 1, 2, 3, 4, 5, 6 or 8.
    pub const fn new(bits: u8) -> Result<Self, QuantError> {
        match bits {
            1..=6 | 8 => Ok(Self(bits)),
            found => Err(QuantError::Bits { format: "a code", expected: "1 to 6 or 8", found }),
        }
    }

    /// The number of bits.
    #[must_use]
    pub const fn get(self) -> u8 {
        self.0
    }

    /// The number of bits, for indexing and shifting.
    #[must_use]
    pub const fn count(self) -> usize {
        self.0 as usize
    }

    /// The greatest code, `2^bits - 1`.
    #[must_use]
    pub const fn max_code(self) -> u8 {
        u8::MAX >> (8 - self.0)
    }
}

impl From<CodeBits> for u8 {
    fn from(bits: CodeBits) -> Self {
        bits.0
    }
}

impl TryFrom<u8> for CodeBits {
    type Error = QuantError;

    fn try_from(bits: u8) -> Result<Self, QuantError> {
        Self::new(bits)
    }
}
