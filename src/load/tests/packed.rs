//! Weights that other tools have quantized: vectors of the tools as models (tests/data/quant), on any number of ranks.

use std::path::Path;

use serde_json::json;

use super::{carry_out, concatenated};
use crate::format::{self, FormatError, GgmlType, ModelIndex, TensorEntry, packed, safetensors};
use crate::load::{WholeTensor, scan};
use crate::model::Skeleton;
use crate::plan::{
    Chunking, DTypeRule, DeviceRule, Encoding, LoadPlan, LoadRequest, Placement, QuantizationRule, Quantized, Strategy,
    plan,
};
use crate::quant::Kernels;
use crate::store::{LocalStore, Store};
use crate::types::{DType, Fqn, Shape, WorldSize, as_usize};

type Tensor = (DType, Shape, Vec<u8>);

/// Tensors of a vector file.
fn vectors(name: &str) -> Vec<(String, Tensor)> {
    let store = LocalStore::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/quant"));
    let file = format!("{name}.safetensors");
    let index = scan(&store, std::slice::from_ref(&file), None).expect("a vector file");
    let open = store.open(&file).expect("a vector file");
    let read = |entry: &TensorEntry| {
        let mut bytes = vec![0; as_usize(entry.range.len())];
        open.read_exact_at(entry.range.start(), &mut bytes).expect("in the file");
        (entry.dtype, entry.shape.clone(), bytes)
    };
    index.tensors.iter().map(|(name, entry)| (name.to_string(), read(entry))).collect()
}

fn find<'a>(vectors: &'a [(String, Tensor)], name: &str) -> &'a Tensor {
    vectors.iter().find(|(found, _)| found == name).map_or_else(|| panic!("no vector {name}"), |(_, tensor)| tensor)
}

fn scalar(value: i32) -> Tensor {
    (DType::I32, Shape::default(), value.to_le_bytes().to_vec())
}

#[expect(clippy::disallowed_methods, reason = "a test writes its model")]
fn write(root: &Path, tensors: &[(String, Tensor)]) {
    let heads: Vec<_> =
        tensors.iter().map(|(name, (dtype, shape, _))| (Fqn::from(name.as_str()), *dtype, shape.clone())).collect();
    let mut bytes = safetensors::build_header(&heads, &[]).expect("small");
    tensors.iter().for_each(|(_, (_, _, data))| bytes.extend_from_slice(data));
    std::fs::write(root.join("model.safetensors"), bytes).expect("written");
}

/// The index with its components gathered.
fn gathered(root: &Path, config: &serde_json::Value) -> Result<ModelIndex, FormatError> {
    let store = LocalStore::new(root);
    let index = scan(&store, &["model.safetensors".to_owned()], None).expect("good headers");
    packed::gather(index, Some(config.to_string().as_bytes()), &mut |_, entry| {
        let mut bytes = vec![0; as_usize(entry.range.len())];
        let file = store.open("model.safetensors").expect("it is there");
        file.read_exact_at(entry.range.start(), &mut bytes).expect("in the file");
        Ok(bytes)
    })
}

fn make_plan(index: &ModelIndex, root: &Path, world: u32) -> LoadPlan {
    let skeleton = Skeleton::generic(index);
    let binding = skeleton.bind(index).expect("its own names");
    let request = LoadRequest {
        model: "vectors".to_owned(),
        root: root.display().to_string(),
        config_json: None,
        world: WorldSize::new(world).expect("not zero"),
        strategy: Strategy::LowMemory,
        placement: Placement::Shard,
        dtype: DTypeRule::Keep,
        quantization: QuantizationRule::None,
        quantized: Quantized::Refuse,
        chunking: Chunking { chunk_bytes: 1000, reader_threads: 2, queue_chunks: 2 },
        digests: false,
        device: DeviceRule::default(),
        split: Vec::new(),
    };
    plan(request, index, &skeleton, &binding).expect("a plan")
}

/// One tool's model: every component as the tool packed it, whatever the number of ranks, and the values that the tool
/// gives for it, `[out, in]`, compared after `rounded`.
fn check(
    config: &serde_json::Value,
    tensors: &[(String, Tensor)],
    values: &[Vec<f32>],
    rounded: fn(f32) -> f32,
) -> Vec<Encoding> {
    let directory = tempfile::tempdir().expect("a directory");
    write(directory.path(), tensors);
    let index = gathered(directory.path(), config).expect("components fit");
    let mut encodings = Vec::new();
    for world in [1, 2, 3, 4, 5, 7, 8, 16] {
        let plan = make_plan(&index, directory.path(), world);
        let (states, read) = carry_out(&plan, &plan.root);
        assert_eq!(read, plan.input_bytes(), "{world} ranks");
        for (place, tensor) in plan.tensors.iter().enumerate() {
            let parts: Vec<Vec<u8>> = tensor
                .components()
                .iter()
                .enumerate()
                .map(|(component, whole)| {
                    let found = concatenated(&states, (place, component));
                    let name = crate::manifest::part_name(&tensor.fqn, &tensor.encoding, whole.part);
                    assert!(found == find(tensors, &name).2, "{name} on {world} ranks");
                    found
                })
                .collect();
            let parts: Vec<&[u8]> = parts.iter().map(Vec::as_slice).collect();
            let whole =
                WholeTensor { encoding: tensor.encoding, shape: &tensor.shape, parts: &parts, nested_offset: None };
            let found = whole.dequantize(Kernels::detect()).expect("components fit");
            for (&found, expected) in found.iter().zip(values.get(place).map_or(&[][..], Vec::as_slice)) {
                let found = rounded(found);
                // 1 ulp.
                assert!(
                    (found - expected).abs() <= expected.abs() * f32::EPSILON,
                    "{}: {found} {expected}",
                    tensor.fqn
                );
            }
            encodings.push(tensor.encoding);
        }
    }
    encodings
}

/// `[in, out]` of f16 as `[out, in]`.
fn transposed((dtype, shape, bytes): &Tensor) -> Vec<f32> {
    assert_eq!(*dtype, DType::F16);
    let (inputs, outputs) = (as_usize(shape.0[0]), as_usize(shape.0[1]));
    let value = |at: usize| half::f16::from_le_bytes([bytes[2 * at], bytes[2 * at + 1]]).to_f32();
    (0..outputs).flat_map(|output| (0..inputs).map(move |input| value(input * outputs + output))).collect()
}

fn floats((dtype, _, bytes): &Tensor) -> Vec<f32> {
    assert_eq!(*dtype, DType::F32);
    bytes.as_chunks().0.iter().map(|word| f32::from_le_bytes(*word)).collect()
}

/// The tensors `module.part` of a vector's parts.
fn module(vectors: &[(String, Tensor)], case: &str, module: &str, parts: &[(&str, &str)]) -> Vec<(String, Tensor)> {
    let part = |(from, to): &(&str, &str)| (format!("{module}.{to}"), find(vectors, &format!("{case}.{from}")).clone());
    parts.iter().map(part).collect()
}

/// GPTQ's and AWQ's references dequantize in f16.
fn in_f16(value: f32) -> f32 {
    half::f16::from_f32(value).to_f32()
}

fn as_it_is(value: f32) -> f32 {
    value
}

#[test]
fn gptq_of_both_versions() {
    let vectors = vectors("gptq");
    for (version, zeros) in [("gptq", "qzeros_v1"), ("gptq_v2", "qzeros_v2")] {
        for (bits, case) in [(2, "b2-g32"), (3, "b3-g32"), (4, "b4-g32"), (8, "b8-g32"), (4, "b4-g32-act")] {
            let parts = [("qweight", "qweight"), (zeros, "qzeros"), ("scales", "scales"), ("g_idx", "g_idx")];
            let tensors = module(&vectors, case, "m.0.q_proj", &parts);
            let config = json!({"quantization_config":
                {"quant_method": "gptq", "bits": bits, "group_size": 32, "checkpoint_format": version}});
            let expected = transposed(find(&vectors, &format!("{case}.dequantized")));
            let found = check(&config, &tensors, &[expected], in_f16);
            assert!(found.iter().all(|encoding| encoding.name() == format!("gptq-{bits}bit")), "{case}");
        }
    }
}

#[test]
fn awq() {
    let vectors = vectors("awq");
    let parts = [("qweight", "qweight"), ("qzeros", "qzeros"), ("scales", "scales")];
    let tensors = module(&vectors, "g32", "m.0.q_proj", &parts);
    let config = json!({"quantization_config":
        {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": true}});
    let expected = transposed(find(&vectors, "g32.dequantized"));
    let found = check(&config, &tensors, &[expected], in_f16);
    assert_eq!((found.len(), found[0].name()), (8, "awq-4bit".to_owned()));
}

#[test]
fn hqq_along_both_axes() {
    let vectors = vectors("hqq");
    for (bits, axis) in [(8, 1), (4, 1), (4, 0), (3, 1), (3, 0), (2, 1), (1, 1)] {
        let case = format!("b{bits}-g64-axis{axis}");
        let mut tensors =
            module(&vectors, &case, "m.0.q_proj", &[("packed", "W_q"), ("scale", "scale"), ("zero", "zero")]);
        for (key, value) in [("nbits", bits), ("group_size", 64), ("axis", axis)] {
            tensors.push((format!("m.0.q_proj.{key}"), scalar(value)));
        }
        let sizes = [64_i64, 96].iter().flat_map(|size| size.to_le_bytes()).collect();
        tensors.push(("m.0.q_proj.shape".to_owned(), (DType::I64, Shape::from([2]), sizes)));
        tensors.push(("m.0.q_proj.packing".to_owned(), (DType::U8, Shape::from([3]), b"any".to_vec())));
        let dequantized = vectors.iter().find(|(name, _)| *name == format!("{case}.dequantized"));
        let expected: Vec<_> = dequantized.iter().map(|(_, tensor)| floats(tensor)).collect();
        assert!(axis == 0 || !expected.is_empty(), "{case} has values to compare with");
        let found = check(&json!({"quantization_config": {"quant_method": "hqq"}}), &tensors, &expected, as_it_is);
        assert_eq!(found[0].name(), format!("hqq-{bits}bit"));
    }
}

#[test]
fn mlx_groups() {
    let vectors = vectors("mlx");
    for bits in [2, 3, 4, 5, 6, 8] {
        let case = format!("b{bits}-g64-f32");
        let parts = [("packed", "weight"), ("scales", "scales"), ("biases", "biases")];
        let mut tensors = module(&vectors, &case, "m.0.q_proj", &parts);
        // The vectors' words are u32, written as i32.
        tensors[0].1.0 = DType::U32;
        let expected = floats(find(&vectors, &format!("{case}.dequantized")));
        let config = json!({"quantization": {"bits": bits, "group_size": 64}});
        let found = check(&config, &tensors, &[expected], as_it_is);
        assert_eq!(found[0].name(), format!("mlx-{bits}bit"));
    }
}

#[test]
fn fp8_in_blocks() {
    let vectors = vectors("fp8");
    let (_, shape, bytes) = find(&vectors, "matrix").clone();
    let scales = find(&vectors, "matrix_scale_inv").clone();
    let tensors = vec![
        ("m.0.q_proj.weight".to_owned(), (DType::F8E4M3, shape, bytes)),
        ("m.0.q_proj.weight_scale_inv".to_owned(), scales),
    ];
    let config = json!({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}});
    let expected = floats(find(&vectors, "matrix_dequantized"));
    let found = check(&config, &tensors, &[expected], as_it_is);
    assert_eq!(found[0].name(), "fp8-e4m3");
}

/// candle's blocks against gguf's own Python code, which packs no K-quants.
#[test]
fn blocks_of_gguf() {
    let vectors = vectors("gguf");
    let (_, _, weights) = find(&vectors, "weights");
    let weights: Vec<f32> = weights.as_chunks().0.iter().map(|word| f32::from_le_bytes(*word)).collect();
    let dequantized = |ggml_type: GgmlType, name: &str| {
        let (_, _, bytes) = find(&vectors, name);
        let mut found = vec![0.0; weights.len()];
        format::dequantize(ggml_type, bytes, &mut found).expect("whole blocks");
        let expected = floats(find(&vectors, &format!("{}.dequantized", ggml_type.name())));
        for (at, (found, expected)) in found.iter().zip(&expected).enumerate() {
            let close = (found - expected).abs() <= expected.abs() * f32::EPSILON;
            assert!(close, "{} {at}: {found} {expected}", ggml_type.name());
        }
    };
    for ggml_type in [GgmlType::Q4_0, GgmlType::Q4_1, GgmlType::Q5_0, GgmlType::Q5_1, GgmlType::Q8_0] {
        let name = format!("{}.packed", ggml_type.name());
        let (_, _, expected) = find(&vectors, &name);
        let mut packed = vec![0; expected.len()];
        format::quantize(ggml_type, &weights, &mut packed).expect("whole blocks");
        let different = packed.iter().zip(expected).filter(|(found, expected)| found != expected).count();
        assert_eq!(different, 0, "{}: of {} bytes", ggml_type.name(), packed.len());
        dequantized(ggml_type, &name);
    }
    for ggml_type in [GgmlType::Q2_K, GgmlType::Q3_K, GgmlType::Q4_K, GgmlType::Q5_K, GgmlType::Q6_K] {
        dequantized(ggml_type, &format!("{}.blocks", ggml_type.name()));
    }
}

/// What does not fit is named, with what was expected and found.
#[test]
fn components_that_do_not_fit_are_refused() {
    let vectors = vectors("awq");
    let parts = [("qweight", "qweight"), ("qzeros", "qzeros"), ("scales", "scales")];
    let good = module(&vectors, "g32", "m.q_proj", &parts);
    let config = |extra: &str, value: serde_json::Value| {
        let mut section = json!({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"});
        section[extra] = value;
        json!({"quantization_config": section})
    };
    let refused = |tensors: &[(String, Tensor)], config: &serde_json::Value, expected: &str| {
        let directory = tempfile::tempdir().expect("a directory");
        write(directory.path(), tensors);
        let error = gathered(directory.path(), config).expect_err(expected).to_string();
        assert!(error.contains(expected), "{error}");
    };
    let unchanged = config("bits", json!(4));
    refused(&good[..2], &unchanged, "m.q_proj.scales: a component: expected a tensor, found none");
    refused(&good, &config("group_size", json!(64)), "m.q_proj.weight: qzeros: expected I32 [1, 8], found I32 [3, 8]");
    refused(&good, &config("version", json!("gemv")), "config.json: version: expected gemm, found gemv");
    refused(&good, &config("quant_method", json!("quip")), "quant_method: expected bitsandbytes, gptq, awq");
    let mut beside = good.clone();
    beside.push(("m.q_proj.weight".to_owned(), scalar(1)));
    refused(&beside, &unchanged, "expected its components, found a tensor of its own beside them");
}
