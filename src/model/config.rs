//! `config.json` of transformers, in the forms that its versions wrote.

use serde::Deserialize;

use super::experts::{self, Experts};
use super::rope::{RawRope, RopeParameters, rotated_dims};
use super::t5::{self, EncoderDecoder};
use super::{ModelError, RopeScaling};
use crate::types::DType;

/// More layers than any published model has, and few enough that a skeleton stays small.
const MAX_LAYERS: u64 = 4096;
/// The largest size of a dim: the product of two fits 64 bits.
pub(super) const MAX_DIM: u64 = 1 << 31;
/// The largest head; every rank computes a buffer of half as many frequencies.
const MAX_HEAD_DIM: u64 = 1 << 16;
/// The longest sequence; for BERT every rank computes buffers of this length.
const MAX_POSITIONS: u64 = 1 << 27;

/// The families whose skeleton is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "the names are the field's own")]
pub enum Architecture {
    Llama,
    Mistral,
    Qwen2,
    Qwen3,
    Mixtral,
    Qwen2Moe,
    Qwen3Moe,
    Gpt2,
    Bert,
    T5,
    /// Any set of tensors, taken as it is.
    Generic,
}

impl Architecture {
    /// `model_type` as transformers writes it; `generic` for [`Architecture::Generic`].
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Mistral => "mistral",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
            Self::Mixtral => "mixtral",
            Self::Qwen2Moe => "qwen2_moe",
            Self::Qwen3Moe => "qwen3_moe",
            Self::Gpt2 => "gpt2",
            Self::Bert => "bert",
            Self::T5 => "t5",
            Self::Generic => "generic",
        }
    }

    /// Whether layers are mixtures of experts.
    #[must_use]
    pub const fn has_experts(self) -> bool {
        matches!(self, Self::Mixtral | Self::Qwen2Moe | Self::Qwen3Moe)
    }
}

/// What stands on top of the layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ModelHead {
    /// Nothing: the base model.
    Base,
    /// `lm_head`.
    CausalLm,
    /// `lm_head` over T5's decoder.
    ConditionalGeneration,
    /// BERT's `cls.predictions`.
    MaskedLm,
    /// BERT's `cls.predictions` and `cls.seq_relationship`.
    PreTraining,
}

/// Which projections of attention have a bias.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AttentionBias {
    /// None.
    None,
    /// Query, key and value.
    Qkv,
    /// Query, key, value and output.
    All,
}

/// A model's configuration, with every default filled in. Sizes are in elements.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// The family.
    pub architecture: Architecture,
    /// What stands on top.
    pub head: ModelHead,
    /// Size of the residual stream.
    pub hidden_size: u64,
    /// Number of layers.
    pub num_hidden_layers: u32,
    /// Query heads.
    pub num_attention_heads: u64,
    /// Key and value heads.
    pub num_key_value_heads: u64,
    /// Size of one head.
    pub head_dim: u64,
    /// Size within the MLP; of a mixture of experts, within its dense layers.
    pub intermediate_size: u64,
    /// The experts, where layers are mixtures of them.
    pub experts: Option<Experts>,
    /// The two stacks of T5; then `num_hidden_layers` are the encoder's.
    pub encoder_decoder: Option<EncoderDecoder>,
    /// Tokens.
    pub vocab_size: u64,
    /// The longest sequence in positions.
    pub max_position_embeddings: u64,
    /// BERT's segments; 0 for others.
    pub type_vocab_size: u64,
    /// Whether the head is the embedding.
    pub tie_word_embeddings: bool,
    /// Rotary position embedding; absent for BERT, GPT-2 and T5.
    pub rope: Option<RopeParameters>,
    /// Epsilon of the norms.
    pub norm_eps: f64,
    /// Biases of attention.
    pub attention_bias: AttentionBias,
    /// Whether the MLP has biases.
    pub mlp_bias: bool,
    /// Positions that attention looks back, where it is limited.
    pub sliding_window: Option<u64>,
    /// The first layer whose attention is limited to the window.
    pub first_window_layer: u32,
    /// The activation, such as `silu`.
    pub hidden_act: String,
    /// The element type that the weights were saved in, if the text says so.
    pub dtype: Option<DType>,
    /// `quant_method` of weights that are quantized already.
    pub quant_method: Option<String>,
    /// The blocks that [`Expansion`](super::Expansion) inserted.
    pub expanded_layers: Vec<u32>,
}

/// Architecture names of transformers, each with family and head.
const KNOWN: [(&str, Architecture, ModelHead); 23] = [
    ("LlamaForCausalLM", Architecture::Llama, ModelHead::CausalLm),
    ("LLaMAForCausalLM", Architecture::Llama, ModelHead::CausalLm),
    ("LlamaModel", Architecture::Llama, ModelHead::Base),
    ("MistralForCausalLM", Architecture::Mistral, ModelHead::CausalLm),
    ("MistralModel", Architecture::Mistral, ModelHead::Base),
    ("Qwen2ForCausalLM", Architecture::Qwen2, ModelHead::CausalLm),
    ("Qwen2Model", Architecture::Qwen2, ModelHead::Base),
    ("Qwen3ForCausalLM", Architecture::Qwen3, ModelHead::CausalLm),
    ("Qwen3Model", Architecture::Qwen3, ModelHead::Base),
    ("MixtralForCausalLM", Architecture::Mixtral, ModelHead::CausalLm),
    ("MixtralModel", Architecture::Mixtral, ModelHead::Base),
    ("Qwen2MoeForCausalLM", Architecture::Qwen2Moe, ModelHead::CausalLm),
    ("Qwen2MoeModel", Architecture::Qwen2Moe, ModelHead::Base),
    ("Qwen3MoeForCausalLM", Architecture::Qwen3Moe, ModelHead::CausalLm),
    ("Qwen3MoeModel", Architecture::Qwen3Moe, ModelHead::Base),
    ("GPT2LMHeadModel", Architecture::Gpt2, ModelHead::CausalLm),
    ("GPT2Model", Architecture::Gpt2, ModelHead::Base),
    ("BertModel", Architecture::Bert, ModelHead::Base),
    ("BertForMaskedLM", Architecture::Bert, ModelHead::MaskedLm),
    ("BertForPreTraining", Architecture::Bert, ModelHead::PreTraining),
    ("T5ForConditionalGeneration", Architecture::T5, ModelHead::ConditionalGeneration),
    // The name that the first published checkpoints have.
    ("T5WithLMHeadModel", Architecture::T5, ModelHead::ConditionalGeneration),
    ("T5Model", Architecture::T5, ModelHead::Base),
];

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Raw {
    architectures: Option<Vec<String>>,
    expanded_layers: Option<Vec<u32>>,
    model_type: Option<String>,
    hidden_size: Option<u64>,
    num_hidden_layers: Option<u64>,
    num_attention_heads: Option<u64>,
    num_key_value_heads: Option<u64>,
    head_dim: Option<u64>,
    intermediate_size: Option<u64>,
    vocab_size: Option<u64>,
    max_position_embeddings: Option<u64>,
    type_vocab_size: Option<u64>,
    tie_word_embeddings: Option<bool>,
    rope_theta: Option<f64>,
    rope_scaling: Option<RawRope>,
    rope_parameters: Option<RawRope>,
    partial_rotary_factor: Option<f64>,
    rms_norm_eps: Option<f64>,
    layer_norm_eps: Option<f64>,
    attention_bias: Option<bool>,
    qkv_bias: Option<bool>,
    mlp_bias: Option<bool>,
    sliding_window: Option<u64>,
    use_sliding_window: Option<bool>,
    max_window_layers: Option<u32>,
    layer_types: Option<Vec<String>>,
    d_model: Option<u64>,
    d_kv: Option<u64>,
    d_ff: Option<u64>,
    scale_decoder_outputs: Option<bool>,
    num_layers: Option<u64>,
    num_heads: Option<u64>,
    n_embd: Option<u64>,
    n_layer: Option<u64>,
    n_head: Option<u64>,
    n_positions: Option<u64>,
    n_ctx: Option<u64>,
    n_inner: Option<u64>,
    activation_function: Option<String>,
    layer_norm_epsilon: Option<f64>,
    scale_attn_weights: Option<bool>,
    scale_attn_by_inverse_layer_idx: Option<bool>,
    hidden_act: Option<String>,
    dtype: Option<String>,
    torch_dtype: Option<String>,
    quantization_config: Option<RawQuantization>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct RawQuantization {
    quant_method: Option<String>,
}

impl ModelConfig {
    /// Reads `config.json`. Keys that it does not know are ignored; an architecture that it does not know is not.
    ///
    /// # Errors
    /// [`ModelError`], naming the field.
    pub fn parse(config_json: &[u8]) -> Result<Self, ModelError> {
        let mut raw: Raw = serde_json::from_slice(config_json)?;
        let (architecture, head) = raw.architecture()?;
        let gpt2 = architecture == Architecture::Gpt2;
        let t5 = architecture == Architecture::T5;
        if gpt2 {
            raw.name_as_others_do()?;
        }
        if t5 {
            raw.name_t5_as_others_do();
        }
        if architecture == Architecture::Mixtral {
            // Its defaults are not the other families'.
            raw.rope_theta.get_or_insert(1e6);
            raw.rms_norm_eps.get_or_insert(1e-5);
        }
        let bert = architecture == Architecture::Bert;
        let size = |field, value: Option<u64>| within(field, value, MAX_DIM);
        let hidden_size = size("hidden_size", raw.hidden_size)?;
        let heads = size("num_attention_heads", raw.num_attention_heads)?;
        let kv_heads = size("num_key_value_heads", raw.num_key_value_heads.or(Some(heads)))?;
        divides(("num_attention_heads", heads), ("num_key_value_heads", kv_heads))?;
        let head_dim = match raw.head_dim.filter(|_| !bert) {
            Some(given) => given,
            None => {
                divides(("hidden_size", hidden_size), ("num_attention_heads", heads))?;
                hidden_size / heads
            }
        };
        within("head_dim", Some(head_dim), MAX_HEAD_DIM)?;
        within("num_attention_heads * head_dim", heads.checked_mul(head_dim), MAX_DIM)?;
        let layers = within("num_hidden_layers", raw.num_hidden_layers, MAX_LAYERS)?;
        let max_positions = raw.max_position_embeddings.unwrap_or(if bert { 512 } else { 2048 });
        within("max_position_embeddings", Some(max_positions), MAX_POSITIONS)?;
        let text = |value: &Option<String>, other: &str| value.clone().unwrap_or_else(|| other.to_owned());
        Ok(Self {
            architecture,
            head,
            hidden_size,
            num_hidden_layers: u32::try_from(layers).expect("at most MAX_LAYERS"),
            num_attention_heads: heads,
            num_key_value_heads: kv_heads,
            head_dim,
            intermediate_size: size("intermediate_size", raw.intermediate_size)?,
            experts: experts::parse(config_json, architecture, layers, raw.intermediate_size)?,
            encoder_decoder: t5.then(|| t5::parse(config_json, layers, MAX_LAYERS)).transpose()?,
            vocab_size: size("vocab_size", raw.vocab_size)?,
            max_position_embeddings: max_positions,
            type_vocab_size: if bert { size("type_vocab_size", raw.type_vocab_size.or(Some(2)))? } else { 0 },
            tie_word_embeddings: raw.tie_word_embeddings.unwrap_or(bert || gpt2 || t5),
            rope: if bert || gpt2 || t5 { None } else { Some(raw.rope(head_dim, max_positions)?) },
            norm_eps: if bert { raw.layer_norm_eps.unwrap_or(1e-12) } else { raw.rms_norm_eps.unwrap_or(1e-6) },
            attention_bias: raw.attention_bias(architecture),
            mlp_bias: bert || gpt2 || (architecture == Architecture::Llama && raw.mlp_bias.unwrap_or(false)),
            sliding_window: raw.sliding_window(architecture),
            first_window_layer: raw.first_window_layer(architecture)?,
            hidden_act: text(&raw.hidden_act, if bert { "gelu" } else { "silu" }),
            dtype: raw.dtype.or(raw.torch_dtype).and_then(|name| name.parse().ok()),
            expanded_layers: raw.expanded_layers.unwrap_or_default(),
            quant_method: raw.quantization_config.and_then(|quantization| quantization.quant_method),
        })
    }

    /// Positions that attention in `layer` looks back, where it is limited.
    #[must_use]
    pub fn window_of(&self, layer: u32) -> Option<u64> {
        self.sliding_window.filter(|_| layer >= self.first_window_layer)
    }

    /// Whether there is a forward with gradients for such a model.
    #[must_use]
    pub const fn is_trainable(&self) -> bool {
        use Architecture::{Gpt2, Llama, Mistral, Qwen2, Qwen3};
        matches!(self.architecture, Llama | Mistral | Qwen2 | Qwen3 | Gpt2) && matches!(self.head, ModelHead::CausalLm)
    }

    /// The blocks of all stacks.
    #[must_use]
    pub fn blocks(&self) -> u32 {
        self.num_hidden_layers + self.encoder_decoder.map_or(0, |stacks| stacks.decoder_layers)
    }

    /// Rows of the query projection.
    #[must_use]
    pub const fn query_size(&self) -> u64 {
        self.num_attention_heads * self.head_dim
    }

    /// Rows of the key and of the value projection.
    #[must_use]
    pub const fn key_value_size(&self) -> u64 {
        self.num_key_value_heads * self.head_dim
    }
}

impl Raw {
    /// The first of `architectures`, else the family that `model_type` names.
    fn architecture(&self) -> Result<(Architecture, ModelHead), ModelError> {
        if let Some(name) = self.architectures.as_ref().and_then(|names| names.first()) {
            return KNOWN
                .iter()
                .find(|(known, ..)| known == name)
                .map(|&(_, architecture, head)| (architecture, head))
                .ok_or_else(|| unknown(name));
        }
        let Some(model_type) = &self.model_type else {
            return Err(ModelError::MissingField { field: "architectures" });
        };
        KNOWN
            .iter()
            .find(|(_, architecture, _)| architecture.name() == model_type)
            .map(|&(_, architecture, head)| (architecture, head))
            .ok_or_else(|| unknown(model_type))
    }

    /// `rope_parameters` (transformers 5), else `rope_theta` and `rope_scaling`.
    fn rope(&self, head_dim: u64, max_positions: u64) -> Result<RopeParameters, ModelError> {
        let raw = self.rope_parameters.as_ref().or(self.rope_scaling.as_ref());
        let theta = raw.and_then(|raw| raw.rope_theta).or(self.rope_theta).unwrap_or(10_000.0);
        if !theta.is_finite() || theta <= 1.0 {
            return Err(ModelError::Rope { rope_type: "any".to_owned(), field: "rope_theta" });
        }
        let partial = raw.and_then(|raw| raw.partial_rotary_factor).or(self.partial_rotary_factor);
        let dim = rotated_dims(head_dim, partial);
        divides(("head_dim", dim), ("the halves that rotary embedding pairs", 2))?;
        let scaling = raw.map_or(Ok(RopeScaling::Default), |raw| raw.scaling(max_positions))?;
        Ok(RopeParameters { theta, dim, scaling })
    }

    fn attention_bias(&self, architecture: Architecture) -> AttentionBias {
        match architecture {
            Architecture::Qwen2 => AttentionBias::Qkv,
            Architecture::Qwen2Moe if self.qkv_bias != Some(false) => AttentionBias::Qkv,
            Architecture::Bert | Architecture::Gpt2 => AttentionBias::All,
            Architecture::Llama | Architecture::Qwen3 | Architecture::Qwen3Moe if self.attention_bias == Some(true) => {
                AttentionBias::All
            }
            _ => AttentionBias::None,
        }
    }

    /// GPT-2's fields under the names that the other families have, with its defaults.
    fn name_as_others_do(&mut self) -> Result<(), ModelError> {
        let unusual = [
            ("scale_attn_weights", self.scale_attn_weights, true),
            ("scale_attn_by_inverse_layer_idx", self.scale_attn_by_inverse_layer_idx, false),
        ];
        for (field, value, usual) in unusual {
            if value.is_some_and(|value| value != usual) {
                return Err(ModelError::Unsupported { field, expected: usual, found: !usual });
            }
        }
        self.hidden_size = self.n_embd.or(self.hidden_size);
        self.num_hidden_layers = self.n_layer.or(self.num_hidden_layers);
        self.num_attention_heads = self.n_head.or(self.num_attention_heads);
        self.num_key_value_heads = None;
        self.head_dim = None;
        let hidden = self.hidden_size.unwrap_or(0);
        self.intermediate_size = self.n_inner.or_else(|| hidden.checked_mul(4));
        let positions = self.n_positions.or(self.n_ctx).or(self.max_position_embeddings);
        self.max_position_embeddings = Some(positions.unwrap_or(1024));
        self.rms_norm_eps = Some(self.layer_norm_epsilon.unwrap_or(1e-5));
        self.hidden_act = Some(self.activation_function.take().unwrap_or_else(|| "gelu_new".to_owned()));
        Ok(())
    }

    /// T5's fields likewise. Its heads need not fill the residual stream, and its positions are relative.
    fn name_t5_as_others_do(&mut self) {
        self.hidden_size = self.d_model.or(self.hidden_size);
        self.num_hidden_layers = self.num_layers.or(self.num_hidden_layers);
        self.num_attention_heads = self.num_heads.or(self.num_attention_heads);
        self.num_key_value_heads = None;
        self.head_dim = self.d_kv.or(self.head_dim);
        self.intermediate_size = self.d_ff.or(self.intermediate_size);
        self.max_position_embeddings = self.n_positions.or(Some(512));
        self.rms_norm_eps = self.layer_norm_epsilon;
        // transformers 5 writes "tied" for every T5, and by this field which have a head of their own.
        if self.scale_decoder_outputs == Some(false) {
            self.tie_word_embeddings = Some(false);
        }
    }

    /// `layer_types` (transformers 5), else `max_window_layers`: Qwen's first layers see everything, the others a window.
    fn first_window_layer(&self, architecture: Architecture) -> Result<u32, ModelError> {
        if !matches!(architecture, Architecture::Qwen2 | Architecture::Qwen3 | Architecture::Qwen2Moe) {
            return Ok(0);
        }
        let Some(types) = &self.layer_types else { return Ok(self.max_window_layers.unwrap_or(28)) };
        let full = types.iter().take_while(|name| *name == "full_attention").count();
        if types.iter().skip(full).any(|name| name != "sliding_attention") {
            return Err(ModelError::LayerTypes);
        }
        Ok(u32::try_from(full).unwrap_or(u32::MAX))
    }

    /// Qwen writes a window that holds only where `use_sliding_window` is true; Mistral's always holds.
    fn sliding_window(&self, architecture: Architecture) -> Option<u64> {
        let used = match architecture {
            Architecture::Mistral | Architecture::Mixtral => true,
            Architecture::Qwen2 | Architecture::Qwen3 | Architecture::Qwen2Moe | Architecture::Qwen3Moe => {
                self.use_sliding_window.unwrap_or(false)
            }
            _ => false,
        };
        self.sliding_window.filter(|_| used)
    }
}

fn unknown(found: &str) -> ModelError {
    let known: Vec<&str> = KNOWN.iter().map(|&(name, ..)| name).filter(|name| !name.starts_with("LLaMA")).collect();
    ModelError::UnknownArchitecture { found: found.to_owned(), known: known.join(", ") }
}

pub(super) fn within(field: &'static str, value: Option<u64>, limit: u64) -> Result<u64, ModelError> {
    match value {
        None => Err(ModelError::MissingField { field }),
        Some(found) if found == 0 || found > limit => Err(ModelError::OutOfRange { field, limit, found }),
        Some(found) => Ok(found),
    }
}

fn divides(
    (field, found): (&'static str, u64),
    (divisor_field, divisor): (&'static str, u64),
) -> Result<(), ModelError> {
    if found.is_multiple_of(divisor) {
        Ok(())
    } else {
        Err(ModelError::NotDivisible { field, found, divisor_field, divisor })
    }
}
