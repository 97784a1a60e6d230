//! A little-endian stream of bits: code `i` is bits `i * bits ..` of the bytes, the lowest first. MLX's rows.
//!
//! Owns: eight codes to `bits` bytes and back. Refuses to know: rows. MLX packs each row of a matrix into u32 words; a row is
//! whole groups of 32 or more, so it ends at a word, and the stream of a matrix is that of its rows. The bytes of
//! little-endian words are the same stream. Any cut at a multiple of 32 codes cuts words, at 8 codes bytes.

use crate::quant::QuantError;
use crate::quant::affine::CodeBits;
use crate::quant::error::expect_len;

/// Codes that fill whole bytes at any width.
const CODES: usize = 8;

/// The number of bytes of `codes` codes.
///
/// # Errors
/// [`QuantError::Parts`] unless `codes` is a multiple of 8.
pub fn bit_stream_bytes(bits: CodeBits, codes: usize) -> Result<usize, QuantError> {
    if codes.is_multiple_of(CODES) {
        Ok(codes / CODES * bits.count())
    } else {
        Err(QuantError::Parts { what: "codes", expected: CODES, found: codes })
    }
}

/// Packs codes; bits above a code's width are dropped.
///
/// # Errors
/// [`QuantError::Parts`] unless there is a multiple of 8 codes, [`QuantError::Length`] when `packed` does not fit.
pub fn pack_bit_stream(bits: CodeBits, codes: &[u8], packed: &mut [u8]) -> Result<(), QuantError> {
    expect_len("packed bytes", packed.len(), bit_stream_bytes(bits, codes.len())?)?;
    let (width, mask) = (bits.count(), bits.max_code());
    for (bytes, codes) in packed.chunks_exact_mut(width).zip(codes.as_chunks::<CODES>().0) {
        let word = codes.iter().rev().fold(0_u64, |word, code| (word << width) | u64::from(code & mask));
        bytes.copy_from_slice(&word.to_le_bytes()[..width]);
    }
    Ok(())
}

/// Unpacks as many codes as `codes` has elements.
///
/// # Errors
/// [`QuantError::Parts`] unless that is a multiple of 8, [`QuantError::Length`] when `packed` does not fit.
pub fn unpack_bit_stream(bits: CodeBits, packed: &[u8], codes: &mut [u8]) -> Result<(), QuantError> {
    expect_len("packed bytes", packed.len(), bit_stream_bytes(bits, codes.len())?)?;
    match bits.get() {
        8 => codes.copy_from_slice(packed),
        4 => {
            for (pair, byte) in codes.as_chunks_mut::<2>().0.iter_mut().zip(packed) {
                *pair = [byte & 15, byte >> 4];
            }
        }
        _ => unpack_any(bits, packed, codes),
    }
    Ok(())
}

fn unpack_any(bits: CodeBits, packed: &[u8], codes: &mut [u8]) {
    let (width, mask) = (bits.count(), bits.max_code());
    for (bytes, codes) in packed.chunks_exact(width).zip(codes.as_chunks_mut::<CODES>().0) {
        let mut word = [0; 8];
        word[..width].copy_from_slice(bytes);
        let word = u64::from_le_bytes(word);
        for (place, code) in codes.iter_mut().enumerate() {
            *code = (word >> (place * width)).to_le_bytes()[0] & mask;
        }
    }
}
