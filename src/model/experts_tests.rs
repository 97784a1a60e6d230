//! Mixtures of experts against what transformers makes of the same configurations (tests/data/model/README.md).

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};

use super::*;
use crate::format::{Encoding, FileEntry, GgmlTensor, GgmlType, ModelIndex, RowOrder, TensorEntry};
use crate::types::{ByteRange, DType, Fqn, Shape};

fn vectors() -> Value {
    let text = include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/model/experts.json"));
    serde_json::from_slice(text).expect("JSON")
}

fn models() -> Vec<(String, Value)> {
    vectors()["models"].as_object().expect("models").clone().into_iter().collect()
}

fn skeleton(config: &Value) -> Skeleton {
    Skeleton::from_config(config.to_string().as_bytes()).expect("a configuration of transformers")
}

fn shapes(names: &Value) -> BTreeMap<Fqn, Shape> {
    let shape = |sizes: &Value| Shape(sizes.as_array().expect("sizes").iter().filter_map(Value::as_u64).collect());
    names.as_object().expect("names").iter().map(|(name, sizes)| (name.as_str().into(), shape(sizes))).collect()
}

/// A file that has these tensors one after another in the order of their names.
fn index(shapes: &BTreeMap<Fqn, Shape>) -> ModelIndex {
    let mut index = ModelIndex { files: vec![FileEntry { name: "m".into(), len_bytes: 0 }], ..ModelIndex::default() };
    let mut start = 1000;
    for (fqn, shape) in shapes {
        let range = ByteRange::with_len(start, shape.bytes(DType::BF16).expect("small")).expect("small");
        start = range.end();
        let entry = TensorEntry { dtype: DType::BF16, shape: shape.clone(), file: 0, range, encoding: Encoding::Plain };
        index.tensors.insert(fqn.clone(), entry);
    }
    index
}

#[test]
fn skeletons_are_what_transformers_saves() {
    for (name, model) in models() {
        let skeleton = skeleton(&model["config"]);
        let expected = shapes(&model["apart"]);
        let found: BTreeMap<Fqn, Shape> =
            skeleton.tensors.iter().map(|tensor| (tensor.fqn.clone(), tensor.shape.clone())).collect();
        assert_eq!(found.len(), skeleton.tensors.len(), "{name}: a name twice");
        assert_eq!(found, expected, "{name}");
        assert_eq!(Some(skeleton.parameters()), model["parameters"].as_u64(), "{name}");
        assert_eq!(skeleton.bind(&index(&expected)).expect("its own tensors").len(), expected.len(), "{name}");
    }
}

/// `MO-4`: from fused files every byte goes to one tensor, of the shape that it has where experts are stored apart.
#[test]
fn mo_4_fused_experts_are_the_same_tensors() {
    for (name, model) in models() {
        let skeleton = skeleton(&model["config"]);
        let fused = index(&shapes(&model["fused"]));
        let fused_bytes: u64 = fused.tensors.values().map(|entry| entry.range.len()).sum();
        let apart = skeleton.with_experts_apart(fused);
        let binding = skeleton.bind(&apart).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(binding.ignored.is_empty(), "{name}: {:?}", binding.ignored);
        let inspection = inspect(&skeleton, &apart, &binding);
        assert_eq!(Some(inspection.parameters), model["parameters"].as_u64(), "{name}");
        assert_eq!(inspection.stored_bytes, fused_bytes, "{name}");
        let mut ranges: Vec<ByteRange> = apart.tensors.values().map(|entry| entry.range).collect();
        ranges.sort_unstable();
        assert!(ranges.is_sorted_by(|one, next| one.end() == next.start()), "{name}: a hole or an overlap");
    }
}

/// By hand for Mixtral with 3 experts, hidden size 64, 32 within an expert, bf16: 4,096 bytes a matrix; gate (w1) above up
/// (w3) in one tensor, down (w2) in the other.
#[test]
fn matrices_lie_where_transformers_fuses_them() {
    let (_, model) = models().into_iter().find(|(name, _)| name == "mixtral").expect("it is there");
    let skeleton = skeleton(&model["config"]);
    let fused = index(&shapes(&model["fused"]));
    let start = |name: &str| fused.tensors[&Fqn::from(name)].range.start();
    let [both, down] = ["gate_up_proj", "down_proj"].map(|name| start(&format!("model.layers.1.mlp.experts.{name}")));
    let apart = skeleton.with_experts_apart(fused.clone());
    let binding = skeleton.bind(&apart).expect("its tensors");
    for (matrix, expected) in [
        ("0.w1", both),
        ("0.w3", both + 4096),
        ("1.w1", both + 2 * 4096),
        ("2.w3", both + 5 * 4096),
        ("0.w2", down),
        ("2.w2", down + 2 * 4096),
    ] {
        let fqn = Fqn::from(format!("model.layers.1.block_sparse_moe.experts.{matrix}.weight"));
        let entry = &apart.tensors[binding.source(&fqn).expect("bound")];
        assert_eq!((entry.range.start(), entry.range.len()), (expected, 4096), "{matrix}");
    }
}

/// GGUF has gate and up apart, and may have both in blocks: Q8_0 takes 34 bytes for 32 elements.
#[test]
fn experts_in_blocks_are_whole_rows() {
    let (_, model) = models().into_iter().find(|(name, _)| name == "qwen3_moe").expect("it is there");
    let skeleton = skeleton(&model["config"]);
    let ggml = |row_order| Encoding::Ggml(GgmlTensor { ggml_type: GgmlType::Q8_0, row_order });
    let entry = |row_order| TensorEntry {
        dtype: DType::F32,
        shape: [3, 32, 64].into(),
        file: 0,
        range: ByteRange::with_len(96, 3 * 32 * 2 * 34).expect("small"),
        encoding: ggml(row_order),
    };
    let fused = Fqn::from("model.layers.0.mlp.experts.up_proj");
    let of = |entry: TensorEntry| {
        let tensors = BTreeMap::from([(fused.clone(), entry)]);
        skeleton.with_experts_apart(ModelIndex { tensors, ..ModelIndex::default() }).tensors
    };
    let apart = of(entry(RowOrder::Same));
    let second = &apart[&Fqn::from("model.layers.0.mlp.experts.1.up_proj.weight")];
    assert_eq!((second.range.start(), second.range.len()), (96 + 2176, 2176));
    assert_eq!((&second.shape, &second.encoding), (&Shape::from([32, 64]), &ggml(RowOrder::Same)));
    assert_eq!(of(entry(RowOrder::InterleavedHalves { head_rows: 8 })).keys().collect::<Vec<_>>(), [&fused]);
}

/// As transformers counts them on the meta device; Mixtral-8x7B, Qwen3-30B-A3B and Qwen1.5-MoE-A2.7B are what their index
/// files and model cards say.
#[test]
fn published_mixtures_have_their_published_counts() {
    let published = vectors()["published"].clone();
    for (name, model) in published.as_object().expect("models") {
        assert_eq!(Some(skeleton(&model["config"]).parameters()), model["parameters"].as_u64(), "{name}");
    }
    let count = |name: &str| published[name]["parameters"].as_u64();
    assert_eq!(count("Mixtral-8x7B-v0.1"), Some(46_702_792_704));
    assert_eq!(count("Qwen3-30B-A3B"), Some(30_532_122_624));
    assert_eq!(count("Qwen1.5-MoE-A2.7B"), Some(14_315_784_192));
    // By hand: 6 of 8 experts idle in 32 layers, 3 * 4096 * 14336 parameters each; 120 of 128 in 48, 3 * 2048 * 768 each.
    let active = |name: &str| inspect::ExpertFigures::new(&skeleton(&published[name]["config"]));
    let figures = active("Mixtral-8x7B-v0.1").expect("experts");
    assert_eq!((figures.count, figures.per_token), (8, 2));
    assert_eq!(figures.active_parameters, 46_702_792_704 - 33_822_867_456);
    let figures = active("Qwen3-30B-A3B").expect("experts");
    assert_eq!(figures.active_parameters, 30_532_122_624 - 27_179_089_920);
}

/// Every matrix of every expert is a linear layer's; routers and the shared expert's gate are not.
#[test]
fn experts_are_linear_and_routers_are_not() {
    for (name, model) in models() {
        for tensor in skeleton(&model["config"]).tensors {
            let fqn = tensor.fqn.as_str();
            let router = fqn.ends_with(".gate.weight") || fqn.ends_with(".shared_expert_gate.weight");
            assert_eq!(tensor.role == Role::Router, router, "{name}: {fqn}");
            let expert = fqn.contains(".experts.") || fqn.contains(".shared_expert.");
            assert!(!expert || tensor.role == Role::Linear, "{name}: {fqn}");
        }
        // The same from the names alone, where there is no config.json.
        let generic = Skeleton::generic(&index(&shapes(&model["apart"])));
        let routers = generic.tensors.iter().filter(|tensor| tensor.role == Role::Router);
        let names: BTreeSet<&str> = routers.map(|tensor| tensor.fqn.as_str()).collect();
        assert!(names.iter().all(|name| name.contains("gate.weight")) && !names.is_empty(), "{name}: {names:?}");
    }
}

#[test]
fn what_does_not_fit_is_named() {
    let (_, model) = models().into_iter().find(|(name, _)| name == "qwen3_moe").expect("it is there");
    let refused = |edit: &dyn Fn(&mut BTreeMap<Fqn, Shape>)| {
        let mut names = shapes(&model["fused"]);
        edit(&mut names);
        let skeleton = skeleton(&model["config"]);
        skeleton.bind(&skeleton.with_experts_apart(index(&names))).expect_err("it does not fit").to_string()
    };
    let fused = |name: &str| Fqn::from(format!("model.layers.1.mlp.experts.{name}"));
    let error = refused(&|names| _ = names.insert(fused("down_proj"), [4, 64, 32].into()));
    assert!(error.contains("1 unexpected (model.layers.1.mlp.experts.3.down_proj.weight)"), "{error}");
    let error = refused(&|names| _ = names.insert(fused("gate_up_proj"), [3, 64, 48].into()));
    assert!(error.contains("experts.0.gate_proj.weight: expected [32, 64], found [32, 48]"), "{error}");
    let error = refused(&|names| _ = names.insert(fused("gate_up_proj"), [3, 63, 64].into()));
    assert!(
        error.contains("6 missing") && error.contains("1 unexpected (model.layers.1.mlp.experts.gate_up"),
        "{error}"
    );
    // Both forms at once: the fused one is too much.
    let error = refused(&|names| _ = names.insert(fused("2.down_proj.weight"), [64, 32].into()));
    assert!(error.contains("unexpected (model.layers.1.mlp.experts.down_proj)"), "{error}");
}

#[test]
fn bad_experts_are_named() {
    let (_, model) = models().into_iter().find(|(name, _)| name == "qwen2_moe").expect("it is there");
    let check = |field: &str, value: Value, expected: &str| {
        let mut config = model["config"].clone();
        config[field] = value;
        let message = ModelConfig::parse(config.to_string().as_bytes()).expect_err(expected).to_string();
        assert!(message.contains(expected), "{message}");
    };
    check("num_experts", Value::Null, "config.json has no num_experts");
    check("num_experts", json!(0), "num_experts: expected 1 to 131072, found 0");
    check("num_experts", json!(100_000), "num_hidden_layers * experts: expected 1 to 131072, found 200000");
    check("num_experts_per_tok", json!(4), "num_experts_per_tok: expected 1 to 3, found 4");
    check("moe_intermediate_size", Value::Null, "no moe_intermediate_size");
    check("shared_expert_intermediate_size", json!(0), "shared_expert_intermediate_size: expected 1");
    check("decoder_sparse_step", json!(0), "decoder_sparse_step: expected 1");
    check("mlp_only_layers", json!("all"), "cannot be read");
}

#[test]
fn generated_mixtures_have_about_the_parameters_asked_for() {
    for architecture in [Architecture::Mixtral, Architecture::Qwen2Moe, Architecture::Qwen3Moe] {
        for text in ["1M", "4M", "30M", "135M", "1B", "7B", "14B", "30B", "100B", "235B"] {
            let asked = parse_parameters(text).expect("a number");
            let request = GenerateRequest {
                architecture,
                parameters: asked,
                dtype: DType::BF16,
                seed: 0,
                max_file_bytes: DEFAULT_FILE_BYTES,
            };
            let model = generate(&request).expect("a good request");
            let off = model.parameters.abs_diff(asked) * 100 / asked;
            assert!(off <= 3, "{architecture:?} {text}: {} parameters", model.parameters);
            let config = ModelConfig::parse(model.config_json.as_bytes()).expect("our own configuration");
            assert_eq!(config.architecture, architecture);
            assert!(config.experts.is_some_and(|experts| experts.count >= 8));
        }
    }
}
