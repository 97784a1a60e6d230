//! QU-1: every kernel gives the bytes of the scalar one. QU-2: parts give the whole.

use half::{bf16, f16};
use proptest::prelude::*;

use super::{Random, all_kernels, bits};
use crate::quant::{BlockSize, DynamicMap, FourBit, FourBitCode, Kernels, Source};
use crate::types::DType;

const FLOATS: [DType; 3] = [DType::F16, DType::BF16, DType::F32];

/// Values per buffer: odd, with a short last block for every block size.
const LARGEST: usize = 40_000;

/// Little-endian elements: per run of about 64 values one of seven kinds.
fn elements(random: &mut Random, dtype: DType, count: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(count * 4);
    let mut kind = 0;
    for index in 0..count {
        if index % 64 == 0 {
            kind = random.below(12);
        }
        let raw = random.bits32();
        let value = match kind {
            // Any bits at all: all exponents, NaN and infinities.
            0 => f32::from_bits(raw),
            // Subnormals and zeros of both signs.
            1 => f32::from_bits(raw & 0x807f_ffff),
            2 => f32::from_bits(raw & 0x8000_0000),
            // Thresholds of a block whose statistic is 1, and their neighbours: ties.
            3 | 4 => tie(random, kind == 3),
            // A stray value that is not finite.
            5 if raw.is_multiple_of(100) => [f32::NAN, f32::INFINITY, f32::NEG_INFINITY][random.below(3)],
            // Very small: statistics about 1e-38.
            6 => uniform(raw) * 3e-38,
            _ => uniform(raw) * 0.1,
        };
        push(&mut bytes, dtype, kind, raw, value);
    }
    bytes
}

fn push(bytes: &mut Vec<u8>, dtype: DType, kind: usize, raw: u32, value: f32) {
    let half = u16::try_from(raw >> 16).expect("16 bits");
    match dtype {
        DType::F16 if kind == 0 => bytes.extend(half.to_le_bytes()),
        DType::F16 if kind == 1 => bytes.extend((half & 0x83ff).to_le_bytes()),
        DType::F16 => bytes.extend(f16::from_f32(value).to_le_bytes()),
        DType::BF16 => bytes.extend(bf16::from_f32(value).to_le_bytes()),
        _ => bytes.extend(value.to_le_bytes()),
    }
}

fn tie(random: &mut Random, nf4: bool) -> f32 {
    let code = if nf4 { FourBitCode::Nf4 } else { FourBitCode::Fp4 };
    let threshold = code.thresholds()[random.below(15)];
    match random.below(5) {
        0 => 1.0,
        1 => threshold.next_up(),
        2 => threshold.next_down(),
        _ => threshold,
    }
}

/// From -1 to 1.
#[expect(clippy::cast_precision_loss, reason = "any value will do")]
fn uniform(raw: u32) -> f32 {
    raw as f32 / 2_147_483_648.0 - 1.0
}

/// The bits, with one pattern for every NaN: only which values are NaN is promised of products.
fn same_nan(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| if value.is_nan() { 0x7fc0_0000 } else { value.to_bits() }).collect()
}

/// Everything that one kernel makes of one source.
#[derive(PartialEq)]
struct Made {
    not_finite: [u64; 2],
    packed: Vec<u8>,
    absmax: Vec<u32>,
    unpacked: Vec<u32>,
    unpacked_bf16: Vec<u32>,
    int8: Vec<u8>,
    scb: Vec<u32>,
    unpacked_int8: Vec<u32>,
    nested: Vec<u8>,
    nested_absmax: Vec<u32>,
    converted: [Vec<u8>; 3],
}

fn make(kernels: Kernels, format: FourBit, source: Source<'_>, columns: usize) -> Made {
    let count = source.len();
    let mut packed = vec![0; format.packed_bytes(count)];
    let mut absmax = vec![0.0; format.blocks(count)];
    let four_bit = kernels.quantize_4bit(format, source, &mut packed, &mut absmax).expect("lengths fit");
    let mut unpacked = vec![0.0; count];
    kernels.dequantize_4bit(format, &packed, &absmax, &mut unpacked).expect("lengths fit");
    let mut unpacked_bf16 = vec![bf16::ZERO; count];
    kernels.dequantize_4bit_bf16(format, &packed, &absmax, &mut unpacked_bf16).expect("lengths fit");

    let (rows, _) = source.split_at(count / columns * columns);
    let mut int8 = vec![0; rows.len()];
    let mut scb = vec![0.0; rows.len() / columns];
    let int8_not_finite = kernels.quantize_int8_rows(rows, columns, &mut int8, &mut scb).expect("lengths fit");
    let mut unpacked_int8 = vec![0.0; rows.len()];
    kernels.dequantize_int8_rows(columns, &int8, &scb, &mut unpacked_int8).expect("lengths fit");

    let mut nested = vec![0; absmax.len()];
    let mut nested_absmax = vec![0.0; absmax.len().div_ceil(256)];
    let map = DynamicMap::standard();
    kernels.nested_quantize(&absmax, 0.05, &map, &mut nested, &mut nested_absmax).expect("lengths fit");
    let converted = FLOATS.map(|to| {
        let mut out = vec![0; count * if to == DType::F32 { 4 } else { 2 }];
        kernels.convert(source, to, &mut out).expect("lengths fit");
        out
    });
    Made {
        not_finite: [four_bit, int8_not_finite],
        packed,
        absmax: bits(&absmax),
        unpacked: same_nan(&unpacked),
        unpacked_bf16: same_nan(&unpacked_bf16.iter().map(|value| value.to_f32()).collect::<Vec<_>>()),
        int8,
        scb: bits(&scb),
        unpacked_int8: same_nan(&unpacked_int8),
        nested,
        nested_absmax: bits(&nested_absmax),
        converted,
    }
}

/// Compares every kernel on buffers of random sizes until `total` values were seen.
fn compare(total: usize, largest: usize, seed: u64) {
    let mut random = Random(seed);
    let mut seen = 0;
    while seen < total {
        let dtype = FLOATS[random.below(3)];
        let count = 1 + random.below(largest);
        let code = [FourBitCode::Nf4, FourBitCode::Fp4][random.below(2)];
        let block = BlockSize::new(32 << random.below(8)).expect("a block size");
        let format = FourBit { code, block };
        // An odd start, so that no load is aligned.
        let mut bytes = vec![0];
        bytes.extend(elements(&mut random, dtype, count));
        let source = Source::new(dtype, &bytes[1..]).expect("whole elements");
        let columns = 1 + random.below(count.min(3000));
        let expected = make(Kernels::scalar(), format, source, columns);
        for kernels in all_kernels().into_iter().skip(1) {
            let made = make(kernels, format, source, columns);
            assert!(made == expected, "{}: seed {seed}, {seen} seen, {dtype} {format:?} {columns}", kernels.name());
        }
        seen += count;
    }
}

/// Cheap enough for a build without optimization; the long one below sees a thousand times as many.
#[test]
fn every_kernel_equals_the_scalar_one() {
    compare(if cfg!(debug_assertions) { 100_000 } else { 10_000_000 }, 9_000, 1);
}

#[test]
#[ignore = "about a minute: run with `cargo test --release --lib quant -- --ignored` after a change of a kernel"]
fn every_kernel_equals_the_scalar_one_on_a_hundred_million_values() {
    compare(100_000_000, LARGEST, 2);
}

/// All 65,536 values of both 16-bit types, to both other types.
#[test]
fn conversions_of_every_16_bit_value() {
    let bytes: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
    for from in [DType::F16, DType::BF16] {
        let source = Source::new(from, &bytes).expect("whole elements");
        for to in FLOATS {
            let mut made = all_kernels().into_iter().map(|kernels| {
                let mut out = vec![0; 65_536 * if to == DType::F32 { 4 } else { 2 }];
                kernels.convert(source, to, &mut out).expect("lengths fit");
                out
            });
            let scalar = made.next().expect("the scalar kernel");
            assert!(made.all(|out| out == scalar), "{from} to {to}");
        }
    }
}

#[test]
fn threads_do_not_change_a_byte() {
    let mut random = Random(3);
    let bytes = elements(&mut random, DType::BF16, 300_001);
    let source = Source::new(DType::BF16, &bytes).expect("whole elements");
    let format = FourBit { code: FourBitCode::Nf4, block: BlockSize::B64 };
    let run = |threads: usize| {
        let mut packed = vec![0; 150_001];
        let mut absmax = vec![0.0; 4688];
        let kernels = Kernels::detect();
        let count = kernels.quantize_4bit_threads(format, threads, source, &mut packed, &mut absmax);
        (count, packed, bits(&absmax))
    };
    let one = run(1);
    for threads in [0, 2, 3, 4, 64] {
        assert!(run(threads) == one, "{threads} threads");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    /// QU-2: cut anywhere between blocks, quantized apart, concatenated.
    #[test]
    fn qu_2_parts_give_the_whole(
        seed: u64,
        count in 1_usize..2000,
        cut in 0_usize..20,
        block in 0_u32..3,
        dtype in proptest::sample::select(FLOATS.to_vec()),
    ) {
        let bytes = elements(&mut Random(seed), dtype, count);
        let source = Source::new(dtype, &bytes).expect("whole elements");
        let format = FourBit { code: FourBitCode::Nf4, block: BlockSize::new(32 << block).expect("a block size") };
        let kernels = Kernels::detect();
        let quantize = |source: Source<'_>| {
            let mut packed = vec![0; format.packed_bytes(source.len())];
            let mut absmax = vec![0.0; format.blocks(source.len())];
            let not_finite = kernels.quantize_4bit(format, source, &mut packed, &mut absmax).expect("lengths fit");
            (not_finite, packed, bits(&absmax))
        };
        let whole = quantize(source);
        let (head, tail) = source.split_at(cut * format.block.values());
        let (mut not_finite, mut packed, mut absmax) = quantize(head);
        let rest = quantize(tail);
        not_finite += rest.0;
        packed.extend(rest.1);
        absmax.extend(rest.2);
        prop_assert_eq!((not_finite, packed, absmax), whole);
    }
}
