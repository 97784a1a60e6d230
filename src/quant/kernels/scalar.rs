//! The reference of every inner loop: the rules of the parent module, one value after the other.
//!
//! The SIMD kernels call into it for the blocks that hold a value that is not finite and for what is shorter than a vector.

use half::{bf16, f16};

use crate::quant::four_bit::{FourBitCode, LEAST_ABSMAX, MAX_BLOCK};
use crate::quant::int8::INVERSE_127;
use crate::quant::source::{WeightFloat, encode};
use crate::quant::{FourBit, Source};
use crate::types::as_u64;

/// The bits of +inf: the magnitudes of what is not finite have at least these bits.
const INFINITY_BITS: u32 = 0x7f80_0000;

/// How many values are decoded at a time where a block does not say it.
const CHUNK: usize = 1024;

/// The largest magnitude; NaN (`0x7fc00000`) if there is one. Magnitudes order as their bits, NaN above infinity.
pub(super) fn largest_magnitude(values: &[f32]) -> f32 {
    let bits = values.iter().map(|value| value.to_bits() & 0x7fff_ffff).max().unwrap_or(0);
    if bits > INFINITY_BITS { f32::NAN } else { f32::from_bits(bits) }
}

/// The factor that brings a block to [-1, 1]; NaN if `absmax` is.
pub(super) fn reciprocal(absmax: f32) -> f32 {
    1.0 / at_least(absmax)
}

fn at_least(absmax: f32) -> f32 {
    // Not `max`, which would turn a NaN into the other operand.
    if absmax < LEAST_ABSMAX { LEAST_ABSMAX } else { absmax }
}

fn count_not_finite(values: &[f32]) -> u64 {
    as_u64(values.iter().filter(|value| !value.is_finite()).count())
}

/// The code of a scaled value.
fn code(code: FourBitCode, t: f32) -> u8 {
    #[expect(clippy::neg_cmp_op_on_partial_ord, reason = "a NaN has to count as above every threshold")]
    let rank: u8 = code.thresholds().iter().map(|threshold| u8::from(!(*threshold >= t))).sum();
    code.order()[usize::from(rank & 15)]
}

fn pack(format: FourBitCode, values: &[f32], packed: &mut [u8], scale: impl Fn(f32) -> f32) {
    for (packed, pair) in packed.iter_mut().zip(values.chunks(2)) {
        let high = code(format, scale(pair[0]));
        let low = code(format, pair.get(1).map_or(0.0, |value| scale(*value)));
        *packed = high << 4 | low;
    }
}

/// Whole blocks. Returns the number of values that are not finite.
pub(super) fn quantize_4bit(format: FourBit, source: Source<'_>, packed: &mut [u8], absmax: &mut [f32]) -> u64 {
    let block = format.block.values();
    let mut buffer = [0.0_f32; MAX_BLOCK];
    let values = &mut buffer[..block];
    let mut not_finite = 0;
    for ((source, packed), absmax) in source.chunks(block).zip(packed.chunks_exact_mut(block / 2)).zip(absmax) {
        source.decode(values);
        *absmax = largest_magnitude(values);
        let inverse = reciprocal(*absmax);
        pack(format.code, values, packed, |value| value * inverse);
        if !absmax.is_finite() {
            not_finite += count_not_finite(values);
        }
    }
    not_finite
}

/// The last block of a tensor, when it is short. Returns the number of values that are not finite.
pub(in crate::quant) fn quantize_short_block(
    code: FourBitCode,
    source: Source<'_>,
    packed: &mut [u8],
    absmax: &mut f32,
) -> u64 {
    let mut buffer = [0.0_f32; MAX_BLOCK];
    let values = &mut buffer[..source.len()];
    source.decode(values);
    let divisor = at_least(largest_magnitude(values));
    *absmax = divisor;
    pack(code, values, packed, |value| value / divisor);
    count_not_finite(values)
}

/// Any number of values.
pub(super) fn dequantize_4bit(format: FourBit, packed: &[u8], absmax: &[f32], out: &mut [f32]) {
    let block = format.block.values();
    for ((out, packed), absmax) in out.chunks_mut(block).zip(packed.chunks(block / 2)).zip(absmax) {
        unpack(&scaled(format.code, *absmax), packed, out);
    }
}

/// Any number of values.
pub(super) fn dequantize_4bit_bf16(format: FourBit, packed: &[u8], absmax: &[f32], out: &mut [bf16]) {
    let block = format.block.values();
    for ((out, packed), absmax) in out.chunks_mut(block).zip(packed.chunks(block / 2)).zip(absmax) {
        unpack(&scaled(format.code, *absmax).map(bf16::from_f32), packed, out);
    }
}

/// The values that the codes of a block with this statistic stand for.
pub(super) fn scaled(code: FourBitCode, absmax: f32) -> [f32; 16] {
    code.values().map(|value| value * absmax)
}

/// Looks the codes of one block up.
pub(super) fn unpack<T: Copy>(table: &[T; 16], packed: &[u8], out: &mut [T]) {
    for (pair, byte) in out.chunks_mut(2).zip(packed) {
        pair[0] = table[usize::from(byte >> 4)];
        if let Some(low) = pair.get_mut(1) {
            *low = table[usize::from(byte & 15)];
        }
    }
}

/// One row. Returns the number of values that are not finite as f16.
pub(super) fn quantize_int8(row: Source<'_>, q: &mut [u8], scb: &mut f32) -> u64 {
    let mut buffer = [0.0_f32; CHUNK];
    let mut not_finite = 0;
    let mut absmax = 0.0_f32;
    for part in row.chunks(CHUNK) {
        let values = decode_as_f16(part, &mut buffer);
        let part_absmax = largest_magnitude(values);
        if part_absmax.is_nan() || part_absmax > absmax {
            absmax = if absmax.is_nan() { absmax } else { part_absmax };
        }
        not_finite += count_not_finite(values);
    }
    *scb = absmax;
    let scale = int8_scale(absmax);
    for (part, q) in row.chunks(CHUNK).zip(q.chunks_mut(CHUNK)) {
        let values = decode_as_f16(part, &mut buffer);
        q.iter_mut().zip(values).for_each(|(q, value)| *q = int8_code(*value, scale));
    }
    not_finite
}

/// `127 / absmax` as torch divides a number by a tensor: by its reciprocal, so with two roundings.
pub(super) fn int8_scale(absmax: f32) -> f32 {
    (1.0 / absmax) * 127.0
}

/// Decodes and rounds to f16.
fn decode_as_f16<'b>(source: Source<'_>, buffer: &'b mut [f32; CHUNK]) -> &'b [f32] {
    let values = &mut buffer[..source.len()];
    source.decode(values);
    if source.float() != WeightFloat::F16 {
        values.iter_mut().for_each(|value| *value = f16::from_f32(*value).to_f32());
    }
    values
}

#[expect(clippy::cast_possible_truncation, reason = "within 127 of 0, and a NaN becomes 0")]
fn int8_code(value: f32, scale: f32) -> u8 {
    ((value * scale).round_ties_even() as i8).cast_unsigned()
}

/// One row.
pub(super) fn dequantize_int8(q: &[u8], scb: f32, out: &mut [f32]) {
    for (out, q) in out.iter_mut().zip(q) {
        *out = f32::from(q.cast_signed()) * scb * INVERSE_127;
    }
}

/// One group of at most 256 statistics; returns the nested statistic.
pub(super) fn nested_quantize(absmax: &[f32], offset: f32, thresholds: &[f32; 256], codes: &mut [u8]) -> f32 {
    let mut buffer = [0.0_f32; 256];
    let values = &mut buffer[..absmax.len()];
    values.iter_mut().zip(absmax).for_each(|(value, absmax)| *value = absmax - offset);
    let nested_absmax = largest_magnitude(values);
    let inverse = reciprocal(nested_absmax);
    values.iter_mut().for_each(|value| *value *= inverse);
    nested_codes(values, thresholds, codes);
    nested_absmax
}

/// For each value the number of thresholds strictly below it; a NaN is above all but the last, infinite one. The steps of
/// the binary search are outside, the values inside: a step of one value does not wait for that of another.
pub(super) fn nested_codes(values: &[f32], thresholds: &[f32; 256], codes: &mut [u8]) {
    codes.fill(0);
    for step in [128_u8, 64, 32, 16, 8, 4, 2, 1] {
        for (code, value) in codes.iter_mut().zip(values) {
            let threshold = thresholds[usize::from(*code | (step - 1))];
            #[expect(clippy::neg_cmp_op_on_partial_ord, reason = "a NaN has to count as above every threshold")]
            let above = u8::from(!(threshold >= *value));
            *code |= above * step;
        }
    }
}

/// Between two different types.
pub(super) fn convert(source: Source<'_>, to: WeightFloat, out: &mut [u8]) {
    let mut buffer = [0.0_f32; CHUNK];
    for (part, out) in source.chunks(CHUNK).zip(out.chunks_mut(CHUNK * to.size_bytes())) {
        let values = &mut buffer[..part.len()];
        part.decode(values);
        encode(values, to, out);
    }
}
