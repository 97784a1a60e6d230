//! The inner loops with AVX2 and F16C, 8 to 32 values at a time.
//!
//! The rank of a value is counted, one compare and one subtraction for each of the 15 thresholds: with 8-lane permutations
//! a binary search is no faster. Nothing is fused: a product and a sum round twice, as the reference does.
#![expect(unsafe_code, reason = "unaligned loads and stores of whole registers")]

use std::arch::x86_64::*;

use half::bf16;

use super::scalar;
use crate::quant::four_bit::MAX_BLOCK;
use crate::quant::int8::INVERSE_127;
use crate::quant::source::WeightFloat;
use crate::quant::{FourBit, Source};

/// Element types as constant parameters.
const F16: u8 = 0;
const BF16: u8 = 1;
const F32: u8 = 2;

/// Whole blocks; the same as [`scalar::quantize_4bit`].
#[target_feature(enable = "avx2,f16c")]
pub(super) fn quantize_4bit(format: FourBit, source: Source<'_>, packed: &mut [u8], absmax: &mut [f32]) -> u64 {
    match source.float() {
        WeightFloat::F16 => quantize_blocks::<F16>(format, source, packed, absmax),
        WeightFloat::Bf16 => quantize_blocks::<BF16>(format, source, packed, absmax),
        WeightFloat::F32 => quantize_blocks::<F32>(format, source, packed, absmax),
    }
}

#[target_feature(enable = "avx2,f16c")]
fn quantize_blocks<const FLOAT: u8>(format: FourBit, source: Source<'_>, packed: &mut [u8], absmax: &mut [f32]) -> u64 {
    let thresholds = format.code.thresholds().map(|threshold| _mm256_set1_ps(threshold));
    let order = load_bytes(format.code.order());
    let block = format.block.values();
    let batch = MAX_BLOCK / block;
    let mut not_finite = 0;
    let batches = source.chunks(block * batch).zip(packed.chunks_mut(block / 2 * batch)).zip(absmax.chunks_mut(batch));
    for ((source, packed), absmax) in batches {
        // All statistics first: a maximum over lanes takes long to come, and the next need not wait for it.
        for (source, absmax) in source.chunks(block).zip(absmax.iter_mut()) {
            *absmax = f32::from_bits(magnitude_bits::<FLOAT>(source.bytes()));
        }
        for ((source, packed), absmax) in source.chunks(block).zip(packed.chunks_exact_mut(block / 2)).zip(absmax) {
            if absmax.is_finite() {
                let inverse = _mm256_set1_ps(scalar::reciprocal(*absmax));
                quantize_block::<FLOAT>(&thresholds, order, source, inverse, packed);
            } else {
                not_finite += scalar::quantize_4bit(format, source, packed, std::slice::from_mut(absmax));
            }
        }
    }
    not_finite
}

/// One block of finite values.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn quantize_block<const FLOAT: u8>(
    thresholds: &[__m256; 15],
    order: __m128i,
    source: Source<'_>,
    inverse: __m256,
    packed: &mut [u8],
) {
    let groups = source.bytes().chunks_exact(32 * size(FLOAT));
    for (group, packed) in groups.zip(packed.as_chunks_mut::<16>().0) {
        let (first, second) = group.split_at(16 * size(FLOAT));
        let (even, odd) = load_pairs::<FLOAT>(first);
        let (even_later, odd_later) = load_pairs::<FLOAT>(second);
        let high = ranks(thresholds, inverse, even, even_later);
        let low = ranks(thresholds, inverse, odd, odd_later);
        let (high, low) = (_mm_shuffle_epi8(order, high), _mm_shuffle_epi8(order, low));
        // A code has four bits, so the shift moves none into the neighbouring byte.
        store_bytes(packed, _mm_or_si128(_mm_slli_epi16::<4>(high), low));
    }
}

/// How many thresholds are strictly below each of 16 values, as bytes.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn ranks(thresholds: &[__m256; 15], inverse: __m256, first: __m256, second: __m256) -> __m128i {
    let (first, second) = (_mm256_mul_ps(first, inverse), _mm256_mul_ps(second, inverse));
    let mut first_rank = _mm256_setzero_si256();
    let mut second_rank = _mm256_setzero_si256();
    for threshold in thresholds {
        let above = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_LT_OQ>(*threshold, first));
        first_rank = _mm256_sub_epi32(first_rank, above);
        let above = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_LT_OQ>(*threshold, second));
        second_rank = _mm256_sub_epi32(second_rank, above);
    }
    narrow(first_rank, second_rank)
}

/// 16 numbers of 32 bits, each under 256, as bytes in their order.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn narrow(first: __m256i, second: __m256i) -> __m128i {
    let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packus_epi32(first, second));
    _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256::<1>(words))
}

/// The bits of the largest magnitude, as f32. The number of bytes is a multiple of 32.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn magnitude_bits<const FLOAT: u8>(bytes: &[u8]) -> u32 {
    let mut largest = _mm256_setzero_si256();
    for vector in bytes.as_chunks::<32>().0 {
        let vector = load_vector(vector);
        largest = if FLOAT == F32 {
            _mm256_max_epu32(largest, _mm256_and_si256(vector, _mm256_set1_epi32(0x7fff_ffff)))
        } else {
            _mm256_max_epu16(largest, _mm256_and_si256(vector, _mm256_set1_epi16(0x7fff)))
        };
    }
    if FLOAT == F32 {
        return largest_lane(largest);
    }
    let largest = _mm_max_epu16(_mm256_castsi256_si128(largest), _mm256_extracti128_si256::<1>(largest));
    // There is a horizontal minimum of 16-bit words only: take that of the complement.
    let ones = _mm_set1_epi16(-1);
    let largest = _mm_xor_si128(_mm_minpos_epu16(_mm_xor_si128(largest, ones)), ones);
    let word = _mm_cvtsi128_si32(largest).cast_unsigned() & 0xffff;
    if FLOAT == BF16 {
        word << 16
    } else {
        _mm_cvtsi128_si32(_mm_castps_si128(_mm_cvtph_ps(_mm_cvtsi32_si128(word.cast_signed())))).cast_unsigned()
    }
}

/// The largest of eight unsigned numbers.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn largest_lane(lanes: __m256i) -> u32 {
    let lanes = _mm_max_epu32(_mm256_castsi256_si128(lanes), _mm256_extracti128_si256::<1>(lanes));
    let lanes = _mm_max_epu32(lanes, _mm_shuffle_epi32::<0b01_00_11_10>(lanes));
    _mm_cvtsi128_si32(_mm_max_epu32(lanes, _mm_shuffle_epi32::<0b10_11_00_01>(lanes))).cast_unsigned()
}

/// 16 elements as f32: those of even and those of odd index.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn load_pairs<const FLOAT: u8>(group: &[u8]) -> (__m256, __m256) {
    if FLOAT == BF16 {
        let words = load_vector(&group.as_chunks::<32>().0[0]);
        let odd = _mm256_and_si256(words, _mm256_set1_epi32(0xffff_0000_u32.cast_signed()));
        return (_mm256_castsi256_ps(_mm256_slli_epi32::<16>(words)), _mm256_castsi256_ps(odd));
    }
    let (first, second) = group.split_at(8 * size(FLOAT));
    let (first, second) = (load8::<FLOAT>(first), load8::<FLOAT>(second));
    let in_order =
        |pairs: __m256| -> __m256 { _mm256_castpd_ps(_mm256_permute4x64_pd::<0b11_01_10_00>(_mm256_castps_pd(pairs))) };
    (
        in_order(_mm256_shuffle_ps::<0b10_00_10_00>(first, second)),
        in_order(_mm256_shuffle_ps::<0b11_01_11_01>(first, second)),
    )
}

/// Any number of values; the same as [`scalar::dequantize_4bit`].
#[target_feature(enable = "avx2,f16c")]
pub(super) fn dequantize_4bit(format: FourBit, packed: &[u8], absmax: &[f32], out: &mut [f32]) {
    let block = format.block.values();
    for ((out, packed), absmax) in out.chunks_mut(block).zip(packed.chunks(block / 2)).zip(absmax) {
        let table = scalar::scaled(format.code, *absmax);
        // SAFETY: the table is 16 readable f32, two registers; the loads need no alignment.
        let (lower, upper) = unsafe { (_mm256_loadu_ps(table.as_ptr()), _mm256_loadu_ps(table.as_ptr().add(8))) };
        let look_up = |codes: __m256i| -> __m256 {
            // The permutation reads the low three bits of an index; the fourth, moved to the sign, chooses the half.
            let half = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(codes));
            _mm256_blendv_ps(_mm256_permutevar8x32_ps(lower, codes), _mm256_permutevar8x32_ps(upper, codes), half)
        };
        let (groups, out_rest) = out.as_chunks_mut::<16>();
        let (bytes, packed_rest) = packed.split_at(groups.len() * 8);
        for (out, bytes) in groups.iter_mut().zip(bytes.as_chunks::<8>().0) {
            // SAFETY: 8 readable bytes; the load needs no alignment.
            let pairs = _mm256_cvtepu8_epi32(unsafe { _mm_loadl_epi64(bytes.as_ptr().cast()) });
            let high = look_up(_mm256_srli_epi32::<4>(pairs));
            let low = look_up(pairs);
            let (even, odd) = (_mm256_unpacklo_ps(high, low), _mm256_unpackhi_ps(high, low));
            // SAFETY: `out` is 16 writable f32, two registers; the stores need no alignment.
            unsafe {
                _mm256_storeu_ps(out.as_mut_ptr(), _mm256_permute2f128_ps::<0x20>(even, odd));
                _mm256_storeu_ps(out.as_mut_ptr().add(8), _mm256_permute2f128_ps::<0x31>(even, odd));
            }
        }
        if !out_rest.is_empty() {
            scalar::unpack(&table, packed_rest, out_rest);
        }
    }
}

/// Any number of values; the same as [`scalar::dequantize_4bit_bf16`]. The two bytes of a value are looked up apart.
#[target_feature(enable = "avx2,f16c")]
pub(super) fn dequantize_4bit_bf16(format: FourBit, packed: &[u8], absmax: &[f32], out: &mut [bf16]) {
    let block = format.block.values();
    for ((out, packed), absmax) in out.chunks_mut(block).zip(packed.chunks(block / 2)).zip(absmax) {
        let table = scalar::scaled(format.code, *absmax);
        // SAFETY: the table is 16 readable f32, two registers; the loads need no alignment.
        let (lower, upper) = unsafe { (_mm256_loadu_ps(table.as_ptr()), _mm256_loadu_ps(table.as_ptr().add(8))) };
        let (lower, upper) = (round_to_bf16(lower), round_to_bf16(upper));
        let byte = _mm_set1_epi16(0xff);
        let low_bytes = _mm_packus_epi16(_mm_and_si128(lower, byte), _mm_and_si128(upper, byte));
        let high_bytes = _mm_packus_epi16(_mm_srli_epi16::<8>(lower), _mm_srli_epi16::<8>(upper));
        let (low_bytes, high_bytes) = (_mm256_broadcastsi128_si256(low_bytes), _mm256_broadcastsi128_si256(high_bytes));
        let (groups, out_rest) = out.as_chunks_mut::<32>();
        let (bytes, packed_rest) = packed.split_at(groups.len() * 16);
        for (out, bytes) in groups.iter_mut().zip(bytes.as_chunks::<16>().0) {
            let pairs = load_bytes(bytes);
            let nibble = _mm_set1_epi8(15);
            let high = _mm_and_si128(_mm_srli_epi16::<4>(pairs), nibble);
            let low = _mm_and_si128(pairs, nibble);
            let codes = _mm256_set_m128i(_mm_unpackhi_epi8(high, low), _mm_unpacklo_epi8(high, low));
            let low = _mm256_shuffle_epi8(low_bytes, codes);
            let high = _mm256_shuffle_epi8(high_bytes, codes);
            let (even, odd) = (_mm256_unpacklo_epi8(low, high), _mm256_unpackhi_epi8(low, high));
            // SAFETY: `out` is 32 writable bf16 of two bytes, two registers; the stores need no alignment.
            unsafe {
                let out: *mut __m256i = out.as_mut_ptr().cast();
                _mm256_storeu_si256(out, _mm256_permute2x128_si256::<0x20>(even, odd));
                _mm256_storeu_si256(out.add(1), _mm256_permute2x128_si256::<0x31>(even, odd));
            }
        }
        if !out_rest.is_empty() {
            scalar::unpack(&table.map(bf16::from_f32), packed_rest, out_rest);
        }
    }
}

/// One row; the same as [`scalar::quantize_int8`].
#[target_feature(enable = "avx2,f16c")]
pub(super) fn quantize_int8(row: Source<'_>, q: &mut [u8], scb: &mut f32) -> u64 {
    match row.float() {
        WeightFloat::F16 => quantize_int8_row::<F16>(row, q, scb),
        WeightFloat::Bf16 => quantize_int8_row::<BF16>(row, q, scb),
        WeightFloat::F32 => quantize_int8_row::<F32>(row, q, scb),
    }
}

#[target_feature(enable = "avx2,f16c")]
fn quantize_int8_row<const FLOAT: u8>(row: Source<'_>, q: &mut [u8], scb: &mut f32) -> u64 {
    // What does not fill 16 lanes is read as a row of its own, completed with zeros, which change no maximum.
    let full = row.len() / 16 * 16;
    let (body, tail) = row.split_at(full);
    let mut last = [0_u8; 64];
    last[..tail.bytes().len()].copy_from_slice(tail.bytes());
    let last = &last[..16 * size(FLOAT)];
    let bits = magnitude_bits::<FLOAT>(body.bytes()).max(magnitude_bits::<FLOAT>(last));
    // Rounding is monotone: the largest magnitude as f16 is the largest of the values as f16.
    let absmax = _mm256_cvtss_f32(as_f16::<FLOAT>(_mm256_set1_ps(f32::from_bits(bits))));
    if !absmax.is_finite() || absmax == 0.0 {
        return scalar::quantize_int8(row, q, scb);
    }
    *scb = absmax;
    let scale = _mm256_set1_ps(scalar::int8_scale(absmax));
    let (q, q_tail) = q.split_at_mut(full);
    for (bytes, q) in body.bytes().chunks_exact(16 * size(FLOAT)).zip(q.as_chunks_mut::<16>().0) {
        store_bytes(q, int8_codes::<FLOAT>(bytes, scale));
    }
    let mut last_q = [0_u8; 16];
    store_bytes(&mut last_q, int8_codes::<FLOAT>(last, scale));
    q_tail.copy_from_slice(&last_q[..q_tail.len()]);
    0
}

/// 16 codes; every product is within 127 of 0.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn int8_codes<const FLOAT: u8>(bytes: &[u8], scale: __m256) -> __m128i {
    let (first, second) = bytes.split_at(8 * size(FLOAT));
    let code = |values: __m256| -> __m256i { _mm256_cvtps_epi32(_mm256_mul_ps(as_f16::<FLOAT>(values), scale)) };
    let words = _mm256_packs_epi32(code(load8::<FLOAT>(first)), code(load8::<FLOAT>(second)));
    let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(words);
    _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256::<1>(words))
}

/// Rounded to f16; values of that type are already.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn as_f16<const FLOAT: u8>(values: __m256) -> __m256 {
    if FLOAT == F16 { values } else { _mm256_cvtph_ps(_mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(values)) }
}

/// One row; the same as [`scalar::dequantize_int8`].
#[target_feature(enable = "avx2,f16c")]
pub(super) fn dequantize_int8(q: &[u8], scb: f32, out: &mut [f32]) {
    let (groups, rest) = out.as_chunks_mut::<8>();
    let (codes, codes_rest) = q.split_at(groups.len() * 8);
    for (out, codes) in groups.iter_mut().zip(codes.as_chunks::<8>().0) {
        // SAFETY: 8 readable bytes; the load needs no alignment.
        let codes = _mm256_cvtepi8_epi32(unsafe { _mm_loadl_epi64(codes.as_ptr().cast()) });
        let product = _mm256_mul_ps(_mm256_cvtepi32_ps(codes), _mm256_set1_ps(scb));
        // SAFETY: 8 writable f32; the store needs no alignment.
        unsafe { _mm256_storeu_ps(out.as_mut_ptr(), _mm256_mul_ps(product, _mm256_set1_ps(INVERSE_127))) };
    }
    scalar::dequantize_int8(codes_rest, scb, rest);
}

/// Between two different types; the same as [`scalar::convert`].
#[target_feature(enable = "avx2,f16c")]
pub(super) fn convert(source: Source<'_>, to: WeightFloat, out: &mut [u8]) {
    match (source.float(), to) {
        (WeightFloat::F16, WeightFloat::Bf16) => convert_from_to::<F16, BF16>(source, to, out),
        (WeightFloat::F16, _) => convert_from_to::<F16, F32>(source, to, out),
        (WeightFloat::Bf16, WeightFloat::F16) => convert_from_to::<BF16, F16>(source, to, out),
        (WeightFloat::Bf16, _) => convert_from_to::<BF16, F32>(source, to, out),
        (WeightFloat::F32, WeightFloat::F16) => convert_from_to::<F32, F16>(source, to, out),
        (WeightFloat::F32, _) => convert_from_to::<F32, BF16>(source, to, out),
    }
}

#[target_feature(enable = "avx2,f16c")]
fn convert_from_to<const FROM: u8, const TO: u8>(source: Source<'_>, to: WeightFloat, out: &mut [u8]) {
    let full = source.len() / 8 * 8;
    let (body, tail) = source.split_at(full);
    let (out, out_tail) = out.split_at_mut(full * size(TO));
    for (bytes, out) in body.bytes().chunks_exact(8 * size(FROM)).zip(out.chunks_exact_mut(8 * size(TO))) {
        store8::<TO>(out, load8::<FROM>(bytes));
    }
    scalar::convert(tail, to, out_tail);
}

const fn size(float: u8) -> usize {
    if float == F32 { 4 } else { 2 }
}

/// 8 elements as f32; `bytes` holds at least as many.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn load8<const FLOAT: u8>(bytes: &[u8]) -> __m256 {
    if FLOAT == F32 {
        return _mm256_castsi256_ps(load_vector(&bytes.as_chunks::<32>().0[0]));
    }
    let words = load_bytes(&bytes.as_chunks::<16>().0[0]);
    if FLOAT == F16 {
        _mm256_cvtph_ps(words)
    } else {
        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(words)))
    }
}

/// Rounds 8 values; `out` has room for at least as many.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn store8<const FLOAT: u8>(out: &mut [u8], values: __m256) {
    if FLOAT == F32 {
        let out = &mut out.as_chunks_mut::<32>().0[0];
        // SAFETY: 32 writable bytes; the store needs no alignment.
        unsafe { _mm256_storeu_ps(out.as_mut_ptr().cast(), values) };
        return;
    }
    let words = if FLOAT == F16 { _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(values) } else { round_to_bf16(values) };
    store_bytes(&mut out.as_chunks_mut::<16>().0[0], words);
}

/// Rounds 8 values to nearest even, a NaN to a quiet one.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn round_to_bf16(values: __m256) -> __m128i {
    let bits = _mm256_castps_si256(values);
    let last = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
    let rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), last);
    let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x0040_0000));
    let is_nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(values, values));
    let words = _mm256_srli_epi32::<16>(_mm256_blendv_epi8(rounded, quiet, is_nan));
    let words = _mm256_permute4x64_epi64::<0b10_00>(_mm256_packus_epi32(words, words));
    _mm256_castsi256_si128(words)
}

#[inline]
#[target_feature(enable = "avx2,f16c")]
fn load_vector(bytes: &[u8; 32]) -> __m256i {
    // SAFETY: 32 readable bytes; the load needs no alignment.
    unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2,f16c")]
fn load_bytes(bytes: &[u8; 16]) -> __m128i {
    // SAFETY: 16 readable bytes; the load needs no alignment.
    unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2,f16c")]
fn store_bytes(out: &mut [u8; 16], bytes: __m128i) {
    // SAFETY: 16 writable bytes; the store needs no alignment.
    unsafe { _mm_storeu_si128(out.as_mut_ptr().cast(), bytes) };
}
