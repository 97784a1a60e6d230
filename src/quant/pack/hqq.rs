//! HQQ's packing: contiguous parts of the codes side by side in one word.
//!
//! Owns: `pack_*` and `unpack_*` of hqq 0.2.8 (`hqq/core/bitpack.py`). The matrix is `[groups, group]` for `axis=1` and
//! `[group, groups]` for `axis=0`; it is cut along dim 0 into parts, and the first part takes the highest bits:
//!
//! | bits | word | parts | shift of part `i` |
//! |---|---|---|---|
//! | 8, 6, 5 | u8 | 1 | 0 |
//! | 4, 2, 1 | u8 | 2, 4, 8 | `8 - bits * (i + 1)` |
//! | 3 | i32 | 10, the last filled up with zeros | `27 - 3 * i` |
//!
//! A part is contiguous, so words and codes of one part run in parallel. A range of the codes is thus found in at most as
//! many runs of words as there are parts, and a rank's range is not a range of the file: to shard a packed tensor, unpack the
//! range ([`HqqPacking::unpack`]) and keep it in a packing of its own.

use crate::quant::QuantError;
use crate::quant::affine::CodeBits;
use crate::quant::error::expect_len;

/// The packing of one matrix of codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HqqPacking {
    bits: CodeBits,
    /// Codes of the matrix.
    codes: usize,
    /// Codes of one part, as many as words.
    part: usize,
}

impl HqqPacking {
    /// The packing of a matrix of `rows` rows and `columns` columns.
    ///
    /// # Errors
    /// [`QuantError::Parts`] when the rows are no whole number of parts (3 bits: any number is), [`QuantError::Range`]
    /// when sizes overflow.
    pub fn new(bits: CodeBits, rows: usize, columns: usize) -> Result<Self, QuantError> {
        let parts = Self::parts(bits);
        if bits != CodeBits::B3 && !rows.is_multiple_of(parts) {
            return Err(QuantError::Parts { what: "rows", expected: parts, found: rows });
        }
        let overflow =
            QuantError::Range { what: "codes", start: 0, count: rows, bound: usize::MAX / columns.max(1) / 4 };
        // Words have up to 4 bytes.
        let codes = rows.checked_mul(columns).filter(|codes| *codes <= usize::MAX / 4).ok_or(overflow)?;
        Ok(Self { bits, codes, part: rows.div_ceil(parts) * columns })
    }

    /// The number of codes.
    #[must_use]
    pub const fn codes(&self) -> usize {
        self.codes
    }

    /// The number of packed bytes.
    #[must_use]
    pub fn packed_bytes(&self) -> usize {
        self.part * Self::word_bytes(self.bits)
    }

    /// Packs all codes; bits above a code's width are dropped.
    ///
    /// # Errors
    /// [`QuantError::Length`] when a slice does not fit.
    pub fn pack(&self, codes: &[u8], packed: &mut [u8]) -> Result<(), QuantError> {
        expect_len("codes", codes.len(), self.codes)?;
        expect_len("packed bytes", packed.len(), self.packed_bytes())?;
        packed.fill(0);
        if codes.is_empty() {
            return Ok(());
        }
        let mask = self.bits.max_code();
        for (part, codes) in codes.chunks(self.part).enumerate() {
            let shift = self.shift(part);
            if self.bits == CodeBits::B3 {
                for (word, code) in packed.as_chunks_mut::<4>().0.iter_mut().zip(codes) {
                    *word = (u32::from_le_bytes(*word) | (u32::from(code & mask) << shift)).to_le_bytes();
                }
            } else {
                packed.iter_mut().zip(codes).for_each(|(word, code)| *word |= (code & mask) << shift);
            }
        }
        Ok(())
    }

    /// The codes `first ..`, one for each element of `codes`, from all packed bytes.
    ///
    /// # Errors
    /// [`QuantError::Length`] when `packed` does not fit, [`QuantError::Range`] when codes lie outside.
    pub fn unpack(&self, packed: &[u8], first: usize, mut codes: &mut [u8]) -> Result<(), QuantError> {
        expect_len("packed bytes", packed.len(), self.packed_bytes())?;
        if first.checked_add(codes.len()).is_none_or(|end| end > self.codes) {
            return Err(QuantError::Range { what: "codes", start: first, count: codes.len(), bound: self.codes });
        }
        let mask = self.bits.max_code();
        let mut next = first;
        while !codes.is_empty() {
            let (part, start) = (next / self.part, next % self.part);
            let (run, rest) = codes.split_at_mut(codes.len().min(self.part - start));
            let shift = self.shift(part);
            if self.bits == CodeBits::B3 {
                for (code, word) in run.iter_mut().zip(&packed.as_chunks::<4>().0[start..]) {
                    *code = (u32::from_le_bytes(*word) >> shift).to_le_bytes()[0] & mask;
                }
            } else {
                run.iter_mut().zip(&packed[start..]).for_each(|(code, word)| *code = (word >> shift) & mask);
            }
            (next, codes) = (next + run.len(), rest);
        }
        Ok(())
    }

    /// Bytes of a word: 4 (i32) for codes of 3 bits, else 1.
    #[must_use]
    pub fn word_bytes(bits: CodeBits) -> usize {
        if bits == CodeBits::B3 { 4 } else { 1 }
    }

    /// Codes in a word.
    #[must_use]
    pub const fn parts(bits: CodeBits) -> usize {
        match bits.get() {
            4 => 2,
            3 => 10,
            2 => 4,
            1 => 8,
            _ => 1,
        }
    }

    /// How far the codes of a part are shifted to the left.
    fn shift(&self, part: usize) -> usize {
        match self.bits.get() {
            3 => 27 - 3 * part,
            1 | 2 | 4 => 8 - self.bits.count() * (part + 1),
            _ => 0,
        }
    }
}
