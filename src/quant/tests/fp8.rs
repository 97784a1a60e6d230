//! FP8 against torch's `float8_e4m3fn` (tests/data/quant).

use super::{Random, bits, floats, safetensors};
use crate::quant::fp8::{Fp8Blocks, decode_e4m3, dequantize_e4m3};

/// All 256 bytes as torch widens them, and times a scale; NaN by sign and quietness only where torch keeps them.
#[test]
fn every_byte_as_torch_has_it() {
    let vectors = safetensors(&["quant/fp8.safetensors"]);
    let bytes: Vec<u8> = (0..=255).collect();
    let mut out = vec![0.0; 256];
    decode_e4m3(&bytes, &mut out).expect("lengths fit");
    let expected = floats(&vectors["values"]);
    assert_eq!(out.iter().filter(|value| value.is_nan()).count(), 2);
    assert!(out[0x7f].is_nan() && out[0xff].is_nan());
    let numbers = |values: &[f32]| values.iter().copied().filter(|value| !value.is_nan()).collect::<Vec<_>>();
    assert_eq!(bits(&numbers(&out)), bits(&numbers(&expected)));
    let scale = floats(&vectors["scale"])[0];
    dequantize_e4m3(&bytes, scale, &mut out).expect("lengths fit");
    assert_eq!(bits(&numbers(&out)), bits(&numbers(&floats(&vectors["scaled"]))));
    assert_eq!((out[0x7e], out[0x81]), (448.0 * scale, -scale / 512.0), "the largest and the least, by hand");
}

/// A matrix of `[150, 200]` in blocks of 128 by 128, and parts of it that cut blocks.
#[test]
fn blocks_as_torch_has_them() {
    let vectors = safetensors(&["quant/fp8.safetensors"]);
    let (bytes, expected) = (&vectors["matrix"], floats(&vectors["matrix_dequantized"]));
    let scales = floats(&vectors["matrix_scale_inv"]);
    let blocks = Fp8Blocks::new([150, 200], [128, 128], &scales).expect("2 by 2 blocks");
    let mut random = Random(5);
    for _ in 0..30 {
        let mut range = |bound: usize| {
            let (a, b) = (random.below(bound + 1), random.below(bound + 1));
            a.min(b)..a.max(b)
        };
        let (rows, columns) = (range(150), range(200));
        let part = |row: usize| row * 200 + columns.start..row * 200 + columns.end;
        let part_bytes: Vec<u8> = rows.clone().flat_map(|row| bytes[part(row)].to_vec()).collect();
        let part_expected: Vec<f32> = rows.clone().flat_map(|row| expected[part(row)].to_vec()).collect();
        let mut out = vec![0.0; part_bytes.len()];
        blocks.dequantize(rows.clone(), columns.clone(), &part_bytes, &mut out).expect("inside");
        assert_eq!(bits(&out), bits(&part_expected), "{rows:?} {columns:?}");
    }
}

#[test]
fn sizes_that_do_not_fit_are_errors() {
    assert!(Fp8Blocks::new([150, 200], [128, 128], &[0.0; 5]).is_err());
    assert!(Fp8Blocks::new([150, 200], [0, 128], &[]).is_err());
    assert!(Fp8Blocks::new([usize::MAX, usize::MAX], [1, 1], &[]).is_err());
    let blocks = Fp8Blocks::new([3, 2], [2, 2], &[1.0, 2.0]).expect("2 blocks");
    assert!(blocks.dequantize(0..4, 0..1, &[0; 4], &mut [0.0; 4]).is_err());
    assert!(blocks.dequantize(0..3, 0..2, &[0; 5], &mut [0.0; 5]).is_err());
    assert!(blocks.dequantize(0..3, 0..2, &[0; 6], &mut [0.0; 5]).is_err());
    assert!(blocks.dequantize(0..3, 1..1, &[], &mut []).is_ok());
    assert!(decode_e4m3(&[0], &mut []).is_err());
}
