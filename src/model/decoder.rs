//! The decoders of the Llama family: Llama, Mistral, Qwen2, Qwen3, and the mixtures of experts Mixtral, Qwen2-MoE, Qwen3-MoE.

use super::config::{Architecture, AttentionBias, ModelConfig, ModelHead};
use super::experts;
use super::skeleton::{Alias, Buffer, BufferKind, Role, Skeleton, Tensors};
use crate::types::Shape;

/// The base model within a model with a head.
const PREFIX: &str = "model.";
const DROPPED_BY_BASE: [&str; 1] = ["lm_head."];

pub(super) fn skeleton(config: ModelConfig) -> Skeleton {
    let base = if config.head == ModelHead::Base { "" } else { PREFIX };
    let mut tensors = Tensors { prefix: base.to_owned(), ..Tensors::default() };
    let (hidden, vocab) = (config.hidden_size, config.vocab_size);
    tensors.add("embed_tokens.weight", [vocab, hidden], Role::Embedding);
    for number in 0..config.num_hidden_layers {
        tensors.prefix = format!("{base}layers.{number}.");
        tensors.layer = Some(number);
        layer(&mut tensors, &config, number);
    }
    tensors.prefix = base.to_owned();
    tensors.layer = None;
    tensors.add("norm.weight", [hidden], Role::Norm);
    let mut aliases = Vec::new();
    if config.head == ModelHead::CausalLm {
        tensors.prefix.clear();
        if config.tie_word_embeddings {
            let target = format!("{base}embed_tokens.weight").into();
            aliases.push(Alias { alias: "lm_head.weight".into(), target });
        } else {
            tensors.add("lm_head.weight", [vocab, hidden], Role::Head);
        }
    }
    let buffers = config
        .rope
        .iter()
        .map(|rope| Buffer {
            fqn: format!("{base}rotary_emb.inv_freq").into(),
            shape: Shape::from([rope.dim / 2]),
            kind: BufferKind::RotaryInvFreq { rope: rope.clone() },
        })
        .collect();
    Skeleton {
        architecture: config.architecture,
        tensors: tensors.list,
        aliases,
        buffers,
        base_prefix: PREFIX,
        dropped: if config.head == ModelHead::Base { &DROPPED_BY_BASE } else { &[] },
        config: Some(config),
    }
}

/// One layer, in the order in which it computes.
fn layer(tensors: &mut Tensors, config: &ModelConfig, number: u32) {
    let hidden = config.hidden_size;
    let (query, key_value) = (config.query_size(), config.key_value_size());
    let qkv_bias = config.attention_bias != AttentionBias::None;
    let output_bias = config.attention_bias == AttentionBias::All;
    tensors.add("input_layernorm.weight", [hidden], Role::Norm);
    tensors.linear("self_attn.q_proj", [query, hidden], qkv_bias);
    tensors.linear("self_attn.k_proj", [key_value, hidden], qkv_bias);
    tensors.linear("self_attn.v_proj", [key_value, hidden], qkv_bias);
    if matches!(config.architecture, Architecture::Qwen3 | Architecture::Qwen3Moe) {
        tensors.add("self_attn.q_norm.weight", [config.head_dim], Role::Norm);
        tensors.add("self_attn.k_norm.weight", [config.head_dim], Role::Norm);
    }
    tensors.linear("self_attn.o_proj", [hidden, query], output_bias);
    tensors.add("post_attention_layernorm.weight", [hidden], Role::Norm);
    if let Some(experts) = config.experts.as_ref().filter(|experts| experts.is_sparse(number)) {
        return experts::layer(tensors, config, experts);
    }
    let inner = config.intermediate_size;
    tensors.linear("mlp.gate_proj", [inner, hidden], config.mlp_bias);
    tensors.linear("mlp.up_proj", [inner, hidden], config.mlp_bias);
    tensors.linear("mlp.down_proj", [hidden, inner], config.mlp_bias);
}
