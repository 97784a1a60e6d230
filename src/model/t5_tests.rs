//! T5 against what transformers makes of the same configurations (tests/data/model/README.md).

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::*;
use crate::format::safetensors::{header_len, parse_header};
use crate::format::{FileEntry, ModelIndex, merge};
use crate::types::{Fqn, Shape, as_u64, as_usize};

macro_rules! vector {
    ($name:literal) => {
        include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/model/", $name)).as_slice()
    };
}

fn vectors() -> Value {
    serde_json::from_slice(vector!("t5.json")).expect("JSON")
}

fn skeleton(config: &Value) -> Skeleton {
    Skeleton::from_config(config.to_string().as_bytes()).expect("a configuration of transformers")
}

#[test]
fn skeletons_are_what_transformers_saves() {
    for (name, model) in vectors()["models"].as_object().expect("models") {
        let skeleton = skeleton(&model["config"]);
        let shape = |sizes: &Value| Shape(sizes.as_array().expect("sizes").iter().filter_map(Value::as_u64).collect());
        let expected = model["tensors"].as_object().expect("names").iter();
        let expected: BTreeMap<Fqn, Shape> = expected.map(|(fqn, sizes)| (fqn.as_str().into(), shape(sizes))).collect();
        let found: BTreeMap<Fqn, Shape> =
            skeleton.tensors.iter().map(|tensor| (tensor.fqn.clone(), tensor.shape.clone())).collect();
        assert_eq!(found, expected, "{name}");
        assert_eq!(Some(skeleton.parameters()), model["parameters"].as_u64(), "{name}");
    }
}

/// The figures of transformers, which are also those of the models' cards.
#[test]
fn published_models_have_their_published_counts() {
    let expected = [("t5-small", 60_506_624), ("t5-base", 222_903_552), ("t5-large", 737_668_096)];
    let published = &vectors()["published"];
    for (name, parameters) in expected {
        let mut config = published[name]["sizes"].clone();
        config["model_type"] = json!("t5");
        config["vocab_size"] = json!(32128);
        assert_eq!(published[name]["parameters"], parameters);
        assert_eq!(skeleton(&config).parameters(), parameters, "{name}");
    }
}

fn file() -> (Skeleton, ModelIndex) {
    let (config, bytes) = (vector!("t5/config.json"), vector!("t5/model.safetensors"));
    let len_bytes = as_u64(bytes.len());
    let len = header_len("t5", bytes, len_bytes).expect("a real header");
    let header = parse_header("t5", &bytes[8..8 + as_usize(len)], len_bytes).expect("a real header");
    let index = merge(vec![(FileEntry { name: "t5".into(), len_bytes }, header)], None).expect("one file");
    (Skeleton::from_config(config).expect("a configuration of transformers"), index)
}

#[test]
fn a_saved_model_binds() {
    let (skeleton, index) = file();
    assert_eq!(skeleton.bind(&index).expect("its own tensors").len(), index.tensors.len());
    // 2 blocks of the encoder, 1 of the decoder, which counts on.
    assert_eq!(skeleton.layers(), 3);
    let layer =
        |name: &str| skeleton.tensors.iter().find(|tensor| tensor.fqn.as_str() == name).expect("it has it").layer;
    assert_eq!(layer("encoder.block.1.layer.0.SelfAttention.q.weight"), Some(1));
    assert_eq!(layer("decoder.block.0.layer.1.EncDecAttention.q.weight"), Some(2));
    assert_eq!(layer("lm_head.weight"), None);
}

/// The first published checkpoints store the shared table under three names, and a table of positions that nothing uses.
#[test]
fn second_copies_and_the_unused_table_are_not_read() {
    let (skeleton, mut index) = file();
    let entry = |name: &str| index.tensors.get(name).expect("it is there").clone();
    let (shared, bias) = (entry("shared.weight"), "SelfAttention.relative_attention_bias.weight");
    let table = entry(&format!("decoder.block.0.layer.0.{bias}"));
    index.tensors.insert("encoder.embed_tokens.weight".into(), shared.clone());
    index.tensors.insert("decoder.embed_tokens.weight".into(), shared);
    index.tensors.insert("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight".into(), table);
    assert_eq!(skeleton.bind(&index).expect("as published").ignored.len(), 3);
    let missing = index.tensors.remove("encoder.block.1.layer.1.DenseReluDense.wo.weight");
    assert!(missing.is_some());
    let error = skeleton.bind(&index).expect_err("a matrix is missing");
    assert_eq!(error.missing.first, ["encoder.block.1.layer.1.DenseReluDense.wo.weight".into()]);
}

/// transformers 5 writes that every T5 is tied, and that this one does not scale what its head sees.
#[test]
fn a_head_of_its_own_is_told_by_either_field() {
    let (skeleton, _) = file();
    let mut config = vectors()["models"]["gated-untied"]["config"].clone();
    for (tied, scaled, own) in [(true, true, false), (true, false, true), (false, true, true)] {
        config["tie_word_embeddings"] = json!(tied);
        config["scale_decoder_outputs"] = json!(scaled);
        let found = Skeleton::from_config(config.to_string().as_bytes()).expect("a configuration").parameters();
        assert_eq!(found, skeleton.parameters() - if own { 0 } else { 40 * 16 }, "{tied} {scaled}");
    }
}
