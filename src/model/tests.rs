//! Known models, bindings and generated models.

use std::collections::BTreeMap;

use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::format::safetensors::{header_len, parse_header};
use crate::format::{Encoding, FileEntry, ModelIndex, TensorEntry, merge, parse_index_json};
use crate::types::{ByteRange, DType, Fqn, Shape, as_u64, as_usize};

fn decoder(name: &str, sizes: [u64; 6], more: &serde_json::Value) -> Skeleton {
    let [hidden, layers, heads, key_value_heads, inner, vocab] = sizes;
    let mut config = json!({
        "architectures": [name], "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads, "intermediate_size": inner, "vocab_size": vocab,
    });
    let more = more.as_object().cloned().unwrap_or_default();
    config.as_object_mut().expect("an object").extend(more);
    Skeleton::from_config(config.to_string().as_bytes()).expect("a good configuration")
}

/// Parameter counts as published for these models (model cards, and the models' own index files).
#[test]
fn published_models_have_their_published_counts() {
    let check = |name: &str, sizes: [u64; 6], more: serde_json::Value, expected: u64| {
        assert_eq!(decoder(name, sizes, &more).parameters(), expected, "{name} {sizes:?}");
    };
    let llama = "LlamaForCausalLM";
    check(llama, [4096, 32, 32, 32, 11008, 32000], json!({"rope_scaling": null}), 6_738_415_616);
    check(llama, [5120, 40, 40, 40, 13824, 32000], json!({}), 13_015_864_320);
    check(llama, [8192, 80, 64, 8, 28672, 32000], json!({}), 68_976_648_192);
    check(llama, [4096, 32, 32, 8, 14336, 128_256], json!({"rope_theta": 500_000.0}), 8_030_261_248);
    check(llama, [8192, 80, 64, 8, 28672, 128_256], json!({}), 70_553_706_496);
    check("MistralForCausalLM", [4096, 32, 32, 8, 14336, 32000], json!({"sliding_window": 4096}), 7_241_732_096);
    check("Qwen2ForCausalLM", [3584, 28, 28, 4, 18944, 152_064], json!({}), 7_615_616_512);
    // Llama-3.2-1B and SmolLM2-135M are tied.
    check(llama, [2048, 16, 32, 8, 8192, 128_256], json!({"tie_word_embeddings": true}), 1_235_814_400);
    check(llama, [576, 30, 9, 3, 1536, 49152], json!({"tie_word_embeddings": true}), 134_515_008);
    // Qwen3-0.6B: heads of 128 that together are wider than the residual stream, norms on queries and keys.
    check(
        "Qwen3ForCausalLM",
        [1024, 28, 16, 8, 3072, 151_936],
        json!({"tie_word_embeddings": true, "head_dim": 128}),
        596_049_920,
    );
}

fn bert(name: &str, [hidden, layers, heads, inner]: [u64; 4]) -> Skeleton {
    let config = json!({
        "architectures": [name], "model_type": "bert", "hidden_size": hidden, "num_hidden_layers": layers,
        "num_attention_heads": heads, "intermediate_size": inner, "vocab_size": 30522,
        "max_position_embeddings": 512, "type_vocab_size": 2,
    });
    Skeleton::from_config(config.to_string().as_bytes()).expect("a good configuration")
}

/// bert-base-uncased as BertModel and as BertForMaskedLM, and all-MiniLM-L6-v2, as published.
#[test]
fn bert_models_have_their_published_counts() {
    assert_eq!(bert("BertModel", [768, 12, 12, 3072]).parameters(), 109_482_240);
    assert_eq!(bert("BertForMaskedLM", [768, 12, 12, 3072]).parameters(), 109_514_298);
    let minilm = bert("BertModel", [384, 6, 12, 1536]);
    assert_eq!(minilm.parameters(), 22_713_216);
    let buffer = minilm.buffers.iter().find(|buffer| buffer.fqn.as_str() == "embeddings.position_ids");
    let values = buffer.expect("BERT has position ids").compute();
    assert!(matches!(values, BufferValues::I64(ids) if ids.len() == 512 && ids[0] == 0 && ids[511] == 511));
}

fn read_tiny_llama() -> (Skeleton, ModelIndex) {
    const FILES: [(&str, &[u8]); 3] = [
        tiny_llama!("model-00001-of-00003.safetensors"),
        tiny_llama!("model-00002-of-00003.safetensors"),
        tiny_llama!("model-00003-of-00003.safetensors"),
    ];
    let headers = FILES
        .iter()
        .map(|&(name, bytes)| {
            let len_bytes = as_u64(bytes.len());
            let len = header_len(name, bytes, len_bytes).expect("a real header");
            let header = parse_header(name, &bytes[8..8 + as_usize(len)], len_bytes).expect("a real header");
            (FileEntry { name: name.to_owned(), len_bytes }, header)
        })
        .collect();
    let (name, json) = tiny_llama!("model.safetensors.index.json");
    let index = parse_index_json(name, json).expect("a real index");
    let index = merge(headers, Some(&index)).expect("a real model");
    (Skeleton::from_config(tiny_llama!("config.json").1).expect("a real configuration"), index)
}

macro_rules! tiny_llama {
    ($name:literal) => {
        ($name, include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/tiny-llama/", $name)).as_slice())
    };
}
use tiny_llama;

/// A model that transformers saved: 2,755,008 parameters by its own index, embeddings tied.
#[test]
fn tiny_llama_binds() {
    let (skeleton, index) = read_tiny_llama();
    let binding = skeleton.bind(&index).expect("its own tensors");
    let inspection = inspect(&skeleton, &index, &binding);
    assert_eq!((inspection.parameters, inspection.stored_bytes), (2_755_008, 5_510_016));
    assert_eq!((inspection.layers, inspection.tensors, inspection.files), (6, 56, 3));
    assert_eq!(inspection.bytes_by_dtype, BTreeMap::from([("BF16".to_owned(), 5_510_016)]));
    assert_eq!(inspection.tied[0].target.as_str(), "model.embed_tokens.weight");
    assert!(inspection.ignored.is_empty());
    // The order is that of a forward pass.
    let names: Vec<&str> = skeleton.tensors.iter().map(|tensor| tensor.fqn.as_str()).collect();
    assert_eq!(names[0], "model.embed_tokens.weight");
    assert_eq!(names[1], "model.layers.0.input_layernorm.weight");
    assert_eq!(names[55], "model.norm.weight");
    // 10000^(-2i/32): 1 first, 10000^(-30/32) last.
    let BufferValues::F32(freqs) = skeleton.buffers[0].compute() else { panic!("inv_freq is f32") };
    assert_eq!((freqs.len(), freqs[0]), (16, 1.0));
    assert!((f64::from(freqs[15]) - 10_f64.powf(-3.75)).abs() < 1e-10);
}

fn index_of(tensors: impl IntoIterator<Item = (String, Shape)>) -> ModelIndex {
    let entry = |shape: Shape| {
        let range = ByteRange::with_len(0, shape.bytes(DType::BF16).expect("small")).expect("small");
        TensorEntry { dtype: DType::BF16, shape, file: 0, range, encoding: Encoding::Plain }
    };
    let tensors = tensors.into_iter().map(|(name, shape)| (Fqn::from(name), entry(shape))).collect();
    ModelIndex { files: vec![FileEntry { name: "m".into(), len_bytes: 0 }], tensors, metadata: BTreeMap::new() }
}

fn small(more: &serde_json::Value) -> Skeleton {
    decoder("LlamaForCausalLM", [64, 2, 4, 2, 128, 256], more)
}

fn tensors_of(skeleton: &Skeleton) -> Vec<(String, Shape)> {
    skeleton.tensors.iter().map(|tensor| (tensor.fqn.to_string(), tensor.shape.clone())).collect()
}

#[test]
fn mo_1_everything_that_differs_is_named_at_once() {
    let skeleton = small(&json!({}));
    let mut tensors = tensors_of(&skeleton);
    tensors.retain(|(name, _)| name != "model.norm.weight" && !name.contains("layers.1.mlp"));
    tensors.push(("model.layers.9.mlp.up_proj.weight".into(), Shape::from([1])));
    tensors[0].1 = Shape::from([300, 64]);
    let error = skeleton.bind(&index_of(tensors)).expect_err("wrong");
    assert_eq!((error.missing.count, error.unexpected.count, error.mismatched_count), (4, 1, 1));
    let text = error.to_string();
    for part in [
        "the tensors are not those of llama: 4 missing (model.layers.1.mlp.gate_proj.weight, ",
        "1 unexpected (model.layers.9.mlp.up_proj.weight)",
        "1 of another shape (model.embed_tokens.weight: expected [256, 64], found [300, 64])",
    ] {
        assert!(text.contains(part), "{text}");
    }
    // What happened: a matrix of int16 was loaded as it was, because it was as wide as the bfloat16 that it should be.
    let mut index = index_of(tensors_of(&skeleton));
    for name in ["model.norm.weight", "lm_head.weight"] {
        index.tensors.get_mut(name).expect("it is there").dtype = DType::I16;
    }
    let error = skeleton.bind(&index).expect_err("no parameters");
    assert_eq!(error.not_float_count, 2);
    let text = error.to_string();
    assert!(text.contains("2 of another type (model.norm.weight: expected floating point, found I16, "), "{text}");
    // The lists are bounded, the counts are not.
    let error = skeleton.bind(&index_of([])).expect_err("nothing there");
    assert_eq!((error.missing.count, error.missing.first.len()), (skeleton.tensors.len(), MAX_NAMED_KEYS));
    assert!(error.to_string().contains(&format!("and {} more)", skeleton.tensors.len() - MAX_NAMED_KEYS)));
}

#[test]
fn prefixes_are_added_and_stripped() {
    let with_head = small(&json!({"tie_word_embeddings": true}));
    let base = decoder("LlamaModel", [64, 2, 4, 2, 128, 256], &json!({}));
    let fqn = Fqn::from("model.norm.weight");
    let binding = with_head.bind(&index_of(tensors_of(&base))).expect("a base model's file");
    assert_eq!(binding.source(&fqn).map(Fqn::as_str), Some("norm.weight"));
    let binding = base.bind(&index_of(tensors_of(&small(&json!({}))))).expect("a file with a head");
    assert_eq!(binding.source(&"norm.weight".into()), Some(&fqn));
    assert_eq!(binding.ignored, ["lm_head.weight".into()]);
}

/// MO-2: a tied weight is read once, under whatever name it is stored.
#[test]
fn mo_2_tied_weights_are_read_once() {
    let skeleton = small(&json!({"tie_word_embeddings": true}));
    let embed = Fqn::from("model.embed_tokens.weight");
    assert_eq!(skeleton.resolve(&"lm_head.weight".into()), &embed);
    let mut tensors = tensors_of(&skeleton);
    let count = tensors.len();
    tensors.push(("lm_head.weight".into(), Shape::from([256, 64])));
    let twice = skeleton.bind(&index_of(tensors.clone())).expect("stored twice");
    assert_eq!((twice.len(), twice.source(&embed)), (count, Some(&embed)));
    assert_eq!(twice.ignored, ["lm_head.weight".into()]);
    tensors.remove(0);
    let head_only = skeleton.bind(&index_of(tensors)).expect("stored as the head");
    assert_eq!(head_only.source(&embed).map(Fqn::as_str), Some("lm_head.weight"));
    // Untied, the head has to be there.
    let untied = small(&json!({}));
    let error = untied.bind(&index_of(tensors_of(&skeleton))).expect_err("no head");
    assert_eq!(error.missing.first, ["lm_head.weight".into()]);
}

#[test]
fn buffers_and_old_names_are_handled() {
    let skeleton = small(&json!({"tie_word_embeddings": true}));
    let mut tensors = tensors_of(&skeleton);
    tensors.push(("model.layers.1.self_attn.rotary_emb.inv_freq".into(), Shape::from([8])));
    assert_eq!(skeleton.bind(&index_of(tensors)).expect("a stored buffer").ignored.len(), 1);

    // bert-base-uncased: a masked-LM configuration over a file with pooler, next-sentence head and TensorFlow's names.
    let masked = bert("BertForMaskedLM", [64, 1, 4, 128]);
    let mut tensors = tensors_of(&bert("BertForPreTraining", [64, 1, 4, 128]));
    for (name, _) in &mut tensors {
        *name = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta");
    }
    tensors.push(("bert.embeddings.position_ids".into(), Shape::from([1, 512])));
    let binding = masked.bind(&index_of(tensors)).expect("as published");
    let norm = binding.source(&"bert.embeddings.LayerNorm.weight".into());
    assert_eq!(norm.map(Fqn::as_str), Some("bert.embeddings.LayerNorm.gamma"));
    assert_eq!(binding.ignored.len(), 5, "{:?}", binding.ignored);

    // A sentence encoder without its pooler.
    let base = bert("BertModel", [64, 1, 4, 128]);
    let mut tensors = tensors_of(&base);
    tensors.retain(|(name, _)| !name.contains("pooler"));
    assert_eq!(base.bind(&index_of(tensors)).expect("without pooler").absent.len(), 2);
}

#[test]
fn quantized_weights_are_recognized() {
    let skeleton = small(&json!({}));
    let mut tensors = tensors_of(&skeleton);
    tensors.push(("model.layers.0.mlp.up_proj.weight.absmax".into(), Shape::from([8])));
    let error = skeleton.bind(&index_of(tensors)).expect_err("quantized");
    assert_eq!(error.prequantized, Some("bitsandbytes (4-bit)"));
    assert!(error.to_string().ends_with("quantized already, by bitsandbytes (4-bit)"));
}

#[test]
fn bad_configurations_are_named() {
    let check = |more: serde_json::Value, expected: &str| {
        let mut config = json!({
            "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "intermediate_size": 128, "vocab_size": 256,
        });
        config.as_object_mut().expect("an object").extend(more.as_object().cloned().unwrap_or_default());
        let message = ModelConfig::parse(config.to_string().as_bytes()).expect_err(expected).to_string();
        assert!(message.contains(expected), "{message}");
    };
    check(
        json!({"architectures": ["FalconForCausalLM"]}),
        "unknown architecture \"FalconForCausalLM\"; known are Llama",
    );
    check(json!({"architectures": null, "model_type": "falcon"}), "unknown architecture \"falcon\"");
    check(json!({"architectures": null}), "no architectures");
    check(json!({"hidden_size": null}), "no hidden_size");
    check(json!({"num_hidden_layers": 0}), "num_hidden_layers: expected 1 to 4096, found 0");
    check(json!({"num_hidden_layers": 100_000_000}), "expected 1 to 4096, found 100000000");
    check(
        json!({"num_key_value_heads": 3}),
        "num_attention_heads is 4, which does not divide by num_key_value_heads = 3",
    );
    check(json!({"hidden_size": 66}), "hidden_size is 66, which does not divide by num_attention_heads = 4");
    check(json!({"head_dim": 2_000_000_000}), "head_dim: expected 1 to 65536");
    check(json!({"head_dim": 65536, "num_attention_heads": 65536}), "num_attention_heads * head_dim");
    check(json!({"rope_theta": -1.0}), "rope_theta");
    check(json!({"vocab_size": "many"}), "cannot be read");
}

/// What transformers 4 and 5 write for one model is read as the same model.
#[test]
fn versions_of_config_json_agree() {
    let base = json!({
        "architectures": ["Qwen2ForCausalLM"], "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 128, "vocab_size": 256, "sliding_window": 4096, "use_sliding_window": false,
    });
    let with = |more: serde_json::Value| {
        let mut config = base.clone();
        config.as_object_mut().expect("an object").extend(more.as_object().cloned().unwrap_or_default());
        ModelConfig::parse(config.to_string().as_bytes()).expect("good")
    };
    let old = with(json!({
        "torch_dtype": "bfloat16", "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0},
    }));
    let new = with(json!({
        "dtype": "bfloat16", "num_key_value_heads": 4, "head_dim": 16,
        "rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0},
    }));
    assert_eq!(old, new);
    assert_eq!((old.dtype, old.sliding_window, old.tie_word_embeddings), (Some(DType::BF16), None, false));
    assert_eq!(old.rope.map(|rope| rope.scaling), Some(RopeScaling::Linear { factor: 2.0 }));
}

#[test]
fn generic_skeletons_take_roles_from_names() {
    let names = ["h.10.attn.c_attn.weight", "h.2.ln_1.weight", "h.2.mlp.c_fc.bias", "wte.weight", "lm_head.weight"];
    let index = index_of(names.iter().map(|name| (name.to_string(), Shape::from([4, 4]))));
    let skeleton = Skeleton::generic(&index);
    let roles: Vec<_> = skeleton.tensors.iter().map(|tensor| (tensor.fqn.as_str(), tensor.role)).collect();
    let expected = [
        ("h.2.ln_1.weight", Role::Norm),
        ("h.2.mlp.c_fc.bias", Role::Bias),
        ("h.10.attn.c_attn.weight", Role::Linear),
        ("lm_head.weight", Role::Head),
        ("wte.weight", Role::Embedding),
    ];
    assert_eq!(roles, expected);
    assert_eq!(skeleton.layers(), 11);
    assert!(skeleton.bind(&index).is_ok());
}

/// What transformers with bitsandbytes quantizes in a Llama: the seven projections of each layer and nothing else.
#[test]
fn linear_layers_are_those_that_bitsandbytes_quantizes() {
    let skeleton = small(&json!({"tie_word_embeddings": false}));
    let linear = skeleton.tensors.iter().filter(|tensor| tensor.role == Role::Linear);
    assert_eq!(linear.count(), 14);
    let head = skeleton.tensors.last().expect("a head");
    assert_eq!((head.fqn.as_str(), head.role), ("lm_head.weight", Role::Head));
}

fn new_model(architecture: Architecture, parameters: u64, max_file_bytes: u64) -> NewModel {
    let request = GenerateRequest { architecture, parameters, dtype: DType::BF16, seed: 0, max_file_bytes };
    generate(&request).expect("a good request")
}

/// Sizes come within 3 % of what was asked, from a toy to the largest.
#[test]
fn generated_models_have_about_the_parameters_asked_for() {
    let families =
        [Architecture::Llama, Architecture::Mistral, Architecture::Qwen2, Architecture::Qwen3, Architecture::Bert];
    for architecture in families {
        for text in ["100K", "300K", "3M", "30M", "135M", "1B", "7B", "70B", "400B"] {
            let asked = parse_parameters(text).expect("a number");
            let model = new_model(architecture, asked, DEFAULT_FILE_BYTES);
            let off = model.parameters.abs_diff(asked) * 100 / asked;
            assert!(off <= 3, "{architecture:?} {text}: {} parameters", model.parameters);
        }
    }
}

/// The files of a generated model are read back by the parsers of real ones and bind to their own configuration; any cut
/// of a file gives the same bytes (MO-3).
#[test]
fn generated_files_bind_and_do_not_depend_on_cuts() {
    let model = new_model(Architecture::Qwen3, 1_000_000, 500_000);
    assert!(model.files.len() > 2, "{}", model.files.len());
    let mut files = Vec::new();
    for (number, file) in model.files.iter().enumerate() {
        let mut bytes = vec![0; as_usize(file.len_bytes)];
        model.fill(number, 0, &mut bytes);
        let len = header_len(&file.name, &bytes, file.len_bytes).expect("a header");
        let header = parse_header(&file.name, &bytes[8..8 + as_usize(len)], file.len_bytes).expect("a header");
        files.push((FileEntry { name: file.name.clone(), len_bytes: file.len_bytes }, header));
        let mut cut = vec![0; bytes.len()];
        let mut at = 0;
        for step in [1, 7, 1000, 4097, 33_333].into_iter().cycle() {
            let end = (at + step).min(cut.len());
            model.fill(number, as_u64(at), &mut cut[at..end]);
            at = end;
            if at == cut.len() {
                break;
            }
        }
        assert_eq!(cut, bytes);
    }
    let index_json = model.index_json.as_ref().expect("several files");
    let index = parse_index_json("index", index_json.as_bytes()).expect("our own index");
    let index = merge(files, Some(&index)).expect("our own files");
    let skeleton = Skeleton::from_config(model.config_json.as_bytes()).expect("our own configuration");
    let binding = skeleton.bind(&index).expect("our own tensors");
    let inspection = inspect(&skeleton, &index, &binding);
    assert_eq!(inspection.parameters, model.parameters);
    assert_eq!(inspection.stored_bytes, model.parameters * 2);
}

#[test]
fn requests_are_checked() {
    assert_eq!(parse_parameters("1.5B").expect("a number"), 1_500_000_000);
    assert_eq!(parse_parameters("135m").expect("a number"), 135_000_000);
    assert_eq!(parse_parameters("250000").expect("a number"), 250_000);
    for text in ["", "B", "1.5", "-1B", "1,5B", "99999999999T", "é"] {
        assert!(parse_parameters(text).is_err(), "{text}");
    }
    let request = GenerateRequest {
        architecture: Architecture::Llama,
        parameters: 1000,
        dtype: DType::BF16,
        seed: 0,
        max_file_bytes: DEFAULT_FILE_BYTES,
    };
    assert!(matches!(generate(&request), Err(GenerateError::Parameters { found: 1000 })));
    let request = GenerateRequest { parameters: 1_000_000, dtype: DType::I8, ..request };
    assert!(matches!(generate(&request), Err(GenerateError::DType { .. })));
}

fn numbers() -> impl Strategy<Value = serde_json::Value> {
    prop_oneof![
        (0_u64..70).prop_map(|number| json!(number)),
        any::<u64>().prop_map(|number| json!(number)),
        any::<f64>().prop_map(|number| json!(number)),
        Just(serde_json::Value::Null),
        Just(json!("text")),
        Just(json!({"rope_type": "yarn", "factor": 1e-300, "rope_theta": 1.0000001})),
        Just(json!({"rope_type": "llama3", "factor": 1e300, "low_freq_factor": 4, "high_freq_factor": 4})),
    ]
}

proptest! {
    /// No configuration makes the parser or the skeleton panic, whatever stands in its fields.
    #[test]
    fn configurations_never_panic(
        edits in prop::collection::vec((0_usize..30, numbers()), 0..6), name in 0_usize..15,
    ) {
        const FIELDS: [&str; 30] = [
            "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
            "intermediate_size", "vocab_size", "max_position_embeddings", "type_vocab_size", "rope_theta",
            "rope_scaling", "rope_parameters", "partial_rotary_factor", "rms_norm_eps", "sliding_window",
            "architectures", "dtype", "quantization_config", "num_experts", "num_experts_per_tok",
            "moe_intermediate_size", "shared_expert_intermediate_size", "decoder_sparse_step", "mlp_only_layers",
            "d_model", "num_layers", "num_decoder_layers", "num_heads", "relative_attention_num_buckets", "feed_forward_proj",
        ];
        const NAMES: [&str; 15] = [
            "LlamaForCausalLM", "LlamaModel", "MistralForCausalLM", "MistralModel", "Qwen2ForCausalLM", "Qwen2Model",
            "Qwen3ForCausalLM", "Qwen3Model", "BertModel", "BertForMaskedLM", "BertForPreTraining",
            "MixtralForCausalLM", "Qwen2MoeModel", "Qwen3MoeForCausalLM", "T5ForConditionalGeneration",
        ];
        let mut config = json!({
            "architectures": [NAMES[name]], "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
            "intermediate_size": 128, "vocab_size": 256, "num_experts": 4, "num_experts_per_tok": 2,
            "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64, "d_model": 64, "d_kv": 16, "d_ff": 128,
            "num_layers": 2, "num_heads": 4,
        });
        for (field, value) in edits {
            config[FIELDS[field]] = value;
        }
        if let Ok(skeleton) = Skeleton::from_config(config.to_string().as_bytes()) {
            prop_assert!(skeleton.parameters() > 0);
            let dims = skeleton.config.as_ref().and_then(|config| config.rope.as_ref()).map_or(0, |rope| rope.dim);
            prop_assert!(dims <= 1 << 16);
            if let Some(BufferValues::F32(freqs)) = skeleton.buffers.first().map(Buffer::compute) {
                prop_assert_eq!(as_u64(freqs.len()), dims / 2);
            }
        }
    }
}
