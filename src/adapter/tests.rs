//! The adapter module against PEFT: its files, and vectors that tests/data/adapter/README.md says how to make.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::model::Skeleton;
use crate::types::as_usize;

const PEFT_CONFIG: &str = include_str!("../../tests/data/golden/tiny-llama-peft-r4/adapter_config.json");
const TARGETS: &str = include_str!("../../tests/data/adapter/targets.json");
const MERGES: &str = include_str!("../../tests/data/adapter/merges.json");
const TINY_LLAMA: &[u8] = include_bytes!("../../tests/data/tiny-llama/config.json");

fn tiny_linears() -> Vec<LinearModule> {
    linears(&Skeleton::from_config(TINY_LLAMA).expect("a Llama"))
}

fn with(changes: &Value) -> Value {
    let mut config: Value = serde_json::from_str(PEFT_CONFIG).expect("JSON");
    let fields = config.as_object_mut().expect("an object");
    fields.extend(changes.as_object().expect("an object").clone());
    config
}

/// The file that PEFT 0.21 wrote is written back byte for byte, unknown fields too.
#[test]
fn pefts_config_is_written_as_it_was_read() {
    let config = AdapterConfig::parse(PEFT_CONFIG.as_bytes()).expect("PEFT's");
    assert_eq!(config.to_json(), PEFT_CONFIG);
    assert_eq!((config.r, config.lora_alpha, config.use_dora), (4, 8.0, false));
    assert_eq!(config.base_model_name_or_path.as_deref(), Some("tiny-llama"));
    let later = with(&json!({"of_peft_0_99": {"b": 1, "a": "é𝄞"}}));
    let config = AdapterConfig::from_value(&later).expect("an unknown field is kept");
    assert_eq!(config.to_value(), later);
    // json.dumps({"b": 1, "a": "é𝄞"}, indent=2, sort_keys=True) escapes as UTF-16.
    assert!(config.to_json().contains("\"a\": \"\\u00e9\\ud834\\udd1e\",\n    \"b\": 1"), "{}", config.to_json());
}

/// A configuration of ours has PEFT's fields, but for the version, which PEFT fills in.
#[test]
fn a_new_config_has_pefts_fields() {
    let names = ["q_proj", "down_proj", "v_proj"].map(str::to_owned).to_vec();
    let mut config = AdapterConfig::new(4, 8.0, TargetModules::Names(names));
    config.base_model_name_or_path = Some("tiny-llama".to_owned());
    let expected: Vec<&str> = PEFT_CONFIG.lines().filter(|line| !line.contains("peft_version")).collect();
    assert_eq!(config.to_json(), expected.join("\n"));
    assert_eq!(AdapterConfig::parse(config.to_json().as_bytes()).expect("our own"), config);
}

#[test]
fn what_is_not_lora_is_refused_by_name() {
    let refused = [
        ("peft_type", json!("IA3")),
        ("bias", json!("all")),
        ("task_type", json!("SEQ_CLS")),
        ("modules_to_save", json!(["lm_head"])),
        ("lora_bias", json!(true)),
        ("target_parameters", json!(["experts.gate"])),
        ("trainable_token_indices", json!([1, 2])),
        ("layer_replication", json!([[0, 4], [2, 5]])),
        ("use_qalora", json!(true)),
        ("kasa_config", json!({"beta": 1e-4})),
        ("arrow_config", json!({"top_k": 3})),
        ("init_lora_weights", json!("pissa_niter_16")),
        ("init_lora_weights", json!("loftq")),
        ("megatron_config", json!({"tensor_model_parallel_size": 2})),
    ];
    for (field, value) in refused {
        let error = AdapterConfig::from_value(&with(&json!({field: value}))).expect_err(field);
        assert!(matches!(&error, AdapterError::Unsupported { field: found, .. } if found == field), "{error}");
    }
    let senseless = [
        ("r", json!(0)),
        ("r", json!(65537)),
        ("r", json!("4")),
        ("lora_alpha", json!("8")),
        ("lora_dropout", json!(1.0)),
        ("use_dora", json!("yes")),
        ("target_modules", json!([1])),
        ("target_modules", json!({"q_proj": 1})),
        ("rank_pattern", json!({"q_proj": 0})),
        ("rank_pattern", json!([4])),
        ("layers_to_transform", json!([-1])),
        ("base_model_name_or_path", json!(3)),
    ];
    for (field, value) in senseless {
        let error = AdapterConfig::from_value(&with(&json!({field: value}))).expect_err(field);
        assert!(matches!(&error, AdapterError::Field { field: found, .. } if *found == field), "{field}: {error}");
    }
    for field in ["peft_type", "r", "target_modules"] {
        let error = AdapterConfig::from_value(&with(&json!({field: null}))).expect_err(field);
        assert!(matches!(&error, AdapterError::Missing { field: found } if *found == field), "{field}: {error}");
    }
    for kept in [json!({"init_lora_weights": "gaussian"}), json!({"modules_to_save": []}), json!({"task_type": null})] {
        AdapterConfig::from_value(&with(&kept)).expect("changes nothing");
    }
}

/// Which modules, ranks, alphas and scales: as PEFT puts its layers on tiny-llama.
#[test]
fn targets_are_pefts() {
    let cases: Vec<Value> = serde_json::from_str(TARGETS).expect("JSON");
    // PEFT lets an adapter stand on a tied head until it is merged; the rule of names is what is compared.
    let untied: Vec<LinearModule> =
        tiny_linears().into_iter().map(|linear| LinearModule { tied: false, ..linear }).collect();
    for case in &cases {
        let config = AdapterConfig::from_value(&case["config"]).expect("a configuration");
        let targets = config.targets(&untied).expect("PEFT found some");
        let expected = case["targets"].as_object().expect("an object");
        assert_eq!(targets.len(), expected.len(), "{}", case["config"]);
        for target in targets {
            let wanted = &expected[&target.module];
            assert_eq!(wanted["r"], target.r, "{} {}", case["config"], target.module);
            assert_eq!(wanted["alpha"].as_f64(), Some(target.alpha), "{} {}", case["config"], target.module);
            // serde_json may read the last bit of a number differently.
            let scale = wanted["scale"].as_f64().expect("a number");
            assert!((scale - target.scale).abs() <= f64::EPSILON * scale, "{} {}", case["config"], target.module);
            assert_eq!((&wanted["out"], &wanted["in"]), (&json!(target.out_features), &json!(target.in_features)));
        }
    }
}

#[test]
fn targets_that_cannot_be_are_refused() {
    let refuse = |modules| AdapterConfig::new(4, 8.0, modules).targets(&tiny_linears()).expect_err("refused");
    let error = refuse(TargetModules::Names(vec!["c_attn".to_owned()]));
    let expected = "target_modules c_attn match no linear layer of the model; there are \
                    down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj";
    assert_eq!(error.to_string(), expected);
    // The end of a name after a dot, and not any end.
    assert!(matches!(refuse(TargetModules::Names(vec!["proj".to_owned()])), AdapterError::NoMatch { .. }));
    assert!(matches!(refuse(TargetModules::Pattern("q_proj".to_owned())), AdapterError::NoMatch { .. }));
    assert!(matches!(refuse(TargetModules::Pattern("(".to_owned())), AdapterError::Pattern { .. }));
    let error = refuse(TargetModules::Names(vec!["lm_head".to_owned()])).to_string();
    assert!(error.contains("target_modules is lm_head") && error.contains("tied"), "{error}");
}

#[test]
fn names_are_those_of_pefts_files() {
    let file = include_bytes!("../../tests/data/golden/tiny-llama-peft-r4/adapter_model.safetensors");
    let text = String::from_utf8_lossy(file);
    let module = "model.layers.5.self_attn.v_proj";
    assert!(text.contains(&format!("\"{}\":", lora_a_name(module))));
    assert!(text.contains(&format!("\"{}\":", lora_b_name(module))));
    assert_eq!(magnitude_name("m.q").as_str(), "base_model.model.m.q.lora_magnitude_vector");
    for part in [AdapterPart::A, AdapterPart::B, AdapterPart::Magnitude] {
        assert_eq!(parse_name(adapter_name(module, part).as_str()), Some((module, part)));
    }
    let others =
        ["model.q.lora_A.weight", "base_model.model.q.weight", "base_model.model..lora_A", "", "lora_A.weight"];
    for name in others.into_iter().chain(["base_model.model.lora_A.weight", "base_model.model.q.lora_A.default.weight"])
    {
        assert_eq!(parse_name(name), None, "{name}");
    }
}

fn floats(value: &Value) -> Vec<f32> {
    let float = |item: &Value| {
        #[expect(clippy::cast_possible_truncation, reason = "Python printed f32 values")]
        let value = item.as_f64().expect("a number") as f32;
        value
    };
    value.as_array().expect("an array").iter().map(float).collect()
}

/// The merged weight is PEFT's `merge_and_unload`, for LoRA, rsLoRA and DoRA, for both orientations; f32 rounding of sums
/// of 3 products of numbers of about 1 stays below 2e-6.
#[test]
fn merges_are_pefts() {
    let cases: Vec<Value> = serde_json::from_str(MERGES).expect("JSON");
    assert_eq!(cases.len(), 8);
    for case in &cases {
        let size = |key: &str| case[key].as_u64().expect("a size");
        let orientation = if case["conv1d"] == true { Orientation::InOut } else { Orientation::OutIn };
        let matrix = Matrix { out_features: size("out"), in_features: size("in"), orientation };
        let mut weight = floats(&case["weight"]);
        let (a, b) = (floats(&case["a"]), floats(&case["b"]));
        let magnitude = case["dora"].as_bool().expect("a flag").then(|| floats(&case["magnitude"]));
        if magnitude.is_some() {
            let norms = row_norms(&weight, matrix);
            for (norm, first) in norms.iter().zip(floats(&case["first_magnitude"])) {
                assert!((norm - first).abs() < 1e-6, "{norm} {first}");
            }
        }
        #[expect(clippy::cast_possible_truncation, reason = "PEFT's scale, in the arithmetic of the weights")]
        let scale = scale(size("r"), case["alpha"].as_f64().expect("a number"), case["rslora"] == true) as f32;
        let adapter = LowRank { a: &a, b: &b, magnitude: magnitude.as_deref(), r: size("r"), scale };
        merge(&mut weight, matrix, &adapter).expect("it fits");
        for (position, (merged, expected)) in weight.iter().zip(floats(&case["merged"])).enumerate() {
            assert!((merged - expected).abs() <= 2e-6 * expected.abs().max(1.0), "{position}: {merged} {expected}");
        }
        let short = LowRank { a: &a[1..], ..adapter };
        let error = merge(&mut weight, matrix, &short).expect_err("an element too few");
        assert!(matches!(error, AdapterError::Length { what: "lora_A", expected: 18, found: 17 }), "{error}");
    }
}

/// `kaiming_uniform_(a=sqrt(5))`: uniform in ±1/sqrt(in), so of variance 1/(3·in); over 2^18 values the mean is within 5
/// standard errors and the variance within 1 %.
#[test]
fn ad_2_first_values_are_uniform_and_repeatable() {
    let a = initial_a(1, "model.layers.0.self_attn.q_proj", 64, 4096);
    let bound = 1.0 / 64.0;
    assert_eq!(a.len(), 1 << 18);
    assert!(a.iter().all(|value| value.abs() <= bound));
    let mean = a.iter().copied().map(f64::from).sum::<f64>() / f64::from(1 << 18);
    let variance = a.iter().map(|&value| f64::from(value).powi(2)).sum::<f64>() / f64::from(1 << 18);
    assert!(mean.abs() < 5.0 * (1.0 / (3.0_f64 * 4096.0)).sqrt() / 512.0, "{mean}");
    assert!((variance * 3.0 * 4096.0 - 1.0).abs() < 0.01, "{variance}");
    assert_eq!(a, initial_a(1, "model.layers.0.self_attn.q_proj", 64, 4096));
    // A value depends on its element alone: fewer rows are the first rows.
    assert_eq!(a[..4096], initial_a(1, "model.layers.0.self_attn.q_proj", 1, 4096));
    assert_ne!(a[..4096], initial_a(2, "model.layers.0.self_attn.q_proj", 1, 4096));
    assert_ne!(a[..4096], initial_a(1, "model.layers.1.self_attn.q_proj", 1, 4096));
}

proptest! {
    /// No text makes the parser panic, and what it accepts it writes and reads as the same.
    #[test]
    fn any_config_is_refused_or_round_trips(
        key in "r|lora_alpha|target_modules|rank_pattern|layers_to_transform|bias|loftq_config|x",
        value in prop_oneof![
            Just(json!(null)), Just(json!([])), Just(json!({})), any::<i64>().prop_map(|n| json!(n)),
            any::<i16>().prop_map(|n| json!(f64::from(n) / 8.0)), ".{0,8}".prop_map(|text| json!(text)),
            "[a-z_.*(]{0,8}".prop_map(|text| json!([text])), "[a-z(]{0,4}".prop_map(|text| json!({text: 3})),
        ],
    ) {
        if let Ok(config) = AdapterConfig::from_value(&with(&json!({key: value}))) {
            prop_assert_eq!(&AdapterConfig::parse(config.to_json().as_bytes()).expect("our own text"), &config);
            let _ = config.targets(&tiny_linears());
        }
    }

    /// The order of the dims of a weight changes nothing but the order of its elements.
    #[test]
    fn orientations_agree(out in 1_usize..6, columns in 1_usize..6, r in 1_usize..4, dora in any::<bool>(), seed in any::<u64>()) {
        let (out_features, in_features, rank) = (out as u64, columns as u64, r as u64);
        let values = |name: &str, count: u64| initial_a(seed, name, 1, count);
        let (a, b) = (values("a", rank * in_features), values("b", rank * out_features));
        let magnitude = dora.then(|| values("m", out_features));
        let adapter = LowRank { a: &a, b: &b, magnitude: magnitude.as_deref(), r: rank, scale: 1.5 };
        let mut one = values("w", out_features * in_features);
        let mut other: Vec<f32> = (0..columns * out).map(|at| one[at % out * columns + at / out]).collect();
        merge(&mut one, Matrix { out_features, in_features, orientation: Orientation::OutIn }, &adapter).expect("it fits");
        merge(&mut other, Matrix { out_features, in_features, orientation: Orientation::InOut }, &adapter).expect("it fits");
        for at in 0..as_usize(out_features * in_features) {
            prop_assert!((other[at] - one[at % out * columns + at / out]).abs() <= 1e-5 * other[at].abs().max(1.0));
        }
    }
}
