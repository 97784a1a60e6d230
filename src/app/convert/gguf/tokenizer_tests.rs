//! The keys of small tokenizers, as llama.cpp's converter writes them.

use serde_json::json;

use super::*;

fn files(tokenizer: Value, settings: Value, config: Value) -> Files {
    let tokenizer = serde_json::from_value(tokenizer).expect("a tokenizer");
    Files { path: "tokenizer.json".to_owned(), tokenizer, settings, config, template: Some("jinja".to_owned()) }
}

fn value(keys: &[(String, HeaderValue)], key: &str) -> Option<HeaderValue> {
    let key = format!("tokenizer.{key}");
    keys.iter().find(|(name, _)| *name == key).map(|(_, value)| value.clone())
}

fn texts(texts: &[&str]) -> Option<HeaderValue> {
    Some(HeaderValue::Texts(texts.iter().map(|&text| text.to_owned()).collect()))
}

/// Merges of bytes. Row 6 of the embedding has no token; token 0 is in both lists.
#[test]
fn merges_of_bytes() {
    let tokenizer = json!({
        "model": {"type": "BPE", "vocab": {"<s>": 0, "a": 1, "b": 2, "ab": 3}, "merges": [["a", "b"], ["a", " b"]]},
        "added_tokens": [
            {"id": 0, "content": "<s>", "special": true},
            {"id": 4, "content": "<tool>", "special": false},
            {"id": 5, "content": "<|end|>", "special": false},
        ],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "use_regex": true},
        "post_processor": {"type": "Sequence", "processors": [
            {"type": "ByteLevel"},
            {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>"}}, {"Sequence": {"id": "A"}}]},
        ]},
    });
    let settings = json!({"bos_token": {"content": "<s>"}, "eos_token": "<|end|>"});
    let files = files(tokenizer, settings, json!({"pad_token_id": 4, "eos_token_id": [1], "unk_token_id": 99}));
    let keys = files.keys(7).expect("keys");
    assert_eq!(value(&keys, "ggml.model"), Some(HeaderValue::Text("gpt2".to_owned())));
    assert_eq!(value(&keys, "ggml.pre"), Some(HeaderValue::Text("gpt-2".to_owned())));
    assert_eq!(value(&keys, "ggml.tokens"), texts(&["<s>", "a", "b", "ab", "<tool>", "<|end|>", "[PAD6]"]));
    assert_eq!(value(&keys, "ggml.token_type"), Some(HeaderValue::I32s(vec![3, 1, 1, 1, 4, 3, 5])));
    assert_eq!(value(&keys, "ggml.merges"), texts(&["a b", "a Ġb"]));
    assert_eq!(value(&keys, "ggml.bos_token_id"), Some(HeaderValue::U32(0)));
    assert_eq!(value(&keys, "ggml.eos_token_id"), Some(HeaderValue::U32(5)));
    assert_eq!(value(&keys, "ggml.padding_token_id"), Some(HeaderValue::U32(4)));
    assert_eq!(value(&keys, "ggml.unknown_token_id"), None, "99 is no row of the embedding");
    assert_eq!(value(&keys, "ggml.add_bos_token"), Some(HeaderValue::Bool(true)));
    assert_eq!(value(&keys, "ggml.add_eos_token"), Some(HeaderValue::Bool(false)));
    assert_eq!(value(&keys, "chat_template"), Some(HeaderValue::Text("jinja".to_owned())));
    let refused = files.keys(5).expect_err("an id without a row").to_string();
    assert_eq!(
        refused,
        "tokenizer.json: token \"<|end|>\": expected an id below 5, the rows of the embedding, found 5"
    );
}

/// Merges with bytes to fall back on, as SentencePiece's models are written by transformers.
#[test]
fn merges_with_bytes_to_fall_back_on() {
    let tokenizer = json!({
        "model": {
            "type": "BPE", "unk_token": "<unk>", "byte_fallback": true, "merges": ["h i", "▁ hi"],
            "vocab": {"<unk>": 0, "<s>": 1, "<0x0A>": 2, "▁hi": 3, "hi": 4, "h": 5},
        },
        "added_tokens": [
            {"id": 0, "content": "<unk>", "special": true},
            {"id": 1, "content": "<s>", "special": true},
        ],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}]},
    });
    let settings = json!({"add_bos_token": true, "chat_template": [
        {"name": "default", "template": "d"}, {"name": "tool use", "template": "t"},
    ]});
    let keys = files(tokenizer, settings, Value::Null).keys(6).expect("keys");
    assert_eq!(value(&keys, "ggml.model"), Some(HeaderValue::Text("llama".to_owned())));
    assert_eq!(value(&keys, "ggml.token_type"), Some(HeaderValue::I32s(vec![2, 3, 6, 1, 1, 1])));
    // "hi" is made by merge 0, "▁hi" by merge 1; "h" by none of the two.
    assert_eq!(value(&keys, "ggml.scores"), Some(HeaderValue::F32s(vec![0.0, 0.0, 0.0, -1.0, -0.0, -2.0])));
    assert_eq!(value(&keys, "ggml.merges"), None);
    assert_eq!(value(&keys, "ggml.add_space_prefix"), Some(HeaderValue::Bool(true)));
    assert_eq!(value(&keys, "ggml.add_bos_token"), Some(HeaderValue::Bool(true)));
    assert_eq!(value(&keys, "chat_template"), Some(HeaderValue::Text("d".to_owned())));
    assert_eq!(value(&keys, "chat_templates"), texts(&["tool_use"]));
    assert_eq!(value(&keys, "chat_template.tool_use"), Some(HeaderValue::Text("t".to_owned())));
}
