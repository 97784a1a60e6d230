//! A matrix of little-endian 32-bit words, each with several codes.
//!
//! Owns: the two directions in which GPTQ runs its streams of bits. Refuses to know: what the codes mean.

use crate::quant::QuantError;
use crate::quant::affine::CodeBits;
use crate::quant::error::expect_len;

/// Words of the stream of `codes` codes, filled up to a whole word (3 bits: to 32 codes in 3 words).
pub(super) fn words_of(bits: CodeBits, codes: usize) -> usize {
    let (per_unit, words) = if 32 % bits.count() == 0 { (32 / bits.count(), 1) } else { (32, bits.count()) };
    codes.div_ceil(per_unit).saturating_mul(words)
}

/// `rows * columns` words in bytes at any alignment.
#[derive(Clone, Copy, Debug)]
pub(super) struct Words<'a> {
    words: &'a [[u8; 4]],
    columns: usize,
}

impl<'a> Words<'a> {
    pub(super) fn new(what: &'static str, bytes: &'a [u8], rows: usize, columns: usize) -> Result<Self, QuantError> {
        expect_len(what, bytes.len(), rows.saturating_mul(columns).saturating_mul(4))?;
        Ok(Self { words: bytes.as_chunks().0, columns })
    }

    pub(super) const fn len(&self) -> usize {
        self.words.len()
    }

    /// A row of words.
    pub(super) fn row(&self, row: usize) -> &'a [[u8; 4]] {
        &self.words[row * self.columns..(row + 1) * self.columns]
    }

    /// Code `place` of the streams that run down columns `first ..`.
    pub(super) fn unpack_down(&self, bits: CodeBits, place: usize, first: usize, codes: &mut [u8]) {
        let (count, mask) = (bits.count(), bits.max_code());
        let (row, shift) = (place * count / 32, place * count % 32);
        let low = &self.row(row)[first..first + codes.len()];
        if shift + count <= 32 {
            for (code, word) in codes.iter_mut().zip(low) {
                *code = (u32::from_le_bytes(*word) >> shift).to_le_bytes()[0] & mask;
            }
        } else {
            let high = &self.row(row + 1)[first..first + codes.len()];
            for ((code, low), high) in codes.iter_mut().zip(low).zip(high) {
                let both = (u32::from_le_bytes(*low) >> shift) | (u32::from_le_bytes(*high) << (32 - shift));
                *code = both.to_le_bytes()[0] & mask;
            }
        }
    }

    /// Codes `first ..` of the stream that runs along a row.
    pub(super) fn unpack_along(&self, bits: CodeBits, row: usize, first: usize, codes: &mut [u8]) {
        let (count, mask) = (bits.count(), bits.max_code());
        let words = self.row(row);
        for (code, place) in codes.iter_mut().zip(first..) {
            let (index, shift) = (place * count / 32, place * count % 32);
            // The word after the last is needed by no code of the row; it only completes the pair.
            let high = words.get(index + 1).map_or(0, |word| u64::from(u32::from_le_bytes(*word)));
            let pair = u64::from(u32::from_le_bytes(words[index])) | (high << 32);
            *code = (pair >> shift).to_le_bytes()[0] & mask;
        }
    }
}

/// Packs rows of `columns` codes into streams along rows; the lengths fit.
pub(super) fn pack_rows(bits: CodeBits, columns: usize, codes: &[u8], packed: &mut [u8]) {
    packed.fill(0);
    let (count, mask) = (bits.count(), bits.max_code());
    let row_bytes = words_of(bits, columns) * 4;
    for (codes, bytes) in codes.chunks_exact(columns.max(1)).zip(packed.chunks_exact_mut(row_bytes.max(1))) {
        for (place, code) in codes.iter().enumerate() {
            let (index, shift) = (place * count / 8, place * count % 8);
            let [low, high] = (u16::from(code & mask) << shift).to_le_bytes();
            bytes[index] |= low;
            if shift + count > 8 {
                bytes[index + 1] |= high;
            }
        }
    }
}
