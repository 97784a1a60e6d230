//! The keys of a GGUF file that hold the tokenizer: of tokenizer.json and the files beside it.
//! Source: llama.cpp's `convert_hf_to_gguf` and gguf-py's `vocab.py`.
//!
//! Owns: the two kinds of tokenizers that llama.cpp computes as they are: merges of bytes, and merges with bytes to fall
//! back on. Refuses to know: how text becomes tokens. What it cannot say it warns of, and leaves out.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;

use super::pre;
use crate::app::convert::ConvertError;
use crate::error::{Classify as _, Kind};
use crate::format::gguf::HeaderValue;
use crate::store::{Store, StoreError, read_small};
use crate::types::{as_u64, as_usize};

/// As the files beside the weights are limited; the largest tokenizers have 40 MB.
const MAX_FILE_BYTES: u64 = 256 << 20;

const JSON: &str = "tokenizer.json";

/// llama.cpp's `enum llama_token_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
enum TokenType {
    Normal = 1,
    Unknown = 2,
    Control = 3,
    UserDefined = 4,
    Unused = 5,
    Byte = 6,
}

/// tokenizer.json with a model of merges.
#[derive(Debug, Deserialize)]
struct Tokenizer {
    model: Merges,
    #[serde(default)]
    added_tokens: Vec<Added>,
    #[serde(default)]
    normalizer: Value,
    #[serde(default)]
    pre_tokenizer: Value,
    #[serde(default)]
    post_processor: Value,
}

#[derive(Debug, Deserialize)]
struct Merges {
    vocab: BTreeMap<String, u64>,
    merges: Vec<Merge>,
    #[serde(default)]
    byte_fallback: bool,
    #[serde(default)]
    ignore_merges: bool,
    #[serde(default)]
    unk_token: Option<String>,
}

/// Two tokens that become one; a text in files before 2024.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Merge {
    Text(String),
    Pair(String, String),
}

#[derive(Debug, Deserialize)]
struct Added {
    id: u64,
    content: String,
    #[serde(default)]
    special: bool,
}

/// The kind of a tokenizer.json, before all of it is read.
#[derive(Debug, Deserialize)]
struct AnyTokenizer {
    model: AnyModel,
}

#[derive(Debug, Deserialize)]
struct AnyModel {
    #[serde(rename = "type", default)]
    kind: String,
}

/// What a model's directory says of its tokenizer.
struct Files {
    path: String,
    tokenizer: Tokenizer,
    /// `tokenizer_config.json`.
    settings: Value,
    /// `config.json`.
    config: Value,
    /// `chat_template.jinja`.
    template: Option<String>,
}

/// The keys of the tokenizer beside the weights in `from`, for a model of `vocab_size` rows of embedding. Without one that
/// llama.cpp knows, the file says that it has none.
pub(super) fn keys(
    from: &dyn Store,
    config_json: Option<&str>,
    vocab_size: u64,
) -> Result<Vec<(String, HeaderValue)>, ConvertError> {
    let none = vec![("tokenizer.ggml.model".to_owned(), HeaderValue::Text("none".to_owned()))];
    let path = from.describe(JSON);
    let Some(bytes) = optional(from, JSON)? else {
        tracing::warn!("there is no {path}: the file has no tokenizer");
        return Ok(none);
    };
    let wrong = |error: serde_json::Error| ConvertError::Tokenizer { path: path.clone(), what: error.to_string() };
    let kind = serde_json::from_slice::<AnyTokenizer>(&bytes).map_err(wrong)?.model.kind;
    if kind != "BPE" {
        tracing::warn!("{path}: expected a model of type BPE, found {kind:?}: the file has no tokenizer");
        return Ok(none);
    }
    let tokenizer: Tokenizer = serde_json::from_slice(&bytes).map_err(wrong)?;
    drop(bytes);
    let settings = optional(from, "tokenizer_config.json")?;
    let template = optional(from, "chat_template.jinja")?;
    let files = Files {
        tokenizer,
        settings: settings.and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default(),
        config: config_json.and_then(|text| serde_json::from_str(text).ok()).unwrap_or_default(),
        template: template.and_then(|bytes| String::from_utf8(bytes).ok()),
        path,
    };
    files.keys(vocab_size)
}

fn optional(from: &dyn Store, name: &str) -> Result<Option<Vec<u8>>, StoreError> {
    match read_small(from, name, MAX_FILE_BYTES) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == Kind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

impl Files {
    fn keys(&self, vocab_size: u64) -> Result<Vec<(String, HeaderValue)>, ConvertError> {
        let tokens = self.tokens(vocab_size)?;
        let model = &self.tokenizer.model;
        let mut list: Vec<(String, HeaderValue)> = Vec::new();
        let mut add = |key: &str, value| list.push((format!("tokenizer.{key}"), value));
        let text = |text: &str| HeaderValue::Text(text.to_owned());
        if model.byte_fallback {
            add("ggml.model", text("llama"));
            add("ggml.pre", text("default"));
            add("ggml.scores", HeaderValue::F32s(self.scores(&tokens)));
            add("ggml.add_space_prefix", HeaderValue::Bool(self.prefixes_space()));
        } else {
            add("ggml.model", text("gpt2"));
            add("ggml.pre", text(self.pre_tokenizer()));
            add("ggml.merges", HeaderValue::Texts(model.merges.iter().map(Merge::text).collect()));
        }
        for (key, id) in self.special_ids(vocab_size) {
            add(&format!("ggml.{key}_token_id"), HeaderValue::U32(id));
        }
        for (key, name, first) in [("add_bos_token", "bos", true), ("add_eos_token", "eos", false)] {
            add(&format!("ggml.{key}"), HeaderValue::Bool(self.adds(key, name, first)));
        }
        let templates = self.templates();
        let named = templates.iter().filter_map(|(key, _)| key.strip_prefix("chat_template.").map(str::to_owned));
        let named: Vec<String> = named.collect();
        if !named.is_empty() {
            add("chat_templates", HeaderValue::Texts(named));
        }
        for (key, template) in templates {
            add(&key, HeaderValue::Text(template));
        }
        add("ggml.token_type", HeaderValue::I32s(tokens.iter().map(|(_, kind)| *kind as i32).collect()));
        add("ggml.tokens", HeaderValue::Texts(tokens.into_iter().map(|(token, _)| token).collect()));
        Ok(list)
    }

    /// A token for every row of the embedding.
    fn tokens(&self, vocab_size: u64) -> Result<Vec<(String, TokenType)>, ConvertError> {
        let model = &self.tokenizer.model;
        let mut tokens: Vec<(String, TokenType)> =
            (0..vocab_size).map(|id| (format!("[PAD{id}]"), TokenType::Unused)).collect();
        let known = model.vocab.iter().map(|(token, &id)| (id, token, self.type_of(token)));
        // A token may be in both lists; what was added says more of it.
        let added = self.tokenizer.added_tokens.iter().map(|added| {
            let kind = match added.special || looks_special(&added.content) {
                _ if model.unk_token.as_ref() == Some(&added.content) && model.byte_fallback => TokenType::Unknown,
                true => TokenType::Control,
                false => TokenType::UserDefined,
            };
            (added.id, &added.content, kind)
        });
        for (id, token, kind) in known.chain(added) {
            let Some(place) = tokens.get_mut(as_usize(id)) else {
                let what = format!(
                    "token {token:?}: expected an id below {vocab_size}, the rows of the embedding, found {id}"
                );
                return Err(ConvertError::Tokenizer { path: self.path.clone(), what });
            };
            *place = (token.clone(), kind);
        }
        Ok(tokens)
    }

    fn type_of(&self, token: &str) -> TokenType {
        let model = &self.tokenizer.model;
        let digits = token.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
        let byte = digits.is_some_and(|digits| digits.len() == 2 && u8::from_str_radix(digits, 16).is_ok());
        match model.byte_fallback {
            true if byte => TokenType::Byte,
            true if model.unk_token.as_deref() == Some(token) => TokenType::Unknown,
            _ => TokenType::Normal,
        }
    }

    /// llama.cpp merges the pair of the highest score first: a token that the n-th merge makes has -n.
    fn scores(&self, tokens: &[(String, TokenType)]) -> Vec<f32> {
        let merges = &self.tokenizer.model.merges;
        let mut ranks = BTreeMap::new();
        for (rank, merge) in merges.iter().enumerate() {
            ranks.entry(merge.merged()).or_insert(rank);
        }
        let score = |(token, kind): &(String, TokenType)| match kind {
            // A single character, which no merge makes.
            TokenType::Normal => -as_f32(ranks.get(token).copied().unwrap_or(merges.len())),
            _ => 0.0,
        };
        tokens.iter().map(score).collect()
    }

    fn pre_tokenizer(&self) -> &'static str {
        let tokenizer = &self.tokenizer;
        pre::name(&tokenizer.pre_tokenizer, tokenizer.model.ignore_merges).unwrap_or_else(|| {
            tracing::warn!(
                "{}: llama.cpp has no name for its pre_tokenizer: \"default\" is written, and it may cut text otherwise",
                self.path
            );
            "default"
        })
    }

    /// Whether text begins with a space that was not there.
    fn prefixes_space(&self) -> bool {
        let of = |value: &Value, list: &str| match value.get(list) {
            Some(Value::Array(steps)) => steps.clone(),
            _ => vec![value.clone()],
        };
        let kind = |step: &Value, name: &str| step.get("type").is_some_and(|kind| kind == name);
        let prepends = of(&self.tokenizer.normalizer, "normalizers").iter().any(|step| kind(step, "Prepend"));
        let metaspace = |step: &Value| {
            let never = step.get("prepend_scheme").is_some_and(|scheme| scheme == "never");
            kind(step, "Metaspace") && !never && step.get("add_prefix_space") != Some(&Value::Bool(false))
        };
        prepends || of(&self.tokenizer.pre_tokenizer, "pretokenizers").iter().any(metaspace)
    }

    /// llama.cpp's names of special tokens, with the ids that the settings or config.json give.
    fn special_ids(&self, vocab_size: u64) -> Vec<(&'static str, u32)> {
        let names = [
            ("bos", "bos"),
            ("eos", "eos"),
            ("unk", "unknown"),
            // The format's own spelling.
            ("sep", "seperator"),
            ("pad", "padding"),
            ("mask", "mask"),
        ];
        let id = |name: &str| {
            let token = self.special(name).and_then(|token| self.id(token));
            let id = token.or_else(|| self.config.get(format!("{name}_token_id")).and_then(Value::as_u64));
            id.filter(|&id| id < vocab_size).and_then(|id| u32::try_from(id).ok())
        };
        names.into_iter().filter_map(|(ours, theirs)| id(ours).map(|id| (theirs, id))).collect()
    }

    /// The text of the token that the settings call `name`.
    fn special(&self, name: &str) -> Option<&str> {
        let entry = self.settings.get(format!("{name}_token"))?;
        entry.get("content").unwrap_or(entry).as_str()
    }

    fn id(&self, token: &str) -> Option<u64> {
        let added = self.tokenizer.added_tokens.iter().find(|added| added.content == token);
        added.map(|added| added.id).or_else(|| self.tokenizer.model.vocab.get(token).copied())
    }

    /// Whether a text's tokens begin or end with a special one: as the settings say, else by the template.
    fn adds(&self, key: &str, name: &str, first: bool) -> bool {
        if let Some(said) = self.settings.get(key).and_then(Value::as_bool) {
            return said;
        }
        let steps = match self.tokenizer.post_processor.get("processors") {
            Some(Value::Array(steps)) => steps.as_slice(),
            _ => std::slice::from_ref(&self.tokenizer.post_processor),
        };
        let single = steps.iter().filter_map(|step| step.get("single")?.as_array()).next_back();
        let end = single.and_then(|single| if first { single.first() } else { single.last() });
        let token = end.and_then(|end| end.pointer("/SpecialToken/id")).and_then(Value::as_str);
        token.is_some() && token == self.special(name)
    }

    /// Keys and texts of the chat templates.
    fn templates(&self) -> Vec<(String, String)> {
        let one = |template: &str| vec![("chat_template".to_owned(), template.to_owned())];
        match self.settings.get("chat_template") {
            Some(Value::String(template)) => one(template),
            Some(Value::Array(named)) => named.iter().filter_map(named_template).collect(),
            _ => self.template.as_deref().map(one).unwrap_or_default(),
        }
    }
}

fn named_template(entry: &Value) -> Option<(String, String)> {
    let (name, template) = (entry.get("name")?.as_str()?, entry.get("template")?.as_str()?);
    let name: String = name.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect();
    let key = if name == "default" { "chat_template".to_owned() } else { format!("chat_template.{name}") };
    Some((key, template.to_owned()))
}

/// Some tokenizers do not call their control tokens special.
fn looks_special(token: &str) -> bool {
    let within = |start: &str, end: &str| token.starts_with(start) && token.ends_with(end);
    within("<|", "|>") || within("<unused", ">") || matches!(token, "<pad>" | "<mask>")
}

impl Merge {
    /// Its two tokens with a space between; a space within a token is written as another letter.
    fn text(&self) -> String {
        match self {
            Self::Text(text) => text.clone(),
            Self::Pair(left, right) => format!("{} {}", left.replace(' ', "Ġ"), right.replace(' ', "Ġ")),
        }
    }

    /// The token that they become.
    fn merged(&self) -> String {
        match self {
            Self::Text(text) => text.replacen(' ', "", 1),
            Self::Pair(left, right) => format!("{left}{right}"),
        }
    }
}

#[expect(clippy::cast_possible_truncation, reason = "ranks of merges are far below 2^24, where an f32 is exact")]
fn as_f32(rank: usize) -> f32 {
    crate::types::as_f64(as_u64(rank)) as f32
}

#[cfg(test)]
#[path = "tokenizer_tests.rs"]
mod tests;
