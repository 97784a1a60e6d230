//! The sizes of a new model for a number of parameters, in the proportions of published ones.

use serde_json::{Map, Value, json};

use super::config::Architecture;
use super::generate::pretty;
use crate::types::DType;

/// The sizes that make a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Sizes {
    architecture: Architecture,
    hidden: u64,
    layers: u64,
    heads: u64,
    key_value_heads: u64,
    head_dim: u64,
    /// Size within the MLP; in a mixture of experts, within one expert.
    inner: u64,
    /// Experts of a layer; 1 MLP in a dense one.
    experts: u64,
    vocab: u64,
    tied: bool,
}

/// The sizes whose count comes closest to `parameters` among shapes of reasonable proportions.
pub(super) fn choose(architecture: Architecture, parameters: u64) -> Sizes {
    let mut best: Option<(u64, Sizes)> = None;
    let step = if parameters < 20_000_000 { 32 } else { 64 };
    for hidden in (1..=512_u64).map(|steps| steps * step) {
        for layers in 1..=160 {
            if let Some(sizes) = fit(architecture, parameters, hidden, layers) {
                let score = score(&sizes, parameters);
                if best.is_none_or(|(least, _)| score < least) {
                    best = Some((score, sizes));
                }
            }
        }
    }
    let smallest = || Sizes::new(architecture, parameters, 32, 1);
    best.map_or_else(smallest, |(_, sizes)| sizes)
}

/// The MLP takes what is left of the parameters; nothing when that is out of proportion.
fn fit(architecture: Architecture, parameters: u64, hidden: u64, layers: u64) -> Option<Sizes> {
    let empty = Sizes { inner: 0, ..Sizes::new(architecture, parameters, hidden, layers) };
    let left = parameters.checked_sub(empty.count())?;
    let per_row = Sizes { inner: 1, ..empty }.count() - empty.count();
    // Whole tiles for the hardware, smaller ones in small models and where a layer has many of them.
    let tile = if hidden < 512 || empty.experts > 8 { 16 } else { 64 };
    let inner = (left / per_row + tile / 2) / tile * tile;
    // Llama's 2.7, Mistral's 3.5 and BERT's 4 times the hidden size are all in between; so are the parts of it that Qwen's
    // many small experts have.
    let (least, most) = if is_qwen_moe(architecture) { (hidden / 4, hidden) } else { (2 * hidden, 5 * hidden) };
    (inner > 0 && inner >= least && inner <= most).then_some(Sizes { inner, ..empty })
}

/// How far the count is off, in ten-thousandths, and how unusual the proportions are, in percent; less is better.
fn score(sizes: &Sizes, parameters: u64) -> u64 {
    let off = sizes.count().abs_diff(parameters).saturating_mul(10_000) / parameters.max(1);
    // Published models are wider per layer the larger they are: 64 at 100 M to 128 at 7 B.
    let usual_width = if parameters < 1_000_000_000 { 64 } else { 112 };
    let aspect = ratio_percent(sizes.hidden, usual_width * sizes.layers);
    let usual_inner = match sizes.architecture {
        Architecture::Bert => 400,
        Architecture::Mixtral => 350,
        // 1408 of 2048, 768 of 2048.
        Architecture::Qwen2Moe => 69,
        Architecture::Qwen3Moe => 38,
        _ => 300,
    };
    let mlp = ratio_percent(sizes.inner * 100, usual_inner * sizes.hidden);
    off + aspect + mlp
}

const fn is_qwen_moe(architecture: Architecture) -> bool {
    matches!(architecture, Architecture::Qwen2Moe | Architecture::Qwen3Moe)
}

/// By how many percent the larger exceeds the smaller.
fn ratio_percent(left: u64, right: u64) -> u64 {
    let (small, large) = (left.min(right).max(1), left.max(right));
    (large * 100 / small).saturating_sub(100)
}

impl Sizes {
    fn new(architecture: Architecture, parameters: u64, hidden: u64, layers: u64) -> Self {
        let head_dim = match hidden {
            ..512 => 32,
            512..2048 => 64,
            _ if architecture == Architecture::Bert => 64,
            _ => 128,
        };
        // A hidden size between two multiples of the head keeps the head smaller rather than leave a rest.
        let head_dim = if hidden.is_multiple_of(head_dim) { head_dim } else { 32 };
        let heads = hidden / head_dim;
        let grouped = architecture != Architecture::Bert && heads.is_multiple_of(4) && heads >= 8;
        let vocab = match (parameters, architecture) {
            (..1_000_000, _) => 512,
            (..50_000_000, _) => 2048,
            (_, Architecture::Bert) => 30_522,
            (500_000_000.., Architecture::Qwen2 | Architecture::Qwen3) => 151_936,
            (500_000_000.., other) if is_qwen_moe(other) => 151_936,
            _ => 32_000,
        };
        let experts = match (parameters, architecture) {
            (10_000_000_000.., Architecture::Qwen2Moe) => 60,
            (10_000_000_000.., Architecture::Qwen3Moe) => 128,
            _ if architecture.has_experts() => 8,
            _ => 1,
        };
        Self {
            architecture,
            hidden,
            layers,
            heads,
            key_value_heads: if grouped { heads / 4 } else { heads },
            head_dim,
            inner: hidden * 3,
            experts,
            vocab,
            tied: parameters < 1_000_000_000,
        }
    }

    /// Parameters of the model, counted by hand as the architectures are published; the skeleton counts the same.
    fn count(&self) -> u64 {
        let (hidden, inner) = (self.hidden, self.inner);
        let (query, key_value) = (self.heads * self.head_dim, self.key_value_heads * self.head_dim);
        if self.architecture == Architecture::Bert {
            let layer = 4 * (hidden * hidden + hidden) + 2 * hidden * inner + inner + hidden + 4 * hidden;
            let embeddings = (self.vocab + self.positions() + 2) * hidden + 2 * hidden;
            return embeddings + self.layers * layer + hidden * hidden + hidden;
        }
        let attention = 2 * query * hidden + 2 * key_value * hidden;
        let extra = match self.architecture {
            Architecture::Qwen2 | Architecture::Qwen2Moe => query + 2 * key_value,
            Architecture::Qwen3 | Architecture::Qwen3Moe => 2 * self.head_dim,
            _ => 0,
        };
        let router = if self.architecture.has_experts() { self.experts * hidden } else { 0 };
        let shared = match self.architecture {
            Architecture::Qwen2Moe => 3 * hidden * self.shared_inner() + hidden,
            _ => 0,
        };
        let mlp = router + self.experts * 3 * hidden * inner + shared;
        let layer = attention + extra + mlp + 2 * hidden;
        let tables = if self.tied { 1 } else { 2 };
        tables * self.vocab * hidden + self.layers * layer + hidden
    }

    /// Size within Qwen2-MoE's shared expert: as in the published model, that of the experts that compute one token.
    const fn shared_inner(&self) -> u64 {
        4 * self.inner
    }

    fn positions(&self) -> u64 {
        match self.architecture {
            Architecture::Bert => 512,
            _ if self.vocab <= 2048 => 2048,
            _ => 4096,
        }
    }

    /// config.json as transformers 5 writes it: keys in order, two spaces.
    pub(super) fn config_json(&self, dtype: DType) -> String {
        let mut fields = match self.architecture {
            Architecture::Bert => self.bert_fields(),
            _ => self.decoder_fields(),
        };
        fields.extend([
            ("dtype", json!(dtype.torch_name())),
            ("hidden_size", json!(self.hidden)),
            ("initializer_range", json!(0.02)),
            // Qwen's sparse layers do not use it.
            ("intermediate_size", json!(if is_qwen_moe(self.architecture) { 3 * self.hidden } else { self.inner })),
            ("max_position_embeddings", json!(self.positions())),
            ("model_type", json!(self.architecture.name())),
            ("num_attention_heads", json!(self.heads)),
            ("num_hidden_layers", json!(self.layers)),
            ("transformers_version", json!("5.0.0")),
            ("use_cache", json!(true)),
            ("vocab_size", json!(self.vocab)),
        ]);
        fields.sort_by_key(|&(key, _)| key);
        let map: Map<String, Value> = fields.into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
        pretty(&Value::Object(map))
    }

    fn decoder_fields(&self) -> Vec<(&'static str, Value)> {
        let (name, theta) = match self.architecture {
            Architecture::Mistral => ("MistralForCausalLM", 10_000.0),
            Architecture::Qwen2 => ("Qwen2ForCausalLM", 1_000_000.0),
            Architecture::Qwen3 => ("Qwen3ForCausalLM", 1_000_000.0),
            Architecture::Mixtral => ("MixtralForCausalLM", 1_000_000.0),
            Architecture::Qwen2Moe => ("Qwen2MoeForCausalLM", 1_000_000.0),
            Architecture::Qwen3Moe => ("Qwen3MoeForCausalLM", 1_000_000.0),
            _ => ("LlamaForCausalLM", 10_000.0),
        };
        let mut fields = vec![
            ("architectures", json!([name])),
            ("attention_dropout", json!(0.0)),
            ("bos_token_id", json!(0)),
            ("eos_token_id", json!(1)),
            ("head_dim", json!(self.head_dim)),
            ("hidden_act", json!("silu")),
            ("num_key_value_heads", json!(self.key_value_heads)),
            ("pad_token_id", Value::Null),
            ("rms_norm_eps", json!(1e-5)),
            ("rope_parameters", json!({"rope_theta": theta, "rope_type": "default"})),
            ("tie_word_embeddings", json!(self.tied)),
        ];
        match self.architecture {
            Architecture::Llama => fields.extend([
                ("attention_bias", json!(false)),
                ("mlp_bias", json!(false)),
                ("pretraining_tp", json!(1)),
            ]),
            Architecture::Mistral => fields.push(("sliding_window", Value::Null)),
            Architecture::Mixtral => fields.extend([
                ("num_experts_per_tok", json!(2)),
                ("num_local_experts", json!(self.experts)),
                ("output_router_logits", json!(false)),
                ("router_aux_loss_coef", json!(0.001)),
                ("sliding_window", Value::Null),
            ]),
            _ => {
                let layer_types: Vec<&str> = (0..self.layers).map(|_| "full_attention").collect();
                fields.extend([
                    ("layer_types", json!(layer_types)),
                    ("max_window_layers", json!(self.layers)),
                    ("sliding_window", Value::Null),
                    ("use_sliding_window", json!(false)),
                ]);
                if matches!(self.architecture, Architecture::Qwen3 | Architecture::Qwen3Moe) {
                    fields.push(("attention_bias", json!(false)));
                }
                fields.extend(self.qwen_moe_fields());
            }
        }
        fields
    }

    fn qwen_moe_fields(&self) -> Vec<(&'static str, Value)> {
        if !is_qwen_moe(self.architecture) {
            return Vec::new();
        }
        let qwen3 = self.architecture == Architecture::Qwen3Moe;
        let per_token = match self.experts {
            ..=8 => 2,
            _ if qwen3 => 8,
            _ => 4,
        };
        let mut fields = vec![
            ("decoder_sparse_step", json!(1)),
            ("mlp_only_layers", json!([])),
            ("moe_intermediate_size", json!(self.inner)),
            ("norm_topk_prob", json!(qwen3)),
            ("num_experts", json!(self.experts)),
            ("num_experts_per_tok", json!(per_token)),
            ("output_router_logits", json!(false)),
            ("router_aux_loss_coef", json!(0.001)),
        ];
        if qwen3 {
            return fields;
        }
        fields.extend([("qkv_bias", json!(true)), ("shared_expert_intermediate_size", json!(self.shared_inner()))]);
        fields
    }

    fn bert_fields(&self) -> Vec<(&'static str, Value)> {
        vec![
            ("architectures", json!(["BertModel"])),
            ("attention_probs_dropout_prob", json!(0.1)),
            ("classifier_dropout", Value::Null),
            ("hidden_act", json!("gelu")),
            ("hidden_dropout_prob", json!(0.1)),
            ("layer_norm_eps", json!(1e-12)),
            ("pad_token_id", json!(0)),
            ("tie_word_embeddings", json!(true)),
            ("type_vocab_size", json!(2)),
        ]
    }
}
