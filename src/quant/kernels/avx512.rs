//! NF4 and FP4 with AVX-512 (F, BW, DQ, VL), 32 values at a time.
//!
//! Even and odd elements stay in two registers, so that the codes of a pair meet in one 32-bit lane. The rank of a value
//! is found by a binary search of four compares, the thresholds of the last two steps by a permutation of one register.
#![expect(unsafe_code, reason = "unaligned loads and stores of whole registers")]

use std::arch::x86_64::*;

use super::scalar;
use crate::quant::four_bit::{FourBitCode, MAX_BLOCK};
use crate::quant::source::WeightFloat;
use crate::quant::{FourBit, Source};

/// Element types and codes as constant parameters.
const F16: u8 = 0;
const BF16: u8 = 1;
const F32: u8 = 2;
const NF4: bool = false;
const FP4: bool = true;

/// Whole blocks; the same as [`scalar::quantize_4bit`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) fn quantize_4bit(format: FourBit, source: Source<'_>, packed: &mut [u8], absmax: &mut [f32]) -> u64 {
    match (source.float(), format.code) {
        (WeightFloat::F16, FourBitCode::Nf4) => quantize_blocks::<F16, NF4>(format, source, packed, absmax),
        (WeightFloat::F16, FourBitCode::Fp4) => quantize_blocks::<F16, FP4>(format, source, packed, absmax),
        (WeightFloat::Bf16, FourBitCode::Nf4) => quantize_blocks::<BF16, NF4>(format, source, packed, absmax),
        (WeightFloat::Bf16, FourBitCode::Fp4) => quantize_blocks::<BF16, FP4>(format, source, packed, absmax),
        (WeightFloat::F32, FourBitCode::Nf4) => quantize_blocks::<F32, NF4>(format, source, packed, absmax),
        (WeightFloat::F32, FourBitCode::Fp4) => quantize_blocks::<F32, FP4>(format, source, packed, absmax),
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn quantize_blocks<const FLOAT: u8, const REORDER: bool>(
    format: FourBit,
    source: Source<'_>,
    packed: &mut [u8],
    absmax: &mut [f32],
) -> u64 {
    let search = Search::new(format.code);
    let block = format.block.values();
    let batch = MAX_BLOCK / block;
    let mut not_finite = 0;
    let batches = source.chunks(block * batch).zip(packed.chunks_mut(block / 2 * batch)).zip(absmax.chunks_mut(batch));
    for ((source, packed), absmax) in batches {
        // All statistics first: a maximum over lanes takes long to come, and the next need not wait for it.
        for (source, absmax) in source.chunks(block).zip(absmax.iter_mut()) {
            *absmax = f32::from_bits(absmax_bits::<FLOAT>(source.bytes()));
        }
        for ((source, packed), absmax) in source.chunks(block).zip(packed.chunks_exact_mut(block / 2)).zip(absmax) {
            if absmax.is_finite() {
                let inverse = _mm512_set1_ps(scalar::reciprocal(*absmax));
                quantize_block::<FLOAT, REORDER>(&search, source, inverse, packed);
            } else {
                not_finite += scalar::quantize_4bit(format, source, packed, std::slice::from_mut(absmax));
            }
        }
    }
    not_finite
}

/// One block of finite values.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn quantize_block<const FLOAT: u8, const REORDER: bool>(
    search: &Search,
    source: Source<'_>,
    inverse: __m512,
    packed: &mut [u8],
) {
    let groups = source.bytes().chunks_exact(if FLOAT == F32 { 128 } else { 64 });
    for (group, packed) in groups.zip(packed.as_chunks_mut::<16>().0) {
        let (even, odd) = load_pairs::<FLOAT>(group);
        let mut high = search.rank(_mm512_mul_ps(even, inverse));
        let mut low = search.rank(_mm512_mul_ps(odd, inverse));
        if REORDER {
            high = _mm512_permutexvar_epi32(high, search.order);
            low = _mm512_permutexvar_epi32(low, search.order);
        }
        let bytes = _mm512_cvtepi32_epi8(_mm512_or_si512(_mm512_slli_epi32::<4>(high), low));
        // SAFETY: `packed` is 16 writable bytes; the store needs no alignment.
        unsafe { _mm_storeu_si128(packed.as_mut_ptr().cast(), bytes) };
    }
}

/// The thresholds, laid out for a binary search: the index of each step is the part of the rank that is known.
struct Search {
    middle: __m512,
    quarter: __m512,
    three_quarters: __m512,
    second: __m512,
    first: __m512,
    order: __m512i,
}

impl Search {
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    fn new(code: FourBitCode) -> Self {
        let thresholds = code.thresholds();
        let from = |first: usize| -> [f32; 16] {
            std::array::from_fn(|rank| thresholds.get(rank + first).copied().unwrap_or(f32::INFINITY))
        };
        let order: [i32; 16] = code.order().map(i32::from);
        // SAFETY: the arrays are 64 readable bytes each; the loads need no alignment.
        let (second, first, order) = unsafe {
            (
                _mm512_loadu_ps(from(1).as_ptr()),
                _mm512_loadu_ps(from(0).as_ptr()),
                _mm512_loadu_si512(order.as_ptr().cast()),
            )
        };
        Self {
            middle: _mm512_set1_ps(thresholds[7]),
            quarter: _mm512_set1_ps(thresholds[3]),
            three_quarters: _mm512_set1_ps(thresholds[11]),
            second,
            first,
            order,
        }
    }

    /// How many thresholds are strictly below each of 16 values, none of which is NaN.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    fn rank(&self, t: __m512) -> __m512i {
        let above = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(self.middle, t);
        let rank = _mm512_maskz_set1_epi32(above, 8);
        let threshold = _mm512_mask_blend_ps(above, self.quarter, self.three_quarters);
        let above = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(threshold, t);
        let rank = _mm512_mask_or_epi32(rank, above, rank, _mm512_set1_epi32(4));
        let above = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(_mm512_permutexvar_ps(rank, self.second), t);
        let rank = _mm512_mask_or_epi32(rank, above, rank, _mm512_set1_epi32(2));
        let above = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(_mm512_permutexvar_ps(rank, self.first), t);
        _mm512_mask_or_epi32(rank, above, rank, _mm512_set1_epi32(1))
    }
}

/// The bits of the largest magnitude of a block, as f32.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn absmax_bits<const FLOAT: u8>(block: &[u8]) -> u32 {
    let mut largest = _mm512_setzero_si512();
    if FLOAT == F32 {
        for bytes in block.as_chunks::<64>().0 {
            largest = _mm512_max_epu32(largest, _mm512_and_si512(load(bytes), _mm512_set1_epi32(0x7fff_ffff)));
        }
        return _mm512_reduce_max_epu32(largest);
    }
    for bytes in block.as_chunks::<64>().0 {
        largest = _mm512_max_epu16(largest, _mm512_and_si512(load(bytes), _mm512_set1_epi16(0x7fff)));
    }
    let largest = _mm256_max_epu16(_mm512_castsi512_si256(largest), _mm512_extracti64x4_epi64::<1>(largest));
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

/// 32 elements as f32: those of even and those of odd index.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn load_pairs<const FLOAT: u8>(group: &[u8]) -> (__m512, __m512) {
    let vectors = group.as_chunks::<64>().0;
    let first = load(&vectors[0]);
    if FLOAT == BF16 {
        let odd = _mm512_and_si512(first, _mm512_set1_epi32(0xffff_0000_u32.cast_signed()));
        return (_mm512_castsi512_ps(_mm512_slli_epi32::<16>(first)), _mm512_castsi512_ps(odd));
    }
    let (low, high) = if FLOAT == F16 {
        (_mm512_cvtph_ps(_mm512_castsi512_si256(first)), _mm512_cvtph_ps(_mm512_extracti64x4_epi64::<1>(first)))
    } else {
        (_mm512_castsi512_ps(first), _mm512_castsi512_ps(load(&vectors[1])))
    };
    let even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    let odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    (_mm512_permutex2var_ps(low, even, high), _mm512_permutex2var_ps(low, odd, high))
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn load(bytes: &[u8; 64]) -> __m512i {
    // SAFETY: 64 readable bytes; the load needs no alignment.
    unsafe { _mm512_loadu_si512(bytes.as_ptr().cast()) }
}

/// Any number of values; the same as [`scalar::dequantize_4bit`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) fn dequantize_4bit(format: FourBit, packed: &[u8], absmax: &[f32], out: &mut [f32]) {
    let block = format.block.values();
    let first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    let second = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    // SAFETY: the codebook is 64 readable bytes; the load needs no alignment.
    let values = unsafe { _mm512_loadu_ps(format.code.values().as_ptr()) };
    for ((out, packed), absmax) in out.chunks_mut(block).zip(packed.chunks(block / 2)).zip(absmax) {
        let table = _mm512_mul_ps(values, _mm512_set1_ps(*absmax));
        let (groups, out_rest) = out.as_chunks_mut::<32>();
        let (bytes, packed_rest) = packed.split_at(groups.len() * 16);
        for (out, bytes) in groups.iter_mut().zip(bytes.as_chunks::<16>().0) {
            // SAFETY: 16 readable bytes; the load needs no alignment.
            let pairs = _mm512_cvtepu8_epi32(unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) });
            // The permutation reads the low four bits of an index only.
            let high = _mm512_permutexvar_ps(_mm512_srli_epi32::<4>(pairs), table);
            let low = _mm512_permutexvar_ps(pairs, table);
            // SAFETY: `out` is 32 writable f32, two registers; the stores need no alignment.
            unsafe {
                _mm512_storeu_ps(out.as_mut_ptr(), _mm512_permutex2var_ps(high, first, low));
                _mm512_storeu_ps(out.as_mut_ptr().add(16), _mm512_permutex2var_ps(high, second, low));
            }
        }
        if !out_rest.is_empty() {
            scalar::unpack(&scalar::scaled(format.code, *absmax), packed_rest, out_rest);
        }
    }
}

/// One group of at most 256 statistics; the same as [`scalar::nested_quantize`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) fn nested_quantize(absmax: &[f32], offset: f32, thresholds: &[f32; 256], codes: &mut [u8]) -> f32 {
    let mut values = [0.0_f32; 256];
    let values = &mut values[..absmax.len()];
    values.iter_mut().zip(absmax).for_each(|(value, absmax)| *value = absmax - offset);
    let largest = scalar::largest_magnitude(values);
    if !largest.is_finite() {
        return scalar::nested_quantize(absmax, offset, thresholds, codes);
    }
    let inverse = scalar::reciprocal(largest);
    values.iter_mut().for_each(|value| *value *= inverse);
    let tree = Tree::new(thresholds);
    let (groups, rest) = values.as_chunks::<16>();
    let (codes, codes_rest) = codes.split_at_mut(groups.len() * 16);
    for (values, codes) in groups.iter().zip(codes.as_chunks_mut::<16>().0) {
        // SAFETY: 16 readable f32 and 16 writable bytes; neither needs alignment.
        unsafe {
            let found = tree.rank(_mm512_loadu_ps(values.as_ptr()));
            _mm_storeu_si128(codes.as_mut_ptr().cast(), _mm512_cvtepi32_epi8(found));
        }
    }
    scalar::nested_codes(rest, thresholds, codes_rest);
    largest
}

/// 255 ascending thresholds in 19 registers: level l of a binary search tree has 2^l of them, in order, and the known part
/// of a rank is the index into its level.
struct Tree {
    /// Levels 0 to 4, one register each.
    small: [__m512; 5],
    level_5: [__m512; 2],
    level_6: [__m512; 4],
    level_7: [__m512; 8],
}

impl Tree {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    fn new(thresholds: &[f32; 256]) -> Self {
        let register = |level: usize, first: usize| -> __m512 {
            let step = 256 >> level;
            let entries: [f32; 16] = std::array::from_fn(|lane| {
                thresholds.get((first + lane) * step + step / 2 - 1).copied().unwrap_or(0.0)
            });
            // SAFETY: 64 readable bytes; the load needs no alignment.
            unsafe { _mm512_loadu_ps(entries.as_ptr()) }
        };
        Self {
            small: [register(0, 0), register(1, 0), register(2, 0), register(3, 0), register(4, 0)],
            level_5: [register(5, 0), register(5, 16)],
            level_6: [register(6, 0), register(6, 16), register(6, 32), register(6, 48)],
            level_7: [
                register(7, 0),
                register(7, 16),
                register(7, 32),
                register(7, 48),
                register(7, 64),
                register(7, 80),
                register(7, 96),
                register(7, 112),
            ],
        }
    }

    /// How many thresholds are strictly below each of 16 values, none of which is NaN.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    fn rank(&self, t: __m512) -> __m512i {
        let mut rank = _mm512_setzero_si512();
        for level in self.small {
            rank = descend(rank, _mm512_permutexvar_ps(rank, level), t);
        }
        rank = descend(rank, look_up_32(self.level_5, rank), t);
        let [a, b, c, d] = self.level_6;
        rank = descend(rank, look_up_64([a, b, c, d], rank), t);
        let upper = _mm512_test_epi32_mask(rank, _mm512_set1_epi32(64));
        let [a, b, c, d, e, f, g, h] = self.level_7;
        let (low, high) = (look_up_64([a, b, c, d], rank), look_up_64([e, f, g, h], rank));
        descend(rank, _mm512_mask_blend_ps(upper, low, high), t)
    }
}

/// The index into the next level: the left child, or the right one where the threshold is strictly below the value.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn descend(rank: __m512i, threshold: __m512, t: __m512) -> __m512i {
    let above = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(threshold, t);
    let left = _mm512_add_epi32(rank, rank);
    _mm512_mask_add_epi32(left, above, left, _mm512_set1_epi32(1))
}

/// Reads the low five bits of an index.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn look_up_32(table: [__m512; 2], index: __m512i) -> __m512 {
    _mm512_permutex2var_ps(table[0], index, table[1])
}

/// Reads the low six bits of an index.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn look_up_64(table: [__m512; 4], index: __m512i) -> __m512 {
    let upper = _mm512_test_epi32_mask(index, _mm512_set1_epi32(32));
    _mm512_mask_blend_ps(upper, look_up_32([table[0], table[1]], index), look_up_32([table[2], table[3]], index))
}
