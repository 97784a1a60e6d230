//! How a tokenizer cuts text before its merges, by llama.cpp's name for it.
//!
//! Owns: the recognition of `pre_tokenizer` in tokenizer.json; llama.cpp has its own code under each name
//! (`llama-vocab.cpp`). Refuses to know: vocabularies.

use serde_json::Value;

/// Regular expressions of a `Split` before the bytes, whether merges are passed over for whole tokens, and the name.
const SPLITS: [(&str, Option<bool>, &str); 5] = [
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        Some(true),
        "llama-bpe",
    ),
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        Some(false),
        "dbrx",
    ),
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        None,
        "qwen2",
    ),
    (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        Some(true),
        "tekken",
    ),
    (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        None,
        "gpt-4o",
    ),
];

/// llama.cpp's name, where it has code that does the same.
pub(super) fn name(pre_tokenizer: &Value, ignore_merges: bool) -> Option<&'static str> {
    let steps: Vec<&Value> = match (kind(pre_tokenizer), pre_tokenizer.get("pretokenizers")) {
        ("Sequence", Some(Value::Array(steps))) => steps.iter().collect(),
        _ => vec![pre_tokenizer],
    };
    match steps[..] {
        [bytes] if is_bytes(bytes, true) => Some("gpt-2"),
        [digits, bytes] if kind(digits) == "Digits" && is_bytes(bytes, true) => {
            // Every digit alone, then as GPT-2 does.
            (digits.get("individual_digits") == Some(&Value::Bool(true))).then_some("smollm")
        }
        [split, bytes] if kind(split) == "Split" && is_bytes(bytes, false) => {
            let regex = split.pointer("/pattern/Regex")?.as_str()?;
            let alone = split.get("behavior")? == "Isolated" && split.get("invert") != Some(&Value::Bool(true));
            let same = |(known, merges, _): &&(&str, Option<bool>, &str)| {
                *known == regex && merges.is_none_or(|merges| merges == ignore_merges)
            };
            SPLITS.iter().find(same).filter(|_| alone).map(|(.., name)| *name)
        }
        _ => None,
    }
}

fn kind(step: &Value) -> &str {
    step.get("type").and_then(Value::as_str).unwrap_or_default()
}

/// A `ByteLevel` step, with GPT-2's regular expression or without; by default it has it.
fn is_bytes(step: &Value, regex: bool) -> bool {
    let flag = |key, default| step.get(key).and_then(Value::as_bool).unwrap_or(default);
    kind(step) == "ByteLevel" && flag("use_regex", true) == regex && !flag("add_prefix_space", true)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn known_tokenizers() {
        let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
        let plain = json!({"type": "ByteLevel", "add_prefix_space": false, "use_regex": false});
        let sequence = |steps: &[&Value]| json!({"type": "Sequence", "pretokenizers": steps});
        assert_eq!(name(&bytes, false), Some("gpt-2"));
        let digits = json!({"type": "Digits", "individual_digits": true});
        assert_eq!(name(&sequence(&[&digits, &bytes]), false), Some("smollm"));
        let split = |regex: &str| json!({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false});
        let llama3 = sequence(&[&split(SPLITS[0].0), &plain]);
        assert_eq!(name(&llama3, true), Some("llama-bpe"));
        assert_eq!(name(&llama3, false), Some("dbrx"));
        assert_eq!(name(&sequence(&[&split(SPLITS[2].0), &plain]), false), Some("qwen2"));
        assert_eq!(name(&sequence(&[&split(r"\s+"), &plain]), false), None);
        assert_eq!(name(&json!({"type": "ByteLevel", "add_prefix_space": true}), false), None);
        assert_eq!(name(&Value::Null, false), None);
    }
}
