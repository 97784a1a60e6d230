//! Models by the fields of their config.json: published ones by name, others from a file or from flags.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::error::{Classify, Kind};
use crate::model::{ModelConfig, ModelError, Skeleton};
use crate::types::{DType, as_u64};

/// The published models.
const PUBLISHED: &str = include_str!("profiles.toml");
const PUBLISHED_NAME: &str = "profiles.toml";

/// A model without weights: everything that follows from its shapes can be asked of it.
///
/// ```
/// use weightcast::estimate::ModelProfile;
/// use weightcast::types::DType;
///
/// let model = ModelProfile::published("llama-2-7b")?;
/// assert_eq!(model.skeleton().parameters(), 6_738_415_616);
/// // Keys and values of one token in 16 bits: 2 · 32 layers · 4096 · 2 bytes.
/// assert_eq!(model.cache_bytes_per_token(DType::F16), 524_288);
/// # Ok::<(), weightcast::estimate::ProfileError>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct ModelProfile {
    name: String,
    source: Option<String>,
    config: ModelConfig,
    dtype: DType,
    config_json: String,
}

/// The fields of a profile: those of config.json that shapes and element types follow from, under its names. GPT-2 and T5
/// have the names of the other families. Sizes are in elements; what is not stated is what transformers takes then.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
#[expect(missing_docs, reason = "the names are those of config.json")]
pub struct ProfileFields {
    /// Where the figures are from.
    #[serde(skip_serializing)]
    pub source: Option<String>,
    /// The first of `architectures`, such as `LlamaForCausalLM`.
    #[serde(skip_serializing)]
    pub architecture: Option<String>,
    /// The family, such as `llama`, where no architecture is stated.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model_type: Option<String>,
    /// The element type of published weights, by PyTorch's name; bfloat16 by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dtype: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hidden_size: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub num_hidden_layers: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub num_decoder_layers: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub num_attention_heads: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub num_key_value_heads: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub head_dim: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub intermediate_size: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vocab_size: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_position_embeddings: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub type_vocab_size: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tie_word_embeddings: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub attention_bias: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub qkv_bias: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mlp_bias: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sliding_window: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rope_theta: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rms_norm_eps: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub num_experts: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub num_local_experts: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub num_experts_per_tok: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub moe_intermediate_size: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shared_expert_intermediate_size: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub decoder_sparse_step: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub relative_attention_num_buckets: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub feed_forward_proj: Option<String>,
}

/// Why there is no such profile.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProfileError {
    /// A file of profiles cannot be read: a field that there is not, or a value of another type.
    #[error("{file}: line {line}: {message}")]
    File {
        /// The file.
        file: String,
        /// The line, from 1.
        line: u64,
        /// What is wrong, with the field's name.
        message: String,
    },
    /// A profile's fields make no model.
    #[error("profile {profile}: {source}")]
    Model {
        /// The profile.
        profile: String,
        /// Why not.
        source: ModelError,
    },
    /// The element type is none of weights.
    #[error("profile {profile}: dtype: expected bfloat16, float16 or float32, found {found:?}")]
    DType {
        /// The profile.
        profile: String,
        /// The text.
        found: String,
    },
    /// There is no profile of this name.
    #[error("no profile {found:?}: known are {known}")]
    Unknown {
        /// The name.
        found: String,
        /// The names that there are.
        known: String,
    },
}

impl Classify for ProfileError {
    fn kind(&self) -> Kind {
        match self {
            Self::Unknown { .. } => Kind::NotFound,
            _ => Kind::Invalid,
        }
    }
}

impl ModelProfile {
    /// The model that `fields` describe.
    ///
    /// # Errors
    /// [`ProfileError::Model`] and [`ProfileError::DType`].
    pub fn new(name: &str, fields: ProfileFields) -> Result<Self, ProfileError> {
        let mut json = serde_json::to_value(&fields).expect("plain fields are always JSON");
        if let Some(architecture) = &fields.architecture {
            json["architectures"] = serde_json::json!([architecture]);
        }
        let config_json = json.to_string();
        let config = ModelConfig::parse(config_json.as_bytes())
            .map_err(|source| ProfileError::Model { profile: name.to_owned(), source })?;
        let dtype = match fields.dtype.as_deref() {
            None => DType::BF16,
            Some(text) => text
                .parse()
                .ok()
                .filter(|dtype: &DType| dtype.is_weight_float())
                .ok_or_else(|| ProfileError::DType { profile: name.to_owned(), found: text.to_owned() })?,
        };
        Ok(Self { name: name.to_owned(), source: fields.source, config, dtype, config_json })
    }

    /// All profiles of a TOML text, by name: a table each, with the fields of [`ProfileFields`].
    ///
    /// # Errors
    /// [`ProfileError`], with file, line and field.
    pub fn parse(file: &str, text: &str) -> Result<Vec<Self>, ProfileError> {
        let tables: BTreeMap<String, ProfileFields> = toml::from_str(text).map_err(|error| ProfileError::File {
            file: file.to_owned(),
            line: line_of(text, error.span().map_or(0, |span| span.start)),
            message: error.message().to_owned(),
        })?;
        tables.into_iter().map(|(name, fields)| Self::new(&name, fields)).collect()
    }

    /// All published profiles, by name.
    #[must_use]
    pub fn all_published() -> Vec<Self> {
        Self::parse(PUBLISHED_NAME, PUBLISHED).expect("the published profiles are read by a test")
    }

    /// The published profile of this name, such as `llama-2-7b`.
    ///
    /// # Errors
    /// [`ProfileError::Unknown`], with the names that there are.
    pub fn published(name: &str) -> Result<Self, ProfileError> {
        Self::find(Self::all_published(), name)
    }

    /// The one of `profiles` that has this name.
    ///
    /// # Errors
    /// [`ProfileError::Unknown`], with the names that there are.
    pub fn find(profiles: Vec<Self>, name: &str) -> Result<Self, ProfileError> {
        let known: Vec<String> = profiles.iter().map(|profile| profile.name.clone()).collect();
        let found = profiles.into_iter().find(|profile| profile.name == name);
        found.ok_or_else(|| ProfileError::Unknown { found: name.to_owned(), known: known.join(", ") })
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where its figures are from.
    #[must_use]
    pub fn source(&self) -> Option<&str> {
        self.source.as_deref()
    }

    /// Its configuration.
    #[must_use]
    pub const fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The text of a `config.json` with its fields.
    #[must_use]
    pub fn config_json(&self) -> &str {
        &self.config_json
    }

    /// The element type of its published weights.
    #[must_use]
    pub const fn dtype(&self) -> DType {
        self.dtype
    }

    /// Names and shapes of its tensors.
    #[must_use]
    pub fn skeleton(&self) -> Skeleton {
        Skeleton::new(self.config.clone())
    }

    /// Bytes of one token's keys and values in all layers, when they are kept as `dtype` and no window has ended:
    /// 2 · layers · key-value heads · head size · element size. 0 for an encoder, which keeps none.
    #[must_use]
    pub fn cache_bytes_per_token(&self, dtype: DType) -> u64 {
        super::sizes::cache_bytes(&self.config, 1, dtype)
    }
}

/// The line, from 1, that byte `offset` of `text` stands in.
fn line_of(text: &str, offset: usize) -> u64 {
    as_u64(text.bytes().take(offset).filter(|&byte| byte == b'\n').count() + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Parameter counts as published (model cards and index files of the models); keys and values of one token by hand:
    /// 2 · layers · key-value heads · head size · 2 bytes.
    #[test]
    fn published_models_have_their_published_counts() {
        let expected = [
            ("llama-2-7b", 6_738_415_616, 2 * 32 * 32 * 128 * 2, 524_288),
            ("llama-2-13b", 13_015_864_320, 2 * 40 * 40 * 128 * 2, 819_200),
            ("llama-2-70b", 68_976_648_192, 2 * 80 * 8 * 128 * 2, 327_680),
            ("mistral-7b", 7_241_732_096, 2 * 32 * 8 * 128 * 2, 131_072),
            ("llama-3-8b", 8_030_261_248, 2 * 32 * 8 * 128 * 2, 131_072),
            ("llama-3-70b", 70_553_706_496, 2 * 80 * 8 * 128 * 2, 327_680),
            ("qwen2.5-7b", 7_615_616_512, 2 * 28 * 4 * 128 * 2, 57_344),
            ("mixtral-8x7b", 46_702_792_704, 2 * 32 * 8 * 128 * 2, 131_072),
            ("qwen2.5-72b", 72_706_203_648, 2 * 80 * 8 * 128 * 2, 327_680),
            ("gpt2", 124_439_808, 2 * 12 * 12 * 64 * 2, 36_864),
            ("gpt2-medium", 354_823_168, 2 * 24 * 16 * 64 * 2, 98_304),
            ("gpt2-large", 774_030_080, 2 * 36 * 20 * 64 * 2, 184_320),
            ("gpt2-xl", 1_557_611_200, 2 * 48 * 25 * 64 * 2, 307_200),
            ("bert-base", 109_514_298, 0, 0),
            ("bert-large", 335_174_458, 0, 0),
            ("t5-small", 60_506_624, 2 * 6 * 8 * 64 * 2, 12_288),
            ("t5-base", 222_903_552, 2 * 12 * 12 * 64 * 2, 36_864),
            ("t5-large", 737_668_096, 2 * 24 * 16 * 64 * 2, 98_304),
        ];
        assert_eq!(ModelProfile::all_published().len(), expected.len());
        for (name, parameters, by_hand, cache) in expected {
            let profile = ModelProfile::published(name).expect("published");
            assert_eq!(profile.skeleton().parameters(), parameters, "{name}");
            assert_eq!((profile.cache_bytes_per_token(DType::BF16), by_hand), (cache, cache), "{name}");
            assert!(profile.source().is_some_and(|source| source.starts_with("https://")), "{name}");
        }
    }

    const OWN: &str = "# mine\n[tiny]\nmodel_type = \"llama\"\nhidden_size = 64\nnum_hidden_layers = 2\n\
                       num_attention_heads = 4\nintermediate_size = 128\nvocab_size = 256\n";

    /// By hand: 2 · 256 · 64 for the tables, 4 · 64² + 3 · 64 · 128 + 2 · 64 in each of 2 layers, 64 for the last norm.
    #[test]
    fn a_profile_of_ones_own_is_read() {
        let profiles = ModelProfile::parse("mine.toml", OWN).expect("good");
        let tiny = ModelProfile::find(profiles, "tiny").expect("it is there");
        assert_eq!(tiny.skeleton().parameters(), 32_768 + 2 * (16_384 + 24_576 + 128) + 64);
        assert_eq!((tiny.dtype(), tiny.name()), (DType::BF16, "tiny"));
    }

    #[test]
    fn what_is_wrong_is_named() {
        let check = |text: &str, expected: &str| {
            let message = ModelProfile::parse("mine.toml", text).expect_err(expected).to_string();
            assert!(message.contains(expected), "{message}");
        };
        check(&format!("{OWN}hiden_size = 3\n"), "mine.toml: line 9: unknown field `hiden_size`, expected one of");
        check(&OWN.replace("= 64", "= -64"), "mine.toml: line 4: ");
        check(&OWN.replace("hidden_size = 64\n", ""), "profile tiny: config.json has no hidden_size");
        check(&OWN.replace("llama", "falcon"), "profile tiny: unknown architecture \"falcon\"");
        check(&OWN.replace("= 256", "= 0"), "profile tiny: config.json: vocab_size: expected 1 to");
        check(&format!("{OWN}dtype = \"int4\"\n"), "profile tiny: dtype: expected bfloat16, float16 or float32");
        check("[tiny\n", "mine.toml: line 1: ");
        let unknown = ModelProfile::published("llama-9").expect_err("unknown").to_string();
        assert!(unknown.contains("no profile \"llama-9\": known are bert-base"), "{unknown}");
    }
}
