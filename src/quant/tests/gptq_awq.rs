//! GPTQ and AWQ against vectors of auto-gptq, gptqmodel and autoawq (tests/data/quant).

use half::f16;

use super::{Random, safetensors};
use crate::quant::affine::CodeBits;
use crate::quant::pack::{
    Awq, AwqShape, Gptq, GptqShape, GptqTensors, GptqVersion, Region, pack_awq, pack_gptq_weight, pack_gptq_zeros,
};
use crate::quant::{QuantError, Source};
use crate::types::DType;

fn source(bytes: &[u8]) -> Source<'_> {
    Source::new(DType::F16, bytes).expect("whole elements")
}

/// `[inputs, outputs]` of f16 as a file of the reference holds it.
fn reference(bytes: &[u8]) -> Vec<f16> {
    bytes.as_chunks::<2>().0.iter().map(|bytes| f16::from_le_bytes(*bytes)).collect()
}

/// Both orders: ours is `[outputs, inputs]` of the region, the reference's `[inputs, all outputs]`. Exact: 0 ulp.
fn assert_equal(ours: &[f32], region: &Region, reference: &[f16], all_outputs: usize, context: &str) {
    assert_eq!(ours.len(), region.len());
    for (at, weight) in ours.iter().enumerate() {
        let (output, input) = (at / region.inputs.len(), at % region.inputs.len());
        let expected = reference[(region.inputs.start + input) * all_outputs + region.outputs.start + output];
        assert_eq!(f16::from_f32(*weight).to_bits(), expected.to_bits(), "{context}: input {input}, output {output}");
    }
}

fn regions(inputs: usize, outputs: usize, random: &mut Random) -> Vec<Region> {
    let mut range = |bound: usize| {
        let (a, b) = (random.below(bound + 1), random.below(bound + 1));
        a.min(b)..a.max(b)
    };
    let mut regions: Vec<_> = (0..20).map(|_| Region { inputs: range(inputs), outputs: range(outputs) }).collect();
    regions.push(Region::whole(inputs, outputs));
    regions
}

/// Inputs and outputs of each case of make_gptq.py.
fn gptq_shape(name: &str, version: GptqVersion) -> GptqShape {
    let (inputs, outputs) = match name {
        "b4-g128" => (128, 32),
        "b4-g64-ragged" => (96, 32),
        _ if name.ends_with("act") => (64, 32),
        _ => (96, 64),
    };
    let bits = CodeBits::new(name.as_bytes()[1] - b'0').expect("a width");
    let group = name.split('-').find_map(|part| part.strip_prefix('g')?.parse().ok()).expect("a group");
    GptqShape { bits, version, inputs, outputs, group }
}

#[test]
fn every_case_of_gptq() {
    let vectors = safetensors(&["quant/gptq.safetensors"]);
    let mut random = Random(11);
    let mut cases = 0;
    for name in vectors.keys().filter_map(|key| key.strip_suffix(".codes")) {
        let of = |part: &str| vectors[&format!("{name}.{part}")].as_slice();
        for (version, qzeros) in [(GptqVersion::V1, of("qzeros_v1")), (GptqVersion::V2, of("qzeros_v2"))] {
            let shape = gptq_shape(name, version);
            let mut packed = vec![0xff; of("qweight").len()];
            pack_gptq_weight(shape, of("codes"), &mut packed).expect("sizes fit");
            assert_eq!(packed, of("qweight"), "{name}: qweight");
            let mut packed = vec![0xff; qzeros.len()];
            pack_gptq_zeros(shape, of("zeros"), &mut packed).expect("sizes fit");
            assert_eq!(packed, qzeros, "{name}: qzeros {version:?}");

            let tensors =
                GptqTensors { qweight: of("qweight"), qzeros, scales: source(of("scales")), g_idx: Some(of("g_idx")) };
            let layer = Gptq::new(shape, tensors).expect("sizes fit");
            assert_eq!(layer.is_act_order(), name.ends_with("act"), "{name}");
            let mut codes = vec![0; of("codes").len()];
            layer.codes(&Region::whole(shape.inputs, shape.outputs), &mut codes).expect("inside");
            assert_eq!(codes, of("codes"), "{name}: codes");
            let mut zeros = vec![0; of("zeros").len()];
            layer.zeros(0..shape.outputs, &mut zeros).expect("inside");
            assert_eq!(zeros, of("zeros"), "{name}: zeros {version:?}");
            for region in regions(shape.inputs, shape.outputs, &mut random) {
                let mut out = vec![f32::NAN; region.len()];
                layer.dequantize(&region, &mut out).expect("inside");
                let context = format!("{name} {version:?} {region:?}");
                assert_equal(&out, &region, &reference(of("dequantized")), shape.outputs, &context);
            }
            cases += 1;
        }
    }
    assert_eq!(cases, 20);
}

/// Without `g_idx` groups follow each other: the cases that are not act-order give the same.
#[test]
fn groups_without_indices() {
    let vectors = safetensors(&["quant/gptq.safetensors"]);
    for name in ["b2-g32", "b3-g32", "b4-g128", "b4-g64-ragged"] {
        let of = |part: &str| vectors[&format!("{name}.{part}")].as_slice();
        let shape = gptq_shape(name, GptqVersion::V2);
        let (qweight, qzeros, scales) = (of("qweight"), of("qzeros_v2"), source(of("scales")));
        let layer = Gptq::new(shape, GptqTensors { qweight, qzeros, scales, g_idx: None }).expect("sizes fit");
        let region = Region::whole(shape.inputs, shape.outputs);
        let mut out = vec![0.0; region.len()];
        layer.dequantize(&region, &mut out).expect("inside");
        assert_equal(&out, &region, &reference(of("dequantized")), shape.outputs, name);
    }
}

/// gptqmodel's `(stored + 1) & mask`: a stored 15 is a zero of 0.
#[test]
fn a_zero_of_version_1_wraps() {
    let shape = GptqShape { bits: CodeBits::B4, version: GptqVersion::V1, inputs: 8, outputs: 8, group: 8 };
    let zeros = [0, 1, 2, 15, 0, 8, 7, 0];
    let mut qzeros = [0; 4];
    pack_gptq_zeros(shape, &zeros, &mut qzeros).expect("sizes fit");
    assert_eq!(u32::from_le_bytes(qzeros), 0xf67f_e10f);
    let scales = [0; 16];
    let tensors = GptqTensors { qweight: &[0; 32], qzeros: &qzeros, scales: source(&scales), g_idx: None };
    let mut read = [0xff; 8];
    Gptq::new(shape, tensors).expect("sizes fit").zeros(0..8, &mut read).expect("inside");
    assert_eq!(read, zeros);
}

#[test]
fn every_case_of_awq() {
    let vectors = safetensors(&["quant/awq.safetensors"]);
    let mut random = Random(13);
    for (name, shape) in [
        ("g32", AwqShape { inputs: 96, outputs: 64, group: 32 }),
        ("g128", AwqShape { inputs: 128, outputs: 32, group: 128 }),
    ] {
        let of = |part: &str| vectors[&format!("{name}.{part}")].as_slice();
        for (codes, expected) in [("codes", "qweight"), ("zeros", "qzeros")] {
            let mut packed = vec![0xff; of(expected).len()];
            pack_awq(of(codes), &mut packed).expect("sizes fit");
            assert_eq!(packed, of(expected), "{name}: {expected}");
        }
        let layer = Awq::new(shape, of("qweight"), of("qzeros"), source(of("scales"))).expect("sizes fit");
        let mut codes = vec![0; of("codes").len()];
        layer.codes(&Region::whole(shape.inputs, shape.outputs), &mut codes).expect("inside");
        assert_eq!(codes, of("codes"), "{name}");
        for region in regions(shape.inputs, shape.outputs, &mut random) {
            let mut out = vec![f32::NAN; region.len()];
            layer.dequantize(&region, &mut out).expect("inside");
            assert_equal(&out, &region, &reference(of("dequantized")), shape.outputs, &format!("{name} {region:?}"));
        }
    }
}

fn build(
    shape: GptqShape,
    qweight: &[u8],
    qzeros: &[u8],
    halves: &[u8],
    g_idx: Option<&[u8]>,
) -> Result<(), QuantError> {
    Gptq::new(shape, GptqTensors { qweight, qzeros, scales: source(halves), g_idx }).map(|_| ())
}

/// PK-2: sizes of every kind that do not fit, and indices that name no group.
#[test]
fn malformed_layers_are_errors() {
    let shape = GptqShape { bits: CodeBits::B3, version: GptqVersion::V1, inputs: 32, outputs: 32, group: 16 };
    let (words, zero_words, halves, indices) = ([0; 3 * 32 * 4], [0; 2 * 3 * 4], [0; 2 * 32 * 2], [0; 32 * 4]);
    assert_eq!(build(shape, &words, &zero_words, &halves, Some(&indices)), Ok(()));
    assert!(build(shape, &words[4..], &zero_words, &halves, None).is_err());
    assert!(build(shape, &words, &zero_words[1..], &halves, None).is_err());
    assert!(build(shape, &words, &zero_words, &halves[2..], None).is_err());
    assert!(build(shape, &words, &zero_words, &halves, Some(&indices[4..])).is_err());
    assert!(build(GptqShape { bits: CodeBits::B5, ..shape }, &words, &zero_words, &halves, None).is_err());
    assert!(build(GptqShape { group: 0, ..shape }, &words, &zero_words, &halves, None).is_err());
    assert!(build(GptqShape { inputs: usize::MAX, ..shape }, &words, &zero_words, &halves, None).is_err());
    assert_eq!(build(GptqShape { inputs: 0, ..shape }, &[], &[], &[], None), Ok(()));
    assert_eq!(build(GptqShape { inputs: usize::MAX / 64, outputs: 0, ..shape }, &[], &[], &[], None), Ok(()));
    for bad in [2_i32, -1, i32::MIN] {
        let mut indices = indices;
        indices[4..8].copy_from_slice(&bad.to_le_bytes());
        let error = build(shape, &words, &zero_words, &halves, Some(&indices)).expect_err("no such group");
        assert_eq!(error, QuantError::GroupIndex { input: 1, groups: 2, found: bad });
    }
    let tensors = GptqTensors { qweight: &words, qzeros: &zero_words, scales: source(&halves), g_idx: None };
    let layer = Gptq::new(shape, tensors).expect("sizes fit");
    #[expect(clippy::reversed_empty_ranges, reason = "it must be refused")]
    let reversed = Region { inputs: 2..1, outputs: 0..1 };
    for (region, count) in [(reversed, 0), (Region { inputs: 0..33, outputs: 0..1 }, 33), (Region::whole(1, 1), 2)] {
        assert!(layer.dequantize(&region, &mut vec![0.0; count]).is_err(), "{region:?}");
    }
    assert!(layer.zeros(0..33, &mut [0; 66]).is_err());

    let shape = AwqShape { inputs: 32, outputs: 16, group: 32 };
    let build = |shape, qweight, qzeros, halves| Awq::new(shape, qweight, qzeros, source(halves)).map(|_| ());
    assert_eq!(build(shape, &[0; 256], &[0; 8], &[0; 32]), Ok(()));
    assert!(build(shape, &[0; 252], &[0; 8], &[0; 32]).is_err());
    assert!(build(AwqShape { outputs: 12, ..shape }, &[0; 256], &[0; 8], &[0; 32]).is_err());
    assert!(build(AwqShape { group: 0, ..shape }, &[0; 256], &[0; 8], &[0; 32]).is_err());
    assert!(build(AwqShape { group: 24, ..shape }, &[0; 256], &[0; 8], &[0; 32]).is_err());
    assert!(pack_awq(&[0; 12], &mut [0; 6]).is_err());
}
