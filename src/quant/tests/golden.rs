//! Equality with the vectors that bitsandbytes and transformers produced (golden/README.md, formats.md sections 1 and 10).

use half::bf16;
use serde_json::Value;

use super::{all_kernels, bits, data, floats, le_bytes, safetensors, sha256};
use crate::quant::{
    BlockSize, DynamicMap, FourBit, FourBitCode, Kernels, NestedStatistics, QuantState, Source, absmax_offset,
};
use crate::types::DType;

fn golden() -> Value {
    serde_json::from_slice(&data("golden/golden_bnb.json")).expect("golden vectors")
}

fn golden_input() -> Vec<u8> {
    input(65_536)
}

/// The input rule of the golden vectors: `count` bf16 values.
#[expect(clippy::cast_precision_loss, reason = "24 bits fit a f32")]
pub(super) fn input(count: u32) -> Vec<u8> {
    let value = |i: u32| {
        let mut u = i.wrapping_mul(2_654_435_761).wrapping_add(12_345);
        u ^= u >> 15;
        u = u.wrapping_mul(0x2c1b_3c6d);
        u ^= u >> 12;
        u = u.wrapping_mul(0x297a_2d39);
        u ^= u >> 15;
        let power = 1.0 / (1_u32 << ((i / 64) % 7)) as f32;
        ((u >> 8) as f32 / 16_777_216.0 - 0.5) * 0.1 * power
    };
    (0..count).flat_map(|i| bf16::from_f32(value(i)).to_le_bytes()).collect()
}

fn text<'v>(value: &'v Value, key: &str) -> &'v str {
    value[key].as_str().unwrap_or_else(|| panic!("{key} is a text"))
}

fn hex_bits(value: &Value) -> u32 {
    u32::from_str_radix(value.as_str().expect("bits as text"), 16).expect("hex digits")
}

fn quantize(kernels: Kernels, format: FourBit, dtype: DType, bytes: &[u8]) -> (Vec<u8>, Vec<f32>) {
    let source = Source::new(dtype, bytes).expect("whole elements");
    let mut packed = vec![0; format.packed_bytes(source.len())];
    let mut absmax = vec![0.0; format.blocks(source.len())];
    let not_finite = kernels.quantize_4bit(format, source, &mut packed, &mut absmax).expect("lengths fit");
    assert_eq!(not_finite, 0);
    (packed, absmax)
}

fn golden_map() -> DynamicMap {
    let values = floats(&data("golden/dynamic_map_f32le.bin"));
    DynamicMap::from_values(values.try_into().expect("256 values")).expect("an ascending map")
}

#[test]
fn four_bit_and_nested_statistics_equal_bitsandbytes() {
    let golden = golden();
    let input = golden_input();
    assert_eq!(sha256(&input), text(&golden["input"], "bf16_sha256"), "the input rule");
    for kernels in all_kernels() {
        for (code, block) in [("nf4", 64), ("nf4", 128), ("fp4", 64), ("fp4", 128)] {
            let expected = &golden["q4"][format!("{code}_{block}")];
            let code = FourBitCode::from_name(code).expect("a code");
            let format = FourBit { code, block: BlockSize::new(block).expect("a block size") };
            let (packed, absmax) = quantize(kernels, format, DType::BF16, &input);
            let context = format!("{} {} {block}", kernels.name(), code.name());
            assert_eq!(sha256(&packed), text(expected, "packed_sha256"), "{context}");
            assert_eq!(sha256(&le_bytes(&absmax)), text(expected, "absmax_sha256"), "{context}");

            let offset = absmax_offset(&absmax);
            assert_eq!(offset.to_bits(), hex_bits(&expected["offset_f64mean_bits"]), "{context}");
            let mut codes = vec![0; absmax.len()];
            let mut nested = vec![0.0; absmax.len().div_ceil(256)];
            kernels.nested_quantize(&absmax, offset, &golden_map(), &mut codes, &mut nested).expect("lengths fit");
            let nested_bits: Vec<u32> =
                expected["nested_absmax_bits"].as_array().expect("a list").iter().map(hex_bits).collect();
            assert_eq!(bits(&nested), nested_bits, "{context}");
            assert_eq!(sha256(&codes), text(expected, "nested_q_default_sha256"), "{context}");
        }
    }
}

/// A zero block, and 65 values from -1 to 1 whose second block is a single value.
#[test]
#[expect(clippy::cast_precision_loss, reason = "small numbers")]
fn special_blocks_equal_bitsandbytes() {
    let golden = golden();
    let format = FourBit { code: FourBitCode::Nf4, block: BlockSize::B64 };
    for kernels in all_kernels() {
        for (key, values) in [
            ("special_zero", vec![0.0_f32; 64]),
            // The statistics of the vector are 64/65 and 1: 65 even steps up to 1.
            ("special_odd", (1..=65).map(|i| i as f32 / 65.0).collect()),
        ] {
            let (packed, absmax) = quantize(kernels, format, DType::F32, &le_bytes(&values));
            let hex: String = packed.iter().map(|byte| format!("{byte:02x}")).collect();
            assert_eq!(hex, text(&golden[key], "packed_hex"), "{key} {}", kernels.name());
            let expected: Vec<f64> =
                golden[key]["absmax"].as_array().expect("a list").iter().flat_map(Value::as_f64).collect();
            assert_eq!(absmax.iter().map(|v| f64::from(*v)).collect::<Vec<_>>(), expected, "{key} {}", kernels.name());
        }
    }
}

/// Every quantized tensor of the files that transformers wrote, from the same bf16 weights.
#[test]
fn every_tensor_of_transformers_files() {
    let weights = safetensors(
        &[1, 2, 3].map(|i| format!("tiny-llama/model-0000{i}-of-00003.safetensors")).each_ref().map(String::as_str),
    );
    let plain = safetensors(&["golden/tiny-llama-bnb-nf4/model.safetensors"]);
    let double = safetensors(&["golden/tiny-llama-bnb-nf4-double/model.safetensors"]);
    let kernels = Kernels::detect();
    let (mut tensors, mut statistics, mut differences) = (0, 0, 0);
    for (name, packed) in &plain {
        let Some(state) = plain.get(&format!("{name}.quant_state.bitsandbytes__nf4")) else { continue };
        let parsed = QuantState::parse(state).expect("a state");
        assert_eq!(parsed.to_json().as_bytes(), state, "{name}");
        let (ours, absmax) = quantize(kernels, parsed.format, DType::BF16, &weights[name]);
        assert!(&ours == packed, "{name}");
        assert!(transposed_bf16(&absmax, parsed.shape.0[1] / 64) == plain[&format!("{name}.absmax")], "{name}");
        assert_eq!(le_bytes(parsed.format.code.values()), plain[&format!("{name}.quant_map")], "{name}");
        assert!(ours == double[name], "{name}");
        let (count, different) = check_nested(name, &absmax, &double);
        tensors += 1;
        statistics += count;
        differences += different;
    }
    assert_eq!(tensors, 42, "six layers of seven matrices");
    // formats.md: about 1 of 1,000, because bitsandbytes' CPU library looks codes up in a table.
    assert!(differences * 200 <= statistics, "{differences} of {statistics}");
}

/// How the plain file holds statistics: bitsandbytes 0.50 saves a model that has run on a CPU with AVX512-BF16 with the
/// statistics as bf16 (exact here, the weights are bf16) and transposed, `[columns / 64, rows]`.
fn transposed_bf16(absmax: &[f32], blocks_per_row: u64) -> Vec<u8> {
    let blocks_per_row = crate::types::as_usize(blocks_per_row);
    assert!(absmax.iter().all(|value| bf16::from_f32(*value).to_f32() == *value));
    (0..blocks_per_row)
        .flat_map(|column| absmax.iter().skip(column).step_by(blocks_per_row))
        .flat_map(|value| bf16::from_f32(*value).to_le_bytes())
        .collect()
}

/// The statistics of one tensor against the file's; the numbers of codes and of codes that differ.
///
/// As the plain file, this one was saved after the model had run: its statistics were quantized, read back, rounded to bf16
/// and quantized again with the mean of those. The first pass is repeated here by bitsandbytes' own table.
fn check_nested(name: &str, absmax: &[f32], double: &std::collections::BTreeMap<String, Vec<u8>>) -> (usize, usize) {
    let state = &double[&format!("{name}.quant_state.bitsandbytes__nf4")];
    let parsed = QuantState::parse(state).expect("a state");
    assert_eq!(parsed.to_json().as_bytes(), state, "{name}");
    let values = floats(&double[&format!("{name}.nested_quant_map")]);
    let map = DynamicMap::from_values(values.try_into().expect("256 values")).expect("an ascending map");
    let absmax = read_back_as_bf16(absmax, &map);
    let offset = parsed.nested.expect("a nested state").offset;
    // torch sums in f32 and in another order.
    assert!(absmax_offset(&absmax).to_bits().abs_diff(offset.to_bits()) <= 1, "{name}");

    let file_codes = &double[&format!("{name}.absmax")];
    let file_nested = floats(&double[&format!("{name}.nested_absmax")]);
    let mut codes = vec![0; absmax.len()];
    let mut nested = vec![0.0; file_nested.len()];
    Kernels::detect().nested_quantize(&absmax, offset, &map, &mut codes, &mut nested).expect("lengths fit");
    assert_eq!(bits(&nested), bits(&file_nested), "{name}");
    let mut different = 0;
    for (index, (ours, file)) in codes.iter().zip(file_codes).enumerate() {
        let t = (absmax[index] - offset) * (1.0 / nested[index / 256]);
        assert_eq!(code_of_bin(t, &map), *file, "{name}: code {index}, t {t}, ours {ours}");
        different += usize::from(ours != file);
    }
    // What is read back differs from what went in by half a step of the map at most: 0.0072 of the group's largest.
    for (index, (read, absmax)) in read(file_codes, &file_nested, offset, &map).iter().zip(&absmax).enumerate() {
        assert!((read - absmax).abs() <= 0.0073 * nested[index / 256], "{name}: {index}: {read} {absmax}");
    }
    (codes.len(), different)
}

fn read(codes: &[u8], nested_absmax: &[f32], offset: f32, map: &DynamicMap) -> Vec<f32> {
    let mut out = vec![0.0; codes.len()];
    NestedStatistics { codes, first_block: 0, nested_absmax, offset, map }.dequantize(&mut out).expect("lengths fit");
    out
}

fn read_back_as_bf16(absmax: &[f32], map: &DynamicMap) -> Vec<f32> {
    let offset = absmax_offset(absmax);
    let (mut codes, mut nested) = (vec![0; absmax.len()], vec![0.0; absmax.len().div_ceil(256)]);
    Kernels::detect().nested_quantize(absmax, offset, map, &mut codes, &mut nested).expect("lengths fit");
    for (index, code) in codes.iter_mut().enumerate() {
        *code = code_of_bin((absmax[index] - offset) * (1.0 / nested[index / 256]), map);
    }
    read(&codes, &nested, offset, map).iter().map(|value| bf16::from_f32(*value).to_f32()).collect()
}

/// The code of the middle of the bin of `t`, of 65,536 bins over [-1, 1]: what bitsandbytes' CPU library answers.
fn code_of_bin(t: f32, map: &DynamicMap) -> u8 {
    let middle = ((f64::from(t) + 1.0) * 32_767.5).round() / 32_767.5 - 1.0;
    let below = map.values().windows(2).filter(|pair| f64::from((pair[0] + pair[1]) / 2.0) < middle).count();
    u8::try_from(below).expect("255 midpoints")
}

#[test]
fn the_standard_map_is_the_golden_one_and_within_2_ulp_of_another_build() {
    let standard = DynamicMap::standard();
    assert_eq!(le_bytes(standard.values()), data("golden/dynamic_map_f32le.bin"));
    assert_eq!(sha256(&le_bytes(standard.values())), text(&golden()["dynamic_map"], "sha256_f32le"));
    let other = floats(&data("golden/dynamic_map_torch215_f32le.bin"));
    for (ours, other) in standard.values().iter().zip(other) {
        assert!(ours.to_bits().abs_diff(other.to_bits()) <= 2, "{ours} {other}");
    }
}

#[test]
fn states_are_the_text_that_python_writes() {
    let golden = golden();
    for key in ["json_plain", "json_nested"] {
        let state = QuantState::parse(text(&golden, key).as_bytes()).expect("a state");
        assert_eq!(state.to_json(), text(&golden, key));
        assert_eq!(state.shape.0, [64, 1024]);
        assert_eq!(state.nested.is_some(), key == "json_nested");
    }
}

/// Digests of the golden input quantized and dequantized by `int8_vectorwise_quant` and `int8_vectorwise_dequant` of
/// bitsandbytes 0.50.2 on CPU.
#[test]
fn int8_rows_equal_bitsandbytes() {
    let input = golden_input();
    let source = Source::new(DType::BF16, &input).expect("whole elements");
    for kernels in all_kernels() {
        let (mut q, mut scb) = (vec![0; 65_536], vec![0.0; 64]);
        assert_eq!(kernels.quantize_int8_rows(source, 1024, &mut q, &mut scb), Ok(0));
        assert_eq!(
            sha256(&q),
            "e81fb9883d997223787b93e7a127456809fd64e643ef79cde9ec9323b972077e",
            "{}",
            kernels.name()
        );
        assert_eq!(
            sha256(&le_bytes(&scb)),
            "32995df5cbf04c77dd98c28e9363493d455c7daf2285596ea4b12335c2c69f14",
            "{}",
            kernels.name()
        );
        let mut out = vec![0.0; 65_536];
        kernels.dequantize_int8_rows(1024, &q, &scb, &mut out).expect("lengths fit");
        assert_eq!(
            sha256(&le_bytes(&out)),
            "9e41ea053c506fe9d006b85cca35e484ef4c1e45bd131c648bb38954148ee467",
            "{}",
            kernels.name()
        );
    }
}
