//! MLX's affine codes against the vectors of mlx (tests/data/quant).

use half::{bf16, f16};

use super::{bits, floats, le_bytes, rule, safetensors};
use crate::quant::QuantError;
use crate::quant::affine::{AffineGroups, CodeBits, GroupAxis, MlxRule, Offset};
use crate::quant::pack::{bit_stream_bytes, pack_bit_stream, unpack_bit_stream};

struct Quantized {
    codes: Vec<u8>,
    scales: Vec<f32>,
    biases: Vec<f32>,
}

fn quantize(rule: MlxRule, weights: &[f32]) -> Quantized {
    let groups = weights.len() / rule.group();
    let (mut codes, mut scales, mut biases) = (vec![0xff; weights.len()], vec![0.0; groups], vec![0.0; groups]);
    rule.quantize(weights, &mut codes, &mut scales, &mut biases).expect("lengths fit");
    Quantized { codes, scales, biases }
}

fn weights_of(name: &str) -> Vec<f32> {
    if !name.starts_with("special") {
        return rule(6 * 256);
    }
    let mut weights = rule(8 * 64);
    let mut group = |index: usize, change: fn(f32) -> f32| {
        weights[index * 64..(index + 1) * 64].iter_mut().for_each(|weight| *weight = change(*weight));
    };
    group(0, |weight| weight / 1_048_576.0);
    group(1, |_| 0.25);
    group(2, |_| -0.25);
    group(3, |_| 0.0);
    group(4, |weight| weight + 1.0);
    group(5, |weight| weight - 1.0);
    weights
}

/// A value as the dtype at the end of a case's name holds it.
fn rounded(name: &str, value: f32) -> f32 {
    match name.rsplit('-').next() {
        Some("bf16") => bf16::from_f32(value).to_f32(),
        Some("f16") => f16::from_f32(value).to_f32(),
        _ => value,
    }
}

fn widened(name: &str, bytes: &[u8]) -> Vec<f32> {
    let pairs = bytes.as_chunks::<2>().0.iter();
    match name.rsplit('-').next() {
        Some("bf16") => pairs.map(|bytes| bf16::from_le_bytes(*bytes).to_f32()).collect(),
        Some("f16") => pairs.map(|bytes| f16::from_le_bytes(*bytes).to_f32()).collect(),
        _ => floats(bytes),
    }
}

/// Packed words, scales and biases to the bit; dequantized to the bit for f32, and for bf16 and f16 when product and sum are
/// rounded to that type as mlx does.
#[test]
fn every_case_of_mlx() {
    let vectors = safetensors(&["quant/mlx.safetensors"]);
    let mut cases = 0;
    for (key, expected_packed) in &vectors {
        let Some(name) = key.strip_suffix(".packed") else { continue };
        let field = |mark: char| name.split('-').find_map(|part| part.strip_prefix(mark)?.parse::<usize>().ok());
        let width = CodeBits::new(u8::try_from(field('b').expect("bits")).expect("few")).expect("a width");
        let rule = MlxRule::new(width, field('g').expect("a group")).expect("a format");
        let weights: Vec<f32> = weights_of(name).into_iter().map(|weight| rounded(name, weight)).collect();
        let Quantized { codes, scales, biases } = quantize(rule, &weights);
        let mut packed = vec![0; bit_stream_bytes(width, codes.len()).expect("whole bytes")];
        pack_bit_stream(width, &codes, &mut packed).expect("lengths fit");
        assert_eq!(&packed, expected_packed, "{name}: packed");
        let mut unpacked = vec![0; codes.len()];
        unpack_bit_stream(width, &packed, &mut unpacked).expect("lengths fit");
        assert_eq!(unpacked, codes, "{name}: PK-1");
        for (values, part) in [(&scales, "scales"), (&biases, "biases")] {
            let ours: Vec<f32> = values.iter().map(|value| rounded(name, *value)).collect();
            assert_eq!(bits(&ours), bits(&widened(name, &vectors[&format!("{name}.{part}")])), "{name}: {part}");
        }
        if let Some(expected) = vectors.get(&format!("{name}.dequantized")) {
            check_dequantized(name, rule, &Quantized { codes, scales, biases }, &widened(name, expected));
        }
        cases += 1;
    }
    assert_eq!(cases, 26);
}

fn check_dequantized(name: &str, rule: MlxRule, quantized: &Quantized, expected: &[f32]) {
    let as_stored = |values: &[f32]| values.iter().map(|value| rounded(name, *value)).collect::<Vec<_>>();
    let (scales, biases) = (as_stored(&quantized.scales), as_stored(&quantized.biases));
    let mut out = vec![0.0; expected.len()];
    let groups = AffineGroups::new(GroupAxis::Runs, rule.group(), &scales, Offset::Bias(&biases)).expect("fits");
    groups.dequantize(0, &quantized.codes, &mut out).expect("lengths fit");
    if name.ends_with("f32") {
        assert_eq!(le_bytes(&out), le_bytes(expected), "{name}: dequantized");
    }
    // mlx's rounding of the product: without the bias ours is the product, which for bf16 and f16 is exact in f32.
    let none = vec![0.0; biases.len()];
    let products = AffineGroups::new(GroupAxis::Runs, rule.group(), &scales, Offset::Bias(&none)).expect("fits");
    products.dequantize(0, &quantized.codes, &mut out).expect("lengths fit");
    let stored = biases.iter().flat_map(|bias| std::iter::repeat_n(*bias, rule.group()));
    let twice: Vec<f32> = out.iter().zip(stored).map(|(q, bias)| rounded(name, rounded(name, *q) + bias)).collect();
    assert!(twice.iter().zip(expected).all(|(a, b)| a == b), "{name}: dequantized in its own type");
}

#[test]
fn only_what_mlx_has() {
    assert!(matches!(MlxRule::new(CodeBits::B1, 64), Err(QuantError::Bits { found: 1, .. })));
    assert_eq!(MlxRule::new(CodeBits::B4, 48), Err(QuantError::MlxGroup { found: 48 }));
    let rule = MlxRule::new(CodeBits::B4, 32).expect("a format");
    let cut = rule.quantize(&[0.0; 33], &mut [0; 33], &mut [0.0], &mut [0.0]);
    assert_eq!(cut, Err(QuantError::GroupSize { found: 32, values: 33 }));
    assert!(rule.quantize(&[0.0; 32], &mut [0; 31], &mut [0.0], &mut [0.0]).is_err());
    assert!(rule.quantize(&[0.0; 32], &mut [0; 32], &mut [], &mut [0.0]).is_err());
    assert!(pack_bit_stream(CodeBits::B3, &[0; 9], &mut [0; 4]).is_err());
    assert!(unpack_bit_stream(CodeBits::B3, &[0; 4], &mut [0; 8]).is_err());
    for bad in [f32::NAN, f32::INFINITY, f32::MAX] {
        let mut weights = vec![0.5; 32];
        weights[3] = bad;
        assert!(quantize(rule, &weights).codes.iter().all(|code| *code <= 15));
    }
}

/// By hand: codes 1, 2, 3 ... of 3 bits are 0o..321 from the lowest bit on.
#[test]
fn a_stream_by_hand() {
    let codes = [1, 2, 3, 4, 5, 6, 7, 0];
    let mut packed = [0; 3];
    pack_bit_stream(CodeBits::B3, &codes, &mut packed).expect("whole bytes");
    assert_eq!(packed, 0o0765_4321_u32.to_le_bytes()[..3]);
    let mut packed = [0; 6];
    pack_bit_stream(CodeBits::B6, &codes.map(|code| code | 0xc0), &mut packed).expect("whole bytes");
    assert_eq!(packed[..3], 0o0403_0201_u32.to_le_bytes()[..3], "bits above the width are dropped");
}
