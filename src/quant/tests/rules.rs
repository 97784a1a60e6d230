//! The rules of special values, of rounding and of errors, by hand.

use half::{bf16, f16};

use super::{all_kernels, bits, le_bytes};
use crate::quant::{
    BlockSize, DynamicMap, FourBit, FourBitCode, Kernels, NestedStatistics, OffsetSum, QuantError, Source,
    absmax_offset,
};
use crate::types::DType;

const NAN_BITS: u32 = 0x7fc0_0000;

/// NF4 blocks of 32 with one odd value: codes of the first pair, the statistic's bits, and how many were not finite.
#[test]
fn special_values_in_a_block() {
    let tiny = 1e-38_f32.to_bits();
    let cases: [(&str, [f32; 2], u8, u32, u64); 7] = [
        ("zeros", [0.0, -0.0], 0x77, 0, 0),
        ("nan", [f32::NAN, 1.0], 0xff, NAN_BITS, 1),
        ("signed nan", [1.0, f32::from_bits(0xffff_ffff)], 0xff, NAN_BITS, 1),
        ("infinity", [f32::NEG_INFINITY, 1.0], 0xf7, f32::INFINITY.to_bits(), 1),
        ("nan and infinity", [f32::INFINITY, f32::NAN], 0xff, NAN_BITS, 2),
        // 5e-39 * 1e38 is 0.5, nearest to 0.4407 (code 12) and 0.5626 (13): the threshold is 0.5017.
        ("subnormal", [5e-39, -5e-39], 0xc2, 5e-39_f32.to_bits(), 0),
        ("at the least divisor", [1e-38, -1e-38], 0xf0, tiny, 0),
    ];
    let format = FourBit { code: FourBitCode::Nf4, block: BlockSize::new(32).expect("a block size") };
    for kernels in all_kernels() {
        for (name, pair, codes, statistic, count) in cases {
            let mut values = [0.0_f32; 32];
            values[..2].copy_from_slice(&pair);
            let bytes = le_bytes(&values);
            let (mut packed, mut absmax) = ([0; 16], [0.0]);
            let source = Source::new(DType::F32, &bytes).expect("whole elements");
            let not_finite = kernels.quantize_4bit(format, source, &mut packed, &mut absmax);
            assert_eq!(not_finite, Ok(count), "{name} {}", kernels.name());
            assert_eq!(packed[0], codes, "{name} {}", kernels.name());
            assert_eq!(absmax[0].to_bits(), statistic, "{name} {}", kernels.name());
        }
    }
}

/// formats.md: the statistic of a short last block is at least 1e-38, `0x006ce3ee`; an odd end is code 7.
#[test]
fn a_short_last_block_of_zeros() {
    let format = FourBit { code: FourBitCode::Nf4, block: BlockSize::B64 };
    for kernels in all_kernels() {
        let (mut packed, mut absmax) = ([0; 2], [1.0]);
        let source = Source::new(DType::BF16, &[0; 6]).expect("whole elements");
        assert_eq!(kernels.quantize_4bit(format, source, &mut packed, &mut absmax), Ok(0));
        assert_eq!((packed, absmax[0].to_bits()), ([0x77, 0x77], 0x006c_e3ee));
    }
}

/// With a statistic of 1 a value on a threshold takes the lower code, the next value above it the higher.
#[test]
fn ties_take_the_lower_code() {
    for (code, lowest) in [(FourBitCode::Nf4, -1.0), (FourBitCode::Fp4, -1.0)] {
        let mut sorted: Vec<f32> = code.values().to_vec();
        sorted.sort_by(f32::total_cmp);
        assert_eq!(sorted[0], lowest);
        let mut values = vec![1.0_f32];
        for pair in sorted.windows(2) {
            let threshold = (pair[0] + pair[1]) / 2.0;
            values.extend([threshold, threshold.next_up()]);
        }
        values.resize(32, 0.0);
        let bytes = le_bytes(&values);
        let source = Source::new(DType::F32, &bytes).expect("whole elements");
        let format = FourBit { code, block: BlockSize::new(32).expect("a block size") };
        for kernels in all_kernels() {
            let (mut packed, mut absmax, mut out) = ([0; 16], [0.0], [0.0; 32]);
            kernels.quantize_4bit(format, source, &mut packed, &mut absmax).expect("lengths fit");
            kernels.dequantize_4bit(format, &packed, &absmax, &mut out).expect("lengths fit");
            for (rank, pair) in sorted.windows(2).enumerate() {
                assert_eq!(out[1 + 2 * rank], pair[0], "{} {rank} {}", code.name(), kernels.name());
                assert_eq!(out[2 + 2 * rank], pair[1], "{} {rank} {}", code.name(), kernels.name());
            }
        }
    }
}

/// The f32 bits of formats.md, its exact midpoints to half an ulp of f32 (2^-25), and FP4's values as fractions of 12.
#[test]
fn codebooks() {
    let nf4: [u32; 16] = [
        0xbf80_0000,
        0xbf32_39b1,
        0xbf06_6b30,
        0xbeca_32a0,
        0xbe91_a24d,
        0xbe3d_353f,
        0xbdba_7871,
        0,
        0x3da2_faff,
        0x3e24_cae3,
        0x3e7c_04dd,
        0x3ead_033a,
        0x3ee1_a4b8,
        0x3f10_07ab,
        0x3f39_13b3,
        0x3f80_0000,
    ];
    assert_eq!(bits(FourBitCode::Nf4.values()), nf4);
    let thresholds = [
        -0.848_096_400_499_343_9,
        -0.610_632_926_225_662_2,
        -0.459_995_269_775_390_6,
        -0.339_679_434_895_515_44,
        -0.234_607_405_960_559_84,
        -0.137_911_733_239_889_12,
        -0.045_525_018_125_772_476,
        0.039_790_149_778_127_67,
        0.120_255_248_248_577_12,
        0.203_521_251_678_466_8,
        0.292_013_771_831_989_3,
        0.389_312_535_524_368_3,
        0.501_663_416_624_069_2,
        0.642_786_920_070_648_2,
        0.861_478_417_811_801_1_f64,
    ];
    for (ours, expected) in FourBitCode::Nf4.thresholds().iter().zip(thresholds) {
        assert!((f64::from(*ours) - expected).abs() < 3.1e-8, "{ours} {expected}");
    }
    let twelfths = [0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0_f32];
    for (code, twelfth) in twelfths.into_iter().enumerate() {
        assert_eq!(FourBitCode::Fp4.values()[code].to_bits(), (twelfth / 12.0).to_bits());
        assert_eq!(FourBitCode::Fp4.values()[code + 8].to_bits(), (-twelfth / 12.0).to_bits());
    }
    assert_eq!(FourBitCode::from_name("fp4"), Some(FourBitCode::Fp4));
    assert_eq!(FourBitCode::from_name("int8"), None);
}

/// SCB 2: 127/2 = 63.5, so 1 is a tie and goes to 64, -1 to -64, 0.5 (31.75) to 32. 2049 is 2048 as f16, 1e6 an infinity.
#[test]
fn int8_rows_by_hand() {
    let rows = [
        ([2.0, 1.0, -1.0, 0.5], [127, 64, -64, 32], 2.0),
        ([2049.0, 0.0, -2048.0, 16.0], [127, 0, -127, 1], 2048.0),
        ([0.0, -0.0, 0.0, 0.0], [0, 0, 0, 0], 0.0),
        ([1e6, 1.0, -1.0, 0.5], [0, 0, 0, 0], f32::INFINITY),
        ([f32::NAN, 1.0, f32::INFINITY, 0.5], [0, 0, 0, 0], f32::NAN),
        ([1e-8, 0.0, -1e-7, 6e-8], [0, 0, -127, 64], f16::from_f32(1e-7).to_f32()),
    ];
    let bytes = le_bytes(&rows.iter().flat_map(|row| row.0).collect::<Vec<f32>>());
    let source = Source::new(DType::F32, &bytes).expect("whole elements");
    for kernels in all_kernels() {
        let (mut q, mut scb) = ([0; 24], [0.0; 6]);
        assert_eq!(kernels.quantize_int8_rows(source, 4, &mut q, &mut scb), Ok(3), "{}", kernels.name());
        for (row, (_, codes, expected)) in rows.iter().enumerate() {
            let ours: Vec<i8> = q[4 * row..4 * row + 4].iter().map(|q| q.cast_signed()).collect();
            assert_eq!(ours, codes, "row {row} {}", kernels.name());
            assert_eq!(scb[row].to_bits(), expected.to_bits(), "row {row} {}", kernels.name());
        }
    }
}

/// Of a model that bitsandbytes 0.50.2 has quantized: values and their row's largest, where `127 / SCB` rounded once would give
/// other codes.
#[test]
fn int8_ties_fall_as_in_torch() {
    for (value, largest, code) in
        [(-0.079_589_844, 0.159_179_69, -63), (-0.054_931_64, 0.109_863_28, -64), (-0.049_072_266, 0.098_144_53, -63)]
    {
        // Long enough for whole vectors.
        let mut row = [value; 64];
        row[63] = largest;
        let bytes = le_bytes(&row);
        let source = Source::new(DType::F32, &bytes).expect("whole elements");
        for kernels in all_kernels() {
            let (mut q, mut scb) = ([0; 64], [0.0]);
            kernels.quantize_int8_rows(source, 64, &mut q, &mut scb).expect("sizes fit");
            assert!(q[..63].iter().all(|q| q.cast_signed() == code), "{value} {}", kernels.name());
        }
    }
}

/// IEEE 754: 1 + 2^-8 is a tie in bf16, 1 + 2^-11 in f16; 65520 is the first f32 that rounds to infinity in f16.
#[test]
fn conversions_by_hand() {
    let cases: [(f32, u16, u16); 9] = [
        (1.0, 0x3f80, 0x3c00),
        (1.0 + 0.003_906_25, 0x3f80, 0x3c04),
        (1.0 + 3.0 * 0.003_906_25, 0x3f82, 0x3c0c),
        (1.0 + 0.000_488_281_25, 0x3f80, 0x3c00),
        (65519.0, 0x4780, 0x7bff),
        (65520.0, 0x4780, 0x7c00),
        (f32::MAX, 0x7f80, 0x7c00),
        (-5.960_464_5e-8, 0xb380, 0x8001),
        (f32::NEG_INFINITY, 0xff80, 0xfc00),
    ];
    // Eight of a kind, so that whole vectors are seen too; a NaN of each kind must stay one.
    for kernels in all_kernels() {
        for (value, as_bf16, as_f16) in cases {
            let bytes = le_bytes(&[value; 9]);
            let source = Source::new(DType::F32, &bytes).expect("whole elements");
            for (to, expected) in [(DType::BF16, as_bf16), (DType::F16, as_f16)] {
                let mut out = [0; 18];
                kernels.convert(source, to, &mut out).expect("lengths fit");
                for found in out.as_chunks::<2>().0 {
                    assert_eq!(u16::from_le_bytes(*found), expected, "{value} {to} {}", kernels.name());
                }
            }
        }
        for bits in [0x7f80_0001_u32, 0xff80_0001, 0x7fc0_0000, 0xffff_ffff] {
            let bytes = le_bytes(&[f32::from_bits(bits); 9]);
            let source = Source::new(DType::F32, &bytes).expect("whole elements");
            let mut out = [0; 18];
            kernels.convert(source, DType::BF16, &mut out).expect("lengths fit");
            assert!(out.as_chunks::<2>().0.iter().all(|v| bf16::from_le_bytes(*v).is_nan()), "{bits:x}");
            kernels.convert(source, DType::F16, &mut out).expect("lengths fit");
            assert!(out.as_chunks::<2>().0.iter().all(|v| f16::from_le_bytes(*v).is_nan()), "{bits:x}");
        }
    }
}

/// NE-1: the offset does not depend on the cut; equal statistics quantize to the code of zero.
#[test]
fn offsets_and_constant_statistics() {
    assert_eq!(absmax_offset(&[]).to_bits(), 0);
    // 1 + 2^-24 has no f32, and 2^24 ones and halves sum exactly in f64 only.
    let statistics = vec![1.0, 3.0, 0.5, 1e-3];
    let mut sum = OffsetSum::default();
    statistics.iter().for_each(|value| sum.add(&[*value]));
    assert_eq!(sum.mean().to_bits(), absmax_offset(&statistics).to_bits());
    assert_eq!(absmax_offset(&statistics), 1.125_25);
    for kernels in all_kernels() {
        let (mut codes, mut nested, mut out) = ([0; 300], [1.0; 2], [0.0; 300]);
        let map = DynamicMap::standard();
        kernels.nested_quantize(&[0.25; 300], 0.25, &map, &mut codes, &mut nested).expect("lengths fit");
        assert_eq!((codes, nested), ([127; 300], [0.0; 2]));
        let run = NestedStatistics { codes: &codes, first_block: 0, nested_absmax: &nested, offset: 0.25, map: &map };
        run.dequantize(&mut out).expect("lengths fit");
        assert_eq!(out, [0.25; 300]);
    }
}

/// A run that starts inside a group takes the next nested statistic where the tensor's group ends.
#[test]
fn a_shard_keeps_its_phase() {
    let map = DynamicMap::standard();
    let codes = [255; 300];
    let mut out = [0.0; 300];
    let run = |first_block, nested_absmax| NestedStatistics {
        codes: &codes,
        first_block,
        nested_absmax,
        offset: 0.5,
        map: &map,
    };
    run(1024 + 200, &[1.0, 2.0]).dequantize(&mut out).expect("lengths fit");
    assert_eq!((out[0], out[55], out[56], out[299]), (1.5, 1.5, 2.5, 2.5));
    run(255, &[1.0, 2.0, 3.0]).dequantize(&mut out).expect("lengths fit");
    assert_eq!((out[0], out[1], out[256], out[257]), (1.5, 2.5, 2.5, 3.5));
    let expected = QuantError::Length { what: "nested_absmax", expected: 3, found: 2 };
    assert_eq!(run(255, &[1.0, 2.0]).dequantize(&mut out), Err(expected));
}

#[test]
fn wrong_arguments_are_errors() {
    let kernels = Kernels::detect();
    assert_eq!(BlockSize::new(48), Err(QuantError::BlockSize { found: 48 }));
    assert!(BlockSize::new(16).is_err() && BlockSize::new(8192).is_err() && BlockSize::new(0).is_err());
    assert!(matches!(Source::new(DType::F64, &[]), Err(QuantError::DType { found: DType::F64 })));
    assert!(matches!(Source::new(DType::F32, &[0; 6]), Err(QuantError::RaggedBytes { found: 6, .. })));
    let source = Source::new(DType::F16, &[0; 256]).expect("whole elements");
    let format = FourBit { code: FourBitCode::Nf4, block: BlockSize::B64 };
    let length = |what, expected, found| Err(QuantError::Length { what, expected, found });
    assert_eq!(kernels.quantize_4bit(format, source, &mut [0; 63], &mut [0.0; 2]), length("packed", 64, 63));
    assert_eq!(kernels.quantize_4bit(format, source, &mut [0; 64], &mut [0.0; 3]), length("absmax", 2, 3));
    assert_eq!(
        kernels.quantize_int8_rows(source, 3, &mut [0; 128], &mut [0.0; 2]),
        Err(QuantError::Columns { columns: 3, values: 128 })
    );
    assert!(kernels.quantize_int8_rows(source, 0, &mut [0; 128], &mut [0.0; 2]).is_err());
    assert_eq!(kernels.convert(source, DType::I8, &mut [0; 128]), Err(QuantError::DType { found: DType::I8 }));
    assert!(kernels.convert(source, DType::F32, &mut [0; 511]).is_err());
    let mut map = *DynamicMap::standard().values();
    map[9] = -2.0;
    assert_eq!(DynamicMap::from_values(map), Err(QuantError::UnsortedMap { index: 9 }));
    // Nothing at all is fine.
    let empty = Source::new(DType::F16, &[]).expect("whole elements");
    assert_eq!(kernels.quantize_4bit(format, empty, &mut [], &mut []), Ok(0));
}
